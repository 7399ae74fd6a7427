"""Layers of our own backbones: the quick product of a few rows is the plain one."""

import pytest
import torch
import torch.nn.functional as functional
from torch import nn

from mmtensorar.model import layers
from mmtensorar.model.attention import LayerCache
from mmtensorar.model.layers import MOST_ROWS, Linear, quicken


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 24), (2, 1, 24), (5, 1, 4, 24), (MOST_ROWS, 1, 24), (99, 1, 24), (2, 3, 24)]
)
def test_a_linear_map_is_the_plain_one(monkeypatch, shape, bias):
    """For one place per row, with and without window slots, and where the plain product is taken."""
    monkeypatch.setattr(layers, "LARGE", 1)
    torch.set_num_threads(2)
    linear, x = Linear(24, 7, bias=bias), torch.randn(shape)
    found = linear(x)
    assert found.is_contiguous()
    torch.testing.assert_close(found, functional.linear(x, linear.weight, linear.bias))


def test_a_linear_map_has_gradients():
    """The turned product is for sampling only."""
    linear, x = Linear(24, 7), torch.randn(2, 1, 24)
    linear(x).sum().backward()
    torch.testing.assert_close(linear.weight.grad, x.sum((0, 1)).expand(7, -1))


def test_a_quickened_model_has_its_weights():
    """Names and tensors stay, and what is more than a linear map is left alone."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2, bias=False)), nn.LayerNorm(2))
    model.append(nn.MultiheadAttention(4, 1))  # has a subclass of nn.Linear
    before = model.state_dict()
    quicken(model)
    assert type(model[0]) is type(model[1][0]) is Linear and type(model[3].out_proj) is not Linear
    assert all(
        before[name] is not None and torch.equal(before[name], value)
        for name, value in model.state_dict().items()
    )


def test_a_cache_keeps_what_was_appended_in_one_place():
    """What is returned are views of memory that is taken once."""
    cache, parts = LayerCache(5), [torch.randn(2, 2, 3, size, 4) for size in (3, 1, 1)]
    returned = [cache.append(*part) for part in parts]
    for index, expected in enumerate(torch.cat(parts, dim=3)):
        assert torch.equal(returned[-1][index], expected)
    assert len({keys.data_ptr() for keys, _ in returned}) == 1 and cache.length == 5
    with pytest.raises(AssertionError, match="a cache of 5 places was asked for 6"):
        cache.append(*parts[1])
