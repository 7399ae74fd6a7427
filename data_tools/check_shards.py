"""Read every sample of a shard folder, and report what is wrong.

    mmtensorar shards check data/mine
    mmtensorar shards check data/mine --report report.json
        the same for other programs
    mmtensorar shards check data/mine --repair data/clean
        write the good samples as a new set, and list what was dropped
    python data_tools/check_shards.py data/mine --recipe recipes/janus_pro_1b.yaml
        also count the captions with more tokens than the recipe's backbone takes

It checks the manifest; each shard's digest, structure and number of samples; each
picture, caption or class number, json, codes and text features; and that no key occurs
twice. Every problem is listed with shard and key. Pictures that occur more than once
are counted, and so are captions of which the cleaning of the text features left
nothing.

The exit code is 2 when something is wrong; with --repair 0 once the clean set is
written.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Python puts a script's own folder here; imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import hashlib
import heapq
import json
import os
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, cast

from tqdm import tqdm

from data_tools.argument_types import positive
from data_tools.executors import in_processes
from data_tools.storage import note_unlisted, only_writer
from mmtensorar.captions.cleaning import Cleaning, leaves_nothing
from mmtensorar.cli import Parser, command
from mmtensorar.data import tars
from mmtensorar.data.members import (
    check_codes,
    check_features,
    decode_caption,
    decode_codes,
    decode_features,
)
from mmtensorar.data.pictures import sample_picture
from mmtensorar.data.shards import (
    EXTENSIONS,
    IMAGE_EXTENSIONS,
    MANIFEST,
    Manifest,
    Sample,
    Shard,
    Staging,
    intact_starts,
    read_sample,
    read_samples,
    write_tar,
    wrong_count,
)
from mmtensorar.files import decode, parse_json, sha256, write_text
from mmtensorar.words import counted

if TYPE_CHECKING:
    from mmtensorar.model.conditions import CaptionEncoder

DROPPED = "dropped.jsonl"
MAX_WARNINGS = 10  # emptied captions that are printed; the report lists all
NUM_LONGEST = 5  # captions that the report names
NUM_NAMED = 20  # prompts longer than the limit that are printed; the report names all


class Problem(NamedTuple):
    """One problem.

    key: of the sample; None when the whole shard has it. text: names shard and key.
    """

    shard: str
    key: str | None
    text: str


class GoodRead(NamedTuple):
    """A sample that could be read.

    number: of the sample in its shard. picture: digest of the encoded picture, if there
    is one.
    num_chars: of its caption. excess: how far its prompt exceeds the limit of --recipe.
    """

    number: int
    key: str
    picture: str | None
    num_chars: int
    excess: str | None


class CheckedShard(NamedTuple):
    """The result for one shard.

    read: the samples that could be read. emptied: those whose text features hold no
    text, see is_emptied.
    """

    shard: Shard
    read: tuple[GoodRead, ...]
    problems: tuple[Problem, ...]
    emptied: tuple[Problem, ...] = ()


class Duplicate(NamedTuple):
    """A sample whose picture occurred before.

    same_as: key of the first sample with that picture.
    """

    shard: str
    sample: GoodRead
    same_as: str


class CheckedSet(NamedTuple):
    """The result for a whole set.

    good: shard -> numbers of its good samples. emptied: samples whose text features
    hold no text. They are what the set's caption cleaning makes, and no damage.
    longest: the samples with the longest captions, longest first. too_long: those whose
    prompt is longer than the limit of --recipe; None without it. Both with their
    shards.
    """

    num_read: int
    problems: tuple[Problem, ...]
    duplicates: tuple[Duplicate, ...]
    good: dict[str, list[int]]
    emptied: tuple[Problem, ...]
    longest: tuple[tuple[str, GoodRead], ...]
    too_long: tuple[tuple[str, GoodRead], ...] | None


# ---- one sample ------------------------------------------------------------------------------


def sample_problems(sample: Sample, where: str, manifest: Manifest) -> list[str]:
    """What is wrong with one sample, one sentence for each problem."""
    checks = (
        lambda: sample_picture(sample, where, manifest.image_size),
        lambda: _check_text(sample, where, manifest.classes),
        lambda: _check_codes(sample, where, manifest),
        lambda: _check_features(sample, where, manifest),
    )
    problems: list[str] = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            problems.append(str(error))
    return problems


def _check_text(sample: Sample, where: str, classes: tuple[str, ...] | None) -> None:
    for extension in ("txt", "json"):
        if extension not in sample.members:
            raise ValueError(f"{where}: no {extension} member")
    check_class(decode_caption(sample.members["txt"], where), where, classes)
    try:
        parse_json(decode(sample.members["json"]))
    except ValueError as error:
        raise ValueError(f"{where}: the json member is {error}") from None


def _check_codes(sample: Sample, where: str, manifest: Manifest) -> None:
    _check_presence(sample, where, "codes.npy", "codes", manifest.codes is not None)
    if manifest.codes is not None:
        check_codes(decode_codes(sample.members["codes.npy"], where), manifest.codes, where)


def _check_features(sample: Sample, where: str, manifest: Manifest) -> None:
    _check_presence(sample, where, "t5.npy", "text features", manifest.text_features is not None)
    if manifest.text_features is not None:
        check_features(decode_features(sample.members["t5.npy"], where), manifest.text_features, where)


def is_emptied(sample: Sample, manifest: Manifest) -> bool:
    """Whether the caption cleaning of the text features leaves nothing of a sample's
    caption.
    """
    if manifest.text_features is None or not {"txt", "t5.npy"} <= sample.members.keys():
        return False
    try:
        caption = decode_caption(sample.members["txt"], "")
        features = decode_features(sample.members["t5.npy"], "")
    except ValueError:  # sample_problems names it
        return False
    if len(features) == 1 < manifest.text_features.max_tokens:  # the end token alone
        return True
    try:
        return leaves_nothing(caption, cast(Cleaning, manifest.text_features.cleaning))
    except ValueError:  # the packages of the cleaning are not installed
        return False


def _check_presence(sample: Sample, where: str, member: str, name: str, expected: bool) -> None:
    if expected and member not in sample.members:
        raise ValueError(f"{where}: no {member}, but the manifest says that the set has {name}")
    if not expected and member in sample.members:
        raise ValueError(f"{where}: has {member}, but the manifest says that the set has no {name}")


def check_class(caption: str, where: str, classes: tuple[str, ...] | None) -> None:
    """Raise ValueError when the set has classes, and the caption is not the number of a
    class.
    """
    if classes is None:
        return
    if not (caption.isdecimal() and len(caption) < 20 and int(caption) < len(classes)):
        raise ValueError(
            f"{where}: caption {caption[:50]!r} is not a class number (expected 0 to {len(classes) - 1})"
        )


# ---- one shard -------------------------------------------------------------------------------


def check_shard(
    folder: Path, shard: Shard, manifest: Manifest, caption_encoder: CaptionEncoder | None = None
) -> CheckedShard:
    """Check one shard, up to the point where it can no longer be read."""
    path = folder / shard.name
    problems: list[Problem] = []
    read: list[GoodRead] = []
    emptied: list[Problem] = []
    try:
        changed = sha256(path) != shard.sha256
    except OSError as error:
        return CheckedShard(shard, (), (Problem(shard.name, None, f"{path}: {error.strerror}"),))
    if changed:
        text = f"{path}: changed since it was made: its sha256 is not the manifest's"
        problems.append(Problem(shard.name, None, text))
    starts, damage = intact_starts(path)
    with tars.TarReader(path) as file:
        for number, (start, stop) in enumerate(zip(starts.tolist(), starts.tolist()[1:], strict=False)):
            try:
                sample = read_sample(file, path, start, stop, EXTENSIONS)
            except (ValueError, OSError) as error:
                problems.append(Problem(shard.name, None, str(error)))
                continue
            where = f"{path}: sample {sample.key}"
            problems += [
                Problem(shard.name, sample.key, text) for text in sample_problems(sample, where, manifest)
            ]
            if is_emptied(sample, manifest):
                text = f"{where}: its text features hold no text: the caption cleaning left nothing"
                emptied.append(Problem(shard.name, sample.key, text))
            caption = sample.members.get("txt", b"").decode(errors="replace").strip()
            excess = caption_encoder and caption_encoder.excess(caption)
            words = None if excess is None else str(excess)
            read.append(GoodRead(number, sample.key, _picture_digest(sample), len(caption), words))
    num_samples = len(starts) - 1
    if damage is not None:
        missing = shard.num_samples - num_samples
        also = f"; {missing} of its samples cannot be reached" if missing > 0 else ""
        problems.append(Problem(shard.name, None, f"{damage}{also}"))
    elif num_samples != shard.num_samples:
        problems.append(Problem(shard.name, None, wrong_count(path, num_samples, shard)))
    return CheckedShard(shard, tuple(read), tuple(problems), tuple(emptied))


def _picture_digest(sample: Sample) -> str | None:
    for name in IMAGE_EXTENSIONS:
        if name in sample.members:
            return hashlib.sha256(sample.members[name]).hexdigest()[:32]
    return None


# ---- the whole set ---------------------------------------------------------------------------


def check(
    folder: Path, manifest: Manifest, workers: int, caption_encoder: CaptionEncoder | None = None
) -> CheckedSet:
    """Check all shards of a set, in several processes.

    caption_encoder: that of --recipe.
    """
    tasks = [(folder, shard, manifest, caption_encoder) for shard in manifest.shards]
    checked_shards: dict[str, CheckedShard] = {}
    with tqdm(desc="checking", unit=" samples", total=manifest.num_samples, disable=None) as progress:
        for checked in in_processes(check_shard, tasks, workers):
            checked_shards[checked.shard.name] = checked
            progress.update(len(checked.read))
    problems: list[Problem] = []
    duplicates: list[Duplicate] = []
    shard_of_key: dict[str, str] = {}
    key_of_picture: dict[str | None, str] = {}
    good: dict[str, list[int]] = {}
    for shard in manifest.shards:
        checked = checked_shards[shard.name]
        bad_keys = {problem.key for problem in checked.problems}
        problems += checked.problems
        good[shard.name] = []
        for sample in checked.read:
            if sample.key in shard_of_key:
                text = (
                    f"{folder / shard.name}: sample {sample.key}: "
                    f"the key is also in {shard_of_key[sample.key]}"
                )
                problems.append(Problem(shard.name, sample.key, text))
                continue
            shard_of_key[sample.key] = shard.name
            if sample.key in bad_keys:
                continue
            good[shard.name].append(sample.number)
            if (first := key_of_picture.setdefault(sample.picture, sample.key)) != sample.key:
                duplicates.append(Duplicate(shard.name, sample, first))
    read = [(shard.name, sample) for shard in manifest.shards for sample in checked_shards[shard.name].read]
    longest = heapq.nlargest(NUM_LONGEST, read, key=lambda pair: pair[1].num_chars)
    too_long = None if caption_encoder is None else tuple(pair for pair in read if pair[1].excess)
    emptied = tuple(chain.from_iterable(checked_shards[shard.name].emptied for shard in manifest.shards))
    return CheckedSet(len(read), tuple(problems), tuple(duplicates), good, emptied, tuple(longest), too_long)


def report(folder: Path, manifest: Manifest, checked: CheckedSet) -> dict:
    """The result for other programs."""
    return {
        "folder": str(folder),
        "ok": not checked.problems,
        "shards": len(manifest.shards),
        "samples": manifest.num_samples,
        "read": checked.num_read,
        "good": sum(map(len, checked.good.values())),
        "problems": [
            {"shard": problem.shard, "key": problem.key, "problem": problem.text}
            for problem in checked.problems
        ],
        "duplicates": [
            {"shard": duplicate.shard, "key": duplicate.sample.key, "same_as": duplicate.same_as}
            for duplicate in checked.duplicates
        ],
        "emptied": [{"shard": sample.shard, "key": sample.key} for sample in checked.emptied],
        "longest_captions": [
            {"shard": shard, "key": sample.key, "characters": sample.num_chars}
            for shard, sample in checked.longest
        ],
        "too_long": None
        if checked.too_long is None
        else [
            {"shard": shard, "key": sample.key, "prompt": sample.excess} for shard, sample in checked.too_long
        ],
    }


def summary(folder: Path, manifest: Manifest, checked: CheckedSet) -> str:
    """The result in one line."""
    facts = [
        f"{folder}: {checked.num_read} of {counted(manifest.num_samples, 'sample')} read "
        f"in {counted(len(manifest.shards), 'shard')}",
        f"{manifest.image_size} pixels",
    ]
    if manifest.classes:
        facts.append(counted(len(manifest.classes), "class"))
    codes, text_features = manifest.codes, manifest.text_features
    crops = f" ({codes.crops} crops)" if codes and codes.crops > 1 else ""
    facts.append(f"codes of {codes.image_tokenizer}{crops}" if codes else "no codes")
    if text_features:
        facts.append(f"text features of {text_features.text_encoder}")
    if checked.duplicates:
        facts.append(f"{len(checked.duplicates)} duplicate pictures")
    if checked.emptied:
        facts.append(f"captions emptied by cleaning: {len(checked.emptied)}")
    if checked.longest and not manifest.classes:
        _, sample = checked.longest[0]
        facts.append(f"longest caption {sample.num_chars} characters (sample {sample.key})")
    if checked.too_long is not None:
        num_long = counted(len(checked.too_long), "prompt") if checked.too_long else "no prompts"
        facts.append(f"{num_long} longer than the recipe's limit")
    facts.append(counted(len(checked.problems), "problem") if checked.problems else "no problems")
    return ", ".join(facts)


# ---- repair ----------------------------------------------------------------------------------


def write_good(path: Path, target: Path, numbers: list[int]) -> Shard:
    """Write some samples of a shard to a new one."""
    return write_tar(target, read_samples(path, intact_starts(path)[0], numbers, EXTENSIONS))


def repair(
    folder: Path, manifest: Manifest, checked: CheckedSet, out: Path, *, drop_duplicates: bool, workers: int
) -> None:
    """Write the good samples as a new set, shard by shard.

    Args:
        folder, manifest: Of the checked set.
        checked: The result of `check`.
        out: Folder of the new set.
        drop_duplicates: Whether to keep only the first of equal pictures.
        workers: Number of processes.

    Raises ValueError when `out` is not empty, or no sample is good.
    """
    foreign = [
        path for path in out.glob("*") if not path.name.startswith(Staging.PREFIX) and path.name != DROPPED
    ]
    if foreign:
        raise ValueError(f"{out} is not empty: it has {foreign[0].name}; choose another folder for --repair")
    dropped = list(checked.problems)
    numbers = dict(checked.good)
    for shard_name, sample, same_as in checked.duplicates if drop_duplicates else ():
        numbers[shard_name] = [number for number in numbers[shard_name] if number != sample.number]
        text = f"{folder / shard_name}: sample {sample.key}: the same picture as sample {same_as}"
        dropped.append(Problem(shard_name, sample.key, text))
    if not any(numbers.values()):
        raise ValueError(f"{folder}: no good sample is left to write to {out}")
    staging = Staging(out, {"set": manifest.model_dump(mode="json"), "good": numbers})
    shards = _write_good_shards(folder, staging, numbers, workers)
    lines = [
        json.dumps({"shard": problem.shard, "key": problem.key, "problem": problem.text})
        for problem in dropped
    ]
    write_text(out / DROPPED, "".join(line + "\n" for line in lines))
    num_samples = sum(shard.num_samples for shard in shards)
    # made is None: make_shards.py would no longer make this set.
    staging.commit(manifest.model_copy(update={"shards": shards, "num_samples": num_samples, "made": None}))
    print(
        f"{out}: {num_samples} of {counted(manifest.num_samples, 'sample')}; "
        f"{out / DROPPED} lists what was dropped, and why"
    )


def _write_good_shards(
    folder: Path, staging: Staging, numbers: dict[str, list[int]], workers: int
) -> tuple[Shard, ...]:
    """numbers: shard -> its samples that are written.

    Returns the new shards, sorted.
    """
    tasks, finished = [], {}
    for name, kept in numbers.items():
        if shard := staging.finished(name):
            finished[name] = shard
        elif kept:
            tasks.append((folder / name, staging.path / name, kept))
    with tqdm(desc="repairing", unit=" shards", total=len(tasks), disable=None) as progress:
        for shard in in_processes(write_good, tasks, workers):
            staging.record(shard)
            finished[shard.name] = shard
            progress.update(1)
    return tuple(finished[name] for name in sorted(finished))


# ---- the command -----------------------------------------------------------------------------


def check_writable(path: Path) -> None:
    """Raise ValueError, before the work, when its result cannot be written to a file.

    The file must not replace a set's manifest or a shard.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{path}: no such folder {path.parent}")
    if path.is_dir() or path.name == MANIFEST or path.suffix == ".tar":
        raise ValueError(f"{path}: choose another name; this one is a folder, or a shard set's")


def caption_encoder_of(recipe: Path | None) -> CaptionEncoder | None:
    """The caption encoder of the recipe's backbone.

    Raises ValueError when the recipe is invalid.
    """
    if recipe is None:
        return None
    from mmtensorar import backbones  # imports torch
    from mmtensorar.recipe import Recipe

    return backbones.caption_encoder(Recipe.load(recipe).backbone)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    description, _, epilog = __doc__.partition("\n\n")
    parser = Parser(
        prog="python -m data_tools.check_shards",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
    )
    parser.add_argument("shards", type=Path, help="shard folder")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes (default: cores)")
    parser.add_argument("--report", type=Path, metavar="JSON", help="write the result to a file")
    parser.add_argument(
        "--repair", type=Path, metavar="OUT", help="write the good samples to a new shard folder"
    )
    parser.add_argument(
        "--drop-duplicates", action="store_true", help="with --repair: keep only the first of equal pictures"
    )
    parser.add_argument(
        "--recipe", type=Path, metavar="YAML", help="count the prompts that are too long for its backbone"
    )
    options = parser.parse_args(arguments)
    if options.drop_duplicates and options.repair is None:
        parser.error("--drop-duplicates goes with --repair")
    return options


@command
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with only_writer(options.repair or Path(), locks=options.repair is not None):
        return run(options)


def run(options: argparse.Namespace) -> int:
    """Check a set, and repair it if that is asked for. Returns the exit code."""
    folder = options.shards
    if options.report is not None:
        check_writable(options.report)
    if options.repair is not None:
        Staging.recover(options.repair)
    manifest = Manifest.read(folder, complete=False)
    note_unlisted(folder, manifest)
    checked = check(folder, manifest, options.workers, caption_encoder_of(options.recipe))
    for problem in checked.problems:
        print(f"error: {problem.text}", file=sys.stderr)
    for sample in checked.emptied[:MAX_WARNINGS]:
        print(f"warning: {sample.text}", file=sys.stderr)
    for shard, sample in (checked.too_long or ())[:NUM_NAMED]:
        where = f"{folder / shard}: sample {sample.key}"
        print(f"note: {where}: the prompt has {sample.excess}", file=sys.stderr)
    print(summary(folder, manifest, checked))
    if options.report is not None:
        write_text(options.report, json.dumps(report(folder, manifest, checked), indent=1) + "\n")
    if options.repair is not None:
        repair(
            folder,
            manifest,
            checked,
            options.repair,
            drop_duplicates=options.drop_duplicates,
            workers=options.workers,
        )
        return 0
    return 2 if checked.problems else 0


if __name__ == "__main__":
    sys.exit(main())
