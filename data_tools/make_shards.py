"""Make shards of images and captions, in WebDataset's layout (see mmtensorar/data/shards.py).

    python data_tools/make_shards.py --folder my_images --out data/mine          a.jpg beside a.txt or a.json, at any depth
    python data_tools/make_shards.py --jsonl my_images/list.jsonl --out data/mine    {"image": path, "caption": text}
    python data_tools/make_shards.py --csv my_images/list.csv --out data/mine        columns image and caption
    python data_tools/make_shards.py --parquet rows.parquet --caption-columns short,long --captions random --out data/mine
    python data_tools/make_shards.py --dataset lambdalabs/naruto-blip-captions --caption-columns text --out data/naruto
    python data_tools/make_shards.py --tars old_shards --min-side 512 --deduplicate --out data/better
    python data_tools/make_shards.py --class-folder imagenet/train --out data/imagenet    a sub-folder per class
    python data_tools/make_shards.py --synthesize shapes --num-samples 4096 --out data/shapes

The same arguments give the same bytes, whatever the number of workers. A finished set is reused; an interrupted run
goes on where it stopped when the same command is given again.
"""

import sys
from pathlib import Path

sys.path[0] = str(
    Path(__file__).resolve().parents[1]
)  # run as a script, the folder of this file stands first

import argparse
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_tools import sources, storage
from data_tools.build_stages import (
    LeftOut,
    Part,
    add_codes,
    distribute,
    make_part,
    make_shard,
)
from data_tools.executors import OnRay, in_processes
from data_tools.samples import Unwanted, Wanted, generator, make_sample
from data_tools.sources import SOURCES, Item, Items, Layout, class_folder
from data_tools.storage import is_local
from mmtensorar.data.shards import MANIFEST, MAX_SIDE, Codes, Manifest, Sample, Staging, TextFeatures
from mmtensorar.data.url_cache import is_url, store_errors
from mmtensorar.files import write_text

LEFT_OUT = "left_out.jsonl"
PART_SAMPLES = 1000  # where shards are not counted in samples
PARTS = 2  # version of their records


class Source(NamedTuple):
    """name: for the manifest. items: in the order of the set, with one caption each. classes: if captions are their numbers."""

    name: str
    items: Items
    classes: tuple[str, ...] | None = None


def read_source(options: argparse.Namespace) -> Source:
    if options.synthesize:
        from data_tools.sources import shapes

        # Drawn at random already; and a set of more samples begins with the samples of a smaller one.
        found = Items(shapes.items(options.num_samples, seed=options.seed, size=options.image_size))
        return Source("shapes", found[: options.limit])
    kind, place = next((kind, place) for kind in SOURCES if (place := getattr(options, kind)))
    if not is_url(place) and is_local(options.out) and Path(place).resolve() == options.out.resolve():
        raise ValueError(f"{place}: source and --out are the same folder; choose another --out")
    own = own_set(place) if kind == "tars" else None
    class_names = sources.read_class_names(options.class_names) if options.class_names else None
    if own is not None and own.classes is not None and class_names is None:
        class_names = {str(number): name for number, name in enumerate(own.classes)}
    layout = Layout(
        image=options.image_column,
        captions=tuple(options.caption_columns),
        root=options.image_root,
        split=options.split,
        templates=tuple(options.class_template),
        class_names=class_names,
        own=own is not None,
        numbered=own is not None and own.classes is not None,
    )
    classes = None
    if kind == "class_folder" and not layout.templates:
        classes = class_folder.class_names(place)
    elif kind == "tars" and layout.class_names and not layout.templates:
        classes = _numbered(layout.class_names, options.class_names or place)
    listed = tqdm(sources.items(kind, place, layout), desc="listing", unit=" images", disable=None)
    # Of the place, names, captions and file sizes, so that a changed source is not taken for the old one.
    digest = hashlib.sha256(json.dumps([_url(place), _url(str(options.image_root or ""))]).encode())

    def chosen() -> Iterator[Item]:
        for item in listed:
            if (
                item.problem and options.on_error == "raise" and not options.dry_run
            ):  # at once, not when its turn comes
                raise ValueError(f"{item.problem}; to leave such samples out add --on-error skip")
            for one in choose_captions(item, options.captions, options.seed):
                told = [one.key, one.captions, one.meta, one.group]
                digest.update(json.dumps(told, sort_keys=True, default=str).encode())
                yield one

    items = Items(chosen())
    name = (
        storage.at(place).name
        if is_url(place)
        else Path(place).resolve().name
        if Path(place).exists()
        else place
    )
    return Source(
        f"{kind} {name} {digest.hexdigest()[:16]}", shuffled(items, options.seed)[: options.limit], classes
    )


def _url(place: str) -> str:
    """A folder may be moved; what is behind another URL is not the same."""
    return place if is_url(place) else ""


def own_set(place: str) -> Manifest | None:
    """The manifest of a folder that this program made, None for other people's tars."""
    folder = storage.at(place)
    return Manifest.read(folder, complete=False) if (folder / MANIFEST).is_file() else None


def _numbered(names: dict[str, str], path: Path | str) -> tuple[str, ...]:
    missing = [str(number) for number in range(len(names)) if str(number) not in names]
    if missing:
        raise ValueError(
            f"{path}: {len(names)} names, but none for class {missing[0]}; expected numbers from 0 on"
        )
    return tuple(names[str(number)] for number in range(len(names)))


def choose_captions(item: Item, choice: str, seed: int) -> list[Item]:
    """The item with one caption: the first, or a random one; or once with each."""
    if item.problem or len(item.captions) == 1:
        return [item]
    if choice == "each":
        return [item._replace(captions=(caption,)) for caption in item.captions]
    index = int(generator(seed, item.key).integers(len(item.captions))) if choice == "random" else 0
    return [item._replace(captions=(item.captions[index],))]


def shuffled(items: Items, seed: int) -> Items:
    """In random order; items of one group stay together, in random order among themselves."""
    rng = np.random.default_rng(seed)
    if len(items.groups) == 1:
        return items.at(rng.permutation(len(items)))
    within: list[list[int]] = [[] for _ in items.groups]
    for place, group in enumerate(items.group_of):
        within[group].append(place)
    return items.at(
        [within[g][i] for g in rng.permutation(len(within)) for i in rng.permutation(len(within[g]))]
    )


def is_validation(picture: str, share: float) -> bool:
    """By the hash of the picture alone: a picture with several captions, or under several names, is on one side only, and more
    samples or another seed move none to the other.
    """
    return int(picture[:16], 16) < share * 2**64


def describe(manifest: Manifest) -> str:
    of_classes = f" in {len(manifest.classes)} classes" if manifest.classes else ""
    source = f"{manifest.source!r}{of_classes}"
    return f"{manifest.num_samples} samples of {source}, {manifest.image_size} pixels, seed {manifest.seed}"


def wanted_of(options: argparse.Namespace) -> Wanted:
    return Wanted(
        image_size=options.image_size,
        crop=options.crop,
        format=options.format,
        quality=options.quality,
        min_side=options.min_side,
        max_aspect=options.max_aspect,
        min_caption=options.min_caption,
        max_caption=options.max_caption,
        seed=options.seed,
    )


def set_in(out: Path) -> Manifest | None:
    """The set that is in a folder. Raises ValueError when the folder holds anything else."""
    Staging.recover(out)
    if (out / MANIFEST).exists():
        return Manifest.read(out, complete=is_local(out))
    if out.exists():
        if not out.is_dir():
            raise ValueError(f"{out} is a file; choose another --out")
        ours = [
            p
            for p in out.iterdir()
            if p.name.startswith(Staging.PREFIX) or p.name == LEFT_OUT or p.name.endswith(".tmp")
        ]
        strangers = [p for p in out.iterdir() if p not in ours]
        if strangers:
            raise ValueError(
                f"{out} is not a shard folder: it has no {MANIFEST}, but {strangers[0].name}; choose another --out"
            )
    return None


def is_made(out: Path, made: dict, entry: dict, overwrite: bool) -> bool:
    """Whether the set is there already, with what is to be encoded. Raises ValueError when another one is, which is to stay."""
    old = set_in(out)
    same = (
        old is not None
        and old.made == made
        and all(getattr(old, key) == value for key, value in entry.items())
    )
    if old is not None and not same and not overwrite:
        raise ValueError(
            f"{out} holds another set ({describe(old)}); choose another --out, or add --overwrite"
        )
    return same


def make(options: argparse.Namespace) -> None:
    out, held_out = options.out, options.out.with_name(f"{options.out.name}_validation")
    set_in(out)  # before the source is listed, which may take long
    source, wanted = read_source(options), wanted_of(options)
    # All that the bytes depend on.
    made = {
        "source": source.name,
        "num_items": len(source.items),
        "samples_per_shard": options.samples_per_shard,
        "bytes_per_shard": options.bytes_per_shard,
        "validation_share": options.validation_share,
        "deduplicate": options.deduplicate,
        "on_error": options.on_error,
        **asdict(wanted),
    }
    encoder = load_encoders(options, source.classes)
    if encoder:
        made |= {key: value.model_dump(mode="json") for key, value in encoder.entry.items()}
    if options.dry_run:
        show(source, wanted, options)
        return
    splits, entry = bool(options.validation_share), encoder.entry if encoder else {}
    held_is_made = splits and is_made(held_out, made, entry, options.overwrite)
    if is_made(out, made, entry, options.overwrite) and held_is_made == splits:
        print(f"reusing {out}: {describe(set_in(out))}")
        return

    staging = Staging(out, [made, PARTS])
    parts = all_parts(staging, source, wanted, options, encoder)
    left_out = [each for part in parts for each in part.left_out]
    if options.deduplicate:
        left_out += duplicates(parts, source.items, pictures=options.deduplicate == "pictures")
    gone = {each.number for each in left_out}
    if len(gone) == len(source.items):
        raise ValueError(f"{out}: nothing is left of {len(gone)} samples ({reasons(left_out)})")

    share = options.validation_share
    aside = {
        each.number for part in parts for each in part.kept if splits and is_validation(each.picture, share)
    }

    kept = {each.number for part in parts for each in part.kept} - gone
    if splits and not 0 < len(kept & aside) < len(kept):
        sizes = f"{len(kept - aside)} samples and {len(kept & aside)} for validation"
        raise ValueError(f"{out}: --validation-share {share:g} gives {sizes}; choose another one")
    if not splits and (held_out / MANIFEST).is_file():
        print(
            f"note: {held_out} was split from another set in {out}, and may hold the same pictures as this one"
        )

    def held(number: int) -> bool:
        return number in aside

    write = partial(write_set, parts, options=options, source=source, made=made, entry=entry)
    if splits and not held_is_made:
        write(
            Staging(held_out, [made, PARTS]), staging.path, lambda number: number not in gone and held(number)
        )
    if left_out:
        lines = [json.dumps({"name": each.name, "reason": each.reason}) for each in sorted(left_out)]
        write_text(out / LEFT_OUT, "\n".join(lines) + "\n")
        print(
            f"left out {len(left_out)} of {len(source.items)}: {reasons(left_out)}; listed in {out / LEFT_OUT}"
        )
    else:
        (out / LEFT_OUT).unlink(missing_ok=True)
    write(staging, staging.path, lambda number: number not in gone and not held(number))


class Encoder(NamedTuple):
    """What is added to the samples in the same pass. entry: what the manifest will say of it. encoded: see parts.add_codes."""

    entry: dict[str, Codes | TextFeatures]
    encoded: Callable[[Iterable[Sample], Path], Iterator[Sample]]


def load_encoders(options: argparse.Namespace, classes: tuple[str, ...] | None) -> Encoder | None:
    """Those of --image-tokenizer and --text-encoder, one after the other; None without both."""
    found = [load_encoder(options)] if options.image_tokenizer else []
    if options.text_encoder:
        if classes is not None:
            raise ValueError(
                f"--text-encoder: the captions are numbers of {len(classes)} classes, which have no text features"
            )
        found.append(load_text_encoder(options))
    if not found:
        return None

    def encoded(samples: Iterable[Sample], path: Path) -> Iterator[Sample]:
        for each in found:
            samples = each.encoded(samples, path)
        return iter(samples)

    return Encoder({key: value for each in found for key, value in each.entry.items()}, encoded)


def load_text_encoder(options: argparse.Namespace) -> Encoder:
    from data_tools import encode_text  # which imports torch
    from mmtensorar import devices
    from mmtensorar.captions.encoders import T5Features

    settings = dict(num_slots=options.max_tokens, dim=None, cleaning=options.caption_cleaning)
    encoder = T5Features(options.text_encoder, device=devices.pick(options.device), **settings)
    expected = encode_text.features_of(encoder)
    size = options.batch_size
    return Encoder(
        {"text_features": expected},
        lambda samples, path: encode_text.encode_samples(samples, path, encoder, expected, batch_size=size),
    )


def load_encoder(options: argparse.Namespace) -> Encoder:
    """The image tokenizer of --image-tokenizer. Raises ValueError when pictures of --image-size do not fit it."""
    from data_tools import encode_codes  # which imports torch
    from mmtensorar.checkpoints.recognise import image_tokenizer_from_arguments

    asked = argparse.Namespace(
        image_tokenizer=options.image_tokenizer,
        name=options.name,
        device=options.device,
        image_size=options.tokenizer_size,
    )
    image_tokenizer, device = image_tokenizer_from_arguments(asked)
    codes = encode_codes.codes_of(image_tokenizer, crops=options.crops, precision=options.precision)
    encode_codes.check_size(str(options.out), options.image_size, image_tokenizer.image_size, options.crops)
    settings = dict(image_size=options.image_size, batch_size=options.batch_size, device=device)
    return Encoder(
        {"codes": codes},
        lambda samples, path: encode_codes.encode_samples(samples, path, image_tokenizer, codes, **settings),
    )


def all_parts(
    staging: Staging, source: Source, wanted: Wanted, options: argparse.Namespace, encoder: Encoder | None
) -> list[Part]:
    """Make the parts that are not there yet. Codes are added here, while the workers make the next parts."""
    size = PART_SAMPLES if options.bytes_per_shard else options.samples_per_shard
    starts = range(0, len(source.items), size)
    finished, uncoded, tasks = {}, [], []
    for number, start in enumerate(starts):
        name = f"part-{number:06d}"
        if part := Part.read(staging.path, name):
            if encoder is None or part.coded:
                finished[name] = part
            else:
                uncoded.append(part)
        else:
            items = source.items[start : start + size]
            tasks.append((staging.path, name, start, items, wanted, options.on_error == "skip"))
    if finished:
        print(f"continuing {options.out}: {len(finished)} of {len(starts)} parts are there")

    def count(part: Part) -> int:
        return len(part.kept) + len(part.left_out)

    initial = sum(map(count, finished.values()))
    with tqdm(
        desc="making shards", unit=" images", total=len(source.items), initial=initial, disable=None
    ) as progress:
        for part in chain(uncoded, options.run(make_part, tasks, options.workers)):
            if encoder:
                part = add_codes(staging.path, part, encoder.encoded)
            finished[part.name] = part
            progress.update(count(part))
    return [finished[name] for name in sorted(finished)]


def duplicates(parts: list[Part], items: Items, *, pictures: bool) -> list[LeftOut]:
    """Of samples with the same picture and caption, or the same picture, all but the first."""
    first: dict[str, int] = {}
    found = []
    for part in parts:
        for kept in part.kept:
            number = first.setdefault(kept.picture if pictures else kept.digest, kept.number)
            if number != kept.number:
                name = items[kept.number].key
                found.append(LeftOut(kept.number, name, f"duplicate of {items[number].key}"))
    return found


def reasons(left_out: list[LeftOut]) -> str:
    kinds = Counter(
        "duplicate"
        if each.reason.startswith("duplicate")
        else "damaged"
        if each.reason.startswith("error")
        else each.reason
        for each in left_out
    )
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def write_set(
    parts: list[Part],
    staging: Staging,
    from_folder: Path,
    takes: Callable[[int], bool],
    *,
    options: argparse.Namespace,
    source: Source,
    made: dict,
    entry: dict[str, Codes | TextFeatures],
) -> None:
    """Write one set from the parts and put it in its place."""
    max_samples = len(source.items) if options.bytes_per_shard else options.samples_per_shard
    plan = list(distribute(parts, takes, max_samples=max_samples, max_bytes=options.bytes_per_shard))
    if not plan:
        raise ValueError(f"{staging.folder}: no sample is left for it; choose another --validation-share")
    finished, tasks = {}, []
    for number, pieces in enumerate(plan):
        path = staging.path / f"{number:05d}.tar"
        if shard := staging.finished(path.name):
            finished[path.name] = shard
        else:
            tasks.append((from_folder, path, pieces))
    # Moving takes no time; only where samples are regrouped is there something to wait for.
    regrouped = any(len(pieces) != 1 or not pieces[0].whole for pieces in plan)
    run, workers = (
        (options.run, options.workers) if regrouped or not is_local(staging.path) else (in_processes, 1)
    )
    with tqdm(
        desc="regrouping", unit=" shards", total=len(tasks), disable=None if regrouped else True
    ) as progress:
        for shard in run(make_shard, tasks, workers):
            staging.record(shard)
            finished[shard.name] = shard
            progress.update(1)
    manifest = Manifest(
        shards=tuple(finished[name] for name in sorted(finished)),
        num_samples=sum(shard.num_samples for shard in finished.values()),
        image_size=options.image_size,
        **entry,
        classes=source.classes,
        source=source.name,
        seed=options.seed,
        made=made,
    )
    staging.commit(manifest)
    print(f"{staging.folder}: {describe(manifest)}, in {len(manifest.shards)} shards")


def show(source: Source, wanted: Wanted, options: argparse.Namespace) -> None:
    """Try the first few hundred items, write nothing, and tell what the set would be."""
    tried = source.items[:200]
    sizes, found, told, damaged = [], Counter(), [], 0
    for number, item in enumerate(tqdm(tried, desc="trying", unit=" images", disable=None)):
        try:
            sample = make_sample(f"{number:09d}", item, wanted).sample
        except Unwanted as reason:
            found[str(reason)] += 1
        except ValueError as error:
            damaged += 1
            found[f"error: {error}"] += 1
        else:
            # In a tar each member has a header, and both are padded.
            sizes.append(sum(512 + -(-len(content) // 512) * 512 for content in sample.members.values()))
            if len(told) < 3:
                told.append(f"  {item.key}: {item.captions[0][:100]!r}")
    share = len(sizes) / max(1, len(tried))
    print(f"{source.name}: {len(source.items)} items; of the first {len(tried)}, {len(sizes)} would be kept")
    for reason, count in found.most_common(10):
        print(f"  {count} left out: {reason}")
    if damaged and options.on_error == "raise":
        print(f"  {damaged} of these would stop the work; with --on-error skip they are left out")
    if sizes:
        print("\n".join(told))
        kept, mean = share * len(source.items), sum(sizes) / len(sizes)
        per_shard = (
            max(1, options.bytes_per_shard // mean) if options.bytes_per_shard else options.samples_per_shard
        )
        print(
            f"about {kept:.0f} samples of {mean:,.0f} bytes, {kept * mean / 1e6:,.1f} MB in {max(1, math.ceil(kept / per_shard))} shards"
        )
        if options.validation_share:
            print(
                f"about {kept * options.validation_share:.0f} of them for validation, in {options.out}_validation"
            )
    else:
        print("nothing would be left")
    if (old := set_in(options.out)) is not None and not options.overwrite:
        print(f"{options.out} holds a set already ({describe(old)}); another one needs --overwrite")
    print(f"nothing was written; without --dry-run the set goes to {options.out}")


def positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def sides(text: str) -> int:
    if (found := positive(text)) > MAX_SIDE:
        raise argparse.ArgumentTypeError(f"expected at most {MAX_SIDE} pixels, got {text}")
    return found


def num_bytes(text: str) -> int:
    """A number with K, M or G for powers of 1,000."""
    short = text.upper().removesuffix("B")
    digits, unit = (short[:-1], short[-1]) if short[-1:] in ("K", "M", "G") else (short, "")
    if not digits.isascii() or not digits.isdigit() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of bytes, such as 500M or 1G, got {text!r}")
    return int(digits) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[unit]


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text!r}")
    return value


def at_least_one(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    group = parser.add_argument_group("where samples come from (one of them)")
    one = group.add_mutually_exclusive_group(required=True)
    for kind, (_, text) in SOURCES.items():
        one.add_argument(f"--{kind.replace('_', '-')}", metavar="PLACE", help=text)
    one.add_argument("--synthesize", choices=["shapes"], help="draw an embedded world")

    group = parser.add_argument_group("how the source is read")
    group.add_argument(
        "--image-column", default="image", metavar="NAME", help="column or key (default: image)"
    )
    group.add_argument(
        "--caption-columns",
        type=lambda text: text.split(","),
        default=["caption"],
        metavar="A,B",
        help="columns or keys of captions (default: caption)",
    )
    group.add_argument(
        "--captions",
        choices=["first", "random", "each"],
        default="first",
        help="where a picture has several: the first, one by chance, or a sample with each (default: first)",
    )
    group.add_argument(
        "--image-root",
        type=storage.argument,
        help="folder that paths are relative to (default: the table's own)",
    )
    group.add_argument("--split", default="train", help="of a dataset (default: train)")
    group.add_argument(
        "--class-template",
        action="append",
        default=[],
        metavar="TEXT",
        help="captions from class names, such as 'a photo of a {}'; may be given several times",
    )
    group.add_argument(
        "--class-names", type=Path, metavar="JSON", help='{"n01440764": "tench"}: names of folders or numbers'
    )
    group.add_argument(
        "--num-samples", type=positive, help="pictures to draw (--synthesize only; default 4096)"
    )
    group.add_argument("--limit", type=positive, help="take only so many, by chance")

    group = parser.add_argument_group("what is taken")
    group.add_argument("--min-side", type=positive, default=0, metavar="PIXELS", help="smaller side at least")
    group.add_argument(
        "--max-aspect",
        type=at_least_one,
        default=0.0,
        metavar="RATIO",
        help="longer side over smaller at most",
    )
    group.add_argument("--min-caption", type=positive, default=0, metavar="CHARACTERS")
    group.add_argument("--max-caption", type=positive, default=0, metavar="CHARACTERS")
    group.add_argument(
        "--deduplicate",
        nargs="?",
        choices=["samples", "pictures"],
        const="samples",
        default=False,
        help="of equal pictures with equal captions take one (the first in the set's order), or of equal pictures",
    )
    group.add_argument(
        "--on-error",
        choices=["raise", "skip"],
        default="raise",
        help=f"a picture that is damaged or has no caption: stop, or leave it out and list it in {LEFT_OUT} (default: stop)",
    )

    group = parser.add_argument_group("what is made")
    group.add_argument(
        "--out",
        type=storage.folder_to_write,
        required=True,
        metavar="PLACE",
        help="shard folder to make, or its URL (s3, gs, hf)",
    )
    group.add_argument(
        "--image-size",
        type=sides,
        help="pixels a side (default: 384; 64 for shapes): the image tokenizer's size, or a larger one for "
        "encode_codes.py --crops 10; LlamaGen's is 1.1 times, 281 for 256 and 422 for 384",
    )
    group.add_argument(
        "--crop",
        choices=["center", "random", "pad", "stretch"],
        default="center",
        help="a square from the middle or from anywhere, or the whole picture on white or stretched (default: center)",
    )
    group.add_argument(
        "--format",
        choices=["jpg", "png", "webp", "keep"],
        default="jpg",
        help="keep: pictures of the right size stay as they are (default: jpg)",
    )
    group.add_argument("--quality", type=positive, default=95, help="of jpg and webp, to 100 (default: 95)")
    group.add_argument(
        "--image-tokenizer",
        metavar="PATH",
        help="add codes in the same pass, as encode_codes.py would: folder, file or hub id",
    )
    group.add_argument("--name", help="kind of image tokenizer, where its tensors do not tell")
    group.add_argument(
        "--tokenizer-size",
        type=positive,
        metavar="PIXELS",
        help="the image tokenizer's, where it does not tell",
    )
    group.add_argument(
        "--crops", type=int, choices=[1, 2, 5, 10], default=1, help="codes per image, see encode_codes.py"
    )
    group.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of encoding (default: fp32)"
    )
    group.add_argument(
        "--text-encoder",
        metavar="PATH",
        help="add text features in the same pass, as encode_text.py would: a T5's folder or hub id",
    )
    group.add_argument(
        "--caption-cleaning",
        choices=["original", "lower", "none"],
        default="original",
        help="see encode_text.py",
    )
    group.add_argument(
        "--max-tokens", type=positive, default=120, help="longer captions are cut (default: 120)"
    )
    group.add_argument(
        "--batch-size",
        type=positive,
        default=32,
        help="images (or crops), or captions, at a time (default: 32)",
    )
    group.add_argument("--device", help="for encoding (default: cuda where there is one, else cpu)")
    group.add_argument(
        "--samples-per-shard", type=positive, default=1000, metavar="N", help="(default: 1000)"
    )
    group.add_argument(
        "--bytes-per-shard", type=num_bytes, default=0, metavar="N", help="instead: such as 500M or 1G"
    )
    group.add_argument(
        "--validation-share",
        type=share,
        default=0.0,
        help="put this share, by the hash of each picture's content, into a set of its own, OUT_validation",
    )
    group.add_argument("--seed", type=int, default=0, help="of the order, and of what is drawn")
    group.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes (default: cores)")
    group.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="where the work is done: processes of this machine, or Ray Data, here or on a cluster (default: local)",
    )
    group.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="of a cluster, such as auto or ray://head:10001 (default: start Ray here)",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace another set in --out once the new one is made"
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing; try the first pictures and tell what would be made",
    )
    options = parser.parse_args(arguments)
    goes_with = {
        "--image-tokenizer": ("name", "tokenizer_size", "crops", "precision"),
        "--text-encoder": ("caption_cleaning", "max_tokens"),
        "--image-tokenizer or --text-encoder": ("batch_size", "device"),
    }
    given = {"--image-tokenizer": options.image_tokenizer, "--text-encoder": options.text_encoder}
    for wanted, names in goes_with.items():
        for name in names:
            if not any(given[each] for each in wanted.split(" or ")) and getattr(
                options, name
            ) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} goes with {wanted}")
    if options.num_samples and not options.synthesize:
        parser.error("--num-samples goes with --synthesize; of any other source --limit takes a part")
    if options.seed < 0:
        parser.error(f"--seed must be at least 0, got {options.seed}")
    if options.quality > 100:
        parser.error(f"--quality must be at most 100, got {options.quality}")
    if (bad := next((t for t in options.class_template if "{}" not in t), None)) is not None:
        parser.error(f"--class-template {bad!r} has no {{}} for the name")
    if options.class_template and not (options.class_folder or options.dataset or options.tars):
        parser.error("--class-template goes with --class-folder, --dataset or --tars")
    if options.ray_address and options.engine != "ray":
        parser.error("--ray-address goes with --engine ray")
    options.num_samples = options.num_samples or 4096
    options.image_size = options.image_size or (64 if options.synthesize else 384)
    options.image_root = options.image_root and options.image_root.resolve()
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        options.run = OnRay(options.ray_address, options.workers) if options.engine == "ray" else in_processes
        make(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, *store_errors()) as error:  # of a store they may name nothing
        where = "" if is_local(options.out) else f"{options.out}: "
        print(f"error: {where}{error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print(
            "error: a worker process was killed, perhaps for lack of memory; try fewer --workers",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
