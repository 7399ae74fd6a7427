"""A folder of pictures, each with its caption in a file of the same name."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_tools.sources import Item, Layout, images, read_file, texts
from mmtensorar.shards import decode_caption


def items(place: str, layout: Layout) -> Iterator[Item]:
    """Every jpg, png and webp below a folder, with the caption from the .txt beside it, or from the keys of the .json.

    Raises ValueError when there is no picture. Other files are counted aloud.
    """
    root = Path(place)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    found, others = images(root, (".txt", ".json"))
    if others:
        print(f"note: left out {len(others)} files that are not jpg, png or webp, such as {others[0]}", file=sys.stderr)
    for path in found:
        name = path.relative_to(root).as_posix()
        meta = {"source": "folder", "name": name, "num_bytes": path.stat().st_size}
        try:
            captions, fields = _captions(path, layout)
        except ValueError as error:
            yield Item(name, bytes, (), meta, problem=str(error))
            continue
        yield Item(name, partial(read_file, path), captions, meta | ({"fields": fields} if fields else {}))


def _captions(path: Path, layout: Layout) -> tuple[tuple[str, ...], dict]:
    """The captions of a picture, and what else its JSON says."""
    text, fields = path.with_suffix(".txt"), path.with_suffix(".json")
    if text.is_file():
        return (decode_caption(read_file(text), str(text)),), {}
    if not fields.is_file():
        raise ValueError(f"{path}: no caption; expected it in {text} or {fields.name}")
    try:
        found = json.loads(read_file(fields))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{fields}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{fields}: holds {type(found).__name__}; expected an object with {', '.join(layout.captions)}")
    captions = texts(found, layout.captions, str(fields))
    return captions, {key: value for key, value in found.items() if key not in layout.captions}
