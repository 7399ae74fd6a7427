"""Read every sample of a shard folder: `python data_tools/check_shards.py data/mine`. Exit code 2 when something is wrong; with --repair 0 once the clean set is written.

Checked: the manifest; each shard's digest, structure and number of samples; each picture, caption or class number,
json, codes and text features; that no key is there twice. Every problem is listed with shard and key. Pictures that are there
more than once are counted.

    python data_tools/check_shards.py data/mine --report report.json    the same for other programs
    python data_tools/check_shards.py data/mine --repair data/clean     the good samples as a new set, and what was dropped
"""

import sys
from pathlib import Path

from mmtensorar import files

sys.path[0] = str(
    Path(__file__).resolve().parents[1]
)  # run as a script, the folder of this file stands first

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

from tqdm import tqdm

from data_tools.executors import in_processes
from mmtensorar.data import shards, tars
from mmtensorar.data.shards import (
    EXTENSIONS,
    IMAGE_EXTENSIONS,
    Manifest,
    Sample,
    Shard,
    Staging,
    read_sample,
    whole_starts,
)
from mmtensorar.files import write_text

DROPPED = "dropped.jsonl"


class Problem(NamedTuple):
    """key: None when it is the shard's and not one sample's. text: a whole sentence, with the shard's path and the key."""

    shard: str
    key: str | None
    text: str


class Read(NamedTuple):
    """A sample that could be read. number: its place in the shard. picture: digest of the encoded picture, if there is one."""

    number: int
    key: str
    picture: str | None


class Checked(NamedTuple):
    """What was found in one shard."""

    shard: Shard
    read: tuple[Read, ...]
    problems: tuple[Problem, ...]


class Findings(NamedTuple):
    """Of a whole set. good: per shard the places of its good samples. duplicates: (sample, shard, key of the first equal picture)."""

    num_read: int
    problems: tuple[Problem, ...]
    duplicates: tuple[tuple[Read, str, str], ...]
    good: dict[str, list[int]]


# ---- one shard -------------------------------------------------------------------------------


def sample_problems(sample: Sample, where: str, manifest: Manifest) -> list[str]:
    """What is wrong with one sample, one sentence each."""
    problems: list[str] = []

    def check(function, *arguments) -> None:
        try:
            function(*arguments)
        except ValueError as error:
            problems.append(str(error))

    check(shards.picture, sample, where, manifest.image_size)
    check(_check_text, sample, where, manifest.classes)
    for member, entry, what, decode, check_array in (
        ("codes.npy", manifest.codes, "codes", shards.decode_codes, shards.check_codes),
        ("t5.npy", manifest.text_features, "text features", shards.decode_features, shards.check_features),
    ):
        if (entry is not None) != (member in sample.members):
            found, said = ("no", "") if entry else ("has", "no ")
            problems.append(f"{where}: {found} {member}, but the manifest says that the set has {said}{what}")
        elif entry is not None:
            check(lambda: check_array(decode(sample.members[member], where), entry, where))
    return problems


def _check_text(sample: Sample, where: str, classes: tuple[str, ...] | None) -> None:
    for extension in ("txt", "json"):
        if extension not in sample.members:
            raise ValueError(f"{where}: no {extension} member")
    check_class(shards.decode_caption(sample.members["txt"], where), where, classes)
    try:
        json.loads(sample.members["json"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: the json member is not JSON ({error})") from error


def check_class(caption: str, where: str, classes: tuple[str, ...] | None) -> None:
    """Raise ValueError when there are classes, and the caption is no number of one."""
    if classes is not None and not (
        caption.isdecimal() and len(caption) < 20 and int(caption) < len(classes)
    ):
        raise ValueError(f"{where}: {caption[:50]!r} is no number of the manifest's {len(classes)} classes")


def check_shard(folder: Path, shard: Shard, manifest: Manifest) -> Checked:
    """Read one shard, as far as it can be read."""
    path = folder / shard.name
    problems: list[Problem] = []
    read: list[Read] = []
    try:
        changed = files.sha256(path) != shard.sha256
    except OSError as error:
        return Checked(shard, (), (Problem(shard.name, None, f"{path}: {error.strerror}"),))
    if changed:
        problems.append(
            Problem(shard.name, None, f"{path}: changed since it was made: its sha256 is not the manifest's")
        )
    starts, damage = whole_starts(path)
    with tars.opened(path) as file:
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
            picture = next(
                (sample.members[name] for name in IMAGE_EXTENSIONS if name in sample.members), None
            )
            digest = None if picture is None else hashlib.sha256(picture).hexdigest()[:32]
            read.append(Read(number, sample.key, digest))
    found = len(starts) - 1
    if damage is not None:
        missing = shard.num_samples - found
        also = f"; {missing} of its samples cannot be reached" if missing > 0 else ""
        problems.append(Problem(shard.name, None, f"{damage}{also}"))
    elif found != shard.num_samples:
        text = f"{path}: {found} samples, the manifest says {shard.num_samples}; make the shard again"
        problems.append(Problem(shard.name, None, text))
    return Checked(shard, tuple(read), tuple(problems))


# ---- the whole set ---------------------------------------------------------------------------


def check(folder: Path, manifest: Manifest, workers: int) -> Findings:
    tasks = [(folder, shard, manifest) for shard in manifest.shards]
    found: dict[str, Checked] = {}
    with tqdm(desc="checking", unit=" samples", total=manifest.num_samples, disable=None) as progress:
        for checked in in_processes(check_shard, tasks, workers):
            found[checked.shard.name] = checked
            progress.update(len(checked.read))
    problems: list[Problem] = []
    duplicates: list[tuple[Read, str, str]] = []
    keys: dict[str, str] = {}
    pictures: dict[str, str] = {}
    good: dict[str, list[int]] = {}
    for shard in manifest.shards:
        checked = found[shard.name]
        bad = {problem.key for problem in checked.problems}
        problems += checked.problems
        good[shard.name] = []
        for read in checked.read:
            if read.key in keys:
                text = f"{folder / shard.name}: sample {read.key}: the key is also in {keys[read.key]}"
                problems.append(Problem(shard.name, read.key, text))
                continue
            keys[read.key] = shard.name
            if read.key in bad:
                continue
            good[shard.name].append(read.number)
            if (first := pictures.setdefault(read.picture, read.key)) != read.key:
                duplicates.append((read, shard.name, first))
    num_read = sum(len(checked.read) for checked in found.values())
    return Findings(num_read, tuple(problems), tuple(duplicates), good)


def report(folder: Path, manifest: Manifest, findings: Findings) -> dict:
    return {
        "folder": str(folder),
        "ok": not findings.problems,
        "shards": len(manifest.shards),
        "samples": manifest.num_samples,
        "read": findings.num_read,
        "good": sum(map(len, findings.good.values())),
        "problems": [
            {"shard": each.shard, "key": each.key, "problem": each.text} for each in findings.problems
        ],
        "duplicates": [
            {"shard": name, "key": read.key, "same_as": first} for read, name, first in findings.duplicates
        ],
    }


# ---- repair ----------------------------------------------------------------------------------


def write_good(path: Path, target: Path, numbers: list[int]) -> Shard:
    return shards.write_tar(target, shards.read_samples(path, whole_starts(path)[0], numbers, EXTENSIONS))


def repair(
    folder: Path, manifest: Manifest, findings: Findings, out: Path, *, drop_duplicates: bool, workers: int
) -> None:
    """Write the good samples as a new set, shard by shard. Raises ValueError when out is not empty, or nothing is good."""
    left_over = [
        path for path in out.glob("*") if not path.name.startswith(Staging.PREFIX) and path.name != DROPPED
    ]
    if left_over:
        raise ValueError(
            f"{out} is not empty: it has {left_over[0].name}; choose another folder for --repair"
        )
    dropped = list(findings.problems)
    numbers = dict(findings.good)
    if drop_duplicates:
        for read, name, first in findings.duplicates:
            numbers[name] = [number for number in numbers[name] if number != read.number]
            dropped.append(
                Problem(
                    name, read.key, f"{folder / name}: sample {read.key}: the same picture as sample {first}"
                )
            )
    if not any(numbers.values()):
        raise ValueError(f"{folder}: no good sample is left to write to {out}")
    staging = Staging(out, {"set": manifest.model_dump(mode="json"), "good": numbers})
    tasks, finished = [], {}
    for name, kept in numbers.items():
        target = staging.path / name
        if shard := staging.finished(name):
            finished[name] = shard
        elif kept:
            tasks.append((folder / name, target, kept))
    with tqdm(desc="repairing", unit=" shards", total=len(tasks), disable=None) as progress:
        for shard in in_processes(write_good, tasks, workers):
            staging.record(shard)
            finished[shard.name] = shard
            progress.update(1)
    lines = [json.dumps({"shard": each.shard, "key": each.key, "problem": each.text}) for each in dropped]
    write_text(out / DROPPED, "".join(line + "\n" for line in lines))
    kept = tuple(finished[name] for name in sorted(finished))
    num_samples = sum(shard.num_samples for shard in kept)
    # It is not any more what make_shards would make.
    staging.commit(manifest.model_copy(update={"shards": kept, "num_samples": num_samples, "made": None}))
    print(
        f"{out}: {num_samples} of {manifest.num_samples} samples; what was dropped, and why, is in {out / DROPPED}"
    )


def check_writable(path: Path) -> None:
    """Raise ValueError, before the work, when its result cannot be written there, or would replace a set's manifest."""
    if not path.parent.is_dir():
        raise ValueError(f"{path}: no such folder {path.parent}")
    if path.is_dir() or path.name == shards.MANIFEST or path.suffix == ".tar":
        raise ValueError(f"{path}: choose another name; this one is a folder, or a shard set's")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("shards", type=Path, help="shard folder")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: cores)")
    parser.add_argument("--report", type=Path, metavar="JSON", help="write what was found")
    parser.add_argument(
        "--repair", type=Path, metavar="OUT", help="write the good samples to a new shard folder"
    )
    parser.add_argument(
        "--drop-duplicates", action="store_true", help="with --repair: of equal pictures keep the first"
    )
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")
    if options.drop_duplicates and options.repair is None:
        parser.error("--drop-duplicates goes with --repair")
    folder = options.shards
    try:
        if options.report is not None:
            check_writable(options.report)
        if options.repair is not None:
            Staging.recover(options.repair)
        manifest = Manifest.read(folder, complete=False)
        findings = check(folder, manifest, options.workers)
        for problem in findings.problems:
            print(f"error: {problem.text}", file=sys.stderr)
        print(summary(folder, manifest, findings))
        if options.report is not None:
            write_text(options.report, json.dumps(report(folder, manifest, findings), indent=1) + "\n")
        if options.repair is not None:
            repair(
                folder,
                manifest,
                findings,
                options.repair,
                drop_duplicates=options.drop_duplicates,
                workers=options.workers,
            )
            return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print(
            "error: a worker process was killed, perhaps for lack of memory; try fewer --workers",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 2 if findings.problems else 0


def summary(folder: Path, manifest: Manifest, findings: Findings) -> str:
    def parts() -> Iterator[str]:
        yield f"{folder}: {findings.num_read} of {manifest.num_samples} samples read in {len(manifest.shards)} shards"
        yield f"{manifest.image_size} pixels"
        if manifest.classes:
            yield f"{len(manifest.classes)} classes"
        codes, text = manifest.codes, manifest.text_features
        crops = f" ({codes.crops} crops)" if codes and codes.crops > 1 else ""
        yield f"codes of {codes.image_tokenizer}{crops}" if codes else "no codes"
        if text:
            yield f"text features of {text.text_encoder}"
        if findings.duplicates:
            yield f"{len(findings.duplicates)} pictures there before"
        yield f"{len(findings.problems) or 'no'} problems"

    return ", ".join(parts())


if __name__ == "__main__":
    sys.exit(main())
