"""Every pair of ZeRO stage, parts, precision, optimiser and offloading that a recipe may ask for trains, is saved and goes on."""

import itertools
import math
import os

import pytest
import torch

from mmtensorar.backbones import Condition, janus
from mmtensorar.image_tokenizers import janus_vq
from mmtensorar.recipe import Recipe
from tests.fakes import write_tiny_janus

deep = pytest.importorskip("mmtensorar.engine")
saving = pytest.importorskip("mmtensorar.saving")

STAGES, PARTS, PRECISIONS = (0, 1, 2, 3), ("all", "heads", "lora", "qlora"), ("bf16", "fp32")
# Paged optimisers page between a GPU and its host.
OPTIMIZERS = (("adamw", "none"), ("adamw_8bit", "none"), ("adamw", "cpu"), ("cpu_adam", "cpu"))


def settings(folder, stage, parts, precision, optimizer, offload, **train):
    return {
        "run": {"name": "matrix", "out": str(folder)},
        "backbone": janus.Config(name="janus", path=str(folder / "janus")),
        "image_tokenizer": janus_vq.Config(name="janus_vq", path=str(folder / "janus" / "vq")),
        "tensorar": {"window": 2, "num_heads": 2},
        "data": {"shards": "none", "batch_size": 2},
        "optim": {"lr": 1e-2, "name": optimizer},
        "train": {"steps": 3, "parts": parts, "precision": precision, **train},
        "lora": {"rank": 2},
        "zero": {"stage": stage, "offload_optimizer": offload},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("matrix")
    write_tiny_janus(folder / "janus", 32, 4, width=64)
    environment = dict(os.environ)
    deep.start_process_group(0)
    torch.set_num_threads(1)
    yield folder
    deep.stop_process_group()
    # Processes that later tests start would take themselves for ranks of this one's group.
    os.environ.clear()
    os.environ.update(environment)


def step(engine) -> float:
    codes = torch.arange(32).view(2, 16, 1)
    condition = Condition(torch.full((2, 3), 5), torch.ones(2, 3, dtype=torch.bool))
    loss = engine(codes, condition, torch.zeros(2, dtype=torch.bool), torch.Generator().manual_seed(0)).loss
    engine.backward(loss)
    engine.step()
    return loss.item()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("parts", PARTS)
def test_what_a_recipe_allows_trains_and_goes_on(folder, tmp_path, stage, parts):
    cpu, allowed = torch.device("cpu"), 0
    for precision, (optimizer, offload) in itertools.product(PRECISIONS, OPTIMIZERS):
        if precision == "fp32" and optimizer == "adamw_8bit":
            continue  # to save time: its moments are those of bf16, its weights those of adamw
        asked = settings(folder, stage, parts, precision, optimizer, offload)
        try:
            recipe = Recipe.model_validate(asked)
        except ValueError as error:
            assert "does not go with" in str(error) or "needs zero.stage" in str(error), error
            continue
        allowed += 1
        place = tmp_path / f"{precision}_{optimizer}_{offload}"
        engine = deep.start(recipe, 1, cpu)
        losses = [step(engine)]
        saver = saving.Saver(engine, place, {}, keep_last=1, keep_best=False, background=False)
        saver.save(1, {}, None, cpu)
        losses += [step(engine) for _ in range(2)]
        assert all(map(math.isfinite, losses)) and losses[2] < losses[0], (recipe, losses)
        engine.destroy()
        engine = deep.start(recipe, 1, cpu)
        assert saving.resume(engine, place, {}) == 1
        assert [step(engine) for _ in range(2)] == losses[1:], (precision, optimizer, offload)
        engine.destroy()
    assert allowed or (parts, stage) == ("qlora", 3)
