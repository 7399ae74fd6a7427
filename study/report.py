"""The page of a study: tables, intervals and plots from the stored results alone.

Intervals are 95 %, over seeds and prompts (see `interval`; how much seeds differ is pooled over the arms). Arms are set beside the control on the same seeds and prompts, so that what
is hard for both cancels.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from math import floor, log10
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
from scipy import stats

from mmtensorar.files import write_text
from study import worlds
from study.grid import BASE, USUAL, Grid

MIN_FREEDOM = 5  # from which on the spread of seeds enters the intervals
STEP_TIMES = "step_times.json"  # arm -> seconds of a step and what it takes over the control's, timed alone
NATS_PER_BIT = np.log(2)


class Interval(NamedTuple):
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} [{100 * self.low:+.1f} {100 * self.high:+.1f}]"


class Runs(NamedTuple):
    """One arm with one sampling. shares: seed -> share of right pictures of each prompt [N]."""

    rows: list[dict]
    shares: dict[int, np.ndarray]


def collect(rows: Sequence[dict]) -> dict[tuple[str, str], Runs]:
    """(arm, sampling) -> its runs. Of a run that is stored twice the last counts."""
    found: dict[tuple[str, str], dict[int, dict]] = defaultdict(dict)
    for row in rows:
        found[row["arm"], row["sampling"]][row["seed"]] = row
    result = {}
    for key, by_seed in found.items():
        shares = {}
        for seed, row in by_seed.items():
            verdicts = [row["verdicts"][number] for number in sorted(row["verdicts"], key=int)]
            shares[seed] = np.array([mean(map(int, digits)) for digits in verdicts])
        result[key] = Runs([by_seed[seed] for seed in sorted(by_seed)], shares)
    return result


def groups_of(grid: Grid) -> list[str]:
    """The group of each of the world's prompts."""
    return [group for group, _ in worlds.load(grid.world).prompts()]


class Spread(NamedTuple):
    """How seeds differ beyond the chance of sampling, of a group's mean: variance, and the degrees of freedom that it is known by."""

    variance: float
    freedom: int


def _parts(groups: Sequence[str]) -> dict[str, list[list[int]]]:
    """Name -> the prompts of the groups whose means it is the mean of: `overall` of all, a group's of its own."""
    places = {
        group: [index for index, each in enumerate(groups) if each == group]
        for group in dict.fromkeys(groups)
    }
    return {"overall": list(places.values()), **{group: [own] for group, own in places.items()}}


def _mean_and_variance(shares: np.ndarray, parts: list[list[int]]) -> tuple[float, float]:
    """[prompts] -> the mean of the groups' means, and its variance over prompts, which holds the chance of sampling."""
    variance = sum(shares[own].var(ddof=1) / len(own) for own in parts if len(own) > 1) / len(parts) ** 2
    return float(np.mean([shares[own].mean() for own in parts])), variance


def spreads(several: Sequence[np.ndarray], groups: Sequence[str]) -> dict[str, Spread]:
    """Of several arms' [seeds, prompts], pooled, since of the few seeds of one arm it would be hardly known."""
    found = {}
    for name, parts in _parts(groups).items():
        between, chance, freedom = 0.0, 0.0, 0
        for values in several:
            if len(values) > 1:
                means = [_mean_and_variance(row, parts)[0] for row in values]
                # What is left of prompts once what all seeds have in common is gone: how hard a prompt is, is no chance.
                variances = [_mean_and_variance(row, parts)[1] for row in values - values.mean(axis=0)]
                between += (len(values) - 1) * np.var(means, ddof=1)
                chance += len(values) * np.mean(variances)
                freedom += len(values) - 1
        found[name] = Spread(max(0.0, between - chance) / max(1, freedom), freedom)
    return found


def interval(values: np.ndarray, groups: Sequence[str], spread: dict[str, Spread]) -> dict[str, Interval]:
    """[seeds, prompts] -> the mean of each group, and overall that of the groups' means.

    Its variance is that over prompts of the seeds' mean, and the spread of seeds, with Student's t of its degrees of freedom.
    """
    if values.shape[1] != len(groups):
        raise ValueError(
            f"a row has verdicts on {values.shape[1]} prompts; expected {len(groups)}, the world's"
        )
    found = {}
    for name, parts in _parts(groups).items():
        value, variance = _mean_and_variance(values.mean(axis=0), parts)
        # Of less than that nothing useful is known of it.
        t = stats.t.ppf(0.975, spread[name].freedom) if spread[name].freedom >= MIN_FREEDOM else 0.0
        half = float(np.sqrt(1.96**2 * variance + t**2 * spread[name].variance / len(values)))
        found[name] = Interval(value, value - half, value + half)
    return found


class Scores:
    """Intervals of a grid's arms: alone, and beside another arm on the seeds that both have."""

    def __init__(self, grid: Grid, found: dict[tuple[str, str], Runs], groups: Sequence[str]):
        self.grid, self.found, self.groups = grid, found, groups
        self._alone = spreads(
            [
                np.stack(list(found[name, USUAL].shares.values()))
                for name in grid.arms
                if (name, USUAL) in found
            ],
            groups,
        )
        self._beside = {}
        for other in filter(None, (grid.control, grid.equal_time)):
            differences = [self.differences(name, other) for name in grid.arms]
            self._beside[other] = spreads([each for each in differences if each is not None], groups)
        self.distances = self._distances()
        self.knows_seeds = self._beside[grid.control]["overall"].freedom >= MIN_FREEDOM

    def differences(self, arm: str, other: str) -> np.ndarray | None:
        """[seeds, prompts]: shares minus the other's; None for the other itself, or where no seed has both."""
        own, others = self.found.get((arm, USUAL)), self.found.get((other, USUAL))
        both = sorted(own.shares.keys() & others.shares.keys()) if own and others and arm != other else []
        return np.stack([own.shares[seed] - others.shares[seed] for seed in both]) if both else None

    def _distances(self) -> dict[str, tuple[float, float, float]]:
        """Arm -> its Frechet distance over the control's on the seeds that both have, and the ends of its interval.

        Of logarithms, whose spread over seeds is pooled over the arms; both ends are nan where it is hardly known.
        """
        logs = {
            name: {row["seed"]: np.log(row["frechet"]) for row in runs.rows}
            for (name, sampling), runs in self.found.items()
            if sampling == USUAL
        }
        control = logs.get(self.grid.control, {})
        differences = {
            name: np.array([own[seed] - control[seed] for seed in sorted(own.keys() & control.keys())])
            for name, own in logs.items()
        }
        several = [each for name, each in differences.items() if len(each) > 1 and name != self.grid.control]
        freedom = sum(len(each) - 1 for each in several)
        t = stats.t.ppf(0.975, freedom) if freedom >= MIN_FREEDOM else np.nan
        deviation = np.sqrt(sum(((each - each.mean()) ** 2).sum() for each in several) / max(1, freedom))
        return {
            name: tuple(
                float(np.exp(each.mean() + sign * (t * deviation / np.sqrt(len(each)) if sign else 0.0)))
                for sign in (0, -1, 1)
            )
            for name, each in differences.items()
            if len(each) and name != self.grid.control
        }

    def ratio(self, arm: str) -> str:
        value, low, high = self.distances[arm]
        return f"{value:.2f}" if np.isnan(low) else f"{value:.2f} [{low:.2f} {high:.2f}]"

    def alone(self, runs: Runs) -> Interval:
        found = interval(
            np.stack([runs.shares[seed] for seed in sorted(runs.shares)]), self.groups, self._alone
        )["overall"]
        return Interval(found.value, max(0.0, found.low), min(1.0, found.high))

    def sampled(self, arm: str, sampling: str) -> Interval | None:
        """The same models' score by a sampling minus that by the recipe's own, on the seeds that both have, over prompts."""
        own, usual = self.found[arm, sampling], self.found.get((arm, USUAL))
        both = sorted(own.shares.keys() & usual.shares.keys()) if usual and sampling != USUAL else []
        if not both:
            return None
        same_models = dict.fromkeys(_parts(self.groups), Spread(0.0, 0))
        return interval(
            np.stack([own.shares[seed] - usual.shares[seed] for seed in both]), self.groups, same_models
        )["overall"]

    def beside(self, arm: str, other: str | None = None) -> dict[str, Interval] | None:
        """other: the grid's control, unless it is its arm of equal time."""
        other = other or self.grid.control
        differences = self.differences(arm, other)
        return None if differences is None else interval(differences, self.groups, self._beside[other])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---", *["---:"] * (len(head) - 1)]) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _mean(runs: Runs, of) -> float | None:
    values = [value for row in runs.rows if (value := of(row)) is not None]
    return mean(values) if values else None


def _distance(runs: Runs) -> str:
    """Mean Frechet distance to three digits and, of several seeds, half the distance between the extremes."""
    values = [row["frechet"] for row in runs.rows]
    digits = max(0, 2 - floor(log10(mean(values)))) if mean(values) > 0 else 0
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ±{(max(values) - min(values)) / 2:.{digits}f}"


def scores(grid: Grid, found: dict, known: Scores, timed: dict[str, dict[str, float]]) -> str:
    """Every arm by its recipe's sampling: score, difference from the control, Frechet distance, steps and time of one beside the control's."""
    rows, control_steps = [], found[grid.control, USUAL].rows[0]["steps"]
    for name, arm in grid.arms.items():
        if (runs := found.get((name, USUAL))) is None:
            continue
        own, others = (
            known.alone(runs),
            [known.beside(name, other) for other in filter(None, (grid.control, grid.equal_time))],
        )
        steps, time = runs.rows[0]["steps"], timed.get(name, {}).get("over_control")
        rows.append(
            [
                f"`{name}`: {arm.about}{f' (removed: {arm.removed})' if arm.removed else ''}",
                str(len(runs.shares)),
                f"{100 * own.value:.1f} [{100 * own.low:.1f} {100 * own.high:.1f}]",
                *("" if beside is None else str(beside["overall"]) for beside in others),
                _distance(runs),
                known.ratio(name) if name in known.distances else "",
                f"{steps}" if steps else "",
                "" if time is None else f"{time:.2f}",
                "" if time is None else f"{time * steps / control_steps:.2f}",
                f"{1000 * mean(row['seconds_per_image'] for row in runs.rows):.0f}",
            ]
        )
    beside = [f"minus `{other}`, points" for other in filter(None, (grid.control, grid.equal_time))]
    head = [
        "arm",
        "seeds",
        "right pictures, %",
        *beside,
        "Frechet",
        f"over `{grid.control}`",
        "steps",
        "time of a step",
        "of the training",
        "ms a picture",
    ]
    return table(head, rows)


def per_group(grid: Grid, known: Scores) -> str:
    """Difference from the control, per skill."""
    names = list(dict.fromkeys(known.groups))
    found = {name: known.beside(name) for name in grid.arms}
    rows = [
        [f"`{name}`", *(str(beside[group]) for group in names)]
        for name, beside in found.items()
        if beside is not None
    ]
    return table(["arm", *names], rows)


def samplings(grid: Grid, found: dict, known: Scores) -> str:
    """Arms that were sampled in several ways."""
    rows = []
    for (name, sampling), runs in found.items():
        if name in grid.arms and any(arm == name and other != USUAL for arm, other in found):
            own = known.alone(runs)
            revised = (
                [f"{100 * value:.0f}" for value in np.mean([row["revised"] for row in runs.rows], axis=0)]
                if runs.rows[0]["revised"]
                else []
            )
            score = f"{100 * own.value:.1f} [{100 * own.low:.1f} {100 * own.high:.1f}]"
            passes = _mean(
                runs, lambda row: row.get("passes_per_image")
            )  # which the first rows did not record
            cost = [
                "" if passes is None else f"{passes:.0f}",
                f"{1000 * mean(row['seconds_per_image'] for row in runs.rows):.0f}",
            ]
            beside = known.sampled(name, sampling)
            rows.append(
                [
                    f"`{name}`",
                    sampling,
                    str(len(runs.rows)),
                    score,
                    str(beside or ""),
                    _distance(runs),
                    " ".join(revised),
                    *cost,
                ]
            )
    rows.sort(key=lambda row: list(grid.arms).index(row[0].strip("`")))
    return table(
        [
            "arm",
            "sampling",
            "seeds",
            "right pictures, %",
            f"minus {USUAL}, points",
            "Frechet",
            "revised at each offset, %",
            "passes a picture",
            "ms a picture",
        ],
        rows,
    )


def probes(grid: Grid, found: dict) -> str:
    """What drafts are worth to the final token, and how good they are."""
    rows = []
    for name in grid.arms:
        if (runs := found.get((name, USUAL))) is None:
            continue

        def of(key: str, runs: Runs = runs) -> np.ndarray | None:
            return (
                np.mean([row["probe"][key] for row in runs.rows], axis=0)
                if key in runs.rows[0]["probe"]
                else None
            )

        none, own, true, error = of("none nats"), of("own nats"), of("true nats"), of("draft_error")
        rows.append(
            [
                f"`{name}`",
                f"{none[0] / NATS_PER_BIT:.3f}",
                "" if own is None else f"{own[0] / NATS_PER_BIT:.3f}",
                "" if true is None else f"{true[0] / NATS_PER_BIT:.3f}",
                "" if own is None else " ".join(f"{value / NATS_PER_BIT:.2f}" for value in own[1:]),
                "" if error is None else " ".join(f"{100 * (1 - value):.0f}" for value in error[1:]),
                " ".join(
                    f"{100 * value:.0f}" for value in np.mean([row["revised"] for row in runs.rows], axis=0)
                ),
            ]
        )
    head = [
        "arm",
        "without drafts",
        "with its own",
        "with true ones",
        "drafts, with its own",
        "sampled drafts right, %",
        "revised, %",
    ]
    return table(head, rows)


def plots():
    """matplotlib's pyplot, drawing into files. Raises ValueError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots need matplotlib: pip install -e '.[study]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(grid: Grid, found: dict, known: Scores, path: Path) -> None:
    """Score of every arm with its interval, best first; the control's as a band."""
    pyplot = plots()
    bars = []
    for name in grid.arms:
        if runs := found.get((name, USUAL)):
            bars.append((name, known.alone(runs)))
    bars.sort(key=lambda bar: bar[1].value)
    figure, axes = pyplot.subplots(figsize=(7, 0.28 * len(bars) + 1))
    for place, (name, own) in enumerate(bars):
        color = {grid.control: "#d62728", BASE: "#7f7f7f"}.get(name, "#1f77b4")
        axes.errorbar(
            100 * own.value,
            place,
            xerr=[[100 * (own.value - own.low)], [100 * (own.high - own.value)]],
            fmt="o",
            color=color,
            capsize=2,
        )
        if name == grid.control:
            axes.axvspan(100 * own.low, 100 * own.high, color=color, alpha=0.08)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.set_xlabel("right pictures, % (95 % over seeds and prompts)")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def write(grid_path: Path, results: Path, rows: Sequence[dict]) -> Path:
    """README.md beside the results, with plots; returns its path. Raises ValueError when there are no results of the control."""
    grid = Grid.load(grid_path)
    found, folder = collect(rows), results.parent
    if (grid.control, USUAL) not in found:
        raise ValueError(f"{results}: no result of the control, {grid.control}; run it first")
    world, groups = worlds.load(grid.world), groups_of(grid)
    known = Scores(grid, found, groups)
    draw(grid, found, known, folder / "scores.png")
    first, judge = rows[0], next((row["judge"] for row in rows if "judge" in row), "the world's detector")
    missing = [name for name in grid.arms if (name, USUAL) not in found]
    notes, times = folder / "notes.md", folder / STEP_TIMES
    timed = json.loads(times.read_text(encoding="utf-8")) if times.is_file() else {}
    parts = [
        f"# Study on the world `{grid.world}`",
        f"Made by `python -m study report {grid_path.as_posix()}` from `{results.name}` alone "
        f"(`python -m study run {grid_path.as_posix()}`; torch {first['torch']}, {' and '.join(sorted({row['device'] for row in rows}))}, threads a run: {', '.join(sorted({str(row['threads']) for row in rows}))}).",
        notes.read_text(encoding="utf-8").strip() if notes.is_file() else "",
        "## Every arm",
        f"All arms start from {f'`{grid.base}`' if grid.base else 'a base that the run trains from nothing'} and see the same samples in the same order for a seed; settings not named are those of "
        f"`{grid.recipe}`. {grid.num_images} picture{'s' * (grid.num_images > 1)} of each of {len(groups)} prompts; what is right is "
        f"said by {judge}. Frechet distance: in {world.FEATURES}, "
        "to pictures of the validation set (± half the distance between the extremes of the seeds), and what it is over the control's."
        " Below 1 is better. Intervals are 95 %, "
        f"over seeds and prompts{'' if known.knows_seeds else ' (of too few seeds yet to know how they differ: over prompts alone)'}. Time of a step: beside the control's, where it was measured alone on the machine (`python -m study time`); "
        "sampling was timed beside other runs and compares roughly.",
        scores(grid, found, known, timed),
        "![scores](scores.png)",
        *([f"Not run yet: {', '.join(f'`{name}`' for name in missing)}."] if missing else []),
        f"## Per skill, minus `{grid.control}`, points",
        per_group(grid, known),
        "## Samplings",
        samplings(grid, found, known),
        "## What drafts are worth",
        "Bits per token of the final prediction (offset 0) on validation samples, given the past alone, with the model's own sampled drafts "
        "in view, and with true ones (which is copying); bits per token of the drafts themselves; share of the sampled drafts that are right; "
        "share of tokens that changed at each offset while sampling.",
        probes(grid, found),
    ]
    page = folder / "README.md"
    write_text(page, "\n\n".join(part for part in parts if part) + "\n")
    return page
