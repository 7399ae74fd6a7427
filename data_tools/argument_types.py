"""Types of command-line arguments: text -> value, or an ArgumentTypeError that says
what is expected.
"""

from __future__ import annotations

import argparse
import math

from mmtensorar.data.shards import MAX_SIDE
from mmtensorar.words import any_number, whole_number


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(1, text)


def whole(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isascii() or not text.isdigit() or (number := whole_number(text)) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return number


def image_side(text: str) -> int:
    """Pixels a side, up to MAX_SIDE."""
    if (side := positive(text)) > MAX_SIDE:
        raise argparse.ArgumentTypeError(f"expected at most {MAX_SIDE} pixels, got {text}")
    return side


def quality(text: str) -> int:
    """1 to 100."""
    if (value := positive(text)) > 100:
        raise argparse.ArgumentTypeError(f"expected at most 100, got {text}")
    return value


def num_bytes(text: str) -> int:
    """A number of bytes, with K, M or G for powers of 1,000."""
    short = text.upper().removesuffix("B")
    digits, unit = (short[:-1], short[-1]) if short[-1:] in ("K", "M", "G") else (short, "")
    if not digits.isascii() or not digits.isdigit() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of bytes, such as 500M or 1G, got {text!r}")
    return int(digits) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[unit]


def column_names(text: str) -> tuple[str, ...]:
    """Names with commas between, stripped of spaces."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected different names with commas between, got {text!r}")
    return names


def fraction(text: str) -> float:
    """A number between 0 and 1, both excluded."""
    value = _number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text!r}")
    return value


def ratio(text: str) -> float:
    """A finite number of at least 1."""
    value = _number(text)
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return any_number(text)
    except ValueError:
        return math.nan
