"""A folder of pictures, each with its caption in a file of the same name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_tools import storage
from data_tools.sources import Item, Layout, images, texts
from data_tools.storage import read_file
from mmtensorar.data.shards import EXTENSIONS, decode_caption


def items(place: str, layout: Layout) -> Iterator[Item]:
    """Every jpg, png and webp below a folder, with the caption from the .txt beside it, or from the keys of the .json.

    Raises ValueError when there is no picture. Other files are counted aloud.
    """
    root = storage.at(place)
    if storage.is_local(root) and not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    found, beside = images(root, (".txt", ".json"))
    # None: neither is there.
    written = [
        next((each for suffix in (".txt", ".json") if (each := path.with_suffix(suffix)) in beside), None)
        for path in found
    ]
    read = storage.contents((path for path in written if path is not None), EXTENSIONS["json"])
    for (path, num_bytes), text in zip(found.items(), written, strict=True):
        name = path.relative_to(root).as_posix()
        meta = {"source": "folder", "name": name, "num_bytes": num_bytes}
        content = b"" if text is None else next(read)
        try:
            if text is None:
                raise ValueError(f"{path}: no caption; expected it in {path.with_suffix('.txt')} or .json")
            if isinstance(content, ValueError):
                raise content
            captions, fields = _captions(content, text, layout)
        except ValueError as error:
            yield Item(name, bytes, (), meta, problem=str(error))
            continue
        yield Item(name, partial(read_file, path), captions, meta | ({"fields": fields} if fields else {}))


def _captions(content: bytes, path: Path, layout: Layout) -> tuple[tuple[str, ...], dict]:
    """The captions in a file, and what else its JSON says."""
    if path.suffix == ".txt":
        return (decode_caption(content, str(path)),), {}
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path}: holds {type(found).__name__}; expected an object with {', '.join(layout.captions)}"
        )
    captions = texts(found, layout.captions, str(path))
    return captions, {key: value for key, value in found.items() if key not in layout.captions}
