"""Look at a shard folder: what is in it, and how its captions and pictures are
distributed.

    mmtensorar shards inspect data/mine
    mmtensorar shards inspect data/mine --html sheet.html

--html writes a page with the same facts, and pictures from all over the set with their
captions.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python puts a script's own folder here; imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

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

from data_tools.argument_types import positive
from data_tools.check_shards import check_class, check_writable
from data_tools.storage import note_unlisted
from mmtensorar.cli import Parser, command
from mmtensorar.data import tars
from mmtensorar.data.members import decode_caption
from mmtensorar.data.pictures import SHARD_FORMATS, decode_picture, encoded_picture
from mmtensorar.data.shards import (
    EXTENSIONS,
    IMAGE_EXTENSIONS,
    Manifest,
    Sample,
    iterate_shard,
    read_sample,
    sample_starts,
)
from mmtensorar.files import write_text
from mmtensorar.words import counted

THUMBNAIL = 192  # pixels a side at most
BINS = 12


class Statistics(NamedTuple):
    """Numbers of a whole set.

    words, picture_bytes, sides: for each sample, the words of its caption, the bytes of
    its picture, and the picture's smaller side before cropping, in pixels (0 if
    unknown).
    members, captions: how often each occurs.
    """

    words: list[int]
    picture_bytes: list[int]
    sides: list[int]
    members: Counter[str]
    captions: Counter[bytes]


def count(folder: Path, manifest: Manifest) -> Statistics:
    """Read all samples. Raises ValueError naming shard and key of a damaged one."""
    statistics = Statistics([], [], [], Counter(), Counter())
    with tqdm(desc="reading", unit=" samples", total=manifest.num_samples, disable=None) as progress:
        for shard in manifest.shards:
            for sample in iterate_shard(folder, shard):
                where = f"{folder / shard.name}: sample {sample.key}"
                caption = decode_caption(sample.members.get("txt", b""), where)
                statistics.words.append(len(caption.split()))
                statistics.picture_bytes.append(len(encoded_picture(sample, where)))
                statistics.sides.append(min(2**31, _smaller_side(sample)))
                statistics.members.update(
                    "image" if name in IMAGE_EXTENSIONS else name for name in sample.members
                )
                statistics.captions[caption.encode()] += 1
                progress.update(1)
    return statistics


def _smaller_side(sample: Sample) -> int:
    try:
        size = json.loads(sample.members["json"])["size"]
        return max(0, int(min(size)))
    except (KeyError, ValueError, TypeError, RecursionError, OverflowError):
        return 0  # another tool made the set


def histogram(values: Sequence[int]) -> list[tuple[str, int]]:
    """Label and count of bins of equal width over whole numbers."""
    low, high = min(values), max(values)
    width = max(1, -(-(high - low + 1) // BINS))
    counts = Counter((value - low) // width for value in values)
    labels = [(low + bin_ * width, low + (bin_ + 1) * width - 1) for bin_ in range(max(counts) + 1)]
    return [(f"{a}" if a == b else f"{a}-{b}", counts[bin_]) for bin_, (a, b) in enumerate(labels)]


def histograms(statistics: Statistics) -> dict[str, list[tuple[str, int]]]:
    """Title -> histogram."""
    values = {"words of a caption": statistics.words, "bytes of a picture": statistics.picture_bytes}
    if sides := [side for side in statistics.sides if side]:
        values["smaller side before cropping, pixels"] = sides
    return {title: histogram(numbers) for title, numbers in values.items()}


def facts(folder: Path, manifest: Manifest, statistics: Statistics) -> list[tuple[str, str]]:
    """Name and text of each fact about the set."""
    size = sum(os.path.getsize(folder / shard.name) for shard in manifest.shards)
    words = statistics.words
    rows = [
        ("source", f"{manifest.source}, seed {manifest.seed}"),
        ("samples", f"{manifest.num_samples:,} in {counted(len(manifest.shards), 'shard')}"),
        ("size", f"{size / 2**30:.2f} GiB, {size / manifest.num_samples:,.0f} bytes a sample"),
        ("pictures", f"{manifest.image_size} pixels a side"),
        ("members", ", ".join(f"{name} {number:,}" for name, number in sorted(statistics.members.items()))),
        ("words", f"{min(words)} to {max(words)}, median {int(np.median(words))}"),
    ]
    if not manifest.classes:
        repeated = sum(number - 1 for number in statistics.captions.values())
        rows.append(("captions", f"{len(statistics.captions):,} different, {repeated:,} repeated"))
    else:
        sizes = sorted(statistics.captions[str(number).encode()] for number in range(len(manifest.classes)))
        median = sizes[len(sizes) // 2]
        rows.append(
            (
                "classes",
                f"{len(manifest.classes)}, of {sizes[0]} to {counted(sizes[-1], 'sample')}, median {median}",
            )
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
    indices = [(2 * i + 1) * manifest.num_samples // (2 * num) for i in range(num)]
    samples, first = [], 0
    for shard in manifest.shards:
        numbers = [index - first for index in indices if first <= index < first + shard.num_samples]
        first += shard.num_samples
        if not numbers:
            continue
        path = folder / shard.name
        starts = sample_starts(path).tolist()
        with tars.TarReader(path) as file:
            for number in numbers:
                sample = read_sample(file, path, starts[number], starts[number + 1], EXTENSIONS)
                samples.append((path, sample))
    return samples


def figure(path: Path, sample: Sample, classes: tuple[str, ...] | None) -> str:
    """HTML of one picture with its caption. path: of the shard."""
    where = f"{path}: sample {sample.key}"
    image = decode_picture(encoded_picture(sample, where), where, formats=SHARD_FORMATS)
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
    """HTML of one histogram."""
    largest = max(number for _, number in rows)
    lines = [
        f'<text x="118" y="{18 * i + 13}" text-anchor="end">{label}</text>'
        f'<rect x="124" y="{18 * i + 2}" width="{240 * number / largest:.1f}" height="14"/>'
        f'<text x="{130 + 240 * number / largest:.1f}" y="{18 * i + 13}">{number:,}</text>'
        for i, (label, number) in enumerate(rows)
    ]
    return f'<div><h2>{title}</h2><svg width="430" height="{18 * len(rows) + 4}">{"".join(lines)}</svg></div>'


def page(folder: Path, manifest: Manifest, statistics: Statistics, num: int) -> str:
    """The whole page, with `num` pictures."""
    names = facts(folder, manifest, statistics)
    rows = "".join(f"<tr><th>{name}<td>{html.escape(text)}" for name, text in names)
    charts = "".join(bars(title, rows) for title, rows in histograms(statistics).items())
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
img {{ width: {THUMBNAIL}px; height: {THUMBNAIL}px }}
img {{ object-fit: contain; background: #eee; image-rendering: auto }}
small {{ display: block; color: #888 }}
</style>
<h1>{title}</h1>
<table>{rows}</table>
<div class="charts">{charts}</div>
<div class="sheet">{sheet}</div>
"""


def print_histogram(title: str, rows: list[tuple[str, int]]) -> None:
    print(f"\n{title}")
    largest = max(number for _, number in rows)
    for label, number in rows:
        print(f"{label:>16} {'#' * round(40 * number / largest)} {number:,}")


@command
def main(arguments: list[str] | None = None) -> int:
    assert __doc__ is not None
    description, _, epilog = __doc__.partition("\n\n")
    parser = Parser(
        prog="python -m data_tools.inspect_shards",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
    )
    parser.add_argument("shards", type=Path, help="shard folder")
    parser.add_argument("--html", type=Path, help="write a page with pictures and captions")
    parser.add_argument("--num", type=positive, default=64, help="pictures on the page (default: 64)")
    options = parser.parse_args(arguments)
    folder = options.shards
    if options.html is not None:
        check_writable(options.html)
    manifest = Manifest.read(folder)
    note_unlisted(folder, manifest)
    statistics = count(folder, manifest)
    for name, text in facts(folder, manifest, statistics):
        print(f"{name:<14} {text}")
    for title, rows in histograms(statistics).items():
        print_histogram(title, rows)
    if options.html is not None:
        write_text(options.html, page(folder, manifest, statistics, options.num))
        print(f"\n{options.html} shows {min(options.num, manifest.num_samples)} of the pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
