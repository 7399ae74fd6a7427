"""What TensorAR, sampling and training ask of a backbone. Files in `mmtensorar/backbones` are held to it.

Shapes: B batch, P prefix, S rows, F factors, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from mmtensorar.model.layers import Checkpointing


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
