"""Run what is missing of a grid: several jobs at a time, each a process of its own
(study.job).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from mmtensorar.files import read_text
from mmtensorar.processes import RunFolderLock
from mmtensorar.words import counted
from study import job, start
from study.commands import ROOT
from study.grid import Grid
from study.results import missing, read

PATIENCE_S = 120  # time for a training run to end its step and save
POLL_S = 1


def folder_lock(out: Path) -> RunFolderLock:
    """A lock on a study's folder.

    Entering it raises ValueError when another process works there.
    """
    return RunFolderLock(out, otherwise="choose another --out")


def worker_environments(num_workers: int | None) -> list[dict[str, str]]:
    """The environment variables of each worker: a GPU each, or without GPUs an equal
    share of the cores.

    num_workers: None: one per GPU, or one per core. OMP_NUM_THREADS is kept when it is
    set.
    """
    import torch

    if num_gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        gpus = [gpu for gpu in visible if gpu] or [str(gpu) for gpu in range(num_gpus)]
        return [
            {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} for number in range(num_workers or len(gpus))
        ]
    num_cores = os.cpu_count() or 1
    num_workers = num_workers or num_cores
    # Jobs that each take all cores wait for each other.
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, num_cores // num_workers))
    return [{"OMP_NUM_THREADS": threads}] * num_workers


@dataclass
class Job:
    """A running job: one arm with one seed."""

    arm: str
    seed: int
    process: subprocess.Popen
    rows: Path  # what it writes when it succeeds
    log: Path
    environment: dict[str, str]
    started: float = field(default_factory=time.monotonic)

    def end(self) -> None:
        """Stop the job if it still runs, with the training it started, which ends its
        step and saves.
        """
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)
                self.process.wait()
                deadline = time.monotonic() + PATIENCE_S
                while time.monotonic() < deadline:
                    os.killpg(self.process.pid, 0)
                    time.sleep(0.2)
                os.killpg(self.process.pid, signal.SIGKILL)


def run(
    grid_path: Path,
    wanted: list[str],
    *,
    out: Path,
    results: Path,
    num_seeds: int | None = None,
    num_workers: int | None = None,
    budget_s: float | None = None,
    dry_run: bool = False,
) -> None:
    """Train and score what has no row yet, and append the rows to the results.

    Args:
        grid_path: the grid's file.
        wanted: names of arms.
        out: folder of data, runs and logs.
        results: file of rows.
        num_seeds: None: the grid's.
        num_workers: jobs at a time; None: one per GPU, or per core.
        budget_s: seconds after which no job is started.
        dry_run: only print what is missing.

    Raises ValueError when stored rows do not fit the grid, or jobs failed.
    """
    began = time.monotonic()
    grid = Grid.load(grid_path)
    num_seeds = num_seeds or grid.num_seeds
    with folder_lock(out):
        environments = worker_environments(num_workers)
        try:
            work = missing(grid, read(results), wanted, num_seeds)
        except ValueError as error:
            raise ValueError(f"{grid_path} and {results}: {error}") from None
        total = len(grid.runs(wanted, num_seeds))
        counts = f"{total - len(work)} of {counted(total, 'run')} in {results}; {len(work)} to do"
        print(f"{counts}, {len(environments)} at a time", flush=True)
        if dry_run:
            for seed, name in work:
                print(f"{name}, seed {seed}")
        if dry_run or not work:
            return
        base = start.folder(grid, out)
        print(
            f"data of {grid.world} in {out / 'data'}, base {base}; what is missing is made first", flush=True
        )
        start.prepare(grid, out)
        _check_base(results, job.fingerprint(base), out)
        results.parent.mkdir(parents=True, exist_ok=True)
        deadline = None if budget_s is None else began + budget_s
        num_left, num_failed = _run_jobs(grid_path, work, environments, out, results, deadline)
    if num_failed:
        raise ValueError(f"{counted(num_failed, 'run')} failed; the same command tries them again")
    if num_left:
        print(f"the time is over; {counted(num_left, 'run')} to do, the same command continues with them")


def _check_base(results: Path, base: str, out: Path) -> None:
    """Raise ValueError when stored rows start from other weights."""
    foreign = next((row for row in read(results) if row.get("base", base) != base), None)
    if foreign:
        raise ValueError(
            f"{results}: its rows start from other weights (of {foreign['arm']}: {foreign['base']}) than "
            f"{out} has ({base}); use another --results"
        )


def _run_jobs(
    grid_path: Path,
    work: list[tuple[int, str]],
    environments: list[dict[str, str]],
    out: Path,
    results: Path,
    deadline: float | None,
) -> tuple[int, int]:
    """Run (seed, arm) jobs, as many at a time as environments; returns how many are
    left and failed.
    """
    waiting, free, running, num_failed = list(work), list(environments), [], 0
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        while waiting or running:
            in_time = deadline is None or time.monotonic() <= deadline
            while waiting and free and in_time:
                seed, arm = waiting.pop(0)
                running.append(_start(grid_path, arm, seed, out, Path(temporary), free.pop()))
                stack.callback(running[-1].end)
            if not running:
                break
            time.sleep(POLL_S)
            for one in list(running):
                if one.process.poll() is not None:
                    running.remove(one)
                    free.append(one.environment)
                    num_failed += not _collect(one, results, len(waiting))
    return len(waiting), num_failed


def _start(
    grid_path: Path, arm: str, seed: int, out: Path, temporary: Path, environment: dict[str, str]
) -> Job:
    rows, log = temporary / f"{arm}-{seed}.jsonl", out / f"{arm}-{seed}.out"
    arguments = [str(grid_path.resolve()), arm, str(seed), str(out), str(rows)]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "study.job", *arguments],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Job(arm, seed, process, rows, log, environment)


def _collect(ended: Job, results: Path, num_waiting: int) -> bool:
    """Append an ended job's rows to the results.

    A failed job returns False and prints the end of its log.
    """
    name = f"{ended.arm}, seed {ended.seed}"
    if ended.process.returncode:
        printed = ended.log.read_text(encoding="utf-8", errors="replace").strip()
        print(f"failed: {name}: {printed[-2000:]}", file=sys.stderr, flush=True)
        return False
    text = read_text(ended.rows)
    with results.open("a", encoding="utf-8") as file:
        file.write(text)
    first = json.loads(text.partition("\n")[0])
    scored = f"{100 * first['score']['overall']:.1f} %, Frechet {first['frechet']:.4f}"
    print(f"{name}: {scored}, {time.monotonic() - ended.started:.0f} s, {num_waiting} left", flush=True)
    return True
