"""Conditions and prefixes: the forms that a prompt takes on its way into the model.

Shapes: B batch, P prefix, C width of a text feature, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

# token ids of a text tokenizer, features of a text encoder, or class numbers
ConditionKind = Literal["tokens", "features", "class"]


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


class FeatureIdentity(NamedTuple):
    """The settings that text features depend on.

    Shards record them for cached features.
    """

    width: int | None  # C; None: any
    max_tokens: int  # longer captions are cut
    cleaning: str  # see mmtensorar.captions.cleaning.Cleaning
    text_encoder: str  # path or hub id
    weight_hash: str | None  # of the encoder's tensors; None where its files are not on this machine


class Excess(NamedTuple):
    """How far a prompt exceeds the limit on its tokens.

    num_tokens: all its tokens, those of the backbone's template included; only of the
    part that was read if the text was too long to read. unread: characters beyond that
    part.
    """

    num_tokens: int
    max_tokens: int
    unread: int

    def __str__(self) -> str:
        unread = f" and {self.unread} unread characters" if self.unread else ""
        return f"{self.num_tokens} tokens{unread} (limit {self.max_tokens})"


class CaptionEncoder(Protocol):
    """Turns captions into a Condition on the CPU.

    Loader workers receive a pickled copy.
    """

    kind: ConditionKind
    num_classes: int | None  # for kind class

    def __call__(self, captions: Sequence[Any]) -> Condition:
        """B captions (class numbers, as str or int, for kind class) -> Condition.

        Raises ValueError.

        A prompt that is longer than the limit is cut at the end of the caption, in the
        same way in training and sampling.
        """
        ...

    def excess(self, caption: Any) -> Excess | None:
        """What is cut from a caption; None if nothing is. Safe in a forked process."""
        ...

    def to(self, device: torch.device) -> None:
        """Compute on this device, if the encoder computes anything.

        The result stays on the CPU.
        """
        ...

    def identity(self) -> FeatureIdentity | None:
        """For kind features, see FeatureIdentity.

        Reads the encoder's weights if they are local.
        """
        ...
