"""Optimisers: the learning rate and weight decay of every parameter group, and refused
settings.
"""

import pytest
import torch

from mmtensorar.recipe import Optim
from mmtensorar.training import optimizers
from tests.helpers.fakes import FakeBackbone
from tests.helpers.models import wrap


@pytest.mark.parametrize("window", [1, 3])
def test_every_parameter_is_in_one_group_with_its_rate_and_decay(window):
    model = wrap(FakeBackbone(), window)
    groups = optimizers.groups(model, Optim(lr=1e-3, tensorar_lr=1e-2, weight_decay=0.1))
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters())) and len(groups) == (2 if window == 1 else 4)
    where = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = where[id(parameter)]
        assert group["lr"] == (1e-2 if name.startswith(("encoder.", "decoder.")) else 1e-3)
        is_table = any(
            parameter is module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)
        )
        assert (group["weight_decay"] == 0) == (parameter.ndim < 2 or is_table), name


def test_frozen_parameters_are_in_no_group():
    model = wrap(FakeBackbone(), 3)
    model.backbone.requires_grad_(False)
    groups = optimizers.groups(model, Optim())
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(
        id(p) for part in (model.encoder, model.decoder) for p in part.parameters()
    )


def test_eight_bit_moments_take_nearly_the_same_steps():
    """The weight is large enough for bitsandbytes to quantise its moments."""
    pytest.importorskip("bitsandbytes")
    results = []
    for name in ("adamw", "adamw_8bit"):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(128, 128))
        optimizer = optimizers.build(Optim(name=name, lr=1e-2), [{"params": [weight]}], torch.device("cpu"))
        target = torch.randn(128, 128)
        for _ in range(50):
            optimizer.zero_grad()
            (weight - target).square().sum().backward()
            optimizer.step()
        results.append(weight.detach())
        kinds = {value.dtype for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)}
        assert (torch.uint8 in kinds) == (name == "adamw_8bit")
    assert (results[0] - results[1]).abs().mean() < 0.02 * results[0].abs().mean()


def test_an_unavailable_optimizer_is_reported():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))]}]
    with pytest.raises(ValueError, match="optim.name is paged_adamw, .* there is no GPU"):
        optimizers.build(Optim(name="paged_adamw"), groups, torch.device("cpu"))
