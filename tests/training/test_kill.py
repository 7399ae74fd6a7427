"""A run killed with SIGKILL at twenty random moments ends like a run that was never
killed.

The process that is killed is a fork of a process that has imported everything, so
twenty starts cost only seconds. Run as a module, this file is the process that forks
and kills.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from mmtensorar import image_tokenizers
from mmtensorar.recipe import Recipe
from mmtensorar.training import run_log
from tests.helpers.fakes import write_tiny_janus
from tests.helpers.runs import NUM_CODES, SIDE, finish_ranks, fork_ranks
from tests.helpers.shards import write_shards

NUM_KILLS, STEPS = 20, 60

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.launch


def child(arguments: list[str], keys: Path) -> int:
    """Fork a run that also records the sample names of every step.

    Returns its process id.
    """
    pid = os.fork()
    if pid:
        return pid
    from mmtensorar import train
    from mmtensorar.data import loader

    stream = loader.stream

    def noted(recipe, *rest, skip_batches: int, **options):
        with keys.open("a") as file:
            for number, batch in enumerate(
                stream(recipe, *rest, skip_batches=skip_batches, **options), skip_batches
            ):
                print(json.dumps([number, batch.names]), file=file, flush=True)
                yield batch

    loader.stream = noted
    code = 1
    try:
        code = train.main(arguments)
    finally:
        os._exit(code)


def in_a_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint is being written: its folder exists, but `latest` does not
    name it yet.
    """
    found = sorted(path.name for path in folder.glob("step_*"))
    latest = folder / "latest"
    return bool(found) and (not latest.is_file() or latest.read_text() < found[-1])


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def main(recipe: str, folder: str, seed: str) -> None:
    rng, run = random.Random(int(seed)), Path(folder)
    keys = run.with_suffix(".keys")
    arguments = [recipe, f"run.name={run.name}", "--resume"]
    in_checkpoints = 0
    for kill in range(NUM_KILLS):
        before = num_lines(keys)
        pid = child(arguments, keys)
        # One third of the kills come during a checkpoint, one third in the first steps,
        # and one third at any time after the start.
        steps, wait_s = (1, rng.uniform(0, 0.2)) if kill % 3 == 1 else (0, rng.uniform(0, 1.2))
        began = None
        while True:
            if os.waitpid(pid, os.WNOHANG)[0]:
                raise SystemExit(f"the run ended by itself before kill {kill}")
            if kill % 3 == 0 and in_a_checkpoint(run / "checkpoints"):
                in_checkpoints += 1
                break
            if began is None and num_lines(keys) - before >= steps:
                began = time.monotonic()
            if kill % 3 and began is not None and time.monotonic() - began > wait_s:
                break
            time.sleep(0.0005)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    _, status = os.waitpid(child(arguments, keys), 0)
    print(json.dumps({"in_checkpoints": in_checkpoints, "code": os.waitstatus_to_exitcode(status)}))


def test_a_run_killed_at_twenty_random_moments_ends_with_the_same_weights(tmp_path):
    """The samples and losses of every step equal those of a run that was never
    killed.
    """
    write_tiny_janus(tmp_path / "janus", NUM_CODES, SIDE)
    recipe = {
        "run": {"name": "whole", "out": str(tmp_path / "runs")},
        "backbone": {"name": "janus", "path": str(tmp_path / "janus")},
        "image_tokenizer": {"name": "janus_vq", "path": str(tmp_path / "janus" / "vq")},
        "tensorar": {"window": 2, "num_heads": 2},
        "data": {"shards": str(tmp_path / "shards"), "batch_size": 3, "shuffle": 3},
        "train": {"steps": STEPS, "save_every": 1, "keep_last": 1, "precision": "fp32"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    write_shards(tmp_path / "shards", image_tokenizers.load(Recipe.load(path, []).image_tokenizer))

    def harness(*arguments: str) -> dict:
        started = fork_ranks("-m", "tests.training.test_kill", *arguments)
        done = finish_ranks(started, timeout_s=300)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    whole, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    assert harness(str(path), str(whole), "alone")["code"] == 0
    done = harness(str(path), str(killed), "0")
    assert done["code"] == 0 and done["in_checkpoints"] >= 3

    def steps(run: Path) -> tuple[list, dict]:
        log = [
            (row["step"], row["loss"], row["loss_per_offset"], row["grad_norm"])
            for row in run_log.read_log(run / "log.jsonl")
        ]
        lines = [
            json.loads(line)
            for line in run.with_suffix(".keys").read_text().splitlines()
            if line.endswith("]")
        ]
        names = {}
        for number, found in lines:
            assert names.setdefault(number, found) == found, "a step was done again on other samples"
        return log, names

    assert steps(whole) == steps(killed)
    assert [step for step, *_ in steps(whole)[0]] == list(range(1, STEPS + 1))
    models = [
        {path.name: path.read_bytes() for path in (run / "model").glob("*.safetensors")}
        for run in (whole, killed)
    ]
    assert models[0] == models[1] and models[0]


if __name__ == "__main__":
    if sys.argv[3] == "alone":
        NUM_KILLS = 0
        sys.argv[3] = "0"
    main(*sys.argv[1:])
