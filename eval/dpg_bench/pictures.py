"""DPG-Bench's prompts, and the pictures made for them.

A folder of pictures is one of two kinds:

official    <item_id>.<ext>, the id being the name up to the first dot: a 2 x 2 grid of four samples
            (top left, top right, bottom left, bottom right) or, with --single, one sample
generated   by eval/harness.py: NNNNN/metadata.jsonl with the item_id, and NNNNN/samples/
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from eval import layout
from eval.layout import Problem
from mmtensorar import files
from mmtensorar.data.pictures import SUFFIXES
from mmtensorar.folders import LeftOut, walk

CELLS = 4  # samples in a grid
TABLE = "dpg_bench.csv"


class Item(NamedTuple):
    """The pictures of one prompt: a grid in one file, or a file per sample."""

    id: str
    files: list[Path]
    is_grid: bool

    def samples(self, num: int) -> list[Image.Image]:
        """Its first samples, in RGB.

        Raises ValueError naming a file that cannot be read or cut.
        """
        if not self.is_grid:
            return [layout.open_image(path) for path in self.files[:num]]
        grid = layout.open_image(self.files[0])
        width, height = grid.size
        if width % 2 or height % 2:
            raise ValueError(
                f"{self.files[0]}: {width}x{height} pixels; "
                "expected a 2 x 2 grid with even sides (or --single)"
            )
        width, height = width // 2, height // 2
        corners = [(column * width, row * height) for row in range(2) for column in range(2)]
        return [grid.crop((x, y, x + width, y + height)) for x, y in corners[:num]]


def read_prompts(bench: Path) -> list[dict]:
    """item_id and prompt of each text in bench/prompts/, by name.

    Raises ValueError when there are none.
    """
    folder = bench / "prompts"
    texts = sorted(_at_top(folder, (".txt",)), key=lambda path: path.stem) if folder.is_dir() else []
    if not texts:
        raise ValueError(
            f"{folder} holds no prompts, <item_id>.txt; expected the folder dpg_bench/ of the ELLA repository"
        )
    prompts = []
    for path in texts:
        text = files.read_text(path).strip()
        if not text:
            raise ValueError(f"{path} is empty; expected a prompt")
        prompts.append({"item_id": path.stem, "prompt": text})
    return prompts


def survey(
    folder: Path,
    items: Collection[str],
    *,
    num_samples: int,
    single: bool,
    unknown: set[str] | None = None,
) -> tuple[list[Item], list[Problem]]:
    """The pictures of the items, in the items' order; and a sentence for each missing
    or surplus picture.

    Args:
        folder: of either kind.
        items: ids.
        num_samples: of each item, in a generated folder.
        single: whether a file of an official folder is one sample, not a grid.
        unknown: receives the names of pictures that belong to none of the items; in a
            generated folder the item_id of their prompt, or the number of its folder if
            it has none.

    Raises ValueError when there is no picture at all.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    if (folder / layout.RECORD).is_file():
        return _generated(folder, items, num_samples, set() if unknown is None else unknown)
    by_item: dict[str, Path] = {}
    problems: list[Problem] = []
    for path in _at_top(folder, SUFFIXES):
        name = path.name.split(".")[0]
        if name not in items:
            problems.append(Problem("unknown item", f"{path.name} belongs to no item of the table"))
            if unknown is not None:
                unknown.add(name)
        elif name in by_item:
            sentence = f"{path.name} belongs to the same item as {by_item[name].name}"
            problems.append(Problem("surplus image", sentence))
        else:
            by_item[name] = path
    if not by_item:
        raise ValueError(f"{folder} holds no pictures of the table's items; expected <item_id>.png")
    problems += _missing(items, by_item)
    return [Item(item, [by_item[item]], not single) for item in items if item in by_item], problems


def _missing(items: Collection[str], found: Collection[str]) -> list[Problem]:
    return [Problem("missing item", f"item {item} has no picture") for item in items if item not in found]


def _at_top(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files of a folder itself that have one of some suffixes, by name; prints a
    note about others.
    """
    left_out = LeftOut(folder)
    found = []
    for path in walk(folder, left_out):
        if path.suffix.lower() not in suffixes:
            left_out.add("of another kind", path)
        elif path.parent != folder:
            left_out.add("in a sub-folder", path)
        elif kind := layout.no_picture(path):
            left_out.add(kind, path)
        else:
            found.append(path)
    left_out.print()
    return found


def _generated(
    folder: Path, items: Collection[str], num_samples: int, unknown: set[str]
) -> tuple[list[Item], list[Problem]]:
    # A folder may hold more samples of a prompt than are asked about.
    num_images = max(num_samples, layout.read_record(folder).get("num_images") or 0)
    pictures, problems = layout.survey(folder, num_images=num_images)
    by_item: dict[str, list[Path]] = {}
    left_out = LeftOut(folder)
    for images in pictures:
        metadata = images[0].parent.parent / "metadata.jsonl"
        name = files.read_json(metadata).get("item_id")
        if not isinstance(name, str) or name not in items:
            sentence = f"{metadata.relative_to(folder)} belongs to no item of the table"
            problems.append(Problem("unknown item", sentence))
            unknown.add(str(name or metadata.parent.name))
        elif name in by_item:
            other = by_item[name][0].parent.parent.name
            sentence = f"{metadata.relative_to(folder)} belongs to the same item as {other}"
            problems.append(Problem("surplus prompt", sentence))
        elif len(images) >= num_samples:
            by_item[name] = images
            for path in images[num_samples:]:
                left_out.add(f"after the first {num_samples} of an item; see --num-images", path)
    left_out.print()
    problems += _missing(items, by_item)
    return [Item(item, by_item[item], False) for item in items if item in by_item], problems


def changed_prompts(folder: Path, bench: Path) -> list[Problem]:
    """A sentence for each picture folder that --ckpt generated for another text than
    the bench has for the item.

    They are scored: the official script never reads the text.
    """
    if not (folder / layout.RECORD).is_file() or not (bench / "prompts").is_dir():
        return []
    texts = {prompt["item_id"]: prompt["prompt"] for prompt in read_prompts(bench)}
    problems = []
    for path in sorted(folder.glob("[0-9]*/metadata.jsonl")):
        metadata = files.read_json(path)
        found, expected = metadata.get("prompt"), texts.get(str(metadata.get("item_id")))
        if isinstance(found, str) and expected is not None and found != expected:
            problems.append(layout.changed_prompt(path.parent.name, found, expected))
    return problems


def write_grid(samples: Sequence[Image.Image], path: Path) -> None:
    """Write the official 2 x 2 grid; an equal one may exist.

    Raises ValueError unless there are four samples of one size, and when path is
    another picture.
    """
    sizes = {sample.size for sample in samples}
    if len(samples) != CELLS or len(sizes) != 1:
        raise ValueError(
            f"{path}: {len(samples)} samples of {len(sizes)} sizes; a grid needs {CELLS} of one size"
        )
    width, height = samples[0].size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for number, sample in enumerate(samples):
        grid.paste(sample, (number % 2 * width, number // 2 * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.temporary_name(path.parent) as temporary:
        grid.save(temporary, "PNG")
        try:
            files.publish(temporary, path)
        except FileExistsError:
            if layout.open_image(path).tobytes() != grid.tobytes():
                raise ValueError(f"{path} exists and is another picture; choose another --out") from None
