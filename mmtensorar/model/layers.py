"""Transformer layers of LlamaGen and Open-MAGVIT2, under the parameter names of their
released weights.

Both have the same parts: RMS norms, rotary positions on a grid, SwiGLU.
Shapes: B batch, P prefix, S positions, T image tokens, D width, O output width, V
vocabulary, H query heads, G key/value heads, C width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mmtensorar.model import attention, kv_cache
from mmtensorar.model.kv_cache import KVCache, LayerCache

# `few_rows_linear` differs from a plain product for at most MAX_ROWS rows and a weight
# of at least MIN_WEIGHT numbers.
MAX_ROWS, MIN_WEIGHT = 64, 2**19

Checkpointing = bool | Literal["selective"]
"""Which activations of a block are recomputed in the backward instead of kept in memory.

False: none. True: all. "selective": all but the results of matrix products and attention (KEPT).
"""

KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


def checkpoint_options(policy: Checkpointing) -> dict[str, Any]:
    """The options of torch.utils.checkpoint.checkpoint for a policy other than
    False.
    """
    # Not reentrant: ZeRO-3 expects one gradient per parameter and backward.
    options: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT)
    return options


def ffn_width(dim: int, *, multiple_of: int = 256, multiplier: float | None = None) -> int:
    """Hidden width of the feed-forward: 2/3 of 4 D, times multiplier, rounded up to
    multiple_of.
    """
    width = int(2 * 4 * dim / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return -(-width // multiple_of) * multiple_of


# ---- positions -----------------------------------------------------------------------------------


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a table first made while sampling must also work in training
def rotary_table(
    prefix_len: int, num_tokens: int, head_dim: int, base: float, device: torch.device
) -> Tensor:
    """[P + T, C / 2] complex64: cos + i sin of each position's angle, one per pair of
    channels.

    The first half of the pairs turns with the row of the grid, the second half with the
    column. The table is neither a buffer nor a parameter, so a cast of the model to
    bfloat16 cannot reach it.
    """
    side = math.isqrt(num_tokens)
    frequencies = base ** -(torch.arange(0, head_dim // 2, 2, device=device).float() / (head_dim // 2))
    angles = torch.outer(torch.arange(side, device=device).float(), frequencies)  # [side, C / 4]
    by_row = angles[:, None].expand(side, side, -1)
    by_column = angles[None].expand(side, side, -1)
    angles = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
    image = torch.polar(torch.ones_like(angles), angles)
    # cos = sin = 0 for the prefix, not (1, 0): its queries and keys become zero
    # vectors. The released models were trained this way, and "repairing" it breaks
    # every one of them.
    return torch.cat([image.new_zeros(prefix_len, image.shape[1]), image])


def rotary_rows(table: Tensor, step: kv_cache.Pass) -> Tensor:
    """The rows of a rotary table [P + T, C / 2] for the new positions of a pass behind a
    cache: [S, C / 2], or [R, S, C / 2] where the rows are at different places.

    Positions past the image, whose results nobody uses, get the last row.
    """
    if step.start is not None and step.used <= len(table):
        return table[step.start : step.used]
    return table[step.places_RS.clamp(max=len(table) - 1)]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels: x [B, S, H, C], table [S, C / 2] or
    [B, S, C / 2] -> [B, S, H, C].

    Computed in float32, returned in x's dtype.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which knows no complex numbers
        cos, sin = torch.view_as_real(table[..., None, :]).unbind(-1)
        even, odd = pairs.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        return turned.flatten(-2).type_as(x)
    pairs = torch.view_as_complex(pairs)
    return torch.view_as_real(pairs * table[..., None, :]).flatten(-2).type_as(x)


# ---- layers --------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """RMS norm computed in float32, cast to the input's dtype, then multiplied by the
    weight.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


Kernel = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x [..., D], weight [O, D], bias [O] or None) -> what a linear map's forward returns."""


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, faster for decoding on the CPU: [B, S, ..., D] ->
    [B, S, ..., O].

    Decoding computes one position per image, so x has only a few rows. For few rows and
    a large weight, the product of nn.Linear is bound by neither memory nor arithmetic
    (MKL in PyTorch 2.15, two threads with AVX-512). Computed as weight @ x.T it takes
    0.7 of the time for 16 rows, and a quarter for two. For one row MKL uses a single
    thread, so the row is doubled: two rows take less than half the time of one. With
    one thread, or a weight that stays in the cache, this does not pay. Training, whole
    sequences and GPUs use the plain product.
    """
    if torch.compiler.is_compiling():  # and cannot ask for the number of threads
        return functional.linear(x, weight, bias)
    few = x.shape[1] == 1 and x[..., 0].numel() <= MAX_ROWS
    large = weight.numel() >= MIN_WEIGHT and torch.get_num_threads() > 1
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    if not (few and large and on_cpu) or torch.is_grad_enabled():
        return functional.linear(x, weight, bias)
    rows = x.flatten(0, -2)
    product = weight @ (rows if len(rows) > 1 else rows.repeat(2, 1)).T  # [O, rows]
    result = product[:, : len(rows)].T.contiguous().view(*x.shape[:-1], -1)
    return result if bias is None else result + bias


class Linear(nn.Linear):
    """A linear map that computes `few_rows_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, ..., D] -> [B, S, ..., O]."""
        return few_rows_linear(x, self.weight, self.bias)


class OutputMap(nn.Linear):
    """A linear map at the end of a head.

    It can run another kernel, such as a fused loss.

    Under ZeRO-3 the weight exists only during this module's forward, so a kernel that
    needs it must run here: `model.loss` passes one that fuses the product with the
    cross entropy.
    """

    def forward(self, x: Tensor, *, kernel: Kernel = few_rows_linear) -> Tensor:
        """kernel(x, weight, bias); by default logits, [B, S, ..., D] ->
        [B, S, ..., V].
        """
        return kernel(x, self.weight, self.bias)


def use_fast_linear(model: nn.Module) -> None:
    """Make every plain nn.Linear of another library's model compute `few_rows_linear`,
    in place.

    The modules keep their weights and names; subclasses of nn.Linear are left alone.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def use_output_map(linear: nn.Linear) -> OutputMap:
    """Turn the last linear map of another library's model into an OutputMap, in place,
    with its weights.
    """
    assert type(linear) in (nn.Linear, Linear)
    linear.__class__ = OutputMap
    return cast(OutputMap, linear)


class SelfAttention(nn.Module):
    """Causal attention over positions. wqkv holds query, key and value, in that
    order.
    """

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int):
        super().__init__()
        self.heads = [num_heads, num_kv_heads]
        self.wqkv = Linear(dim, (num_heads + 2 * num_kv_heads) * (dim // num_heads), bias=False)
        self.wo = Linear(dim, dim, bias=False)

    def forward(
        self, x: Tensor, table: Tensor, pattern: attention.Pattern, cache: LayerCache | None = None
    ) -> Tensor:
        """x [B, S, D], table: the rotary rows of these S positions, [S, C / 2] or
        [B, S, C / 2] -> [B, S, D].
        """
        H, G = self.heads
        qkv = self.wqkv(x).unflatten(-1, (H + 2 * G, -1))  # [B, S, H + 2G, C]
        query, key = rotate(qkv[:, :, : H + G], table).transpose(1, 2).split(self.heads, dim=1)
        value = qkv[:, :, H + G :].transpose(1, 2)
        if cache is not None:
            key, value = cache.append(key, value)
        mixed = attention.attend(query, key, value, pattern)  # [B, H, S, C]
        return self.wo(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = Linear(dim, hidden, bias=False)
        self.w3 = Linear(dim, hidden, bias=False)
        self.w2 = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and feed-forward, each with a norm before and a residual around it.

    attend: the attention module; Block's forward passes it everything after x.
    """

    def __init__(self, attend: nn.Module, dim: int, hidden: int, eps: float, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.attention_norm = RMSNorm(dim, eps)
        self.attention = attend
        self.ffn_norm = RMSNorm(dim, eps)
        self.feed_forward = FeedForward(dim, hidden)

    def forward(self, x: Tensor, *context) -> Tensor:
        x = x + functional.dropout(
            self.attention(self.attention_norm(x), *context), self.dropout, self.training
        )
        return x + functional.dropout(self.feed_forward(self.ffn_norm(x)), self.dropout, self.training)


def run(
    blocks: Iterable[Block],
    x: Tensor,
    table: Tensor,
    pattern: attention.Pattern,
    cache: KVCache | None,
    *,
    activation_checkpointing: Checkpointing,
) -> Tensor:
    """Pass x [B, S, D] through all blocks and return [B, S, D].

    Args:
        blocks: of the backbone, in order.
        x: [B, S, D].
        table: the rotary rows of these S positions, [S, C / 2] or [B, S, C / 2].
        pattern: see attention.pattern.
        cache: None for a whole sequence.
        activation_checkpointing: see Checkpointing; no effect without gradients.
    """
    for index, block in enumerate(blocks):
        if activation_checkpointing and cache is None and torch.is_grad_enabled():
            x = checkpoint(block, x, table, pattern, **checkpoint_options(activation_checkpointing))
        else:
            x = block(x, table, pattern, None if cache is None else cache.layers[index])
    return x
