"""How many steps to feed per pass: chosen from measured times and confirmed guesses.

The choice changes the time that a picture takes, never its tokens (up to rounding).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch import nn

MOST_STEPS = 64  # of a pass
POWERS = [2**power for power in range(MOST_STEPS.bit_length())]
FORGET = 0.98  # per pass: guesses at the beginning of a picture say little about its end
PRIOR = 0.5  # observations that the rate of the guess before counts for
# A number of steps that seems this good compared with the best is worth a try.
PROMISING = 0.7
EXPLORE_EVERY = 32  # passes: then a neighbour of the best number of steps is measured again
OUTLIER = 3.0  # times the expected seconds: something else ran


class Pace:
    """What has been measured of a model on this machine.

    The seconds of a pass are taken to be a straight line over its new positions, which
    averages the noise of a busy machine. If everything slows down alike, the choice
    stays the same.
    """

    def __init__(self):
        self._reached = [0.0] * MOST_STEPS  # how often all guesses before guess j were right
        self._right = [0.0] * MOST_STEPS  # how often guess j was right too
        self._passes = 0
        self._shapes: set[tuple[int, int]] = set()  # (pictures, steps) that have run
        self._tries: Counter[int] = Counter()  # steps -> measured passes
        self._points = 0
        # Means over the measured passes, and sums of products of deviations from them.
        self._new, self._seconds, self._new_new, self._new_seconds = 0.0, 0.0, 0.0, 0.0

    def choose(self, pictures: int, limit: int) -> int:
        """The number of steps, a power of 2 or the limit, with the most tokens per
        second; sometimes one that is to be measured.

        pictures: that are fed together. limit: the most steps that may be fed.
        """
        sizes = [*(power for power in POWERS if power < limit), limit]
        # Sizes are tried upwards: one that is far too large would take long.
        largest = 2 * max((steps for steps, tries in self._tries.items() if tries), default=0)
        scores = {
            steps: self._expected(steps) / self._estimate(pictures * steps)
            for steps in sizes
            if steps <= max(1, largest)
        }
        best = max(scores, key=lambda steps: scores[steps])
        promising = [steps for steps in scores if scores[steps] >= PROMISING * scores[best]]
        new = [steps for steps in promising if not self._tries[steps] and steps in POWERS]
        if new:
            return min(new)
        if self._passes % EXPLORE_EVERY == EXPLORE_EVERY - 1:
            neighbours = [steps for steps in promising if steps in (best // 2, 2 * best)]
            return min(neighbours, key=lambda steps: self._tries[steps], default=best)
        return best

    def record(self, pictures: int, steps: int, seconds: float, confirmed: Sequence[int]) -> None:
        """Add a pass.

        confirmed: for each picture, how many guesses were right before the first wrong
            one. The pass fed steps - 1 guesses; its last prediction shows whether the
            next guess was right too, so it is at most `steps`.
        """
        self._passes += 1
        for counts in (self._reached, self._right):
            counts[:] = [FORGET * count for count in counts]
        for right in confirmed:
            for guess in range(min(right + 1, steps)):
                self._reached[guess] += 1
                self._right[guess] += guess < right
        if (pictures, steps) in self._shapes:
            self._add(pictures * steps, seconds)
            self._tries[steps] += 1
        else:  # the first pass of a shape includes start-up costs
            self._shapes.add((pictures, steps))

    def _add(self, new: int, seconds: float) -> None:
        """Add a point of the line (Welford's update of means and products)."""
        if self._points > EXPLORE_EVERY:
            seconds = min(seconds, OUTLIER * self._estimate(new))
        self._points += 1
        from_mean = new - self._new
        self._new += from_mean / self._points
        self._seconds += (seconds - self._seconds) / self._points
        self._new_new += from_mean * (new - self._new)
        self._new_seconds += from_mean * (seconds - self._seconds)

    def _estimate(self, new: int) -> float:
        """Seconds of a pass of so many new positions.

        Where all measured passes had equally many, more are taken to cost nothing, so
        that they are tried.
        """
        if not self._points:
            return 1.0
        slope = max(0.0, self._new_seconds / self._new_new) if self._new_new else 0.0
        slope = min(slope, self._seconds / self._new)  # no pass takes less than nothing
        return self._seconds + slope * (new - self._new)

    def _expected(self, steps: int) -> float:
        """Tokens that a pass of so many steps makes final, on average."""
        expected, all_right, rate = 1.0, 1.0, 0.5
        for guess in range(steps - 1):
            # Guesses that were hardly ever reached are about as good as those before.
            rate = (self._right[guess] + PRIOR * rate) / (self._reached[guess] + PRIOR)
            all_right *= rate
            expected += all_right
        return expected


_PACES: WeakKeyDictionary[nn.Module, Pace] = WeakKeyDictionary()


def pace_of(model: nn.Module) -> Pace:
    """The pace of a model, which later batches go on from."""
    return _PACES.setdefault(model, Pace())
