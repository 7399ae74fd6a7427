"""The random numbers of each token, and the token that a number draws.

Every token has its own number in [0, 1), drawn before decoding starts. So nothing that
happens while decoding (batch, lookahead, filters) can shift the stream of an image.
Shapes: B batch, T image tokens, K window, F factors, V vocabulary; N any number of
windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from mmtensorar.model.categorical import invert_cdf
from mmtensorar.sampling import filters

# (logits [N, K, V], numbers [N, K] float64 in [0, 1)) -> tokens [N, K] int64, called
# for one factor after the other.
Draw = Callable[[Tensor, Tensor], Tensor]
# An element of SamplerSettings.per_factor, where every list is replaced by one number.
# Any, since the declared types still allow lists.
FactorSettings = Any
Generators = Generator | Sequence[Generator] | None


def token_numbers(
    num_tokens: int, window: int, num_factors: int, batch: int, generator: Generators
) -> Tensor:
    """One number in [0, 1) for each slot and factor of each step: [B, T, F, K] float64.

    The numbers of the final tokens (offset 0) are drawn first. So they are the same for
    any window, and models with different windows are compared on equal numbers.

    Args:
        generator: one for the batch; or one per row, which makes a row independent of
            its neighbours; None draws from the global one.

    Raises ValueError when the number of generators is not B.
    """
    final, drafts = (
        _uniform((num_tokens, num_factors, slots), batch, generator) for slots in (1, window - 1)
    )
    return torch.cat([final, drafts], dim=-1)


def _uniform(shape: tuple[int, ...], batch: int, generator: Generators) -> Tensor:
    """[B, *shape] float64 in [0, 1), on the generators' device."""
    if generator is None or isinstance(generator, Generator):
        device = None if generator is None else generator.device
        return torch.rand(batch, *shape, generator=generator, device=device, dtype=torch.float64)
    if len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for {batch} rows; expected one generator per row")
    rows = [torch.rand(shape, generator=g, device=g.device, dtype=torch.float64) for g in generator]
    return torch.stack(rows)


def draw_tokens(logits: Tensor, numbers: Tensor, settings: FactorSettings) -> Tensor:
    """Logits [N, K, V], numbers [N, K] -> tokens [N, K], by one factor's settings."""
    probs = filters.probabilities(
        logits, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
    )
    tokens = invert_cdf(probs, numbers)
    if settings.greedy_drafts:
        tokens[:, 1:] = greedy(logits[:, 1:], numbers)
    return tokens


def greedy(logits: Tensor, numbers: Tensor) -> Tensor:
    """The likeliest tokens; the numbers are not used. A `draw` for `decode`."""
    return logits.argmax(-1)
