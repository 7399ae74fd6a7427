"""A CSV (or TSV) file with a header, a column with paths of pictures and columns with
captions.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data_tools import storage
from data_tools.caption_columns import quoted
from data_tools.delimited import IsRow, Row, plain_rows, quoted_rows, quoting_of
from data_tools.sources import Item, Layout, Listing, Source
from data_tools.sources._rows import SUFFIXES, match_columns, row_item, table_file
from mmtensorar.files import iterate_lines


def read(location: str, layout: Layout) -> Listing:
    """The rows of a file, which is tab-separated when its name ends in .tsv.

    CSV has quoting. TSV has it only where the whole file agrees with it: see
    delimited.quoting_of. Raises ValueError naming file and line for a header without
    the columns.
    """
    path, root = table_file(location, layout)
    return Listing(_items(path, root, layout))


def _items(path: Path, root: Path, layout: Layout) -> Iterator[Item]:
    rows = rows_of(path, layout)
    first = next(rows, Row(1, []))
    where = f"{path}:{first.line}"
    if first.problem is not None:
        raise ValueError(f"{where}: {first.problem}")
    header = first.cells
    layout = match_columns(header, layout, where)
    if repeated := [name for name, count in Counter(header).items() if count > 1]:
        note = f"columns of one name, of which the last is kept: {quoted(repeated)}"
        print(f"note: {where}: {note}", file=sys.stderr)
    num_rows = 0
    for num_rows, row in enumerate(rows, 1):
        where, problem = f"{path}:{row.line}", row.problem
        if problem is None and len(row.cells) != len(header):
            cells = "1 cell" if len(row.cells) == 1 else f"{len(row.cells)} cells"
            problem = f"{cells}, but the header has {len(header)}"
        if problem is not None:
            yield Item(f"row {num_rows}", bytes, (), {"source": "csv"}, problem=f"{where}: {problem}")
        else:
            fields = dict(zip(header, row.cells, strict=True))
            yield row_item(f"row {num_rows}", fields, layout, root, where, "csv")
    if not num_rows:
        raise ValueError(f"{path}: no rows in it")


def rows_of(path: Path, layout: Layout) -> Iterator[Row]:
    """The rows of a file, header first. layout: names the column of pictures."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with_quotes = delimiter == "," or _is_quoted(path, delimiter, layout)
    with storage.open_file(path) as file:
        lines = iterate_lines(file)
        if not with_quotes:
            yield from plain_rows(lines, delimiter)
            return
        header = next(quoted_rows(lines, delimiter, lambda cells: False), None)
        if header is None:
            return
        yield header
        yield from quoted_rows(lines, delimiter, _row_test(header.cells, delimiter, layout))


def _row_test(header: list[str], delimiter: str, layout: Layout) -> IsRow:
    """Whether the cells of a line look like a row's.

    The name of a picture tells, in its column from the left or from the right: a
    caption with commas that lacks its quotes has too many cells. In TSV the number of
    cells tells too.
    """
    names = [name.strip() for name in header]
    image = names.index(layout.image) if layout.image in names else 0

    def is_row(cells: list[str]) -> bool:
        if delimiter == "\t" and len(cells) == len(header):
            return True
        if len(cells) < min(2, len(header)):
            return False
        places = (image, image - len(header) + len(cells))
        return any(
            0 <= place < len(cells) and cells[place].strip(' "').lower().endswith(SUFFIXES)
            for place in places
        )

    return is_row


def _is_quoted(path: Path, delimiter: str, layout: Layout) -> bool:
    with storage.open_file(path) as file:
        lines = iterate_lines(file)
        header = next(quoted_rows(lines, delimiter, lambda cells: False), None)
        if header is None:
            return False
        is_row = _row_test(header.cells, delimiter, layout)
        quoting = quoting_of(lines, delimiter, len(header.cells), is_row)
    if quoting.num_unpaired and not quoting.is_used:
        note = f"quotes are read as characters; rows where they do not pair up: {quoting.num_unpaired}"
        print(f"note: {path}: {note}", file=sys.stderr)
    return quoting.is_used


SOURCE = Source(
    "--csv",
    "a CSV file with a header and columns image (a path) and caption; .tsv for tabs",
    read,
    uses=("--image-column", "--image-root"),
)
