"""How many steps to feed per pass: chosen from measured times and confirmed guesses.

The choice changes the time that a picture takes, never its tokens (up to rounding).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch import nn

MOST_STEPS = 64  # of a pass
FORGET = 0.98  # per pass: guesses at the beginning of a picture say little about its end
PRIOR = 0.5  # observations that the rate of the guess before counts for
# A measured time may be too long, when something else ran, but hardly too short. So the
# shortest counts, and grows by this factor whenever a longer one is seen.
DRIFT = 1.02


class Pace:
    """What has been measured of a model on this machine."""

    def __init__(self):
        self._seconds: dict[int, float] = {}  # new positions of a pass -> seconds
        self._reached = [0.0] * MOST_STEPS  # how often all guesses before guess j were right
        self._right = [0.0] * MOST_STEPS  # how often guess j was right too

    def choose(self, pictures: int, limit: int) -> int:
        """The number of steps, a power of 2 or the limit, with the most tokens per
        second.

        pictures: that are fed together. limit: the most steps that may be fed.
        """
        # Sizes are tried upwards: one that is far too large would take long.
        largest = 2 * max(self._seconds, default=0)
        sizes = [2**power for power in range(limit.bit_length()) if 2**power < limit] + [limit]
        known = [steps for steps in sizes if steps == 1 or pictures * steps <= largest]
        return max(known, key=lambda steps: self._expected(steps) / self._estimate(pictures * steps))

    def record(self, pictures: int, steps: int, seconds: float, confirmed: Sequence[int]) -> None:
        """Add a pass.

        confirmed: for each picture, how many guesses were right before the first wrong
            one. The pass fed steps - 1 guesses; its last prediction shows whether the
            next guess was right too, so it is at most `steps`.
        """
        new, known = pictures * steps, self._seconds.get(pictures * steps)
        self._seconds[new] = seconds if known is None else min(seconds, known * DRIFT)
        for counts in (self._reached, self._right):
            counts[:] = [FORGET * count for count in counts]
        for right in confirmed:
            for guess in range(min(right + 1, steps)):
                self._reached[guess] += 1
                self._right[guess] += guess < right

    def _expected(self, steps: int) -> float:
        """Tokens that a pass of so many steps makes final, on average."""
        expected, all_right, rate = 1.0, 1.0, 0.5
        for guess in range(steps - 1):
            # Guesses that were hardly ever reached are about as good as those before.
            rate = (self._right[guess] + PRIOR * rate) / (self._reached[guess] + PRIOR)
            all_right *= rate
            expected += all_right
        return expected

    def _estimate(self, new: int) -> float:
        """Seconds of a pass of so many new positions: measured, else on the line through
        the two nearest sizes.

        Of a single size it is assumed that more positions take no longer, so that they
        are tried.
        """
        if not self._seconds:
            return 1.0
        if new in self._seconds:
            return self._seconds[new]
        sizes = sorted(self._seconds)
        if len(sizes) == 1:
            return self._seconds[sizes[0]]
        right = min(max(bisect_left(sizes, new), 1), len(sizes) - 1)
        low, high = sizes[right - 1], sizes[right]
        slope = max(0.0, (self._seconds[high] - self._seconds[low]) / (high - low))
        return max(self._seconds[low] + slope * (new - low), min(self._seconds.values()))


_PACES: WeakKeyDictionary[nn.Module, Pace] = WeakKeyDictionary()


def pace_of(model: nn.Module) -> Pace:
    """The pace of a model, which later batches go on from."""
    return _PACES.setdefault(model, Pace())
