"""Rows of CSV and TSV files: each one's cells and line, or why it cannot be read.

One quote that is never closed must not swallow the rows after it. So a row that cannot
be read ends with its first line, and reading resumes at the next one.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from mmtensorar.files import Line

MAX_CELL = 2**20  # characters
MAX_ROW_LINES = 1000  # that a quoted cell may span

IsRow = Callable[[list[str]], bool]  # whether the cells of a line look like a row's


class Row(NamedTuple):
    """line: its first one, from 1. problem: why it cannot be read, None when it can."""

    line: int
    cells: list[str]
    problem: str | None = None


def plain_rows(lines: Iterable[Line], delimiter: str) -> Iterator[Row]:
    """Rows without quoting: a line is a row, and a quote is a character.

    Empty lines are left out.
    """
    for line in lines:
        if line.problem is not None or line.text:
            yield Row(line.number, line.text.split(delimiter), line.problem)


def quoted_rows(
    lines: Iterable[Line], delimiter: str, is_row: IsRow, *, strict: bool = True
) -> Iterator[Row]:
    """Rows whose cells may be in quotes, and then hold delimiters, line ends and
    doubled quotes.

    Empty lines are left out.

    Args:
        lines: Of the file.
        delimiter: Between cells.
        is_row: A row of which two lines look like rows by themselves has swallowed one.
        strict: Characters after a closing quote are a problem.
    """
    csv.field_size_limit(MAX_CELL)
    source, waiting = iter(lines), deque[Line]()

    def take() -> Line | None:
        return waiting.popleft() if waiting else next(source, None)

    while (line := take()) is not None:
        if line.problem is not None:
            yield Row(line.number, [], line.problem)
        elif cells := _one_line(line.text, delimiter):
            yield Row(line.number, cells)
        elif line.text:
            row, used = _quoted_row(line, take, delimiter, is_row, strict)
            yield row
            if row.problem is not None:
                waiting.extendleft(reversed(used[1:]))


def _quoted_row(
    first: Line, take: Callable[[], Line | None], delimiter: str, is_row: IsRow, strict: bool
) -> tuple[Row, list[Line]]:
    """The row that begins with a line, and the lines that were read for it."""
    used, why = [first], "the file ends"

    def text() -> Iterator[str]:
        nonlocal why
        yield first.text + first.end
        while len(used) < MAX_ROW_LINES:
            if (line := take()) is None:
                return
            used.append(line)
            if line.problem is not None:
                why = f"line {line.number} cannot be read"
                return
            yield line.text + line.end
        why = f"{MAX_ROW_LINES} lines follow"

    try:
        cells = next(csv.reader(text(), delimiter=delimiter, strict=True))
    except csv.Error as error:
        problem = str(error)
        if problem == "unexpected end of data":
            problem = f"a quote opens in this row, and {why} before it closes"
        elif not strict and len(used) == 1 and (cells := _lenient(first.text, delimiter)):
            return Row(first.number, cells), used
        return Row(first.number, [], f"not CSV ({problem})"), used
    if len(used) > 1 and sum(_looks_whole(line.text, delimiter, is_row) for line in used) > 1:
        problem = (
            f"not CSV (a quote opens in this row, and closes in line {used[-1].number}, after other rows)"
        )
        return Row(first.number, [], problem), used
    return Row(first.number, cells), used


def _one_line(text: str, delimiter: str) -> list[str]:
    """The cells of a row that one line holds; none when it may go on, or cannot be
    read.
    """
    if '"' not in text and "\r" not in text and len(text) <= MAX_CELL:
        return text.split(delimiter) if text else []
    try:
        return next(csv.reader((text,), delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []


def _looks_whole(text: str, delimiter: str, is_row: IsRow) -> bool:
    return is_row(text.split(delimiter)) or is_row(_lenient(text, delimiter))


def _lenient(text: str, delimiter: str) -> list[str]:
    """The cells of one line as Python's csv guesses them; none when it cannot."""
    try:
        return next(csv.reader([text], delimiter=delimiter), [])
    except csv.Error:
        return []


class Quoting(NamedTuple):
    """is_used: whether quotes are read as quoting.

    num_unpaired: lines whose quotes do not pair up.
    """

    is_used: bool
    num_unpaired: int


def quoting_of(lines: Iterable[Line], delimiter: str, num_cells: int, is_row: IsRow) -> Quoting:
    """Whether the rows of a file without a standard, such as TSV, are quoted
    consistently.

    Without quoting, a cell that begins with a quote is common. So the file is read in
    both ways. It is quoted when all its quotes pair up and no more rows have a wrong
    number of cells than without quoting, or when fewer rows cannot be read.

    Args:
        lines: Of the file, without the header.
        num_cells: Of the header.
        is_row: See `quoted_rows`.
    """
    plain_wrong = num_unpaired = 0

    def counted() -> Iterator[Line]:
        nonlocal plain_wrong, num_unpaired
        for line in lines:
            plain_wrong += bool(line.text) and line.text.count(delimiter) + 1 != num_cells
            num_unpaired += line.text.count('"') % 2 or (
                '"' in line.text and not _one_line(line.text, delimiter)
            )
            yield line

    unpaired = wrong = 0
    for row in quoted_rows(counted(), delimiter, is_row):
        if row.cells:
            wrong += len(row.cells) != num_cells
        else:
            unpaired += row.problem is not None and row.problem.startswith("not CSV")
    is_used = (not unpaired and wrong <= plain_wrong) or unpaired + wrong < plain_wrong
    return Quoting(is_used, num_unpaired)
