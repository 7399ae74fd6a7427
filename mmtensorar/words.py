"""Numbers in messages. Imports nothing of ours."""

from __future__ import annotations


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
