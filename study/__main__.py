"""Run a grid or write its page: mmtensorar study run|report|across|time|check
(docs/study/howto.md).

The functions import what they need, so that a mistyped option is reported before torch
is imported.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmtensorar.cli import Parser, command
from mmtensorar.files import write_text
from mmtensorar.sampling.settings import at_least_1
from study.commands import RESULTS, ROOT

if TYPE_CHECKING:
    from study.grid import Grid


def seconds(text: str) -> float:
    """'90m' or '2h' -> seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mh])", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected a time such as 90m or 2h, got {text!r}")
    return float(match[1]) * {"m": 60, "h": 3600}[match[2]]


def _wanted(grid: Grid, named: Sequence[str] | None) -> list[str]:
    """The arms that a command is about.

    Raises ValueError for an unknown name, or one that was removed.
    """
    if unknown := set(named or ()) - grid.arms.keys():
        raise ValueError(f"--arms: unknown {', '.join(sorted(unknown))}; there are {', '.join(grid.arms)}")
    for name in named or ():
        if reason := grid.arms[name].removed:
            raise ValueError(f"--arms: {name} cannot be run any more, its setting was removed: {reason}")
    return list(dict.fromkeys(named or grid.arms))


def _out(options: argparse.Namespace) -> Path:
    return (options.out or Path("runs/study") / options.grid.stem).resolve()


def run(options: argparse.Namespace) -> None:
    """Train and score what is missing of a grid."""
    from study import runner
    from study.grid import Grid
    from study.results import path_of

    runner.run(
        options.grid,
        _wanted(Grid.load(options.grid), options.arms),
        out=_out(options),
        results=options.results or path_of(options.grid),
        num_seeds=options.seeds,
        num_workers=options.workers,
        budget_s=options.budget,
        dry_run=options.dry_run,
    )


def check(options: argparse.Namespace) -> int:
    """Train and score one arm again; 0 when the score is within the stored score's
    interval, else 1.
    """
    from study import commands, runner, start
    from study.grid import USUAL, Grid
    from study.results import path_of, read
    from study.scores import Scores, collect, groups_of

    grid = Grid.load(options.grid)
    _wanted(grid, [options.arm])
    results = options.results or path_of(options.grid)
    rows = read(results)
    of_run = collect([row for row in rows if (row["arm"], row["seed"]) == (options.arm, options.seed)])
    if (stored := of_run.get((options.arm, USUAL))) is None:
        raise ValueError(f"{results}: no row of {options.arm}, seed {options.seed}")
    out = (options.out or Path("runs/study") / f"{options.grid.stem}_check").resolve()
    new_rows, log = out / "rows.jsonl", out / f"{options.arm}-{options.seed}.out"
    with runner.folder_lock(out):
        start.prepare(grid, out)
        arguments = [options.grid.resolve(), options.arm, options.seed, out, new_rows]
        commands.run("-m", "study.job", *arguments, log=log)
    scores = Scores(grid, collect(rows), groups_of(grid))
    before, now = scores.alone(stored), scores.alone(collect(read(new_rows))[options.arm, USUAL]).value
    within = before.low <= now <= before.high
    interval = f"{100 * before.value:.1f} [{100 * before.low:.1f} {100 * before.high:.1f}]"
    verdict = "within" if within else "outside"
    print(f"{options.arm}, seed {options.seed}: stored {interval}, now {100 * now:.1f}: {verdict}")
    return 0 if within else 1


def time_steps(options: argparse.Namespace) -> None:
    """Time a few steps of every arm, alone on the machine: runs that share a machine
    slow each other.
    """
    from study import report, runner, start, timing
    from study.grid import BASE, Grid
    from study.results import path_of

    grid = Grid.load(options.grid)
    out = _out(options)
    target = (options.results or path_of(options.grid)).with_name(report.STEP_TIMES)
    names = [
        name
        for name in _wanted(grid, options.arms)
        if name not in (BASE, grid.control) and not grid.arms[name].removed
    ]
    with runner.folder_lock(out):
        start.prepare(grid, out)
        timed = timing.steps_in_turns(grid, [grid.control, *names], out, options.rounds)
    by_arm = timing.relative_to_control(grid, timed)
    write_text(target, json.dumps(by_arm, indent=1) + "\n")
    for name, times in by_arm.items():
        print(f"{name}: {times['seconds']:.3f} s a step, {times['over_control']:.2f} times the control's")


def write_report(options: argparse.Namespace) -> None:
    """Write the page of one grid."""
    from study import report
    from study.results import path_of, read

    results = options.results or path_of(options.grid)
    print(report.write(options.grid, results, read(results)))


def write_across(options: argparse.Namespace) -> None:
    """Write the page over several grids."""
    from study import across
    from study.results import read

    studies = [across.load(path, read(options.folder / path.stem / RESULTS)) for path in options.grids]
    print(across.write(studies, options.folder))


def _add(commands, name: str, call, *, help: str, example: str) -> Parser:
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        example=example,
    )
    parser.set_defaults(call=call)
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m study",
        description="Grids of small runs, scored alike.",
        example="run study/grids/shapes.yaml --budget 2h",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shapes = "study/grids/shapes.yaml"
    one = _add(commands, "run", run, help="train and score what is missing of a grid", example=shapes)
    one.add_argument("grid", type=Path, help=f"YAML file, such as {shapes}")
    one.add_argument(
        "--budget", type=seconds, metavar="TIME", help="start no run after this time, such as 90m or 2h"
    )
    one.add_argument("--arms", nargs="+", metavar="NAME", help="default: all of the grid")
    one.add_argument("--seeds", type=at_least_1, metavar="N", help="how many; default: the grid's")
    one.add_argument(
        "--workers",
        type=at_least_1,
        metavar="N",
        help="runs at a time; default: one per GPU, or without GPUs one per core",
    )
    one.add_argument("--dry-run", action="store_true", help="only print what is missing")
    one.add_argument("--out", type=Path, metavar="FOLDER", help="data, runs, logs; default: runs/study/GRID")
    one.add_argument("--results", type=Path, metavar="FILE", help=f"default: docs/study/GRID/{RESULTS}")

    one = _add(
        commands,
        "time",
        time_steps,
        help="time steps of the arms in turns, alone on the machine, for the report",
        example=f"{shapes} --rounds 8",
    )
    one.add_argument("grid", type=Path, help="YAML file")
    one.add_argument("--arms", nargs="+", metavar="NAME", help="default: all of the grid")
    one.add_argument(
        "--rounds", type=at_least_1, default=8, metavar="N", help="steps of each arm (default 8)"
    )
    one.add_argument("--out", type=Path, metavar="FOLDER", help="as for run")
    one.add_argument("--results", type=Path, metavar="FILE", help="as for run; times are written next to it")

    one = _add(
        commands,
        "check",
        check,
        help="train and score one arm again; exit code 1 outside its stored interval",
        example=f"{shapes} --arm k2_self",
    )
    one.add_argument("grid", type=Path, help="YAML file")
    one.add_argument("--arm", required=True, metavar="NAME")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/study/GRID_check")
    one.add_argument("--results", type=Path, metavar="FILE", help="as for run")

    one = _add(
        commands,
        "report",
        write_report,
        help="write tables and plots of a grid from the stored results",
        example=shapes,
    )
    one.add_argument("grid", type=Path, help="YAML file")
    one.add_argument("--results", type=Path, metavar="FILE", help=f"default: docs/study/GRID/{RESULTS}")

    one = _add(
        commands,
        "across",
        write_across,
        help="write the page that compares several worlds, from the stored results",
        example=f"{shapes} study/grids/digits.yaml",
    )
    one.add_argument("grids", type=Path, nargs="+", metavar="GRID", help="YAML files")
    one.add_argument(
        "--folder",
        type=Path,
        default=ROOT / "docs/study",
        help=f"of GRID/{RESULTS}, and for the page; default: docs/study",
    )
    return parser.parse_args(arguments)


@command
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # Checked here, since the functions above import torch, which takes seconds.
    for grid in getattr(options, "grids", None) or [options.grid]:
        if not grid.is_file():
            raise ValueError(f"{grid}: no such grid; expected a YAML file, such as study/grids/shapes.yaml")
    try:
        return options.call(options) or 0
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        return 130


if __name__ == "__main__":
    # As Ctrl-C does: whoever ends this process also ends the jobs that it started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
