"""Stored results of a grid: docs/study/GRID/results.jsonl, one line for each run and
sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmtensorar import files
from study.commands import RESULTS, ROOT
from study.grid import Grid, comparable

KEYS = {
    "arm",
    "seed",
    "sampling",
    "settings",
    "score",
    "verdicts",
    "probe",
    "frechet",
    "revised",
    "steps",
    "seconds_per_image",
    "torch",
    "device",
    "threads",
}


def path_of(grid: Path) -> Path:
    """Where the results of a grid's file are by default."""
    return ROOT / "docs/study" / grid.stem / RESULTS


def read(path: Path) -> list[dict]:
    """All rows; none when there is no file.

    Raises ValueError naming a line that is not a row.
    """
    rows = []
    for where, row in files.read_json_lines(path) if path.is_file() else ():
        if lacks := KEYS - row.keys():
            raise ValueError(f"{where}: expected a row of results; it has no {', '.join(sorted(lacks))}")
        rows.append(row)
    return rows


def missing(grid: Grid, rows: list[dict], wanted: Sequence[str], num_seeds: int) -> list[tuple[int, str]]:
    """(seed, arm) of each run that lacks a row for one of its samplings.

    Args:
        grid: the grid.
        rows: the stored ones.
        wanted: names of arms.
        num_seeds: of each arm, unless the arm has fewer.

    Raises ValueError when an arm has rows that were made with other settings.
    """
    stored = {(row["seed"], row["arm"], row["sampling"]): row for row in rows}
    to_do = []
    for seed, name in grid.runs(wanted, num_seeds):
        of_run = [stored.get((seed, name, sampling)) for sampling in grid.arms[name].samplings_of(seed)]
        for row in filter(None, of_run):
            _check_settings(grid, name, row)
        if None in of_run:
            to_do.append((seed, name))
    return to_do


def _check_settings(grid: Grid, name: str, row: dict) -> None:
    """Raise ValueError when a stored row was made with other settings than the grid and
    its recipe have.
    """
    if row["settings"] != (settings := grid.arms[name].settings):
        raise ValueError(
            f"arms.{name} was run with {row['settings']}, the grid has {settings}: give the arm another "
            "name, or remove its rows from the results and its folder from the runs"
        )
    now = comparable(grid.made_of(name, row["sampling"]))
    made_of = comparable(row.get("made_of", now))  # the first rows have none
    if made_of != now:
        changed = sorted(key for key in made_of.keys() | now.keys() if made_of.get(key) != now.get(key))
        raise ValueError(
            f"arms.{name}, sampling {row['sampling']!r}, was run with another {' and '.join(changed)} than "
            "the grid and its recipe have now: use another --results and --out, or remove its rows from the "
            "results"
        )
