"""Causal attention with left padding: one function for all backbones of our own.

    sdpa               PyTorch's fused kernels, the default
    flash_attention_2  the flash-attn package, on CUDA in bf16 or fp16
    eager              written out, to check the others against

All three give the same numbers within rounding, padded rows included. Shapes: B batch, H query heads, G key/value
heads (a divisor of H), S queries, N keys, C width of a head. The S queries are the last S of the N places.
"""

from __future__ import annotations

import importlib.util
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

Implementation = Literal["sdpa", "flash_attention_2", "eager"]


class LayerCache:
    """Keys and values of one layer, [B, G, max_len, C] each, of which the first `length` places are filled.

    The memory is taken once, at the first append, and what is returned are views of it: a cache that grows by
    concatenation copies all earlier places at every step.
    """

    def __init__(self, max_len: int):
        self.max_len, self.length = max_len, 0
        self._keys: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """[B, G, S, C] twice -> all keys and values up to here."""
        if self._keys is None:
            B, G, _, C = key.shape
            # Of the key's dtype, which under autocast is not that of the weights.
            self._keys, self._values = key.new_empty(2, B, G, self.max_len, C)
        start, self.length = self.length, self.length + key.shape[2]
        assert self.length <= self.max_len, f"a cache of {self.max_len} places was asked for {self.length}"
        self._keys[:, :, start : self.length] = key
        self._values[:, :, start : self.length] = value
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def crop(self, length: int) -> None:
        """Forget all places from length on."""
        self.length = min(self.length, length)


class Pattern(NamedTuple):
    """Who sees whom. Made once for a forward pass, since all layers share it."""

    implementation: Implementation
    visible: Tensor | None  # [B, 1, S, N] bool, for sdpa and eager; None: causal, nothing padded
    mask: Tensor | None  # [B, N] bool, for flash-attn, which takes the real places without the padding


def require(implementation: Implementation, *, key: str, dtype: torch.dtype | None = None) -> None:
    """Raise ValueError, naming the setting, when an implementation cannot be used on this machine or in dtype."""
    if implementation != "flash_attention_2":
        return
    if importlib.util.find_spec("flash_attn") is None or not torch.cuda.is_available():
        raise ValueError(
            f"{key} is flash_attention_2, but flash-attn is not usable here "
            "(it needs a CUDA GPU and `pip install -e '.[flash]'`); sdpa is the default"
        )
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(
            f"{key} is flash_attention_2, which computes in bf16 or fp16, not in {dtype}; use sdpa for float32"
        )


def pattern(
    mask: Tensor | None,
    num_queries: int,
    num_keys: int,
    implementation: Implementation,
    device: torch.device | None = None,
) -> Pattern:
    """Causal, without the places that mask [B, N] says are padding; None: there is no padding.

    A padded query sees itself alone, so that its row is a number and reaches nobody.
    """
    if implementation == "flash_attention_2":
        return Pattern(implementation, None, mask)
    # is_causal of sdpa aligns queries with the first keys, so it fits a square only.
    if mask is None and (num_queries in (1, num_keys)) and implementation == "sdpa":
        return Pattern(implementation, None, None)
    places = torch.arange(num_keys, device=device)
    queries = places[num_keys - num_queries :, None]
    visible = places <= queries
    visible = visible[None, None] if mask is None else (visible & mask[:, None, None]) | (places == queries)
    return Pattern(implementation, visible, None)


def attend(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
    """[B, H, S, C], [B, G, N, C], [B, G, N, C] -> [B, H, S, C], scaled by 1 / sqrt(C)."""
    if pattern.implementation == "flash_attention_2":
        return _flash(query, key, value, pattern.mask)
    # Consecutive query heads share one key head.
    repeats = query.shape[1] // key.shape[1]
    if pattern.implementation == "eager":
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
        return scores.masked_fill(~pattern.visible, float("-inf")).softmax(-1).to(value.dtype) @ value
    causal = pattern.visible is None and query.shape[2] > 1
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=pattern.visible, is_causal=causal, enable_gqa=repeats > 1
    )


def _flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """flash-attn; its causal mask is aligned with the last key, as ours is."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if query.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"flash_attention_2 computes in bf16 or fp16, not in {query.dtype}; use sdpa for float32"
        )
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [B, S, H, C]
    if mask is None:
        return flash_attn_func(query, key, value, causal=True).transpose(1, 2)
    # The real places of all rows end to end, with the borders between rows.
    real = mask[:, -query.shape[1] :]
    packed = flash_attn_varlen_func(
        query[real],
        key[mask],
        value[mask],
        _borders(real),
        _borders(mask),
        query.shape[1],
        key.shape[1],
        causal=True,
    )
    # A padded query sees itself alone: its result is its own value.
    mixed = value[:, -query.shape[1] :].repeat_interleave(query.shape[2] // value.shape[2], 2)
    mixed[real] = packed
    return mixed.transpose(1, 2)


def _borders(mask: Tensor) -> Tensor:
    """[B, N] -> [B + 1] int32: where each row's real places start in the packed sequence, and the end."""
    return functional.pad(mask.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
