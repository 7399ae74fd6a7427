"""Backbones: plain next-token image models, cut at the seams that TensorAR needs.

A backbone knows nothing of TensorAR, data or training. One file each; the recipe's
`backbone: {name: ...}` picks it, and that file's Config validates the section.
Shapes: B batch, P prefix, S rows, T image tokens, F factors, D width, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from mmtensorar.layers import Checkpointing
from mmtensorar.recipe import Section
from mmtensorar.weights import Unread


class Condition(NamedTuple):
    """What the prompts became, on the CPU, in the loader."""

    values: Tensor  # [B, P] int64 token ids, [B, P, C] features of a text encoder, or [B, 1] int64 class ids
    mask: Tensor  # [B, P] bool, left-padded: column P - 1 is always real


class Prefix(NamedTuple):
    """What a condition becomes in front of the image tokens."""

    embeds: Tensor  # [B, P, D]
    mask: Tensor  # [B, P] bool


class Backbone(Protocol):
    """An nn.Module with these parts.

    embed, prefix and head are modules, not methods, because ZeRO-3 gathers parameters
    around `forward`.
    """

    dim: int  # D
    num_tokens: int  # T
    factor_sizes: tuple[int, ...]  # (V_0, ..., V_{F-1})
    layers: nn.ModuleList  # the transformer's, of which train.compile compiles each
    activation_checkpointing: Checkpointing  # set before training
    embed: nn.Module  # codes [..., F] -> [..., D]
    prefix: nn.Module  # (Condition, uncond [B] bool) -> Prefix; uncond rows get the null prompt
    # (hidden [..., D], prev [..., f]) -> logits [..., V_f], f = prev.shape[-1]. A head that has `last_map`, the linear map that its
    # logits come out of, takes targets [...] too, and then gives their summed cross entropy.
    head: nn.Module

    def __call__(self, embeds: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        """[B, S, D], [B, cached + S] bool -> [B, S, D], what `head` takes; causal; S rows follow the cache."""
        ...

    def new_cache(self, max_len: int) -> Any:
        """An empty key-value cache for max_len places: layers, or an object with `layers`, each with crop(length)."""
        ...

    def save_pretrained(self, folder) -> None:
        """Write config.json, model.safetensors and the text tokenizer, for `load` to read."""
        ...

    def save_config(self, folder) -> None:
        """The same into an existing folder, without the weights."""
        ...


CaptionEncoder = Callable[[Sequence[str]], Condition]


def _module(section: Section):
    return importlib.import_module(f"mmtensorar.backbones.{section.name}")


def load(
    section: Section, *, weights: bool = True, device: str = "cpu", sizes_only: bool = False
) -> Backbone:
    """The backbone a recipe names, in float32 and train mode.

    weights: False builds it with random weights, reading the configuration only. device:
    "meta" (without weights) builds the shapes alone. sizes_only: for a plan, the sizes of a released model may come
    from our own table, so that nothing is downloaded; such a backbone cannot be saved. Raises ValueError or OSError, naming
    the path, when there is no such model or it does not fit.
    """
    return _module(section).load(section, weights=weights, device=device, sizes_only=sizes_only)


def unread(section: Section) -> Unread:
    """The backbone a recipe names without its values, and the files that hold them. Raises ValueError like `load`."""
    return _module(section).unread(section)


def caption_encoder(section: Section) -> CaptionEncoder:
    """The function that turns captions into this backbone's Condition; it can be sent to loader workers."""
    return _module(section).caption_encoder(section)
