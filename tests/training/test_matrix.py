"""Every allowed combination of ZeRO stage, parts, precision, optimiser and offloading
trains, saves and resumes.
"""

import itertools
import json
import math
import sys
import traceback
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from mmtensorar.backbones import janus
from mmtensorar.image_tokenizers import janus_vq
from mmtensorar.model.conditions import Condition
from mmtensorar.recipe import Recipe, SamplerSettings
from mmtensorar.sampling.decode import decode
from tests.helpers.fakes import write_tiny_janus
from tests.helpers.runs import finish_ranks, fork_ranks

pytestmark = pytest.mark.launch

STAGES, PARTS, PRECISIONS = (0, 1, 2, 3), ("all", "heads", "lora", "qlora"), ("bf16", "fp32")
# The paged optimisers are missing: they page between a GPU and its host.
OPTIMIZERS = (("adamw", "none"), ("adamw_8bit", "none"), ("adamw", "cpu"), ("cpu_adam", "cpu"))


def settings(folder, stage, parts, precision, optimizer, offload, **train):
    return {
        "run": {"name": "matrix", "out": str(folder)},
        "backbone": janus.Config(name="janus", path=str(folder / "janus")),
        "image_tokenizer": janus_vq.Config(name="janus_vq", path=str(folder / "janus" / "vq")),
        "tensorar": {"window": 2, "num_heads": 2},
        "data": {"shards": "none", "batch_size": 1},
        "optim": {"lr": 1e-2, "name": optimizer},
        "train": {"steps": 2, "parts": parts, "precision": precision, **train},
        "lora": {"rank": 2},
        "zero": {"stage": stage, "offload_optimizer": offload},
    }


CONDITION = Condition(torch.full((1, 3), 5), torch.ones(1, 3, dtype=torch.bool))


def step(engine) -> float:
    """One update on one sample: on a CPU without bfloat16 instructions every sample
    takes long.
    """
    codes = torch.arange(16).view(1, 16, 1)
    loss = engine(codes, CONDITION, torch.zeros(1, dtype=torch.bool), torch.Generator().manual_seed(0)).loss
    engine.backward(loss)
    engine.step()
    return loss.item()


def sample(engine) -> None:
    """Sample one picture, as a sample grid does.

    Under ZeRO-3, DeepSpeed's trace of a step also held all calls of sampling, and each
    call searched the rest of it: the second grid of the tiny recipe took minutes. So
    DeepSpeed must not see them.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    from mmtensorar.training.engine import gathered_model

    with patch.object(PartitionedParameterCoordinator, "fetch_sub_module") as fetch:
        with gathered_model(engine) as model:
            settings = SamplerSettings(cfg_scale=2.0)
            decode(model, CONDITION, settings, generator=torch.Generator().manual_seed(0))
    assert not fetch.called
    assert engine.module.training


def go_through(folder: Path, stage: int, parts: str) -> None:
    """Try all precisions, optimisers and offloading settings that a recipe allows.

    Raises AssertionError with the settings that failed.
    """
    from mmtensorar.training import engine as engines
    from mmtensorar.training import run_state

    cpu, allowed = torch.device("cpu"), 0
    for precision, (optimizer, offload) in itertools.product(PRECISIONS, OPTIMIZERS):
        # To save time, 8-bit moments are not repeated in fp32, and optimisers other
        # than plain AdamW are tried only with parts=all.
        if precision == "fp32" and optimizer == "adamw_8bit":
            continue
        if parts != "all" and (optimizer, offload) != ("adamw", "none"):
            continue
        asked = (stage, parts, precision, optimizer, offload)
        try:
            recipe = Recipe.model_validate(settings(folder, *asked))
        except ValueError as error:
            assert "does not work with" in str(error) or "needs zero.stage" in str(error), error
            continue
        allowed += 1
        place = folder / "_".join(map(str, asked))
        engine = engines.start(recipe, 1, cpu)
        losses = [step(engine)]
        saver = run_state.Saver(engine, place, {}, keep_last=1, keep_best=False, background=False)
        saver.save(1, {}, None, cpu)
        if precision == "fp32":
            sample(engine)  # the resumed run below does not, and computes the same
        losses.append(step(engine))
        # One update in bfloat16 may raise the loss of a few tokens by its rounding.
        assert all(map(math.isfinite, losses)) and losses[1] < losses[0] + 0.01, (asked, losses)
        assert losses[1] != losses[0], asked
        engine.destroy()
        engine = engines.start(recipe, 1, cpu)
        assert run_state.resume(engine, place, {}) == 1
        again = step(engine)
        assert again == losses[1], (asked, again, losses[1])
        engine.destroy()
    assert allowed or (parts, stage) == ("qlora", 3)


def main(folder: Path) -> None:
    """Run the matrix in its own process: DeepSpeed fails on a second process group
    after the first has ended.
    """
    from mmtensorar.training import distributed

    distributed.start_process_group(0)
    torch.set_num_threads(1)
    write_tiny_janus(folder / "janus", 32, 4, width=64)
    found = {}
    for stage, parts in itertools.product(STAGES, PARTS):
        try:
            go_through(folder, stage, parts)
            found[f"{stage} {parts}"] = None
        except Exception:  # any error fails only its own test; the others still run
            found[f"{stage} {parts}"] = traceback.format_exc()
    (folder / "found.json").write_text(json.dumps(found))
    distributed.stop_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("matrix")
    started = fork_ranks("-m", "tests.training.test_matrix", str(folder))
    done = finish_ranks(started, timeout_s=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("parts", PARTS)
def test_every_allowed_combination_of_settings_trains_and_resumes(found, stage, parts):
    assert found[f"{stage} {parts}"] is None, found[f"{stage} {parts}"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
