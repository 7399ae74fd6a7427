"""A CSV (or TSV) file with a header, a column with paths of pictures and columns with captions."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from data_tools.sources import Item, Layout, Listing, Source
from data_tools.sources._rows import row_item, table_file

MAX_CELL = 2**20  # characters


def read(location: str, layout: Layout) -> Listing:
    """The rows of a file.

    Raises ValueError naming file and line for a missing column, a wrong number of cells, and
    text that is not UTF-8.
    """
    path, root = table_file(location, layout)
    return Listing(_items(path, root, layout))


def _items(path: Path, root: Path, layout: Layout) -> Iterator[Item]:
    csv.field_size_limit(MAX_CELL)
    # utf-8-sig: a spreadsheet's byte order mark must not become part of the first column's name.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            header = _header(next(reader, []), path, layout)
            num_rows = 0
            for cells in reader:
                if not cells:
                    continue
                where = f"{path}:{reader.line_num}"
                if len(cells) != len(header):
                    raise ValueError(f"{where}: {len(cells)} cells, but the header has {len(header)}")
                num_rows += 1
                fields = dict(zip(header, cells, strict=True))
                yield row_item(f"row {num_rows}", fields, layout, root, where, "csv")
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num}: not CSV ({error})") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: after line {reader.line_num}: not UTF-8 ({error.reason})") from error
    if not num_rows:
        raise ValueError(f"{path}: no rows in it")


def _header(header: list[str], path: Path, layout: Layout) -> list[str]:
    for column in (layout.image, *layout.captions):
        if header.count(column) != 1:
            present = ", ".join(map(repr, header)) or "nothing"
            raise ValueError(f"{path}:1: expected one column {column!r}, found {present}")
    return header


SOURCE = Source(
    "--csv", "a CSV file with a header and columns image (a path) and caption; .tsv for tabs", read
)
