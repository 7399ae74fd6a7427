"""Look at a shard folder: `python data_tools/inspect_shards.py data/mine --html sheet.html`.

Prints what is in it and how captions and pictures are distributed; --html writes one page with the same and a sheet of
pictures with their captions, spread over the set.
"""

import sys
from pathlib import Path

sys.path[0] = str(
    Path(__file__).resolve().parents[1]
)  # run as a script, the folder of this file stands first

import argparse
import base64
import html
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_tools.check_shards import check_class, check_writable
from mmtensorar.data import tars
from mmtensorar.data.shards import (
    EXTENSIONS,
    IMAGE_EXTENSIONS,
    Manifest,
    Sample,
    decode_caption,
    decode_image,
    image_member,
    iterate_shard,
    read_sample,
    sample_starts,
)

THUMBNAIL = 192  # pixels a side at most
BINS = 12


class Numbers(NamedTuple):
    """Per sample: words of the caption, bytes of the picture, smaller side before it was cropped (0: not told). Then counts."""

    words: list[int]
    picture_bytes: list[int]
    sides: list[int]
    members: Counter[str]
    captions: Counter[bytes]


def count(folder: Path, manifest: Manifest) -> Numbers:
    """Raises ValueError naming shard and key of a damaged sample."""
    found = Numbers([], [], [], Counter(), Counter())
    with tqdm(desc="reading", unit=" samples", total=manifest.num_samples, disable=None) as progress:
        for shard in manifest.shards:
            for sample in iterate_shard(folder, shard):
                where = f"{folder / shard.name}: sample {sample.key}"
                caption = decode_caption(sample.members.get("txt", b""), where)
                found.words.append(len(caption.split()))
                found.picture_bytes.append(len(image_member(sample, where)))
                found.sides.append(min(2**31, _smaller_side(sample)))
                found.members.update("image" if name in IMAGE_EXTENSIONS else name for name in sample.members)
                found.captions[caption.encode()] += 1
                progress.update(1)
    return found


def _smaller_side(sample: Sample) -> int:
    try:
        size = json.loads(sample.members["json"])["size"]
        return max(0, int(min(size)))
    except (KeyError, ValueError, TypeError, RecursionError, OverflowError):
        return 0  # made by another tool


def histogram(values: Sequence[int]) -> list[tuple[str, int]]:
    """Label and count of bins of equal width over whole numbers."""
    low, high = min(values), max(values)
    width = max(1, -(-(high - low + 1) // BINS))
    counts = Counter((value - low) // width for value in values)
    labels = [(low + bin_ * width, low + (bin_ + 1) * width - 1) for bin_ in range(max(counts) + 1)]
    return [(f"{a}" if a == b else f"{a}-{b}", counts[bin_]) for bin_, (a, b) in enumerate(labels)]


def histograms(found: Numbers) -> dict[str, list[tuple[str, int]]]:
    told = [side for side in found.sides if side]
    shown = {"words of a caption": found.words, "bytes of a picture": found.picture_bytes}
    if told:
        shown["smaller side before cropping, pixels"] = told
    return {title: histogram(values) for title, values in shown.items()}


def facts(folder: Path, manifest: Manifest, found: Numbers) -> list[tuple[str, str]]:
    size = sum(os.path.getsize(folder / shard.name) for shard in manifest.shards)
    rows = [
        ("source", f"{manifest.source}, seed {manifest.seed}"),
        ("samples", f"{manifest.num_samples:,} in {len(manifest.shards):,} shards"),
        ("size", f"{size / 2**30:.2f} GiB, {size / manifest.num_samples:,.0f} bytes a sample"),
        ("pictures", f"{manifest.image_size} pixels a side"),
        ("members", ", ".join(f"{name} {number:,}" for name, number in sorted(found.members.items()))),
        ("words", f"{min(found.words)} to {max(found.words)}, median {int(np.median(found.words))}"),
    ]
    repeated = sum(number - 1 for number in found.captions.values())
    if not manifest.classes:
        rows.append(("captions", f"{len(found.captions):,} different, {repeated:,} repeated"))
    else:
        numbers = sorted(found.captions[str(number).encode()] for number in range(len(manifest.classes)))
        middle = numbers[len(numbers) // 2]
        rows.append(
            ("classes", f"{len(manifest.classes)}, of {numbers[0]} to {numbers[-1]} samples, median {middle}")
        )
    if (codes := manifest.codes) is not None:
        shape = f"{codes.crops} x {codes.grid[0]}x{codes.grid[1]} x {len(codes.factor_sizes)}"
        rows.append(("codes", f"{shape} of {codes.image_tokenizer} {codes.weight_hash[:12]}"))
    if (text := manifest.text_features) is not None:
        rows.append(("text features", f"up to {text.max_tokens} x {text.width} of {text.text_encoder}"))
    return rows


# ---- the page --------------------------------------------------------------------------------


def spread(folder: Path, manifest: Manifest, num: int) -> list[tuple[Path, Sample]]:
    """Samples at equal distances over the set, each with its shard's path."""
    num = min(num, manifest.num_samples)
    wanted = [(2 * i + 1) * manifest.num_samples // (2 * num) for i in range(num)]
    found, first = [], 0
    for shard in manifest.shards:
        numbers = [place - first for place in wanted if first <= place < first + shard.num_samples]
        first += shard.num_samples
        if not numbers:
            continue
        path = folder / shard.name
        starts = sample_starts(path).tolist()
        with tars.opened(path) as file:
            for number in numbers:
                found.append((path, read_sample(file, path, starts[number], starts[number + 1], EXTENSIONS)))
    return found


def figure(path: Path, sample: Sample, classes: tuple[str, ...] | None) -> str:
    where = f"{path}: sample {sample.key}"
    image = decode_image(image_member(sample, where), where)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    caption = decode_caption(sample.members["txt"], where)
    check_class(caption, where, classes)
    if classes is not None:
        caption = f"{caption} {classes[int(caption)]}"
    picture = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img src="data:image/jpeg;base64,{picture}" alt=""><figcaption>{html.escape(caption[:300])}'
        f"<small>{html.escape(f'{path.name} {sample.key}')}</small></figcaption></figure>"
    )


def bars(title: str, rows: list[tuple[str, int]]) -> str:
    largest = max(number for _, number in rows)
    lines = [
        f'<text x="118" y="{18 * i + 13}" text-anchor="end">{label}</text>'
        f'<rect x="124" y="{18 * i + 2}" width="{240 * number / largest:.1f}" height="14"/>'
        f'<text x="{130 + 240 * number / largest:.1f}" y="{18 * i + 13}">{number:,}</text>'
        for i, (label, number) in enumerate(rows)
    ]
    return f'<div><h2>{title}</h2><svg width="430" height="{18 * len(rows) + 4}">{"".join(lines)}</svg></div>'


def page(folder: Path, manifest: Manifest, found: Numbers, num: int) -> str:
    rows = "".join(f"<tr><th>{name}<td>{html.escape(text)}" for name, text in facts(folder, manifest, found))
    charts = "".join(bars(title, rows) for title, rows in histograms(found).items())
    sheet = "".join(figure(path, sample, manifest.classes) for path, sample in spread(folder, manifest, num))
    title = html.escape(folder.name)
    return f"""<!doctype html>
<meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px/1.4 sans-serif; margin: 2em; color: #222 }}
th {{ text-align: left; padding-right: 1.5em; font-weight: 600 }}
h2 {{ font-size: 14px }}
svg text {{ font-size: 11px }}
svg rect {{ fill: #4a7ab0 }}
.charts, .sheet {{ display: flex; flex-wrap: wrap; gap: 16px }}
figure {{ margin: 0; width: {THUMBNAIL}px }}
img {{ width: {THUMBNAIL}px; height: {THUMBNAIL}px; object-fit: contain; background: #eee; image-rendering: auto }}
small {{ display: block; color: #888 }}
</style>
<h1>{title}</h1>
<table>{rows}</table>
<div class="charts">{charts}</div>
<div class="sheet">{sheet}</div>
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("shards", type=Path, help="shard folder")
    parser.add_argument("--html", type=Path, help="write a page with a sheet of pictures and captions")
    parser.add_argument("--num", type=int, default=64, help="pictures on the sheet (default: 64)")
    options = parser.parse_args(arguments)
    if options.num < 1:
        parser.error(f"--num must be at least 1, got {options.num}")
    folder = options.shards
    try:
        if options.html is not None:
            check_writable(options.html)
        manifest = Manifest.read(folder)
        found = count(folder, manifest)
        for name, text in facts(folder, manifest, found):
            print(f"{name:<14} {text}")
        for title, rows in histograms(found).items():
            print(f"\n{title}")
            largest = max(number for _, number in rows)
            for label, number in rows:
                print(f"{label:>16} {'#' * round(40 * number / largest)} {number:,}")
        if options.html is not None:
            options.html.write_text(page(folder, manifest, found, options.num), encoding="utf-8")
            print(f"\n{options.html} shows {min(options.num, manifest.num_samples)} of the pictures")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
