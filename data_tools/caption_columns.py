"""Counts of the caption columns that the rows of a source have, so that a wrong name is
found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmtensorar.data.members import is_empty

MAX_NAMES = 20  # names of columns that a message lists


def texts_in(value: Any) -> list[Any]:
    """What a cell holds, one or a list, without nulls and blank texts."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [text for text in values if text is not None and not (isinstance(text, str) and is_empty(text))]


@dataclass
class ColumnCount:
    """Which of --caption-columns the rows have.

    Args:
        num_rows: Rows of a table, or JSON objects.
        missing, empty: Column -> rows without it, and rows in which it holds no text.
        names: Names of the rows' columns, as keys; not all when there are many.
        num_texts: Samples whose caption is in a .txt, where no column is read.
        blank: Column -> captions without text in lists that have others.
    """

    num_rows: int = 0
    missing: Counter[str] = field(default_factory=Counter)
    empty: Counter[str] = field(default_factory=Counter)
    names: dict[str, None] = field(default_factory=dict)
    num_texts: int = 0
    blank: Counter[str] = field(default_factory=Counter)

    def add(self, fields: Mapping[str, Any], columns: tuple[str, ...]) -> None:
        """Count one row."""
        self.num_rows += 1
        for column in columns:
            if column not in fields:
                self.missing[column] += 1
            elif not (texts := texts_in(fields[column])):
                self.empty[column] += 1
            elif isinstance(fields[column], (list, tuple)) and (blank := len(fields[column]) - len(texts)):
                self.blank[column] += blank
        if len(self.names) <= MAX_NAMES:
            self.names.update(dict.fromkeys(fields))

    def notes(self, where: str, columns: tuple[str, ...], is_given: bool) -> list[str]:
        """What the columns lack, one sentence each, when all rows have been counted.

        is_given: whether the command has --caption-columns.

        Raises ValueError for a column that no row has.
        """
        absent = [column for column in columns if self.num_rows and self.missing[column] == self.num_rows]
        if absent:
            raise ValueError(
                f"{where}: no row has the column {quoted(absent)} of --caption-columns; "
                f"the columns are {quoted(self.names) or 'none'}"
            )
        notes = [
            f"rows {lack} column {column!r}: {count} of {self.num_rows}"
            for counts, lack in ((self.missing, "without"), (self.empty, "without text in"))
            for column, count in counts.items()
        ]
        notes += [
            f"captions without text that column {column!r} has beside others, left out: {count}"
            for column, count in self.blank.items()
        ]
        if is_given and self.num_texts:
            notes.append(f"captions read from .txt, where --caption-columns has no effect: {self.num_texts}")
        elif is_given and not self.num_rows:
            notes.append("--caption-columns has no effect: this source has no columns")
        return notes


def quoted(names: Any) -> str:
    """The first names, in quotes."""
    names = [repr(name) for name in names]
    more = ", ..." if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
