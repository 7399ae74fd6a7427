"""What TensorAR, sampling and training ask of a backbone. Files in `mmtensorar/backbones` are held to it.

Shapes: B batch, P prefix, S rows, F factors, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from mmtensorar.model.layers import Checkpointing

# ---- heads and caches ----------------------------------------------------------------------------


@runtime_checkable
class Head(Protocol):
    """An nn.Module that turns hidden states into logits, one factor after the other.

    It computes head(hidden, prev) = output_maps[f](states(hidden, prev)). The loss uses the
    two halves to put a kernel of its own in place of the last product (`model.loss`).
    """

    @property
    def output_maps(self) -> Sequence[nn.Module]:
        """The last linear map of each factor. A `layers.OutputMap` can run a fused loss."""
        ...

    def states(self, hidden: Tensor, prev: Tensor) -> Tensor:
        """What output_maps[f] takes: hidden [..., D], prev [..., f] int64, f = prev.shape[-1].

        It uses parameters only by calling submodules, as ZeRO-3 needs.
        """
        ...

    def __call__(self, hidden: Tensor, prev: Tensor) -> Tensor:
        """hidden [..., D], earlier factors prev [..., f] int64 -> logits [..., V_f] of factor f."""
        ...


class CacheLayer(Protocol):
    """The keys and values of one layer."""

    def crop(self, length: int, /) -> None:
        """Forget all positions from length on."""
        ...


class Cache(Protocol):
    """A key-value cache. `kv_cache.KVCache` is one."""

    @property
    def layers(self) -> Sequence[CacheLayer]: ...


# ---- backbones -----------------------------------------------------------------------------------


class Backbone(Protocol):
    """An nn.Module with these parts.

    embed, prefix and head are modules, not methods, because ZeRO-3 gathers parameters
    around `forward`.
    """

    dim: int  # D
    num_tokens: int  # T
    factor_sizes: tuple[int, ...]  # (V_0, ..., V_{F-1})
    lora_targets: str  # regular expression: names, inside the backbone, of the matrices that get adapters
    layers: nn.ModuleList  # the transformer's layers; train.compile compiles each of them
    activation_checkpointing: Checkpointing  # set before training
    embed: nn.Module  # codes [..., F] -> [..., D]
    prefix: nn.Module  # (Condition, uncond [B] bool) -> Prefix; uncond rows get the null prompt
    head: Head

    def __call__(self, embeds: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        """Causal hidden states: embeds [B, S, D], mask [B, cached + S] bool -> [B, S, D].

        The S rows follow the positions in the cache. `head` takes the result.
        """
        ...

    def new_cache(self, max_len: int) -> Cache:
        """An empty key-value cache for max_len positions."""
        ...

    def save_pretrained(self, folder) -> None:
        """Write config.json, model.safetensors and the text tokenizer, for `load` to read."""
        ...

    def save_config(self, folder) -> None:
        """Write the same into an existing folder, without the weights."""
        ...
