"""The page over several worlds, from their stored results alone: what an arm gains or loses in each, and whether its bits foretell it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from mmtensorar.files import write_text
from study import report
from study.grid import USUAL, Grid

FIGURE = "costs.png"
LABELLED = -4  # points, below which the plot names an arm


class Point(NamedTuple):
    """An arm with drafts in one grid. cost: bits that the final token costs more with the arm's own drafts in view than the control's.
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
    found: dict[tuple[str, str], report.Runs]
    known: report.Scores

    @property
    def name(self) -> str:
        return self.path.stem

    def beside(self, arm: str) -> report.Interval | None:
        """Score minus the control's, on the seeds that both have."""
        beside = self.known.beside(arm)
        return None if beside is None else beside["overall"]

    def bits(self, arm: str, drafts: str) -> np.ndarray | None:
        """Bits per token at each offset, with drafts in view that are none or own; None where there are no such rows."""
        runs, key = self.found.get((arm, USUAL)), f"{drafts} nats"
        if runs is None or key not in runs.rows[0]["probe"]:
            return None
        return np.mean([row["probe"][key] for row in runs.rows], axis=0) / report.NATS_PER_BIT


def load(path: Path, rows: Sequence[dict]) -> Study:
    grid, found = Grid.load(path), report.collect(rows)
    return Study(path, grid, found, report.Scores(grid, found, report.groups_of(grid)))


def gains(studies: Sequence[Study]) -> str:
    """Arms that more than one grid has."""
    rows = []
    for arm in dict.fromkeys(name for study in studies for name in study.grid.arms):
        cells = [study.beside(arm) for study in studies]
        if sum(cell is not None for cell in cells) > 1:
            told = next(study.grid.arms[arm] for study in studies if arm in study.grid.arms)
            parts = [
                ("", "") if cell is None else (str(cell), study.known.ratio(arm))
                for study, cell in zip(studies, cells, strict=True)
            ]
            rows.append(
                [
                    f"`{arm}`: {told.about}{' (removed)' if told.removed else ''}",
                    *(text for part in parts for text in part),
                ]
            )
    head = [text for study in studies for text in (f"{study.name}, points", "Frechet")]
    return report.table(["arm", *head], rows)


def costs(study: Study) -> dict[str, float]:
    """Arm with drafts -> bits that its final token costs more than the control's."""
    control = study.bits(study.grid.control, "none")[0]
    return {
        name: own[0] - control for name in study.grid.arms if (own := study.bits(name, "own")) is not None
    }


def offsets(studies: Sequence[Study], arms: Sequence[str]) -> str:
    rows = []
    for study in studies:
        cost = costs(study)
        for arm in (study.grid.control, *arms):
            if (bits := study.bits(arm, "none")) is not None:
                own, beside = study.bits(arm, "own"), study.beside(arm)
                cells = [
                    "" if each is None else " ".join(f"{value:.2f}" for value in each) for each in (bits, own)
                ]
                more = f"{cost[arm]:+.2f}" if arm in cost else ""
                rows.append([study.name, f"`{arm}`", *cells, more, "" if beside is None else str(beside)])
    head = [
        "grid",
        "arm",
        "bits per token at each offset, given the past",
        "with its own drafts",
        "final token minus the control's",
        "score, points",
    ]
    return report.table(head, rows)


def points(studies: Sequence[Study]) -> list[Point]:
    return [
        Point(study.name, arm, cost, 100 * beside.value)
        for study in studies
        for arm, cost in costs(study).items()
        if (beside := study.beside(arm)) is not None
    ]


def correlations(found: Sequence[Point]) -> str:
    """What costs foretell of gains, in each grid; worlds differ in too much to be one sample."""
    said = []
    for grid in dict.fromkeys(point.grid for point in found):
        own = [point for point in found if point.grid == grid]
        if len(own) > 2:
            value = stats.spearmanr([point.cost for point in own], [point.gain for point in own]).statistic
            said.append(f"{value:+.2f} in {grid} ({len(own)} arms)")
    return (
        "Rank correlation of what the final token costs more with the gain in score: " + ", ".join(said) + "."
        if said
        else ""
    )


def draw(found: Sequence[Point], path: Path) -> None:
    pyplot = report.plots()
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for number, grid in enumerate(dict.fromkeys(point.grid for point in found)):
        own = [point for point in found if point.grid == grid]
        axes.plot(
            [point.cost for point in own], [point.gain for point in own], "o", label=grid, color=f"C{number}"
        )
        for point in (each for each in own if each.gain < LABELLED):  # the others would cover each other
            axes.annotate(
                point.arm, (point.cost, point.gain), fontsize=6, xytext=(3, 3), textcoords="offset points"
            )
    axes.set_xscale(
        "symlog", linthresh=0.1
    )  # a model that copies its drafts costs a hundred times what one that is not harmed does
    axes.axhline(0, color="#7f7f7f", linewidth=1)
    axes.set_xlabel("bits that the final token costs more than the control's")
    axes.set_ylabel("right pictures, points above the plain control")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def write(studies: Sequence[Study], folder: Path) -> Path:
    """README.md and a plot in the folder; returns the page's path. Raises ValueError when a study has no result of its control."""
    if len(studies) < 2:
        raise ValueError(
            f"found {len(studies)} grid; expected two or more to set beside each other (report makes the page of one)"
        )
    for study in studies:
        if (study.grid.control, USUAL) not in study.found:
            raise ValueError(f"{study.path}: no result of the control, {study.grid.control}; run it first")
    found = points(studies)
    draw(found, folder / FIGURE)
    notes = folder / "notes.md"
    num_seeds = {
        study.name: len({row["seed"] for runs in study.found.values() for row in runs.rows})
        for study in studies
    }
    few = [study.name for study in studies if not study.known.knows_seeds]
    unknown = f" ({', '.join(few)}: too few seeds to know how they differ)" if few else ""
    parts = [
        "# Does refinement help? Worlds beside each other",
        f"Made by `python -m study across {' '.join(study.path.as_posix() for study in studies)}` from the stored results alone. "
        + ", ".join(f"[{study.name}]({study.name}/README.md)" for study in studies)
        + " have a page each. Seeds: "
        + ", ".join(f"{number} of {name}" for name, number in num_seeds.items())
        + " at most.",
        notes.read_text(encoding="utf-8").strip() if notes.is_file() else "",
        "## Score minus the plain control's, and Frechet distance over the control's",
        "Points of right pictures, and Frechet distances as a multiple of the control's (above 1 is worse), with 95 % intervals over seeds"
        f" and prompts{unknown}.",
        gains(studies),
        "## Cross entropy per offset, and what refinement gains",
        "On validation samples, given the past alone and with the model's own sampled drafts in view. How far offsets are apart says how much "
        "worse a draft is than the prediction that it is to help; where drafts do harm, it is in the final token's bits too.",
        offsets(studies, ["k2", "k4", "k2_self", "k4_self"]),
        correlations(found),
        f"![costs]({FIGURE})",
    ]
    page = folder / "README.md"
    write_text(page, "\n\n".join(part for part in parts if part) + "\n")
    return page
