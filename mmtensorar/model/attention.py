"""Causal attention with left padding, for the backbones in our own code.

    sdpa               PyTorch's fused kernels, the default
    flash_attention_2  the flash-attn package, on CUDA in bf16 or fp16
    eager              plain tensor operations, to check the others

All three give the same numbers within rounding, padded rows included.
Shapes: B batch, H query heads, G key/value heads (a divisor of H), S queries, N keys, C
width of a head. The S queries are at the last S of the N positions.
"""

from __future__ import annotations

import importlib.util
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

Implementation = Literal["sdpa", "flash_attention_2", "eager"]


class Pattern(NamedTuple):
    """Which query sees which key.

    Computed once per forward pass, since all layers share it.
    """

    implementation: Implementation
    visible: Tensor | None
    """[B, 1, S, N] or [1, 1, S, N] bool, for sdpa and eager. None: causal, without padding."""
    mask: Tensor | None
    """[B, N] bool, for flash-attn, which receives the real positions without the padding."""


def require(implementation: Implementation, *, key: str, dtype: torch.dtype | None = None) -> None:
    """Raise ValueError when an implementation cannot run on this machine or in dtype.

    key: the setting that the message names. dtype: None checks the machine only.
    """
    if implementation != "flash_attention_2":
        return
    if importlib.util.find_spec("flash_attn") is None or not torch.cuda.is_available():
        raise ValueError(
            f"{key} is flash_attention_2, but flash-attn is not usable here "
            "(it needs a CUDA GPU and `pip install -e '.[flash]'`); use sdpa, the default"
        )
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(
            f"{key} is flash_attention_2, which computes in bf16 or fp16, not in {dtype}; "
            "use sdpa for float32"
        )


def padding(mask: Tensor) -> Tensor | None:
    """The mask [B, N], or None if nothing is padded, which allows faster kernels.

    Waits for the GPU. A tensor without values counts as padded.
    """
    without_values = mask.is_meta or type(mask) is not Tensor
    return mask if without_values or not bool(mask.all()) else None


def pattern(
    mask: Tensor | None,
    num_queries: int,
    num_keys: int,
    implementation: Implementation,
    device: torch.device | None = None,
) -> Pattern:
    """The causal pattern of S queries over N keys, without padding.

    A padded query sees only itself, so that its row is finite; no other row sees it.

    Args:
        mask: [B, N] bool, False where a position is padding; None if nothing is padded.
        num_queries: S.
        num_keys: N.
        implementation: the one that will run.
        device: of the queries.
    """
    if implementation == "flash_attention_2":
        return Pattern(implementation, None, mask)
    # is_causal of sdpa aligns the queries with the first keys, so it is right only for
    # S = N.
    if mask is None and (num_queries in (1, num_keys)) and implementation == "sdpa":
        return Pattern(implementation, None, None)
    keys_N = torch.arange(num_keys, device=device)
    queries_S1 = keys_N[num_keys - num_queries :, None]
    visible = (keys_N <= queries_S1)[None, None]  # [1, 1, S, N]
    if mask is not None:
        visible = (visible & mask[:, None, None]) | (keys_N == queries_S1)  # [B, 1, S, N]
    return Pattern(implementation, visible, None)


def attend(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
    """[B, H, S, C], [B, G, N, C], [B, G, N, C] -> [B, H, S, C], scaled by
    1 / sqrt(C).
    """
    if pattern.implementation == "flash_attention_2":
        return _flash(query, key, value, pattern.mask)
    # Consecutive query heads share one key head.
    repeats = query.shape[1] // key.shape[1]
    if pattern.implementation == "eager":
        assert pattern.visible is not None
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
        return scores.masked_fill(~pattern.visible, float("-inf")).softmax(-1).to(value.dtype) @ value
    causal = pattern.visible is None and query.shape[2] > 1
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=pattern.visible, is_causal=causal, enable_gqa=repeats > 1
    )


def _flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by flash-attn, whose causal mask is aligned with the last key, as ours
    is.
    """
    from flash_attn import (  # pyright: ignore[reportMissingImports]
        flash_attn_func,
        flash_attn_varlen_func,
    )

    if query.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"flash_attention_2 computes in bf16 or fp16, not in {query.dtype}; use sdpa for float32"
        )
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [B, S, H, C]
    if mask is None:
        return flash_attn_func(query, key, value, causal=True).transpose(1, 2)
    # The real positions of all rows end to end, with the borders between rows.
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
    # A padded query sees only itself: its result is its own value.
    mixed = value[:, -query.shape[1] :].repeat_interleave(query.shape[2] // value.shape[2], 2)
    mixed[real] = packed
    return mixed.transpose(1, 2)


def _borders(mask: Tensor) -> Tensor:
    """[B, N] -> [B + 1] int32: where each row's real positions start in the packed
    sequence, and the end.
    """
    return functional.pad(mask.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
