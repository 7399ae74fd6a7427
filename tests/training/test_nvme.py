"""Weights and moments on NVMe: the same steps as on the host, saved and taken up by either. With MMTENSORAR_TEST_NVME=1."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmtensorar.model.conditions import Condition
from mmtensorar.recipe import Recipe
from mmtensorar.training import plan
from tests.training.test_train import environment

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("nvme", "cpu")


def recipe_for(place: str, folder: Path) -> Recipe:
    """The tiny Janus: two of its four flat tensors are large enough to be moved."""
    changes = ["zero.stage=3", "data.batch_size=4", "optim.name=cpu_adam", f"zero.offload_optimizer={place}"]
    changes += [f"zero.nvme_path={folder / 'disk'}"] if place == "nvme" else []
    return Recipe.load(ROOT / "recipes/tiny/tensorar.yaml", changes)


def main(folder: Path) -> None:
    from mmtensorar.training import engine as deep
    from mmtensorar.training import run_state

    rank, world_size, cpu = deep.start_process_group(0)
    found = {}

    def step(engine) -> float:
        own = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
        codes = (torch.arange(4 * engine.module.backbone.num_tokens).view(4, -1, 1) % 200)[own]
        condition = Condition(torch.full((4, 8), 5)[own], torch.ones(4, 8, dtype=torch.bool)[own])
        uncond, generator = torch.zeros(len(codes), dtype=torch.bool), torch.Generator().manual_seed(0)
        loss = engine(codes, condition, uncond, generator, (own.start, 4)).loss
        engine.backward(loss)
        engine.step()
        return deep.mean_over_ranks(loss.detach().clone()).item()

    if world_size > 1:
        engine = deep.start(recipe_for("nvme", folder), world_size, cpu)
        losses = [step(engine)]
        run_state.Saver(engine, folder / "two", {}, keep_last=1, keep_best=False, background=False).save(
            1, {}, None, cpu
        )
        whole = deep.full_state_dict(engine)
        if rank == 0:
            torch.save(whole, folder / "whole.pt")
        losses += [step(engine), step(engine)]
        if rank == 0:
            (folder / "two.json").write_text(json.dumps(losses))
        deep.stop_process_group()
        return
    for place in PLACES:
        engine = deep.start(recipe_for(place, folder), 1, cpu)
        found[place] = [step(engine)]
        saver = run_state.Saver(engine, folder / place, {}, keep_last=1, keep_best=False, background=False)
        saver.save(1, {}, None, cpu)
        found[f"{place} moved"] = sum(
            deep.on_nvme(engine, number) for number in range(len(deep.flat_tensors(engine)))
        )
        found[place] += [step(engine), step(engine)]
        engine.destroy()
    for saved in PLACES:
        for place in PLACES:
            engine = deep.start(recipe_for(place, folder), 1, cpu)
            run_state.resume(engine, folder / saved, {})
            found[f"{saved} then {place}"] = [step(engine), step(engine)]
            engine.destroy()
    whole = torch.load(folder / "whole.pt", weights_only=True)
    for place in PLACES:
        engine = deep.start(recipe_for(place, folder), 1, cpu)
        run_state.resume(engine, folder / "two", {})
        now = deep.full_state_dict(engine)
        found[f"two then {place} alike"] = all(torch.equal(now[name], value) for name, value in whole.items())
        found[f"two then {place}"] = [step(engine), step(engine)]
        engine.destroy()
    deep.forget_swap(recipe_for("nvme", folder))
    found["left"] = [str(path) for path in (folder / "disk").rglob("*") if path.is_file()]
    (folder / "found.json").write_text(json.dumps(found))
    deep.stop_process_group()


def test_steps_are_those_on_the_host_and_either_goes_on_from_the_other(tmp_path):
    pytest.importorskip("deepspeed")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if "MMTENSORAR_TEST_NVME" not in os.environ or not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("needs libaio and some minutes of compiling: set MMTENSORAR_TEST_NVME=1")
    command = [sys.executable, "-m", "tests.training.test_nvme", str(tmp_path)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment() | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(2)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["nvme moved"], found["cpu moved"], found["left"]) == (2, 0, [])
    assert found["nvme"] == found["cpu"] and found["nvme"][2] < found["nvme"][0]
    for saved in PLACES:
        for place in PLACES:
            assert found[f"{saved} then {place}"] == found["cpu"][1:], (saved, place)
    two = json.loads((tmp_path / "two.json").read_text())
    assert two == pytest.approx(found["cpu"], rel=1e-3)
    for place in PLACES:
        assert found[f"two then {place} alike"] and found[f"two then {place}"] == pytest.approx(
            two[1:], rel=1e-3
        )


def test_the_plan_counts_what_is_moved(tmp_path):
    counts = {"backbone": 800, "tensorar": 0, "trainable": 800, "four_bit": 0}
    planned = {place: plan.memory(recipe_for(place, tmp_path), counts, 100, 0.0, 1) for place in PLACES}
    assert planned["nvme"].nvme == 16 * 800 and planned["cpu"].nvme == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
