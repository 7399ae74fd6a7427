"""Sampling from a categorical distribution with one random number per token (inverse of
the CDF).
"""

import torch
from torch import Tensor


def invert_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """The token whose slice of the line [0, sum of probs) holds the random number.

    A draw takes one random number per token, where torch.multinomial takes V. So every
    row can have its own generator at no cost. Use float64 when the exact distribution
    matters: V is in the thousands, and the slices are thin.

    Args:
        probs: [..., V] probabilities, floating point, need not sum to 1.
        uniform: [...] numbers in [0, 1), of the same dtype.

    Returns:
        Tokens [...] int64 in 0..V-1, never one whose probability is 0. If probs holds
        NaN, the result may be V.
    """
    line = probs.cumsum(-1)
    total = line[..., -1:]
    point = torch.minimum(uniform[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # right=True: the first token whose slice ends beyond the point, never an empty
    # slice.
    return torch.searchsorted(line, point, right=True)[..., 0]
