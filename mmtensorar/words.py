"""Numbers and errors in messages, and numbers of command lines.

Imports nothing of ours.
"""

from __future__ import annotations

import argparse
import os


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 sample`, `2 samples`, `0 classes`.

    plural: where adding s or es does not make it.
    """
    if number == 1:
        return f"1 {noun}"
    return f"{number} {plural or noun + ('es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's')}"


def time_left(seconds: float) -> str:
    """`under a minute left`, `1 minute left`, `90 minutes left`, `3.5 hours left`."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "under a minute left"
    if minutes < 180:
        return f"{counted(minutes, 'minute')} left"
    return f"{seconds / 3600:.1f} hours left"


def whole_number(text: str) -> int:
    """The type of an option: as int, without underscores between digits, which recipes
    refuse too.

    Raises ValueError, and ArgumentTypeError for a number that 64 bits do not hold.
    """
    if "_" in text:
        raise ValueError(text)
    number = int(text)
    if abs(number) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a number less than 2^63, got {text}")
    return number


def any_number(text: str) -> float:
    """The type of an option: as float, without underscores. Raises ValueError."""
    if "_" in text:
        raise ValueError(text)
    return float(text)


def sentence_of(error: Exception) -> str:
    """An error in words.

    Those of Python itself name the file or the text, and no error number.
    """
    if isinstance(error, OSError) and error.strerror:
        what = error.strerror[:1].lower() + error.strerror[1:]
        named = isinstance(error.filename, (str, bytes))
        return f"{os.fsdecode(error.filename)}: {what}" if named else what
    if isinstance(error, UnicodeEncodeError):
        near = error.object[max(0, error.start - 20) : error.end + 20]
        return f"{near!r} holds half a character, or a byte that is not UTF-8"
    if isinstance(error, UnicodeDecodeError):
        near = bytes(error.object[max(0, error.start - 20) : error.end + 20])
        return f"expected UTF-8, got {near!r}"
    return str(error) or type(error).__name__
