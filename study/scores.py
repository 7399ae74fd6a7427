"""Scores of a grid's arms from stored rows: alone, minus the control, and by another
sampling.

Arms are compared on the same seeds and prompts, so that what is hard for both cancels.
Intervals are 95 %, over seeds and prompts (eval/intervals.py); how much seeds differ is
pooled over the arms.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import NamedTuple

import numpy as np

from eval.intervals import (
    MIN_FREEDOM,
    Interval,
    Spread,
    over_seeds,
    pooled_spreads,
    prompts_by_name,
    ratios_to_control,
)
from study import worlds
from study.grid import USUAL, Grid


class Runs(NamedTuple):
    """One arm with one sampling.

    shares: seed -> share of right pictures of each prompt, [prompts].
    """

    rows: list[dict]
    shares: dict[int, np.ndarray]


AllRuns = Mapping[tuple[str, str], Runs]  # by (arm, sampling)


def collect(rows: Sequence[dict]) -> dict[tuple[str, str], Runs]:
    """(arm, sampling) -> its runs. When a run is stored twice, the last row counts."""
    by_key: dict[tuple[str, str], dict[int, dict]] = defaultdict(dict)
    for row in rows:
        by_key[row["arm"], row["sampling"]][row["seed"]] = row
    runs = {}
    for key, by_seed in by_key.items():
        shares = {}
        for seed, row in by_seed.items():
            verdicts = [row["verdicts"][number] for number in sorted(row["verdicts"], key=int)]
            shares[seed] = np.array([mean(map(int, digits)) for digits in verdicts])
        runs[key] = Runs([by_seed[seed] for seed in sorted(by_seed)], shares)
    return runs


def groups_of(grid: Grid) -> list[str]:
    """The group, a skill or class, of each of the world's prompts."""
    return [group for group, _ in worlds.load(grid.world).prompts()]


class Scores:
    """Intervals of a grid's arms.

    Args:
        grid: the arms.
        runs: their results.
        groups: of the prompts, see `groups_of`.

    Attributes:
        distances: arm -> its Frechet distance as a multiple of the control's on the
            same seeds, and the ends of its interval, which are nan where the spread of
            seeds is unknown.
        knows_seeds: whether there are enough seeds to know how they differ.
    """

    def __init__(self, grid: Grid, runs: AllRuns, groups: Sequence[str]):
        self.grid, self.runs, self.groups = grid, runs, groups
        alone = [runs[name, USUAL].shares.values() for name in grid.arms if (name, USUAL) in runs]
        self._spreads_alone = pooled_spreads([np.stack(list(shares)) for shares in alone], groups)
        self._spreads_minus = {}
        for other in filter(None, (grid.control, grid.equal_time)):
            differences = [self._differences(name, other) for name in grid.arms]
            self._spreads_minus[other] = pooled_spreads([d for d in differences if d is not None], groups)
        self.distances = self._distances()
        self.knows_seeds = self._spreads_minus[grid.control]["overall"].freedom >= MIN_FREEDOM

    def usual(self, arm: str) -> Runs | None:
        """An arm's runs with the recipe's sampling."""
        return self.runs.get((arm, USUAL))

    def alone(self, runs: Runs) -> Interval:
        """The score of one arm with one sampling."""
        values = np.stack([runs.shares[seed] for seed in sorted(runs.shares)])
        overall = over_seeds(values, self.groups, self._spreads_alone)["overall"]
        return Interval(overall.value, max(0.0, overall.low), min(1.0, overall.high))

    def minus(self, arm: str, other: str | None = None) -> dict[str, Interval] | None:
        """An arm's score minus another's, of each group and overall; None where no seed
        has both.

        other: the grid's control (None), or its arm of equal time.
        """
        other = other or self.grid.control
        differences = self._differences(arm, other)
        if differences is None:
            return None
        return over_seeds(differences, self.groups, self._spreads_minus[other])

    def minus_usual(self, arm: str, sampling: str) -> Interval | None:
        """The same models' score by a sampling minus that by the recipe's own, over
        prompts.
        """
        sampled, usual = self.runs[arm, sampling], self.usual(arm)
        both = sorted(sampled.shares.keys() & usual.shares.keys()) if usual and sampling != USUAL else []
        if not both:
            return None
        differences = np.stack([sampled.shares[seed] - usual.shares[seed] for seed in both])
        same_models = dict.fromkeys(prompts_by_name(self.groups), Spread(0.0, 0))
        return over_seeds(differences, self.groups, same_models)["overall"]

    def ratio(self, arm: str) -> str:
        """An arm's Frechet distance over the control's, with its interval where that is
        known.
        """
        value, low, high = self.distances[arm]
        return f"{value:.2f}" if np.isnan(low) else f"{value:.2f} [{low:.2f} {high:.2f}]"

    def _differences(self, arm: str, other: str) -> np.ndarray | None:
        """[seeds, prompts] shares minus the other's; None for the other itself, or
        where no seed has both.
        """
        one, two = self.usual(arm), self.usual(other)
        both = sorted(one.shares.keys() & two.shares.keys()) if one and two and arm != other else []
        return np.stack([one.shares[seed] - two.shares[seed] for seed in both]) if both else None

    def _distances(self) -> dict[str, tuple[float, float, float]]:
        logs = {
            name: {row["seed"]: np.log(row["frechet"]) for row in runs.rows}
            for (name, sampling), runs in self.runs.items()
            if sampling == USUAL
        }
        control = logs.pop(self.grid.control, {})
        return ratios_to_control(
            {
                name: np.array(
                    [of_arm[seed] - control[seed] for seed in sorted(of_arm.keys() & control.keys())]
                )
                for name, of_arm in logs.items()
            }
        )


def percent(score: Interval) -> str:
    """A score, in percent, with its interval."""
    return f"{100 * score.value:.1f} [{100 * score.low:.1f} {100 * score.high:.1f}]"


def mean_of(runs: Runs, key: str) -> np.ndarray | None:
    """Mean over seeds of a row's list, or of one in its probe; None where the rows do
    not have it.
    """
    first = runs.rows[0]
    if key in first:
        return np.mean([row[key] for row in runs.rows], axis=0)
    if key in first["probe"]:
        return np.mean([row["probe"][key] for row in runs.rows], axis=0)
    return None
