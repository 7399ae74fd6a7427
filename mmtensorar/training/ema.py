"""An exponential moving average of the trained weights.

Each rank averages the parts of the float32 weights that it holds. So the average is
spread over the ranks like the weights, and needs no communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """The moving average of a rank's weights: `averages[i]` is that of `weights[i]`."""

    def __init__(self, weights: Sequence[Tensor], decay: float):
        """
        Args:
            weights: this rank's float32 weights, which training changes in place.
            decay: share of the old average that each step keeps, in (0, 1).
        """
        self.weights, self.decay = list(weights), decay
        self.averages = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights after an optimizer step, counted from 1.

        The first steps use a smaller decay, min(decay, (1 + step) / (10 + step));
        otherwise the initial weights would dominate the average for long.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, weight in zip(self.averages, self.weights, strict=True):
            average.lerp_(weight, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside this with statement the weights are the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # In place, since under DeepSpeed the weights are views of larger tensors.
        for average, weight in zip(self.averages, self.weights, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
