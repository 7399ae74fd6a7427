"""The message that the ranks exchange once per step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepMessage:
    """The mean over ranks of a step's losses, and events that any rank reports.

    One tensor holds all of it, so that a step needs one collective. It is exchanged
    before the update, so that a loss which is not finite never reaches the weights.
    """

    loss: float  # what is minimised, nats per token
    loss_per_offset: list[float]  # K numbers, cross entropy in nats per token
    stop_requested: bool  # a rank received a stop signal
    save_failed: bool  # a rank could not write its part of a run state
    any_skipped: bool  # a rank skipped damaged samples
    any_cut: bool  # a rank cut prompts that were too long

    @staticmethod
    def pack(
        losses: Tensor, *, stop_requested: bool, save_failed: bool, num_skipped: int, num_cut: int = 0
    ) -> Tensor:
        """This rank's message [K + 5] float32.

        losses: loss, then loss_per_offset [K + 1].
        """
        reports = [float(stop_requested), float(save_failed), float(num_skipped), float(num_cut)]
        return torch.cat([losses, losses.new_tensor(reports)])

    @classmethod
    def unpack(cls, means: Sequence[float]) -> StepMessage:
        """The message from the mean over ranks of what `pack` returned."""
        loss, *loss_per_offset, stop_requested, save_failed, num_skipped, num_cut = means
        return cls(loss, loss_per_offset, stop_requested > 0, save_failed > 0, num_skipped > 0, num_cut > 0)

    @property
    def is_finite(self) -> bool:
        """Whether all losses are numbers."""
        return all(map(math.isfinite, [self.loss, *self.loss_per_offset]))
