"""Where samples come from: one file and one generator a source.

A source yields items in an order that depends on its content alone. An item's picture is a function without arguments, so
that listing a source is cheap and a worker process opens or draws it. A new source is a new file and a line in SOURCES.
"""

from __future__ import annotations

import json
import pickle
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from data_tools import storage as places
from data_tools.storage import read_file
from mmtensorar.data.shards import decode_caption

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

# Option of make_shards.py -> module here, and what the option's help says.
SOURCES = {
    "folder": ("folder", "images with a .txt or .json caption of the same name, at any depth"),
    "class_folder": (
        "class_folder",
        "images in one sub-folder per class; the sorted names give the class numbers",
    ),
    "jsonl": ("jsonl", 'lines {"image": path, "caption": text}'),
    "csv": ("table", "a CSV file with a header and columns image (a path) and caption; .tsv for tabs"),
    "parquet": (
        "parquet",
        "a Parquet file, or a folder of them, with columns image (path, bytes or both) and caption",
    ),
    "dataset": ("dataset", "a Hugging Face dataset: NAME on the hub, or a folder that save_to_disk wrote"),
    "tars": (
        "webdataset",
        "a folder of WebDataset tars, or one tar: captions in .txt or .json members, classes in .cls",
    ),
}


class Item(NamedTuple):
    """One picture of a source.

    key: names it in the source. picture: its bytes, or the
    drawn picture. captions: one or several to choose from. meta: what the json member will say. group: items of one group
    are cheap to read together, and stay together when the order is shuffled. problem: why it cannot be taken, if it cannot.
    """

    key: str
    picture: Callable[[], bytes | Image.Image]
    captions: tuple[str, ...]
    meta: dict
    group: str = ""
    problem: str | None = None


class Items(Sequence[Item]):
    """A list of items, each kept as bytes: a source may have tens of millions, and as objects an item takes 2.7 times as much.

    groups: their names, in order of first use. group_of: the number of each item's group.
    """

    def __init__(self, items: Iterable[Item] = ()):
        names: dict[str, int] = {}
        self._pickled: list[bytes] = []
        self.group_of = array("l")
        for item in items:
            self._pickled.append(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
            self.group_of.append(names.setdefault(item.group, len(names)))
        self.groups = tuple(names)

    def at(self, places: Iterable[int]) -> Items:
        """The items at some places, in that order."""
        found = Items()
        places = list(places)
        found._pickled = [self._pickled[place] for place in places]
        found.group_of = array("l", (self.group_of[place] for place in places))
        found.groups = self.groups
        return found

    def __len__(self) -> int:
        return len(self._pickled)

    def __getitem__(self, place: int | slice) -> Item | Items:
        if isinstance(place, slice):
            return self.at(range(*place.indices(len(self))))
        return pickle.loads(self._pickled[place])  # made above


@dataclass(frozen=True)
class Layout:
    """How a source is to be read, where it leaves a choice.

    image, captions: columns (of a table) or keys (of a JSON object). root: folder that paths are relative to; the folder of
    the table itself when None. split: of a dataset. templates: captions from class names, with {} for the name; none keeps class
    numbers. class_names: folder name (or class number) -> class name. own: tars of our own, whose json members are kept.
    numbered: their captions are class numbers.
    """

    image: str = "image"
    captions: tuple[str, ...] = ("caption",)
    root: Path | None = None
    split: str = "train"
    templates: tuple[str, ...] = ()
    class_names: Mapping[str, str] | None = None
    own: bool = False
    numbered: bool = False


def items(kind: str, place: str, layout: Layout) -> Iterator[Item]:
    """The items of a source. Raises ValueError naming the file, line or row that is wrong, and when there are none.

    What is wrong with one item alone is the item's `problem`.
    """
    yield from import_module(f"data_tools.sources.{SOURCES[kind][0]}").items(place, layout)


# ---- for the sources -------------------------------------------------------------------------


def images(root: Path, expected: tuple[str, ...] = ()) -> tuple[dict[Path, int], dict[Path, int]]:
    """Every jpg, png and webp below a folder with its bytes, sorted; and the files of the expected suffixes.

    Hidden files are left out, others are counted aloud. Raises ValueError when there is no picture.
    """
    files = places.files(root)
    found = {path: size for path, size in files.items() if path.suffix.lower() in SUFFIXES}
    beside = {path: size for path, size in files.items() if path.suffix.lower() in expected}
    if not found:
        raise ValueError(f"{root}: no {', '.join(SUFFIXES)} files in it")
    if others := [path for path in files if path not in found and path not in beside]:
        print(
            f"note: left out {len(others)} files that are not jpg, png or webp, such as {others[0]}",
            file=sys.stderr,
        )
    return found, beside


def texts(fields: Mapping[str, Any], columns: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The captions in some columns of a row; a column may hold one text, a list of them, or nothing.

    Raises ValueError when there is none in all of them, and for a column that holds anything else.
    """
    found = []
    for column in columns:
        value = fields.get(column)
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if text is None or text == "":
                continue
            if not isinstance(text, str):
                raise ValueError(f"{where}: {column!r} holds {type(text).__name__}; expected a caption")
            found.append(decode_caption(text.encode(errors="surrogatepass"), where))
    if not found:
        there = ", ".join(map(repr, fields)) or "nothing"
        raise ValueError(f"{where}: no caption in {', '.join(map(repr, columns))}; found {there}")
    return tuple(found)


def inside(root: Path, name: Any, where: str) -> Path:
    """The file of a name in a folder. Raises ValueError when it is not there, or lies outside.

    In a store nothing is asked for yet: one request per picture, only to see that it is there, would take too long.
    """
    if not isinstance(name, str):
        raise ValueError(f"{where}: the image is {type(name).__name__}; expected a path")
    local = places.is_local(root)
    # Resolved, so that neither `..`, an absolute path nor a link leads out of the folder.
    path = root if "\0" in name or (not local and "://" in name) else (root / name).resolve()
    if not path.is_relative_to(root) or (not local and path == root):
        raise ValueError(
            f"{where}: image {name!r} lies outside {root}; --image-root names the folder of the pictures"
        )
    if local and not path.is_file():
        raise ValueError(f"{where}: image {name!r} is not a file in {root}")
    return path


def of_row(key: str, fields: dict[str, Any], layout: Layout, root: Path, where: str, source: str) -> Item:
    """The item of a row whose image is a path; other columns are kept in meta."""
    meta: dict[str, Any] = {"source": source}
    try:
        if layout.image not in fields:
            raise ValueError(
                f"{where}: expected an image in {layout.image!r}, found {', '.join(map(repr, fields)) or 'nothing'}"
            )
        path = inside(root, fields[layout.image], where)
        captions = texts(fields, layout.captions, where)
    except ValueError as error:
        return Item(key, bytes, (), meta, problem=str(error))
    meta["name"] = fields[layout.image]
    if places.is_local(path):
        meta["num_bytes"] = path.stat().st_size
    others = {name: value for name, value in fields.items() if name not in (layout.image, *layout.captions)}
    return Item(key, partial(read_file, path), captions, meta | ({"fields": others} if others else {}))


def class_captions(name: str, layout: Layout) -> tuple[str, ...]:
    """A class's captions by the templates: name as the table of names says, or with spaces for underscores."""
    shown = (layout.class_names or {}).get(name, name.replace("_", " "))
    return tuple(template.replace("{}", shown) for template in layout.templates)


def read_class_names(path: Path) -> dict[str, str]:
    """A JSON object, folder name or class number -> class name. Raises ValueError for anything else."""
    try:
        found = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f'{path}: expected an object such as {{"n01440764": "tench"}}')
    return found
