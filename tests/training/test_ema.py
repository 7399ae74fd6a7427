"""The moving average of the weights: its values, and swapping it in and out in
place.
"""

import pytest
import torch

from mmtensorar.training.ema import Average


def test_the_average_equals_one_computed_by_hand():
    weights = [torch.zeros(3), torch.ones(2, 2)]
    average = Average(weights, 0.5)
    expected = [weight.double() for weight in weights]
    for step in range(1, 20):
        for weight in weights:
            weight.add_(step)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))  # short at first
        expected = [
            decay * old + (1 - decay) * weight.double() for old, weight in zip(expected, weights, strict=True)
        ]
    for found, wanted in zip(average.averages, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_views_of_the_weights_see_the_average_and_then_the_weights_again():
    """DeepSpeed's partitions are views of one flat tensor, so the swap has to be in
    place.
    """
    flat = torch.arange(6.0)
    view, average = flat[2:4], Average([flat], 0.9)
    flat.add_(10)
    with pytest.raises(KeyError), average.in_place():
        assert view.tolist() == [2, 3]
        raise KeyError
    assert view.tolist() == [12, 13] and average.averages[0].tolist() == list(range(6))
