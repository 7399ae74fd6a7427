"""A CSV (or TSV) file with a header, a column with paths of pictures and one or more with captions."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from data_tools import storage
from data_tools.sources import Item, Layout, of_row

MAX_CELL = 2**20  # characters


def items(place: str, layout: Layout) -> Iterator[Item]:
    """Raises ValueError naming file and line for a missing column, another number of cells, and text that is not UTF-8."""
    path = storage.at(place)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file{'' if storage.is_local(path) else ', or it cannot be reached'}"
        )
    root = (layout.root or path.parent).resolve()
    csv.field_size_limit(MAX_CELL)
    with path.open(
        encoding="utf-8-sig", newline=""
    ) as file:  # a spreadsheet's byte order mark is none of the first name's
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            header = next(reader, [])
            for column in (layout.image, *layout.captions):
                if header.count(column) != 1:
                    found = ", ".join(map(repr, header)) or "nothing"
                    raise ValueError(f"{path}:1: expected one column {column!r}, found {found}")
            rows = 0
            for cells in reader:
                if not cells:
                    continue
                where = f"{path}:{reader.line_num}"
                if len(cells) != len(header):
                    raise ValueError(f"{where}: {len(cells)} cells, but the header has {len(header)}")
                rows += 1
                yield of_row(f"row {rows}", dict(zip(header, cells, strict=True)), layout, root, where, "csv")
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num}: not CSV ({error})") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: after line {reader.line_num}: not UTF-8 ({error.reason})") from error
    if not rows:
        raise ValueError(f"{path}: no rows in it")
