"""A folder of pictures, each with its caption in a file of the same name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from data_tools import storage
from data_tools.sources import Item, Layout, Listing, Source
from data_tools.sources._rows import captions_in, find_pictures, parse_object, unnamed_item
from data_tools.storage import read_file
from mmtensorar.data.members import decode_caption
from mmtensorar.data.shards import EXTENSIONS
from mmtensorar.folders import LeftOut


def read(location: str, layout: Layout) -> Listing:
    """Every picture below a folder.

    The caption is in the .txt file (in any case) of the same name, or in the .json file
    of the same name under the keys of layout.captions. Raises ValueError when there is
    no picture.
    """
    root = storage.at(location)
    if storage.is_local(root) and not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    return Listing(_items(root, layout))


def _items(root: Path, layout: Layout) -> Iterator[Item]:
    left_out = LeftOut(root)
    pictures, text_files = find_pictures(root, left_out, (".txt", ".json"))
    texts = _first_texts(text_files)
    paths_of_text = [texts.get(path.with_suffix("")) for path in pictures]
    _count_unused(text_files, texts, paths_of_text, left_out)
    left_out.print()
    contents = storage.contents((path for path in paths_of_text if path is not None), EXTENSIONS["json"])
    for (path, status), text_path in zip(pictures.items(), paths_of_text, strict=True):
        content = b"" if text_path is None else next(contents)
        if not storage.is_utf8(str(path)):
            yield unnamed_item(path, root, "folder")
            continue
        name = path.relative_to(root).as_posix()
        meta = {"source": "folder", "name": name, "num_bytes": status.num_bytes}
        try:
            if text_path is None:
                raise ValueError(f"{path}: no caption; expected it in {path.with_suffix('.txt')} or .json")
            if isinstance(content, ValueError):
                raise content
            captions, fields = _captions(content, text_path, layout)
        except ValueError as error:
            yield Item(name, bytes, (), meta, problem=str(error))
            continue
        meta |= {"fields": fields} if fields else {}
        yield Item(name, partial(read_file, path), captions, meta, stamp=status.stamp)


def _first_texts(paths: Iterable[Path]) -> dict[Path, Path]:
    """Path without its suffix -> the caption file that counts: .txt before .json, and
    small letters first.
    """

    def rank(path: Path) -> tuple[bool, bool, str]:
        suffix = path.suffix.lower()
        return suffix == ".json", path.suffix != suffix, path.suffix

    first: dict[Path, Path] = {}
    for path in sorted(paths, key=rank):
        first.setdefault(path.with_suffix(""), path)
    return first


def _count_unused(
    text_files: Iterable[Path], first: dict[Path, Path], used: Iterable[Path | None], left_out: LeftOut
) -> None:
    """Count the caption files that no picture takes. first: see `_first_texts`."""
    used = set(used)
    for path in text_files:
        if path not in used:
            other = first[path.with_suffix("")]
            is_second = other in used
            left_out.add(f"its {other.suffix} is used" if is_second else "no picture of that name", path)


def _captions(content: bytes, path: Path, layout: Layout) -> tuple[tuple[str, ...], dict]:
    """The captions in a file, and the other keys of its JSON."""
    if path.suffix.lower() == ".txt":
        layout.columns.num_texts += 1
        return (decode_caption(content, str(path)),), {}
    fields = parse_object(content, str(path), f"an object with {', '.join(layout.captions)}")
    captions = captions_in(fields, layout, str(path))
    return captions, {key: value for key, value in fields.items() if key not in layout.captions}


SOURCE = Source(
    "--folder", "images with a .txt or .json caption of the same name, at any depth", read, uses=()
)
