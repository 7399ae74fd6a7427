"""WebDataset tars that others made: members {key}.jpg, {key}.txt, {key}.json, {key}.cls beside each other."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_tools import storage
from data_tools.sources import SUFFIXES, Item, Layout, class_captions, texts
from mmtensorar.data import tars
from mmtensorar.data.shards import EXTENSIONS, decode_caption

TEXT = ("txt", "text", "caption")


def items(place: str, layout: Layout) -> Iterator[Item]:
    """The samples of a tar, or of all tars below a folder, in their order.

    The caption is the txt member, or the keys of the json member, or the cls member's class number (or made of its name).
    Members of other kinds are not read, and are counted aloud. Raises ValueError for a damaged or compressed tar.
    """
    path, files = storage.with_suffix(place, ".tar")
    ignored: Counter[str] = Counter()
    samples = 0
    for file in files:
        name = file.relative_to(path).as_posix() if file != path else path.name
        for item in _tar(file, name, layout, ignored):
            samples += 1
            yield item
    if ignored:
        kinds = ", ".join(f"{count} .{kind}" for kind, count in ignored.most_common(5))
        print(f"note: left out members of other kinds: {kinds}", file=sys.stderr)
    if not samples:
        raise ValueError(f"{path}: no samples in it")


def _tar(path: Path, name: str, layout: Layout, ignored: Counter[str]) -> Iterator[Item]:
    last, found, seen = None, {}, set()
    with tars.opened(path) as file:
        if file.pread(2, 0) == b"\x1f\x8b":
            raise ValueError(
                f"{path}: compressed; unpack it with gunzip first, so that any sample can be read alone"
            )
        for member in tars.members(file, path, folders=True):
            folder, _, plain = member.name.rpartition("/")
            if not plain or plain.startswith("."):  # a folder, or what macOS adds beside a file
                continue
            stem, _, extension = plain.partition(".")
            key = f"{folder}/{stem}"
            if key != last:
                if last is not None:
                    yield from _item(file, path, name, last, found, layout, ignored)
                if key in seen:
                    raise ValueError(
                        f"{path}: sample {stem}: its members are not together: {member.name} comes after another key"
                    )
                seen.add(key)
                last, found = key, {}
            extension = extension.lower()
            if extension in found:
                raise ValueError(f"{path}: sample {stem}: member {member.name} is there twice")
            found[extension] = member
        if last is not None:
            yield from _item(file, path, name, last, found, layout, ignored)


def _item(
    file: tars.opened,
    path: Path,
    name: str,
    key: str,
    found: dict[str, tars.Member],
    layout: Layout,
    ignored: Counter[str],
) -> Iterator[Item]:
    key = key.removeprefix("/").removeprefix("./")
    where = f"{path}: sample {key}"
    known = {suffix[1:] for suffix in SUFFIXES}
    pictures = [extension for extension in found if extension in known]
    ignored.update(extension for extension in found if extension not in (*known, *TEXT, "json", "cls"))
    meta = {"source": "webdataset", "name": f"{name} {key}"}
    try:
        if len(pictures) != 1:
            raise ValueError(f"{where}: expected one of {', '.join(sorted(known))}, found {', '.join(found)}")
        picture = found[pictures[0]]
        if picture.size > EXTENSIONS["jpg"]:
            raise ValueError(
                f"{where}: the picture has {picture.size} bytes, more than the {EXTENSIONS['jpg']} allowed"
            )
        captions = _captions(file, path, found, layout, where)
        if layout.own:
            meta = _own_meta(file, path, found, where) or meta
    except ValueError as error:
        yield Item(f"{name} {key}", bytes, (), meta, problem=str(error))
        return
    yield Item(f"{name} {key}", partial(_read, path, picture), captions, {"num_bytes": picture.size} | meta)


def _captions(
    file: tars.opened, path: Path, found: dict[str, tars.Member], layout: Layout, where: str
) -> tuple[str, ...]:
    for extension in (*TEXT, "json", "cls"):
        if extension in found and found[extension].size > EXTENSIONS["json"]:
            raise ValueError(
                f"{where}: .{extension} has {found[extension].size} bytes, more than {EXTENSIONS['json']}"
            )
    for extension in TEXT:
        if extension in found:
            caption = decode_caption(tars.content(file, found[extension], path), where)
            return _of_class(caption, layout, where) if layout.numbered else (caption,)
    if "json" in found:
        try:
            fields = json.loads(tars.content(file, found["json"], path))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: the json member is not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: the json member holds {type(fields).__name__}; expected an object")
        if "cls" not in found or any(fields.get(column) for column in layout.captions):
            return texts(fields, layout.captions, where)
    if "cls" in found:
        number = tars.content(file, found["cls"], path).strip().decode(errors="replace")
        if not number.isdecimal():
            raise ValueError(f"{where}: cls holds {number[:20]!r}; expected a class number")
        if layout.class_names is None:
            raise ValueError(
                f"{where}: a class number and no caption; add --class-names, and --class-template for captions"
            )
        return _of_class(number, layout, where)
    raise ValueError(f"{where}: no caption; expected a txt or json member, found {', '.join(found)}")


def _of_class(number: str, layout: Layout, where: str) -> tuple[str, ...]:
    if number not in layout.class_names:
        raise ValueError(f"{where}: class {number} has no name in --class-names")
    return class_captions(number, layout) or (number,)


def _own_meta(file: tars.opened, path: Path, found: dict[str, tars.Member], where: str) -> dict | None:
    """What a set of ours says of where a picture came from, and how large it was."""
    if "json" not in found:
        return None
    try:
        meta = json.loads(tars.content(file, found["json"], path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: the json member is not JSON ({error})") from error
    return meta if isinstance(meta, dict) else None


def _read(path: Path, member: tars.Member) -> bytes:
    with tars.opened(path) as file:
        return tars.content(file, member, path)
