"""The page over several worlds, from their stored results: what each arm gains or loses
in each world.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from eval import tables
from eval.intervals import Interval
from mmtensorar.files import read_text, write_text
from study import plots
from study.grid import USUAL, Grid
from study.report import NATS_PER_BIT
from study.scores import Scores, collect, groups_of, mean_of

FIGURE = "costs.png"
LABELLED_BELOW = -4  # points; the plot names only these arms, since other names would cover each other
# The arms of the page's first table, those that say most first.
LEADING = (
    "k2_self",
    "k2_self_double",
    "k4_self",
    "k2",
    "k4",
    "k8",
    "k4_pure_noise",
    "k4_none",
    "plain_double",
    "base",
)
WITH_BITS = ("k2", "k4", "k2_self", "k4_self")
GLOSSARY = """\
- *Window, K*: the tokens that a step predicts. Offset 0 is the final token, the others are \
drafts of the next tokens.
- *Control* (`plain`): the plain fine-tune, K=1. *Points*: percent of right pictures, minus the control's.
- *Rate*: how often a draft in the input is redrawn in training, one rate per offset, 0 at offset 0. \
*Exponential* at K=4 is 0, .39, .63, .78.
- *Self-drafts*: redrawn drafts are the model's own guesses, not uniform noise.
- *Frechet*: distance to validation pictures as a multiple of the control's; below 1 is better."""


class Point(NamedTuple):
    """An arm with drafts in one grid.

    cost: bits that its final token costs, with its own drafts in view, minus the
    control's.
    gain: points of score.
    """

    grid: str
    arm: str
    cost: float
    gain: float


class Study(NamedTuple):
    """One grid and its results."""

    path: Path
    grid: Grid
    scores: Scores

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def num_seeds(self) -> int:
        return len({row["seed"] for runs in self.scores.runs.values() for row in runs.rows})

    def gain(self, arm: str) -> Interval | None:
        """Score minus the control's, on the seeds that both have; None where there are
        none.
        """
        by_group = self.scores.minus(arm)
        return None if by_group is None else by_group["overall"]

    def bits(self, arm: str, drafts: str) -> np.ndarray | None:
        """Bits per token at each offset; None without such rows.

        drafts: those in view, none or own.
        """
        runs = self.scores.usual(arm)
        nats = None if runs is None else mean_of(runs, f"{drafts} nats")
        return None if nats is None else nats / NATS_PER_BIT

    def costs(self) -> dict[str, float]:
        """Arm with drafts -> bits that its final token costs, minus the control's."""
        control = self.bits(self.grid.control, "none")[0]
        return {
            name: bits[0] - control for name in self.grid.arms if (bits := self.bits(name, "own")) is not None
        }


def load(path: Path, rows: Sequence[dict]) -> Study:
    """A grid's file and its rows.

    Raises ValueError when there is no result of the control.
    """
    grid, runs = Grid.load(path), collect(rows)
    if (grid.control, USUAL) not in runs:
        raise ValueError(f"{path}: no result of the control, {grid.control}; run it first")
    return Study(path, grid, Scores(grid, runs, groups_of(grid)))


# ---- tables --------------------------------------------------------------------------------------


def _about(studies: Sequence[Study], arm: str) -> str:
    first = next(study.grid.arms[arm] for study in studies if arm in study.grid.arms)
    return f"`{arm}`: {first.about}{' (removed)' if first.removed else ''}"


def leading_table(studies: Sequence[Study]) -> str:
    """The arms of LEADING that a grid has: points in each world, then Frechet ratios.

    Empty without any.
    """
    rows = []
    for arm in LEADING:
        gains = [study.gain(arm) for study in studies]
        if any(gains):
            points = [
                ""
                if gain is None
                else f"{100 * gain.value:+.1f}{'*' if not gain.low <= 0 <= gain.high else ''}"
                for gain in gains
            ]
            ratios = [
                f"{study.scores.distances[arm][0]:.2f}" if arm in study.scores.distances else ""
                for study in studies
            ]
            rows.append([_about(studies, arm), *points, *ratios])
    if not rows:
        return ""
    head = ["arm", *(study.name for study in studies), *(f"Frechet, {study.name}" for study in studies)]
    return tables.markdown([head, *rows])


def all_arms_table(studies: Sequence[Study]) -> str:
    """Arms that more than one grid has, with intervals."""
    rows = []
    for arm in dict.fromkeys(name for study in studies for name in study.grid.arms):
        gains = [study.gain(arm) for study in studies]
        if sum(gain is not None for gain in gains) > 1:
            cells = []
            for study, gain in zip(studies, gains, strict=True):
                cells += ["", ""] if gain is None else [str(gain), study.scores.ratio(arm)]
            rows.append([_about(studies, arm), *cells])
    head = [text for study in studies for text in (f"{study.name}, points", "Frechet")]
    return tables.markdown([["arm", *head], *rows])


def offsets_table(studies: Sequence[Study], arms: Sequence[str]) -> str:
    """Bits per token at each offset, of the control and some arms."""
    head = [
        "grid",
        "arm",
        "bits per token at each offset, given the past",
        "with its own drafts",
        "final token minus the control's",
        "score, points",
    ]
    rows = []
    for study in studies:
        costs = study.costs()
        for arm in (study.grid.control, *arms):
            if (bits := study.bits(arm, "none")) is not None:
                both = [
                    "" if values is None else " ".join(f"{value:.2f}" for value in values)
                    for values in (bits, study.bits(arm, "own"))
                ]
                cost = f"{costs[arm]:+.2f}" if arm in costs else ""
                rows.append([study.name, f"`{arm}`", *both, cost, str(study.gain(arm) or "")])
    return tables.markdown([head, *rows])


# ---- do costs predict gains? ---------------------------------------------------------------------


def points(studies: Sequence[Study]) -> list[Point]:
    return [
        Point(study.name, arm, cost, 100 * gain.value)
        for study in studies
        for arm, cost in study.costs().items()
        if (gain := study.gain(arm)) is not None
    ]


def _by_grid(all_points: Sequence[Point]) -> dict[str, list[Point]]:
    grids = dict.fromkeys(point.grid for point in all_points)
    return {grid: [point for point in all_points if point.grid == grid] for grid in grids}


def correlations(all_points: Sequence[Point]) -> str:
    """How well costs predict gains, for each grid: worlds differ too much to be
    pooled.
    """
    listed = []
    for grid, arms in _by_grid(all_points).items():
        if len(arms) > 2:
            value = stats.spearmanr([point.cost for point in arms], [point.gain for point in arms]).statistic
            listed.append(f"{value:+.2f} in {grid} ({len(arms)} arms)")
    if not listed:
        return ""
    return (
        "Rank correlation between the extra cost of the final token and the gain in score: "
        f"{', '.join(listed)}."
    )


def draw(all_points: Sequence[Point], path: Path) -> None:
    """Plot gains over costs."""
    figure, axes = plots.pyplot().subplots(figsize=(7, 4.5))
    for number, (grid, arms) in enumerate(_by_grid(all_points).items()):
        costs, gains = [point.cost for point in arms], [point.gain for point in arms]
        axes.plot(costs, gains, "o", label=grid, color=f"C{number}")
        for point in arms:
            if point.gain < LABELLED_BELOW:
                axes.annotate(
                    point.arm,
                    (point.cost, point.gain),
                    fontsize=6,
                    xytext=(3, 3),
                    textcoords="offset points",
                )
    # A model that copies its drafts costs a hundred times more than one that they do
    # not harm.
    axes.set_xscale("symlog", linthresh=0.1)
    axes.axhline(0, color="#7f7f7f", linewidth=1)
    axes.set_xlabel("bits that the final token costs more than the control's")
    axes.set_ylabel("right pictures, points above the plain control")
    axes.grid(alpha=0.3)
    axes.legend()
    plots.save(figure, path)


# ---- the page ------------------------------------------------------------------------------------


def write(studies: Sequence[Study], folder: Path) -> Path:
    """Write README.md and a plot in the folder; returns the page's path.

    folder/notes.md, if there is one, follows the first table. Raises ValueError for
    fewer than two studies.
    """
    if len(studies) < 2:
        raise ValueError(
            f"found {len(studies)} grid; expected two or more to compare (report makes the page of one)"
        )
    all_points = points(studies)
    draw(all_points, folder / FIGURE)
    notes = folder / "notes.md"
    leading = leading_table(studies)
    sections = [
        "# Does refinement help? Several worlds compared",
        GLOSSARY,
        leading,
        "Points above the control in each world; `*`: the 95 % interval excludes zero." if leading else "",
        read_text(notes).strip() if notes.is_file() else "",
        _origin(studies),
        "## All arms",
        "Points of right pictures minus the plain control's, and Frechet distances as a multiple of the "
        f"control's, with 95 % intervals over seeds and prompts{_unknown_seeds(studies)}.",
        all_arms_table(studies),
        "## Cross entropy per offset, and what refinement gains",
        "On validation samples, given the past alone and with the model's own sampled drafts in view. The "
        "gap between offsets is how much worse a draft is than the prediction that it should help; where "
        "drafts do harm, the final token costs more bits too.",
        offsets_table(studies, WITH_BITS),
        correlations(all_points),
        f"![costs]({FIGURE})",
    ]
    page = folder / "README.md"
    write_text(page, "\n\n".join(filter(None, sections)) + "\n")
    return page


def _origin(studies: Sequence[Study]) -> str:
    """The pages of the worlds, and how this one was made."""
    links = ", ".join(f"[{study.name}]({study.name}/README.md)" for study in studies)
    seeds = ", ".join(f"{study.num_seeds} of {study.name}" for study in studies)
    command = f"python -m study across {' '.join(study.path.as_posix() for study in studies)}"
    return (
        f"Each world has a page with all its arms: {links}. Seeds: {seeds} at most. This page was made by "
        f"`{command}` from the stored results alone."
    )


def _unknown_seeds(studies: Sequence[Study]) -> str:
    few = [study.name for study in studies if not study.scores.knows_seeds]
    return f" ({', '.join(few)}: too few seeds to know how they differ)" if few else ""
