"""The stopwatch, and the numbers of the step log."""

import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from mmtensorar.recipe import Recipe
from mmtensorar.training import run_log, stopwatch

CPU = torch.device("cpu")


def test_laps_of_a_name_add_up_until_they_are_read():
    watch = stopwatch.Stopwatch(CPU)
    for _ in range(2):
        time.sleep(0.02)
        watch.lap("a")
    watch.lap("b")
    first = watch.seconds()
    assert first["a"] >= 0.04 and 0 <= first["b"] < first["a"]
    watch.lap("c")
    assert watch.seconds().keys() == {"c"}


def test_a_matrix_product_has_a_rate():
    assert stopwatch.matmul_rate(CPU, torch.float32) > 1e8


def test_numbers_lists_and_parts_become_events(tmp_path):
    seen = []
    log = run_log.StepLog(tmp_path, num_steps=2, curves=False, monitor=seen.extend)
    row = {
        "step": 1,
        "loss": 1.5,
        "loss_per_offset": [1.0, 2.0],
        "lr": 0.1,
        "grad_norm": float("nan"),
        "tokens_per_s": 1.0,
    }
    log.step(row | {"mfu": 0.5, "memory_gib": 1.0, "seconds": {"data": 0.5}})
    log.close()
    assert [
        event for event in seen if event[0] not in ("lr", "grad_norm", "tokens_per_s", "mfu", "memory_gib")
    ] == [
        ("loss", 1.5, 1),
        ("loss_per_offset/0", 1.0, 1),
        ("loss_per_offset/1", 2.0, 1),
        ("seconds/data", 0.5, 1),
    ]
    (read,) = run_log.read_log(tmp_path / "log.jsonl")
    assert read["seconds"] == {"data": 0.5} and read["grad_norm"] is None


def test_weights_and_biases_gets_each_number(monkeypatch, tmp_path):
    """Numbers reach Weights & Biases through DeepSpeed's monitor.

    A stand-in for the library records the calls.
    """
    engines = pytest.importorskip("mmtensorar.training.engine")
    told = []
    wandb = ModuleType("wandb")
    wandb.__spec__ = SimpleNamespace()
    wandb.init = lambda **options: told.append(options)
    wandb.log = lambda data, step=None, commit=None: told.append((data, step))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda *a, **k: 0)
    write = engines.monitor(["tensorboard", "wandb"], tmp_path / "run", 0)
    write([("loss", 1.5, 3), ("seconds/data", 0.1, 3)])
    assert told == [
        {"project": "mmtensorar", "group": "run", "entity": None},
        ({"loss": 1.5}, 3),
        ({"seconds/data": 0.1}, 3),
    ]
    assert engines.monitor(["tensorboard"], tmp_path / "run", 0) is None
    monkeypatch.delitem(sys.modules, "wandb")
    recipe = Recipe.load(Path(__file__).parents[2] / "recipes/tiny/plain.yaml", ["train.monitors=[wandb]"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="train.monitors wandb needs wandb: pip install wandb"):
        engines.check_machine(recipe, torch.device("cpu"))
