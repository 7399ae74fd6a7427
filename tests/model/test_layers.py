"""Layers of our own backbones: the matrix product for few rows equals the plain
product.
"""

import pytest
import torch
import torch.nn.functional as functional
from torch import nn

from mmtensorar.model import layers
from mmtensorar.model.layers import MAX_ROWS, Linear, OutputMap, use_fast_linear, use_output_map


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 24), (2, 1, 24), (5, 1, 4, 24), (MAX_ROWS, 1, 24), (99, 1, 24), (2, 3, 24)]
)
def test_a_product_of_few_rows_equals_the_plain_one(monkeypatch, shape, bias):
    """Tested with one position per row, with and without window slots, and where the
    plain product is used.
    """
    monkeypatch.setattr(layers, "MIN_WEIGHT", 1)
    torch.set_num_threads(2)
    linear, x = Linear(24, 7, bias=bias), torch.randn(shape)
    found = linear(x)
    assert found.is_contiguous()
    torch.testing.assert_close(found, functional.linear(x, linear.weight, linear.bias))


def test_a_linear_map_has_gradients():
    """When gradients are needed, the plain product is used."""
    linear, x = Linear(24, 7), torch.randn(2, 1, 24)
    linear(x).sum().backward()
    torch.testing.assert_close(linear.weight.grad, x.sum((0, 1)).expand(7, -1))


def test_a_model_with_fast_linear_maps_keeps_its_weights():
    """Names and tensors do not change, and subclasses of nn.Linear are not replaced."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2, bias=False)), nn.LayerNorm(2))
    model.append(nn.MultiheadAttention(4, 1))  # contains a subclass of nn.Linear
    before = model.state_dict()
    use_fast_linear(model)
    assert type(model[0]) is type(model[1][0]) is Linear and type(model[3].out_proj) is not Linear
    assert all(
        before[name] is not None and torch.equal(before[name], value)
        for name, value in model.state_dict().items()
    )


def test_an_output_map_runs_the_given_kernel():
    """The layer passes its own weight and bias: under ZeRO-3 no other module can read
    them.
    """
    plain = nn.Linear(4, 3)
    weight, x = plain.weight, torch.randn(2, 5, 4)
    output_map = use_output_map(plain)
    assert type(output_map) is OutputMap and output_map.weight is weight
    assert torch.equal(output_map(x), functional.linear(x, weight, plain.bias))
    squared = output_map(x, kernel=lambda x, weight, bias: (x @ weight.T + bias).square().sum())
    torch.testing.assert_close(squared, output_map(x).square().sum())
    use_fast_linear(nn.Sequential(output_map))
    assert type(output_map) is OutputMap
