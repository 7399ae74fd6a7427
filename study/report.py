"""The page of a study on one world: tables and a plot from the stored results alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import floor, log10
from pathlib import Path
from statistics import mean

import numpy as np

from eval import tables
from mmtensorar.files import read_text, write_text
from study import plots, worlds
from study.grid import BASE, USUAL, Grid
from study.scores import Runs, Scores, collect, groups_of, mean_of, percent

STEP_TIMES = "step_times.json"  # arm -> seconds of a step, and as a multiple of the control's, timed alone
FIGURE = "scores.png"
NATS_PER_BIT = np.log(2)


# ---- tables --------------------------------------------------------------------------------------


def arms_table(scores: Scores, timed: Mapping[str, Mapping[str, float]]) -> str:
    """Every arm by its recipe's sampling: score, difference from the control, distance,
    steps and time.

    timed: contents of STEP_TIMES.
    """
    grid = scores.grid
    references = list(filter(None, (grid.control, grid.equal_time)))
    head = [
        "arm",
        "seeds",
        "right pictures, %",
        *(f"minus `{name}`, points" for name in references),
        "Frechet",
        f"over `{grid.control}`",
        "steps",
        "time of a step",
        "of the training",
        "ms a picture",
    ]
    control_steps = scores.usual(grid.control).rows[0]["steps"]
    rows = []
    for name, arm in grid.arms.items():
        if (runs := scores.usual(name)) is None:
            continue
        differences = [scores.minus(name, other) for other in references]
        steps, time = runs.rows[0]["steps"], timed.get(name, {}).get("over_control")
        rows.append(
            [
                f"`{name}`: {arm.about}{f' (removed: {arm.removed})' if arm.removed else ''}",
                str(len(runs.shares)),
                percent(scores.alone(runs)),
                *("" if groups is None else str(groups["overall"]) for groups in differences),
                _distance(runs),
                scores.ratio(name) if name in scores.distances else "",
                f"{steps}" if steps else "",
                "" if time is None else f"{time:.2f}",
                "" if time is None else f"{time * steps / control_steps:.2f}",
                _milliseconds(runs),
            ]
        )
    return tables.markdown([head, *rows])


def groups_table(scores: Scores) -> str:
    """Every arm's difference from the control, per group."""
    names = list(dict.fromkeys(scores.groups))
    rows = []
    for arm in scores.grid.arms:
        if (differences := scores.minus(arm)) is not None:
            rows.append([f"`{arm}`", *(str(differences[group]) for group in names)])
    return tables.markdown([["arm", *names], *rows])


def samplings_table(scores: Scores) -> str:
    """Arms that were sampled in several ways."""
    head = [
        "arm",
        "sampling",
        "seeds",
        "right pictures, %",
        f"minus {USUAL}, points",
        "Frechet",
        "revised at each offset, %",
        "passes a picture",
        "ms a picture",
    ]
    grid, several = scores.grid, {arm for arm, sampling in scores.runs if sampling != USUAL}
    rows = []
    for (arm, sampling), runs in scores.runs.items():
        if arm not in grid.arms or arm not in several:
            continue
        passes = [row["passes_per_image"] for row in runs.rows if "passes_per_image" in row]
        is_removed = sampling not in (USUAL, *grid.samplings)
        rows.append(
            [
                f"`{arm}`",
                f"{sampling} (removed)" if is_removed else sampling,
                str(len(runs.rows)),
                percent(scores.alone(runs)),
                str(scores.minus_usual(arm, sampling) or ""),
                _distance(runs),
                _percents(mean_of(runs, "revised")) if runs.rows[0]["revised"] else "",
                f"{mean(passes):.0f}" if passes else "",  # the first rows did not record it
                _milliseconds(runs),
            ]
        )
    rows.sort(key=lambda row: list(grid.arms).index(row[0].strip("`")))
    return tables.markdown([head, *rows])


def probes_table(scores: Scores) -> str:
    """How much drafts help the final token, and how often they are right."""
    head = [
        "arm",
        "without drafts",
        "with its own",
        "with true ones",
        "drafts, with its own",
        "sampled drafts right, %",
        "revised, %",
    ]
    rows = []
    for name in scores.grid.arms:
        if (runs := scores.usual(name)) is None:
            continue
        with_own, error = mean_of(runs, "own nats"), mean_of(runs, "draft_error")
        rows.append(
            [
                f"`{name}`",
                _first_bits(mean_of(runs, "none nats")),
                _first_bits(with_own),
                _first_bits(mean_of(runs, "true nats")),
                "" if with_own is None else " ".join(f"{nats / NATS_PER_BIT:.2f}" for nats in with_own[1:]),
                "" if error is None else _percents(1 - error[1:]),
                _percents(mean_of(runs, "revised")),
            ]
        )
    return tables.markdown([head, *rows])


def _distance(runs: Runs) -> str:
    """Mean Frechet distance to three digits and, of several seeds, half the distance
    between the extremes.
    """
    values = [row["frechet"] for row in runs.rows]
    digits = max(0, 2 - floor(log10(mean(values)))) if mean(values) > 0 else 0
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ±{(max(values) - min(values)) / 2:.{digits}f}"


def _milliseconds(runs: Runs) -> str:
    return f"{1000 * mean(row['seconds_per_image'] for row in runs.rows):.0f}"


def _percents(shares: np.ndarray) -> str:
    return " ".join(f"{100 * share:.0f}" for share in shares)


def _first_bits(nats: np.ndarray | None) -> str:
    return "" if nats is None else f"{nats[0] / NATS_PER_BIT:.3f}"


# ---- the page ------------------------------------------------------------------------------------


def draw(scores: Scores, path: Path) -> None:
    """Plot the score of every arm with its interval, best first; the control's as a
    band.
    """
    grid = scores.grid
    bars = [(name, scores.alone(runs)) for name in grid.arms if (runs := scores.usual(name))]
    bars.sort(key=lambda bar: bar[1].value)
    figure, axes = plots.pyplot().subplots(figsize=(7, 0.28 * len(bars) + 1))
    for row, (name, score) in enumerate(bars):
        color = {grid.control: "#d62728", BASE: "#7f7f7f"}.get(name, "#1f77b4")
        axes.errorbar(
            100 * score.value,
            row,
            xerr=[[100 * (score.value - score.low)], [100 * (score.high - score.value)]],
            fmt="o",
            color=color,
            capsize=2,
        )
        if name == grid.control:
            axes.axvspan(100 * score.low, 100 * score.high, color=color, alpha=0.08)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.set_xlabel("right pictures, % (95 % over seeds and prompts)")
    axes.grid(axis="x", alpha=0.3)
    plots.save(figure, path)


def write(grid_path: Path, results: Path, rows: Sequence[dict]) -> Path:
    """Write README.md and a plot next to the results; returns the page's path.

    Args:
        grid_path: the grid's file.
        results: the rows' file; folder/notes.md, if there is one, leads the page.
        rows: the stored rows.

    Raises ValueError when there are no results of the control.
    """
    grid, folder = Grid.load(grid_path), results.parent
    runs = collect(rows)
    if (grid.control, USUAL) not in runs:
        raise ValueError(f"{results}: no result of the control, {grid.control}; run it first")
    scores = Scores(grid, runs, groups_of(grid))
    draw(scores, folder / FIGURE)
    times, notes = folder / STEP_TIMES, folder / "notes.md"
    timed = json.loads(read_text(times)) if times.is_file() else {}
    missing = [f"`{name}`" for name in grid.arms if (name, USUAL) not in runs]
    sections = [
        f"# Study on the world `{grid.world}`",
        _origin(grid_path, results, rows),
        read_text(notes).strip() if notes.is_file() else "",
        "## Every arm",
        _conditions(scores, rows),
        arms_table(scores, timed),
        f"![scores]({FIGURE})",
        f"Not run yet: {', '.join(missing)}." if missing else "",
        f"## Per skill, minus `{grid.control}`, points",
        groups_table(scores),
        "## Samplings",
        samplings_table(scores),
        "## What drafts are worth",
        "Bits per token of the final prediction (offset 0) on validation samples, given the past alone, "
        "with the model's own sampled drafts in view, and with true ones (which is copying); bits per token "
        "of the drafts themselves; share of the sampled drafts that are right; share of tokens that changed "
        "at each offset while sampling.",
        probes_table(scores),
    ]
    page = folder / "README.md"
    write_text(page, "\n\n".join(filter(None, sections)) + "\n")
    return page


def _origin(grid_path: Path, results: Path, rows: Sequence[dict]) -> str:
    """How the page and its rows were made."""
    devices = " and ".join(sorted({row["device"] for row in rows}))
    threads = ", ".join(sorted({str(row["threads"]) for row in rows}))
    return (
        f"Made by `python -m study report {grid_path.as_posix()}` from `{results.name}` alone. The rows were "
        f"made by `python -m study run {grid_path.as_posix()}` with torch {rows[0]['torch']} on {devices}; "
        f"threads of a run: {threads}."
    )


def _conditions(scores: Scores, rows: Sequence[dict]) -> str:
    """What all arms have in common, and what the columns are."""
    grid, features = scores.grid, worlds.load(scores.grid.world).FEATURES
    judge = next((row["judge"] for row in rows if "judge" in row), "the world's detector")
    base = f"`{grid.base}`" if grid.base else "a base that the run trains from nothing"
    pictures = f"{grid.num_images} picture{'s' * (grid.num_images > 1)}"
    over = "seeds and prompts" if scores.knows_seeds else "prompts alone: there are too few seeds so far"
    return (
        f"All arms start from {base} and see the same samples in the same order for a seed. Settings that "
        f"are not named are those of `{grid.recipe}`. Each of {len(scores.groups)} prompts gets {pictures}; "
        f"what is right is decided by {judge}. Frechet distance: in {features}, to pictures of the "
        "validation set (± half the distance between the extremes of the seeds), then as a multiple of the "
        f"control's; below 1 is better. Intervals are 95 %, over {over}. Time of a step: as a multiple of "
        "the control's, where it was measured alone on the machine (`python -m study time`); sampling was "
        "timed while other runs shared the machine and compares roughly."
    )
