"""A file with one JSON object a line, which has the path of a picture and its caption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools import storage
from data_tools.sources import Item, Layout, Listing, Source
from data_tools.sources._rows import parse_object, row_item, table_file

MAX_LINE = 2**22  # bytes


def read(location: str, layout: Layout) -> Listing:
    """The lines of a file. Raises ValueError naming file and line for a bad or too long line."""
    path, root = table_file(location, layout)
    return Listing(_items(path, root, layout))


def _items(path: Path, root: Path, layout: Layout) -> Iterator[Item]:
    expected = f'{{"{layout.image}": path, "{layout.captions[0]}": text}}'
    num_lines = 0
    with storage.open_file(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
            where = f"{path}:{number}"
            if len(line) == MAX_LINE:
                raise ValueError(f"{where}: the line has {MAX_LINE} bytes or more")
            if not line.strip():
                continue
            fields = parse_object(line, where, expected)
            yield row_item(f"line {number}", fields, layout, root, where, "jsonl")
            num_lines += 1
    if not num_lines:
        raise ValueError(f"{path}: no lines in it")


SOURCE = Source("--jsonl", 'lines {"image": path, "caption": text}', read)
