"""DPG-Bench's prompts, and the pictures made for them.

A folder of pictures is one of two kinds. Official: <item_id>.<ext>, the id being the name up to the first dot, a 2 x 2
grid of four samples (top left, top right, bottom left, bottom right) or, where so asked, one sample. Or as eval/harness.py
generates: NNNNN/metadata.jsonl with the item_id and NNNNN/samples/.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from eval import layout

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CELLS = 4  # of a grid
TABLE = "dpg_bench.csv"


class Item(NamedTuple):
    """The pictures of one prompt: a grid in one file, or a file per sample."""

    id: str
    files: list[Path]
    is_grid: bool

    def samples(self, num: int) -> list[Image.Image]:
        """Its first samples, in RGB. Raises ValueError, naming the file, for a picture that cannot be read or cut."""
        if not self.is_grid:
            return [layout.open_image(path) for path in self.files[:num]]
        grid = layout.open_image(self.files[0])
        width, height = grid.size
        if width % 2 or height % 2:
            raise ValueError(
                f"{self.files[0]}: {width}x{height} pixels; expected a 2 x 2 grid, of even sides (or --single)"
            )
        width, height = width // 2, height // 2
        corners = [(column * width, row * height) for row in range(2) for column in range(2)]
        return [grid.crop((x, y, x + width, y + height)) for x, y in corners[:num]]


def read_prompts(bench: Path) -> list[dict]:
    """item_id and prompt of each text in bench/prompts/, by name. Raises ValueError when there are none."""
    files = sorted((bench / "prompts").glob("*.txt"), key=lambda path: path.stem)
    if not files:
        raise ValueError(
            f"{bench / 'prompts'} holds no prompts, <item_id>.txt; expected the folder dpg_bench/ of the ELLA repository"
        )
    prompts = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not UTF-8") from None
        if not text:
            raise ValueError(f"{path} is empty; expected a prompt")
        prompts.append({"item_id": path.stem, "prompt": text})
    return prompts


def survey(
    folder: Path, items: Collection[str], *, num_samples: int, single: bool
) -> tuple[list[Item], list[str]]:
    """The pictures of the items, in their order; and what is missing, there twice or too many, in words.

    Raises ValueError when there is no picture at all.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    if (folder / layout.RECORD).is_file():
        return _generated(folder, items, num_samples)
    found: dict[str, Path] = {}
    problems = []
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES):
        name = path.name.split(".")[0]
        if name not in items:
            problems.append(f"{path.name} is of no item of the table")
        elif name in found:
            problems.append(f"{path.name} is of the item of {found[name].name}")
        else:
            found[name] = path
    if not found:
        raise ValueError(f"{folder} holds no pictures of the table's items; expected <item_id>.png")
    problems += [f"item {item} has no picture" for item in items if item not in found]
    return [Item(item, [found[item]], not single) for item in items if item in found], problems


def _generated(folder: Path, items: Collection[str], num_samples: int) -> tuple[list[Item], list[str]]:
    # A folder may hold more samples of a prompt than are asked about.
    num_images = max(num_samples, layout.read_record(folder).get("num_images", num_samples))
    pictures, problems = layout.survey(folder, num_images=num_images)
    found: dict[str, list[Path]] = {}
    for images in pictures:
        place = images[0].parent.parent / "metadata.jsonl"
        name = files.read_json(place).get("item_id")
        if not isinstance(name, str) or name not in items:
            problems.append(f"{place.relative_to(folder)} is of no item of the table")
        elif len(images) >= num_samples:
            found[name] = images
    problems += [f"item {item} has no picture" for item in items if item not in found]
    return [Item(item, found[item], False) for item in items if item in found], problems


def write_grid(samples: Sequence[Image.Image], path: Path) -> None:
    """The official 2 x 2 grid of four samples of one size. Raises ValueError for another number, or other sizes."""
    sizes = {sample.size for sample in samples}
    if len(samples) != CELLS or len(sizes) != 1:
        raise ValueError(
            f"{path}: {len(samples)} samples of {len(sizes)} sizes; a grid needs {CELLS} of one size"
        )
    width, height = samples[0].size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for place, sample in enumerate(samples):
        grid.paste(sample, (place % 2 * width, place // 2 * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    grid.save(partial, "PNG")
    partial.replace(path)
