"""An exponential moving average of the weights that are trained.

It is kept over whatever pieces of the float32 weights a rank has, so it is spread over the ranks as they are, and needs no
communication: the average of pieces is a piece of the average.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """weights: this rank's float32 weights, which training changes in place. decay: of the average at each step."""

    def __init__(self, weights: Sequence[Tensor], decay: float):
        self.weights, self.decay = list(weights), decay
        self.averages = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the optimiser's step, counted from 1. Early steps count for more, or the start would stay in it for long."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, weight in zip(self.averages, self.weights, strict=True):
            average.lerp_(weight, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """For the time of a with statement the weights are the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weight in zip(self.averages, self.weights, strict=True):
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)
