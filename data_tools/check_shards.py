"""Read every sample of a shard folder: `python data_tools/check_shards.py data/mine`. Exit code 2 when something is wrong.

Checked: the manifest; each shard's digest, structure and number of samples; each picture, caption or class number,
json, codes and text features; that no key is in two shards. Every problem is listed with shard and key.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a script, the folder of this file stands first

import argparse
import json

from tqdm import tqdm

from mmtensorar import shards
from mmtensorar.shards import Manifest, Sample, Shard


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
    caption = shards.decode_caption(sample.members["txt"], where)
    if classes is not None and not (caption.isdecimal() and int(caption) < len(classes)):
        raise ValueError(f"{where}: {caption!r} is no number of the manifest's {len(classes)} classes")
    try:
        json.loads(sample.members["json"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: the json member is not JSON ({error})") from error


def shard_problems(folder: Path, shard: Shard, manifest: Manifest, seen: dict[str, str], progress: tqdm) -> list[str]:
    """What is wrong with one shard. seen: key -> shard, for all keys so far; this shard's are added."""
    path = folder / shard.name
    problems = []
    if shards.sha256(path) != shard.sha256:
        problems.append(f"{path}: changed since it was made: its sha256 is not the manifest's")
    try:
        for sample in shards.iterate_shard(folder, shard):
            where = f"{path}: sample {sample.key}"
            if sample.key in seen:
                problems.append(f"{where}: the key is also in {seen[sample.key]}")
            seen[sample.key] = shard.name
            problems += sample_problems(sample, where, manifest)
            progress.update(1)
    except ValueError as error:  # the rest of this shard cannot be read
        problems.append(str(error))
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", type=Path, help="shard folder")
    folder = parser.parse_args(arguments).shards
    try:
        manifest = Manifest.read(folder)
        problems: list[str] = []
        seen: dict[str, str] = {}
        with tqdm(desc="checking", unit=" samples", total=manifest.num_samples, disable=None) as progress:
            for shard in manifest.shards:
                problems += shard_problems(folder, shard, manifest, seen, progress)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    parts = [f"{manifest.image_size} pixels"]
    if manifest.classes:
        parts.append(f"{len(manifest.classes)} classes")
    codes, text = manifest.codes, manifest.text_features
    crops = f" ({codes.crops} crops)" if codes and codes.crops > 1 else ""
    parts.append(f"codes of {codes.image_tokenizer}{crops}" if codes else "no codes")
    if text:
        parts.append(f"text features of {text.text_encoder}")
    print(
        f"{folder}: {len(seen)} of {manifest.num_samples} samples read in {len(manifest.shards)} shards, "
        f"{', '.join(parts)}, {len(problems) or 'no'} problems"
    )
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
