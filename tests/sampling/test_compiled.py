"""Compiled passes: no shape depends on how far the pictures are, and the tokens stay the
same.
"""

import pytest
import torch

from mmtensorar.pipeline import Generator
from mmtensorar.recipe import SamplerSettings
from mmtensorar.sampling import compiled, strategies
from mmtensorar.sampling.decode import decode
from tests.helpers.decoding import generators, make
from tests.helpers.fakes import (
    class_condition,
    fake_condition,
    llamagen_condition,
    tiny_llamagen,
    tiny_open_magvit2,
)
from tests.helpers.models import open_codec, wrap


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def llamagen(condition):
    backbone = tiny_llamagen(condition)
    return open_codec(wrap(backbone, 3)).eval(), llamagen_condition(backbone)


MODELS = {
    "one factor": lambda: (make("one_factor", 1), fake_condition()),
    "two factors": lambda: (make("two_factors", 3), fake_condition()),
    "janus": lambda: (make("janus", 3), fake_condition()),
    "llamagen of classes": lambda: llamagen("class"),
    "llamagen of texts": lambda: llamagen("text"),
    "open_magvit2": lambda: (wrap(tiny_open_magvit2(), 1).eval(), class_condition(0, 1, 2)),
}
SETTINGS = {"cfg_scale": 2.0, "top_k": 6, "top_p": 0.9}


def traced(model, condition, lookahead, **options):
    settings = SamplerSettings(lookahead=lookahead, **SETTINGS)
    numbers = generators(*range(len(condition.values)))
    return decode(model, condition, settings, generator=numbers, keep_trace=True, **options)


@pytest.mark.parametrize("lookahead", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_fixed_shapes_give_the_same_tokens(name, lookahead, monkeypatch):
    """Every pass has the same shapes, and finished pictures that stay in the batch
    change nothing.
    """
    model, condition = MODELS[name]()
    monkeypatch.setattr(strategies, "compiled", lambda run: run)
    shapes = []
    model.backbone.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    expected = traced(model, condition, lookahead)
    shapes.clear()
    fixed = traced(model, condition, lookahead, compile_passes=True)
    assert torch.equal(fixed.trace, expected.trace) and fixed.passes == expected.passes
    assert len(shapes) > 2 and len(set(shapes[1:])) == 1


def test_a_pass_is_one_graph_that_is_compiled_once(capsys):
    """It is traced whole (`fullgraph`), for each number of steps once, and gives the
    same tokens.
    """
    model, condition = MODELS["janus"]()
    torch._dynamo.reset()
    compiled.compiled.cache_clear()
    for lookahead in (1, 3, 3):
        expected = traced(model, condition, lookahead)
        found = traced(model, condition, lookahead, compile_passes=True)
        assert torch.equal(found.trace, expected.trace) and found.passes == expected.passes
    assert "not compiled" not in capsys.readouterr().err
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_a_pass_that_cannot_be_compiled_runs_as_it_is(capsys, monkeypatch):
    """One note says so and why, and the tokens are the same."""
    model, condition = MODELS["janus"]()

    def broken(run, **options):
        def call(*args):
            raise RuntimeError("no compiler here\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    compiled.compiled.cache_clear()
    for _ in range(2):
        found = traced(model, condition, 3, compile_passes=True)
        assert torch.equal(found.trace, traced(model, condition, 3).trace)
    compiled.compiled.cache_clear()
    assert capsys.readouterr().err == "note: passes are not compiled: RuntimeError: no compiler here\n"


def test_compiling_needs_a_gpu():
    with pytest.raises(ValueError, match="compile is on, but the device is cpu"):
        Generator.load("anywhere", device="cpu", compile=True)
