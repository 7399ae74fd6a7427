"""Draw tokens with Gumbel noise that is a function of a key and of the code alone.

A token is the code with the largest log p + g, where g is independent Gumbel noise for
each code (the Gumbel-max trick; Maddison et al., A* Sampling, arXiv:1411.0030). Two
distributions p and q that share their noise give the same token with probability
sum_i 1 / sum_j max(p_j / p_i, q_j / q_i), at least (1 - D) / (1 + D) where D is their
total variation. So a guess that was drawn from a similar distribution is often right.

The noise is computed when it is needed, by a hash of the token's key and the code. So
it does not depend on batch, device or order of computation, and needs no memory
between draws.
Shapes: V vocabulary; any axes in front.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

# Odd constants of integer hashes: the golden ratio's, those of MurmurHash3's 32-bit
# finaliser (Appleby), and those of SplitMix64 (Steele et al., OOPSLA 2014).
GOLDEN_32 = 0x9E3779B1
MURMUR = (0x85EBCA6B, 0xC2B2AE35)
GOLDEN_64 = 0x9E3779B97F4A7C15
SPLITMIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def random_keys(
    shape: Sequence[int], generator: Generator | None = None, device: torch.device | None = None
) -> Tensor:
    """Keys drawn at random, int64 of any value.

    generator: None is the global one.
    """
    return torch.randint(-(2**63), 2**63 - 1, tuple(shape), generator=generator, device=device)


def child_keys(keys: Tensor, numbers: Tensor | int) -> Tensor:
    """One key for each number, derived from `keys`: int64, of the broadcast shape.

    A different number, or a different key, gives an unrelated key.
    """
    numbers = torch.as_tensor(numbers, dtype=torch.int64, device=keys.device)
    return _mix_64(keys + _signed(GOLDEN_64, 64) * (numbers + 1))


def draw(logits: Tensor, keys: Tensor) -> Tensor:
    """Tokens [...] int64 from logits [..., V], by the keys [...] int64 of the tokens.

    The logits are log probabilities up to a constant, in any floating dtype. Minus
    infinity is never drawn, unless all are.
    """
    return (logits.float() + gumbel(keys, logits.shape[-1])).argmax(-1)


def gumbel(keys: Tensor, size: int) -> Tensor:
    """Standard Gumbel noise of the codes 0 to size - 1: keys [...] -> float32
    [..., size].
    """
    # Of two uniform numbers of 31 bits the float is exact where it matters: a code wins
    # by a small exponential number, which needs a small uniform one.
    uniform = (_hash(keys, size) & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)
    exponential = uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()
    return exponential.log_().neg_()


def _hash(keys: Tensor, size: int) -> Tensor:
    """A 32-bit hash of each key and code: keys [...] int64 -> int32 [..., size].

    Both halves of the key enter, each before a full mix, so that two keys that agree in
    one half give unrelated numbers.
    """
    low = keys.to(torch.int32)[..., None]  # wraps around
    high = (keys >> 32).to(torch.int32)[..., None]
    codes = torch.arange(size, dtype=torch.int32, device=keys.device) * _signed(GOLDEN_32, 32)
    return _mix_32_(_mix_32_(codes + low) ^ high)


def _mix_32_(x: Tensor) -> Tensor:
    """MurmurHash3's finaliser, in place; each bit of the input changes half of the
    output's.
    """
    first, second = (_signed(constant, 32) for constant in MURMUR)
    # A shift of a signed number fills in its sign, which the masks remove.
    x ^= (x >> 16) & 0xFFFF
    x *= first
    x ^= (x >> 13) & 0x7FFFF
    x *= second
    x ^= (x >> 16) & 0xFFFF
    return x


def _mix_64(x: Tensor) -> Tensor:
    """SplitMix64's mix."""
    first, second = (_signed(constant, 64) for constant in SPLITMIX)
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * first
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * second
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _signed(value: int, bits: int) -> int:
    """An unsigned number as the signed one with the same bits."""
    return value - 2**bits if value >= 2 ** (bits - 1) else value
