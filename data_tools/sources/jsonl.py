"""A JSON object a line, with the path of a picture and its caption."""

from __future__ import annotations

import json
from collections.abc import Iterator

from data_tools import storage
from data_tools.sources import Item, Layout, of_row

MAX_LINE = 2**22  # bytes


def items(place: str, layout: Layout) -> Iterator[Item]:
    """Raises ValueError naming file and line for a line that is not such an object, or too long."""
    path = storage.at(place)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file{'' if storage.is_local(path) else ', or it cannot be reached'}"
        )
    root = (layout.root or path.parent).resolve()
    lines = 0
    with storage.opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
            where = f"{path}:{number}"
            if len(line) == MAX_LINE:
                raise ValueError(f"{where}: the line has {MAX_LINE} bytes or more")
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error})") from error
            if not isinstance(fields, dict):
                raise ValueError(
                    f'{where}: expected {{"{layout.image}": path, "{layout.captions[0]}": text}}'
                )
            yield of_row(f"line {number}", fields, layout, root, where, "jsonl")
            lines += 1
    if not lines:
        raise ValueError(f"{path}: no lines in it")
