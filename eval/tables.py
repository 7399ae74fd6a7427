"""Tables of text, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def aligned(rows: Rows, *, num_left: int = 1) -> list[list[str]]:
    """The cells padded to their column's width; the first num_left columns are
    left-aligned.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [
            cell.ljust(width) if column < num_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]


def text(rows: Rows, *, num_left: int = 1) -> list[str]:
    """Lines of a table for a terminal, columns two spaces apart."""
    return ["  ".join(row) for row in aligned(rows, num_left=num_left)]


def markdown(rows: Rows) -> str:
    """A Markdown table; the first row is its head.

    The first column is on the left, numbers on the right.
    """
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    ruler = "|" + "|".join(["---", *["---:"] * (len(rows[0]) - 1)]) + "|"
    return "\n".join([head, ruler, *body])
