"""Run a grid, or write its page: python -m study run GRID.yaml | report GRID.yaml | across GRID.yaml GRID.yaml | check | time"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from mmtensorar import files
from mmtensorar.files import write_text
from mmtensorar.processes import RunFolderLock
from mmtensorar.sampling.settings import at_least_1
from study import across, report
from study.commands import ROOT
from study.grid import BASE, USUAL, Grid

RESULTS = "results.jsonl"
PATIENCE_S = 120  # for a training to end its step and save
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


def read(path: Path) -> list[dict]:
    """Rows of stored results. Raises ValueError naming a line that is none."""
    rows = []
    for where, row in files.read_json_lines(path) if path.is_file() else ():
        if lacks := KEYS - row.keys():
            raise ValueError(f"{where}: expected a row of results; it has no {', '.join(sorted(lacks))}")
        rows.append(row)
    return rows


def seconds(text: str) -> float:
    """'90m' or '2h' -> seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mh])", text)
    if not found:
        raise argparse.ArgumentTypeError(f"expected a time such as 90m or 2h, got {text!r}")
    return float(found[1]) * {"m": 60, "h": 3600}[found[2]]


def places(workers: int | None) -> list[dict[str, str]]:
    """What each worker sees of the machine, as environment: a GPU each, or on a machine without one an equal part of the cores.

    Who has set OMP_NUM_THREADS keeps it.
    """
    import torch

    if torch.cuda.device_count():
        gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu] or list(
            map(str, range(torch.cuda.device_count()))
        )
        return [{"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} for number in range(workers or len(gpus))]
    workers = workers or os.cpu_count() or 1
    # Jobs that each take all cores wait on each other.
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // workers))
    return [{"OMP_NUM_THREADS": threads}] * workers


def _end(process: subprocess.Popen) -> None:
    """Stop a job that still runs, and the training it started, which ends its step and saves."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            deadline = time.monotonic() + PATIENCE_S
            while time.monotonic() < deadline:
                os.killpg(process.pid, 0)
                time.sleep(0.2)
            os.killpg(process.pid, signal.SIGKILL)


def missing(grid: Grid, rows: list[dict], wanted: Sequence[str], num_seeds: int) -> list[tuple[int, str]]:
    """(seed, arm) of what has no row for one of its samplings. Raises ValueError for rows of an arm that had other settings then."""
    stored = {(row["seed"], row["arm"], row["sampling"]): row for row in rows}
    found = []
    for seed, name in grid.runs(wanted, num_seeds):
        arm = grid.arms[name]
        own = [stored.get((seed, name, sampling)) for sampling in arm.samplings_of(seed)]
        for row in filter(None, own):
            if row["settings"] != arm.settings:
                raise ValueError(
                    f"arms.{name} was run with {row['settings']}, the grid has {arm.settings}: give the arm another name, or take its rows "
                    "out of the results and its folder out of the runs"
                )
            now = grid.made_of(name, row["sampling"])
            if "made_of" in row and row["made_of"] != now:  # the first rows have none
                changed = sorted(
                    key
                    for key in row["made_of"].keys() | now.keys()
                    if row["made_of"].get(key) != now.get(key)
                )
                raise ValueError(
                    f"arms.{name}, sampling {row['sampling']!r}, was run with another {' and '.join(changed)} than the grid and its recipe "
                    "have now: use another --results and --out, or take its rows out of the results"
                )
        if None in own:
            found.append((seed, name))
    return found


def _wanted(grid: Grid, named: Sequence[str] | None) -> list[str]:
    """The arms that a command is about. Raises ValueError for a name that is none, or that cannot be run any more."""
    if unknown := set(named or ()) - grid.arms.keys():
        raise ValueError(f"--arms: unknown {', '.join(sorted(unknown))}; there are {', '.join(grid.arms)}")
    for name in named or ():
        if reason := grid.arms[name].removed:
            raise ValueError(
                f"--arms: {name} cannot be run any more, what it sets is not in the code: {reason}"
            )
    return list(dict.fromkeys(named or grid.arms))


def _out(options: argparse.Namespace) -> Path:
    return (options.out or Path("runs/study") / options.grid.stem).resolve()


def _locked(out: Path) -> RunFolderLock:
    return RunFolderLock(out, otherwise="choose another --out")


def run(options: argparse.Namespace) -> None:
    _wanted(Grid.load(options.grid), options.arms)  # before a folder is made
    with _locked(_out(options)):
        _run(options)


def _run(options: argparse.Namespace) -> None:
    from study import job, start

    grid = Grid.load(options.grid)
    wanted, out = _wanted(grid, options.arms), _out(options)
    results = options.results or ROOT / "docs/study" / options.grid.stem / RESULTS
    began = time.monotonic()
    free, running, failed = places(options.workers), [], 0
    num_seeds = options.seeds or grid.num_seeds
    try:
        work = missing(grid, read(results), wanted, num_seeds)
    except ValueError as error:
        raise ValueError(f"{options.grid} and {results}: {error}") from None
    total = len(grid.runs(wanted, num_seeds))
    print(
        f"{total - len(work)} of {total} runs are in {results}; {len(work)} to do, {len(free)} at a time",
        flush=True,
    )
    if options.dry_run:
        for seed, name in work:
            print(f"{name}, seed {seed}")
    if options.dry_run or not work:
        return
    print(
        f"data of {grid.world} in {out / 'data'}, base {start.folder(grid, out)}; what is missing of them is made first",
        flush=True,
    )
    start.prepare(grid, out)
    base = job.fingerprint(start.folder(grid, out))
    if other := next((row for row in read(results) if row.get("base", base) != base), None):
        raise ValueError(
            f"{results}: its rows start from other weights (of {other['arm']}: {other['base']}) than {out} has ({base}); use another --results"
        )
    results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        while work or running:
            over = options.budget is not None and time.monotonic() - began > options.budget
            while work and free and not over:
                (seed, name), place = work.pop(0), free.pop()
                target = Path(temporary) / f"{name}-{seed}.jsonl"
                command = [
                    sys.executable,
                    "-m",
                    "study.job",
                    str(options.grid.resolve()),
                    name,
                    str(seed),
                    str(out),
                    str(target),
                ]
                with (out / f"{name}-{seed}.out").open("w", encoding="utf-8") as log:
                    process = subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=os.environ | place,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                stack.callback(_end, process)
                running.append((process, name, seed, target, place, time.monotonic()))
            if not running:
                break
            time.sleep(1)
            for each in list(running):
                process, name, seed, target, place, started = each
                if process.poll() is None:
                    continue
                running.remove(each)
                free.append(place)
                if process.returncode:
                    failed += 1
                    told = (out / f"{name}-{seed}.out").read_text(encoding="utf-8", errors="replace").strip()
                    print(f"failed: {name}, seed {seed}: {told[-2000:]}", file=sys.stderr, flush=True)
                    continue
                text = target.read_text(encoding="utf-8")
                with results.open("a", encoding="utf-8") as file:
                    file.write(text)
                first = json.loads(text.splitlines()[0])
                print(
                    f"{name}, seed {seed}: {100 * first['score']['overall']:.1f} %, Frechet {first['frechet']:.4f}, "
                    f"{time.monotonic() - started:.0f} s, {len(work)} left",
                    flush=True,
                )
    if failed:
        raise ValueError(f"{failed} runs failed; the same command tries them again")
    if work:
        print(f"the time is over; {len(work)} runs are left, the same command goes on")


def check(options: argparse.Namespace) -> int:
    """One arm trained and scored anew, beside its stored score: 0 when it is within that one's interval, else 1."""
    from study import commands, start

    grid = Grid.load(options.grid)
    _wanted(grid, [options.arm])
    results = options.results or ROOT / "docs/study" / options.grid.stem / RESULTS
    stored = report.collect(
        [row for row in read(results) if (row["arm"], row["seed"]) == (options.arm, options.seed)]
    )
    if (runs := stored.get((options.arm, USUAL))) is None:
        raise ValueError(f"{results}: no row of {options.arm}, seed {options.seed}")
    out = (options.out or Path("runs/study") / f"{options.grid.stem}_check").resolve()
    with _locked(out):
        start.prepare(grid, out)
        target = out / "rows.jsonl"
        commands.run(
            "-m",
            "study.job",
            options.grid.resolve(),
            options.arm,
            options.seed,
            out,
            target,
            log=out / f"{options.arm}-{options.seed}.out",
        )
    known = report.Scores(grid, report.collect(read(results)), report.groups_of(grid))
    own, score = known.alone(runs), known.alone(report.collect(read(target))[options.arm, USUAL]).value
    within = own.low <= score <= own.high
    print(
        f"{options.arm}, seed {options.seed}: stored {100 * own.value:.1f} [{100 * own.low:.1f} {100 * own.high:.1f}], now {100 * score:.1f}: "
        f"{'within' if within else 'outside'}"
    )
    return 0 if within else 1


def time_steps(options: argparse.Namespace) -> None:
    """A few steps of every arm, with nothing beside them: while runs share a machine their times say little."""
    from study import start, timing

    grid = Grid.load(options.grid)
    out = _out(options)
    target = (options.results or ROOT / "docs/study" / options.grid.stem / RESULTS).with_name(
        report.STEP_TIMES
    )
    names = [
        name
        for name in _wanted(grid, options.arms)
        if name not in (BASE, grid.control) and not grid.arms[name].removed
    ]
    with _locked(out):
        start.prepare(grid, out)
        found = timing.beside_control(
            grid, timing.steps_in_turns(grid, [grid.control, *names], out, options.rounds)
        )
    write_text(target, json.dumps(found, indent=1) + "\n")
    for name, times in found.items():
        print(f"{name}: {times['seconds']:.3f} s a step, {times['over_control']:.2f} times the control's")


def write(options: argparse.Namespace) -> None:
    results = options.results or ROOT / "docs/study" / options.grid.stem / RESULTS
    print(report.write(options.grid, results, read(results)))


def compare(options: argparse.Namespace) -> None:
    found = [across.load(path, read(options.folder / path.stem / RESULTS)) for path in options.grids]
    print(across.write(found, options.folder))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m study", description="Grids of small runs, scored alike.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="train and score what is missing of a grid")
    one.add_argument("grid", type=Path, help="YAML file, such as study/grids/shapes.yaml")
    one.add_argument(
        "--budget", type=seconds, metavar="TIME", help="start no run after this time, such as 90m or 2h"
    )
    one.add_argument("--arms", nargs="+", metavar="NAME", help="default: all of the grid")
    one.add_argument("--seeds", type=at_least_1, help="how many; default: the grid's")
    one.add_argument(
        "--workers", type=at_least_1, help="runs at a time; default: one per GPU, or without one per core"
    )
    one.add_argument("--dry-run", action="store_true", help="only say what is missing")
    one.add_argument("--out", type=Path, help="data, runs and logs; default: runs/study/GRID")
    one.add_argument("--results", type=Path, metavar="FILE", help=f"default: docs/study/GRID/{RESULTS}")
    one.set_defaults(call=run)
    timed = commands.add_parser(
        "time", help="time steps of the arms in turns, alone on the machine, for the report"
    )
    timed.add_argument("grid", type=Path)
    timed.add_argument("--arms", nargs="+", metavar="NAME", help="default: all of the grid")
    timed.add_argument("--rounds", type=at_least_1, default=8, help="steps of each arm (default 8)")
    timed.add_argument("--out", type=Path, help="as of run")
    timed.add_argument("--results", type=Path, metavar="FILE", help="as of run; times are put beside it")
    timed.set_defaults(call=time_steps)
    again = commands.add_parser(
        "check", help="train and score one arm anew, beside its stored score; exit 1 outside its interval"
    )
    again.add_argument("grid", type=Path)
    again.add_argument("--arm", required=True, metavar="NAME")
    again.add_argument("--seed", type=int, default=0)
    again.add_argument("--out", type=Path, help="default: runs/study/GRID_check")
    again.add_argument("--results", type=Path, metavar="FILE", help="as of run")
    again.set_defaults(call=check)
    other = commands.add_parser("report", help="write tables and plots from the stored results alone")
    other.add_argument("grid", type=Path)
    other.add_argument("--results", type=Path, metavar="FILE", help=f"default: docs/study/GRID/{RESULTS}")
    other.set_defaults(call=write)
    last = commands.add_parser(
        "across", help="set several worlds beside each other, from the stored results alone"
    )
    last.add_argument("grids", type=Path, nargs="+", metavar="grid")
    last.add_argument(
        "--folder",
        type=Path,
        default=ROOT / "docs/study",
        help=f"of GRID/{RESULTS}, and for the page; default: docs/study",
    )
    last.set_defaults(call=compare)
    options = parser.parse_args(arguments)
    try:
        return options.call(options) or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    # As Ctrl-C does: whoever ends this ends what it has started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
