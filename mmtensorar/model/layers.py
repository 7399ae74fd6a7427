"""Transformer layers of the backbones that are our own code, under the parameter names of the official checkpoints.

LlamaGen and Open-MAGVIT2 are both built of them: RMS norms, rotary places on a grid, SwiGLU.
Shapes: B batch, P prefix, S rows, T image tokens, D width, H query heads, G key/value heads, C width of a head.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from functools import lru_cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mmtensorar.model import attention

# Where `Linear` multiplies in its own way: up to so many rows, with a weight of at least so many numbers.
MOST_ROWS, LARGE = 64, 2**19


Checkpointing = bool | Literal["selective"]
"""What of a block a backward computes again instead of keeping: nothing, all, or what is not a matrix product or attention."""

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
    """Options of torch.utils.checkpoint.checkpoint for a policy that is not False."""
    # Not reentrant: ZeRO-3 counts on one gradient per parameter and backward.
    options: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT)
    return options


def ffn_width(dim: int, *, multiple_of: int = 256, multiplier: float | None = None) -> int:
    """Hidden width of the feed-forward: two thirds of 4 D (times multiplier), rounded up."""
    width = int(2 * 4 * dim / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return -(-width // multiple_of) * multiple_of


# ---- places --------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a table first asked for while sampling must still do for training
def rotary_table(
    prefix_len: int, num_tokens: int, head_dim: int, base: float, device: torch.device
) -> Tensor:
    """[P + T, C / 2] complex64, cos + i sin per pair of channels: a quarter turns by row, a quarter by column.

    Neither a buffer nor a parameter, so that no cast to bf16 ever reaches it.
    """
    side = math.isqrt(num_tokens)
    frequencies = base ** -(torch.arange(0, head_dim // 2, 2, device=device).float() / (head_dim // 2))
    angles = torch.outer(torch.arange(side, device=device).float(), frequencies)  # [side, C / 4]
    by_row = angles[:, None].expand(side, side, -1)
    by_column = angles[None].expand(side, side, -1)
    angles = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
    image = torch.polar(torch.ones_like(angles), angles)
    # cos = sin = 0 for the prefix, not (1, 0): its queries and keys become zero vectors. The released models were
    # trained so, and "repairing" this breaks every one of them.
    return torch.cat([image.new_zeros(prefix_len, image.shape[1]), image])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """[B, S, H, C], [S, C / 2] -> [B, S, H, C]: neighbouring channels are a pair. In float32, returned in x's dtype."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[:, None]).flatten(-2).type_as(x)


# ---- layers --------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """In float32, back to the input's dtype, then the weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


class Linear(nn.Linear):
    """A linear map that is quick where decoding on the CPU needs it: one place per image, so a few rows.

    For few rows and a large weight nn.Linear's product is bound by neither memory nor arithmetic (MKL in PyTorch 2.15,
    two threads with AVX-512). Turned round, it takes 0.7 of the time for 16 rows and a quarter for two, and two rows
    less than half the time of one, for which MKL uses a single thread. With one thread, or a weight that stays in the
    cache, turning does not pay. In training, for whole sequences and on GPUs nothing differs.
    """

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """[B, S, ..., D] -> [B, S, ..., O], or with targets [B, S, ...] their summed cross entropy [], see `fused_loss`."""
        if targets is not None:
            return fused_loss(x.flatten(0, -2), self.weight, self.bias, targets.flatten())
        few = x.shape[1] == 1 and x[..., 0].numel() <= MOST_ROWS
        large = self.weight.numel() >= LARGE and torch.get_num_threads() > 1
        if (
            not (few and large)
            or x.device.type != "cpu"
            or x.dtype != torch.float32
            or torch.is_grad_enabled()
        ):
            return super().forward(x)
        rows = x.flatten(0, -2)
        product = self.weight @ (rows if len(rows) > 1 else rows.repeat(2, 1)).T  # [O, rows]
        result = product[:, : len(rows)].T.contiguous().view(*x.shape[:-1], -1)
        return result if self.bias is None else result + self.bias


IGNORED = -100  # a target that counts nothing


def has_fused_loss() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def fused_loss(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """[N, D], [V, D], [V] or None, [N] -> [] float32: the summed cross entropy of x @ weight.T + bias, by Liger's kernel.

    Logits and their gradients are made once, a part at a time, in the forward.
    """
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    loss = LigerFusedLinearCrossEntropyFunction.apply(
        x, weight, targets, bias, None, IGNORED, 0.0, 0.0, "sum"
    )
    return (loss[0] if isinstance(loss, tuple) else loss).float()


def quicken(model: nn.Module) -> None:
    """Give the linear maps of a model that is not our code the forward of ours."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


class SelfAttention(nn.Module):
    """Causal attention over places. wqkv holds query, key and value, in that order."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int):
        super().__init__()
        self.heads = [num_heads, num_kv_heads]
        self.wqkv = Linear(dim, (num_heads + 2 * num_kv_heads) * (dim // num_heads), bias=False)
        self.wo = Linear(dim, dim, bias=False)

    def forward(
        self, x: Tensor, table: Tensor, pattern: attention.Pattern, cache: attention.LayerCache | None = None
    ) -> Tensor:
        """[B, S, D], the table's rows of these S places -> [B, S, D]."""
        H, G = self.heads
        qkv = self.wqkv(x).unflatten(-1, (H + 2 * G, -1))  # [B, S, H + 2G, C]
        query, key = rotate(qkv[:, :, : H + G], table).transpose(1, 2).split(self.heads, dim=1)
        value = qkv[:, :, H + G :].transpose(1, 2)
        if cache is not None:
            key, value = cache.append(key, value)
        mixed = attention.attend(query, key, value, pattern)  # [B, H, S, C]
        return self.wo(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = Linear(dim, hidden, bias=False)
        self.w3 = Linear(dim, hidden, bias=False)
        self.w2 = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and feed-forward, each normed before and added after."""

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
    caches: list[attention.LayerCache] | None,
    *,
    activation_checkpointing: Checkpointing,
) -> Tensor:
    """[B, S, D] through all blocks; see Checkpointing."""
    for index, block in enumerate(blocks):
        if activation_checkpointing and caches is None and torch.is_grad_enabled():
            x = checkpoint(block, x, table, pattern, **checkpoint_options(activation_checkpointing))
        else:
            x = block(x, table, pattern, None if caches is None else caches[index])
    return x
