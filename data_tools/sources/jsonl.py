"""A file with one JSON object a line, which has the path of a picture and its
caption.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools import storage
from data_tools.sources import Item, Layout, Listing, Source
from data_tools.sources._rows import parse_object, row_item, table_file
from mmtensorar.files import iterate_lines

MAX_LINE = 2**22  # bytes


def read(location: str, layout: Layout) -> Listing:
    """The lines of a file. Raises ValueError when there are none."""
    path, root = table_file(location, layout)
    return Listing(_items(path, root, layout))


def _items(path: Path, root: Path, layout: Layout) -> Iterator[Item]:
    expected = f'{{"{layout.image}": path, "{layout.captions[0]}": text}}'
    num_lines = 0
    with storage.open_file(path) as file:
        for line in iterate_lines(file, MAX_LINE):
            if line.problem is None and not line.text.strip():
                continue
            num_lines += 1
            key, where = f"line {line.number}", f"{path}:{line.number}"
            try:
                if line.problem is not None:
                    raise ValueError(f"{where}: not JSON ({line.problem})")
                fields = parse_object(line.text, where, expected)
            except ValueError as error:
                yield Item(key, bytes, (), {"source": "jsonl"}, problem=str(error))
            else:
                yield row_item(key, fields, layout, root, where, "jsonl")
    if not num_lines:
        raise ValueError(f"{path}: no lines in it")


SOURCE = Source(
    "--jsonl", 'lines {"image": path, "caption": text}', read, uses=("--image-column", "--image-root")
)
