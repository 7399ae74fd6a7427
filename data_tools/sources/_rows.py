"""What several sources need: pictures below a folder, rows of a table, captions of
classes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data_tools import storage
from data_tools.caption_columns import quoted, texts_in
from data_tools.sources import Item, Layout
from data_tools.storage import FileStatus, read_file
from mmtensorar.data.members import decode_caption
from mmtensorar.data.pictures import SUFFIXES
from mmtensorar.data.tars import compression
from mmtensorar.files import check_characters, decode_text, parse_json
from mmtensorar.folders import LeftOut


def find_pictures(
    root: Path, left_out: LeftOut, expected: tuple[str, ...] = (), *, entered: Iterable[Path] = ()
) -> tuple[dict[Path, FileStatus], dict[Path, FileStatus]]:
    """Every picture below a folder, sorted; and the files of `expected`.

    Args:
        left_out: Receives what is not read, see `storage.files`, and files with other
            suffixes.
        expected: Suffixes of the files that come second.
        entered: Folders that are not entered.

    Raises ValueError when there is no picture.
    """
    files = storage.files(root, left_out, entered=entered)
    pictures = {path: status for path, status in files.items() if path.suffix.lower() in SUFFIXES}
    others = {path: status for path, status in files.items() if path.suffix.lower() in expected}
    if not pictures:
        raise ValueError(f"{root}: no {', '.join(SUFFIXES)} files in it")
    for path in files:
        if path not in pictures and path not in others:
            left_out.add("not a picture", path)
    return pictures, others


def unnamed_item(path: Path, root: Path, source: str) -> Item:
    """The item of a picture in a folder whose name is not UTF-8: a problem."""
    name = path.relative_to(root).as_posix().encode(errors="backslashreplace").decode()
    return Item(name, bytes, (), {"source": source, "name": name}, problem=storage.name_problem(path))


def parse_object(content: str | bytes, where: str, expected: str = "an object") -> dict[str, Any]:
    """A JSON object. Raises ValueError, starting with `where`, for anything else."""
    text = decode_text(content, where) if isinstance(content, bytes) else content
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: holds {type(value).__name__}; expected {expected}")
    check_characters(value, where)
    return value


def captions_in(fields: Mapping[str, Any], layout: Layout, where: str) -> tuple[str, ...]:
    """The captions in the layout's columns of a row, which is counted.

    A column may hold one text, a list of texts, or nothing. Raises ValueError when all
    columns together have no caption, and for a column that holds anything else.
    """
    layout.columns.add(fields, layout.captions)
    captions = []
    for column in layout.captions:
        for text in texts_in(fields.get(column)):
            if not isinstance(text, str):
                raise ValueError(f"{where}: {column!r} holds {type(text).__name__}; expected a caption")
            captions.append(decode_caption(text.encode(errors="surrogatepass"), where))
    if not captions:
        found = f"; found {quoted(fields) or 'nothing'}; --caption-columns names others"
        if any(column in fields for column in layout.captions):
            found = ": " + ", ".join(f"{name!r} {_without_text(fields, name)}" for name in layout.captions)
        raise ValueError(f"{where}: no caption in {quoted(layout.captions)}{found}")
    return tuple(captions)


def _without_text(fields: Mapping[str, Any], column: str) -> str:
    if column not in fields:
        return "is missing"
    return "is null" if fields[column] is None else "is empty"


# ---- tables ----------------------------------------------------------------------------------


def match_columns(names: Sequence[str], layout: Layout, where: str) -> Layout:
    """The layout with its columns as a table spells them: spaces around a name do not
    count.

    Raises ValueError, naming the option, for a column that is missing or occurs twice.
    """

    def found(column: str, option: str) -> str:
        exact = [name for name in names if name == column]
        alike = exact or [name for name in names if name.strip() == column]
        if len(alike) != 1:
            raise ValueError(
                f"{where}: expected one column {column!r}, found {quoted(names) or 'nothing'}; "
                f"{option} names another one"
            )
        return alike[0]

    return replace(
        layout,
        image=found(layout.image, "--image-column"),
        captions=tuple(found(column, "--caption-columns") for column in layout.captions),
    )


def table_file(location: str, layout: Layout) -> tuple[Path, Path]:
    """A table's path, and the folder that the paths in it are relative to."""
    path = storage.at(location)
    if storage.is_local(path) and path.is_dir():
        raise ValueError(f"{path} is a folder; expected the file of a table")
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file{'' if storage.is_local(path) else ', or it cannot be reached'}"
        )
    with path.open("rb") as file:
        if found := compression(file.read(8)):
            raise ValueError(f"{path}: compressed with {found}; unpack it first")
    return path, (layout.root or path.parent).resolve()


def path_in(root: Path, name: Any, where: str) -> Path:
    """The file of a name in a folder.

    Raises ValueError when it lies outside the folder, or does not exist. In a store the
    latter is not checked: one request a picture would take too long.
    """
    if not isinstance(name, str):
        raise ValueError(f"{where}: the image is {type(name).__name__}; expected a path")
    local = storage.is_local(root)
    path = root if "\0" in name or (not local and "://" in name) else path_below(root, name)
    if path is None or (not local and path == root):
        raise ValueError(
            f"{where}: image {name!r} lies outside {root}; --image-root names the folder of the pictures"
        )
    if local and not os.path.isfile(path):
        raise ValueError(f"{where}: image {name!r} is not a file in {root}")
    return path


def path_below(root: Path, name: str) -> Path | None:
    """The path of a name in a folder; None when `..` or an absolute path leads out of
    it.

    Links in the folder may lead out of it, as in every source: the one who made the
    folder put them there.
    """
    if not storage.is_local(root):
        path = (root / name).resolve()
        return path if path.is_relative_to(root) else None
    for path in (Path(os.path.normpath(root / name)), Path(os.path.realpath(root / name))):
        if path.is_relative_to(root):
            return path
    return None


def row_item(key: str, fields: dict[str, Any], layout: Layout, root: Path, where: str, source: str) -> Item:
    """The item of a row whose image is a path.

    Args:
        key: Key of the item.
        fields: Column -> value. Other columns than image and captions are kept in meta.
        layout: Names the columns of image and captions.
        root: Folder of the pictures.
        where: File and row, for messages.
        source: Kind of source, for meta.
    """
    meta: dict[str, Any] = {"source": source}
    try:
        if layout.image not in fields:
            layout.columns.add(fields, layout.captions)
            raise ValueError(
                f"{where}: expected an image in {layout.image!r}, found {quoted(fields) or 'nothing'}; "
                "--image-column names another one"
            )
        path = path_in(root, fields[layout.image], where)
        captions = captions_in(fields, layout, where)
    except ValueError as error:
        return Item(key, bytes, (), meta, problem=str(error))
    meta["name"] = fields[layout.image]
    stamp = ""
    if storage.is_local(path):
        meta["num_bytes"], stamp = path.stat().st_size, storage.stamp(path)
    others = {name: value for name, value in fields.items() if name not in (layout.image, *layout.captions)}
    meta |= {"fields": others} if others else {}
    return Item(key, partial(read_file, path), captions, meta, stamp=stamp)


def picture_in(value: Any, column: str, where: str, find: Callable[[str], Path]) -> bytes:
    """The encoded picture in a cell: bytes, or Hugging Face's {"bytes", "path"}.

    Args:
        value: Content of the cell.
        column: Name of its column, for messages.
        where: File and row, for messages.
        find: A path in the cell -> the file. It raises ValueError for a file that is
            refused.
    """
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            return read_file(find(value["path"]))
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise ValueError(f"{where}: no bytes of a picture in {column!r}")
    return value


# ---- classes ---------------------------------------------------------------------------------


def check_class_names(classes: Iterable[str], layout: Layout, where: str) -> None:
    """Print notes on classes that --class-names does not name, and on names of no
    class.

    Raises ValueError when there are both: then a class is probably misspelt.
    """
    if layout.class_names is None:
        return
    classes = list(classes)
    unnamed = [name for name in classes if name not in layout.class_names]
    unknown = sorted(layout.class_names.keys() - set(classes))
    if unnamed and unknown:
        raise ValueError(
            f"{where}: --class-names has {quoted(unknown)}, which no class is called, "
            f"and no name for {quoted(unnamed)}"
        )
    notes = [f"classes without a name in --class-names: {quoted(unnamed)}"] if unnamed else []
    notes += [f"names in --class-names without a class: {quoted(unknown)}"] if unknown else []
    if not layout.templates:
        notes.append("--class-names has no effect without --class-template")
    for note in notes:
        print(f"note: {where}: {note}", file=sys.stderr)


def class_captions(name: str, layout: Layout) -> tuple[str, ...]:
    """A class's captions by the templates; empty without templates.

    name: folder or number of the class. Where the layout has no name for it,
    underscores become spaces.
    """
    shown = (layout.class_names or {}).get(name, name.replace("_", " "))
    return tuple(template.replace("{}", shown) for template in layout.templates)
