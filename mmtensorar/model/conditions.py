"""What a prompt becomes on its way into the model. Shapes: B batch, P prefix, C width of a text feature, D width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Condition(NamedTuple):
    """The prompts of a batch, made in the loader on the CPU."""

    values: Tensor  # [B, P] int64 token ids, [B, P, C] features of a text encoder, or [B, 1] int64 class ids
    mask: Tensor  # [B, P] bool, left-padded: column P - 1 is always real

    def to(self, device: torch.device | str) -> Condition:
        """The same on another device."""
        return Condition(self.values.to(device), self.mask.to(device))


class Prefix(NamedTuple):
    """The rows that a condition becomes in front of the image tokens."""

    embeds: Tensor  # [B, P, D]
    mask: Tensor  # [B, P] bool


CaptionEncoder = Callable[[Sequence[str]], Condition]
