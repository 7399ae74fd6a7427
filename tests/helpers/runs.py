"""Training runs as a user starts them, and the contents of their run folders.

A `bench` is a folder with recipe.yaml, the models that it names, and shards (see
conftest.py); its runs are in bench/runs. Runs are forked (see fork_server.py) unless a
test is about a launcher.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from mmtensorar import image_tokenizers
from mmtensorar.recipe import Recipe
from mmtensorar.training import run_log
from tests.helpers import fork_server
from tests.helpers.fakes import write_tiny_janus
from tests.helpers.fork_server import ROOT, environment
from tests.helpers.shards import write_shards

TRAIN = ROOT / "mmtensorar" / "train.py"
SIDE, NUM_CODES = 4, 32  # 4x4 tokens out of 32 codes
# Adam's first update is lr times the sign of the gradient. Without a large eps,
# rounding noise in a gradient near zero becomes a full step, and a comparison would
# only compare noise.
ALIKE = ("optim.eps=0.01", "train.grad_accum=1")


def write_bench(folder: Path) -> Path:
    """Write a tiny Janus, its image tokenizer, shards, and a recipe of 4 steps in
    float32.

    Returns the folder.
    """
    write_tiny_janus(folder / "janus", NUM_CODES, SIDE)
    recipe = {
        "run": {"name": "unnamed", "out": str(folder / "runs")},
        "backbone": {"name": "janus", "path": str(folder / "janus")},
        "image_tokenizer": {"name": "janus_vq", "path": str(folder / "janus" / "vq")},
        "tensorar": {"window": 3, "num_heads": 2},
        "data": {"shards": str(folder / "shards"), "batch_size": 4, "shuffle": 0, "uncond_rate": 0.5},
        "optim": {"lr": 1e-2, "warmup_steps": 1},
        # Where a CPU has no instructions for bfloat16, it is 70 times slower than
        # float32.
        "train": {"steps": 4, "grad_accum": 2, "log_every": 1, "save_every": 2, "precision": "fp32"},
        "zero": {"stage": 0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_shards(
        folder / "shards", image_tokenizers.load(Recipe.load(folder / "recipe.yaml", []).image_tokenizer)
    )
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork_ranks(*command: object, ranks: int = 1, cwd: Path = ROOT, **variables: str) -> list[fork_server.Run]:
    """Fork `python COMMAND` once for each rank; several ranks form a gloo group, as
    under a launcher.
    """
    server = fork_server.shared()
    if ranks == 1:
        return [server.start(*command, env=environment(**variables), cwd=cwd)]
    group = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    started: list[fork_server.Run] = []
    for rank in range(ranks):
        env = environment(**variables, **group, RANK=str(rank), LOCAL_RANK=str(rank))
        first = started[0] if started else None
        started.append(server.start(*command, env=env, cwd=cwd, output_of=first))
    return started


def finish_ranks(started: list[fork_server.Run], *, timeout_s: float) -> subprocess.CompletedProcess:
    """Wait for all ranks.

    Raises AssertionError when their exit codes differ: every rank must end by itself.
    """
    try:
        done = [run.communicate(timeout_s=timeout_s) for run in started]
    finally:
        for run in started:
            run.kill()
    codes = {run.returncode for run in done}
    assert len(codes) == 1, f"exit codes {[run.returncode for run in done]}\n{done[0].stderr[-3000:]}"
    return subprocess.CompletedProcess(done[0].args, done[0].returncode, done[0].stdout, done[0].stderr)


def run(bench: Path, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess:
    """Train with bench/recipe.yaml and these arguments, to the end."""
    started = fork_ranks(TRAIN, bench / "recipe.yaml", *arguments, ranks=ranks, cwd=bench)
    return finish_ranks(started, timeout_s=240)


def launch(bench: Path, *arguments: str, ranks: int) -> subprocess.Popen:
    """Train through the deepspeed launcher.

    It gets its own process group, which is what Ctrl-C in a terminal reaches.
    """
    launcher = Path(sys.executable).with_name("deepspeed")
    words = [str(launcher), "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return subprocess.Popen(
        [*words, str(TRAIN), str(bench / "recipe.yaml"), *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=bench,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, *, timeout_s: int) -> subprocess.CompletedProcess:
    """Wait until launcher, ranks and workers have all closed the output; past the
    timeout, end them.
    """
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def endless(name: str) -> list[str]:
    """Arguments of a run that only a signal ends."""
    return [f"run.name={name}", "train.steps=100000", "train.save_every=0"]


def signal_after_a_step(number: int, process, bench: Path, name: str) -> None:
    """Send a signal to the process group of a run (forked or launched) once it has
    logged a step.
    """
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline and not rows(bench, name):
        time.sleep(0.1)
    if rows(bench, name):
        os.killpg(process.pid, number)


def cut(bench: Path, name: str, suffix: str = "cut", *, step: int = 2) -> str:
    """Copy a finished run, as if it had been stopped after a step.

    Returns the copy's name.
    """
    copy = bench / "runs" / f"{name}_{suffix}"
    shutil.copytree(bench / "runs" / name, copy)
    shutil.rmtree(copy / "model")
    for folder in (copy / "checkpoints").glob("step_*"):
        if folder.name > f"step_{step:06d}":
            shutil.rmtree(folder)
    (copy / "checkpoints" / "latest").write_text(f"step_{step:06d}")
    return copy.name


def rows(bench: Path, name: str) -> list[dict]:
    """The rows of a run's log.jsonl."""
    return run_log.read_log(bench / "runs" / name / "log.jsonl")


def numbers(row: dict) -> tuple:
    """The numbers that must repeat exactly; speed and memory need not."""
    return row["step"], row["loss"], row["loss_per_offset"], row["lr"], row["grad_norm"]


def assert_close(found: list[dict], expected: list[dict]) -> None:
    """Assert that rows are equal up to the order of sums."""
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4), (a, b)
        assert a["loss_per_offset"] == pytest.approx(b["loss_per_offset"], rel=1e-4), (a, b)
        # Adam hides a wrong factor on the gradient; the norm does not.
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.01), (a, b)
        assert a["lr"] == b["lr"]
