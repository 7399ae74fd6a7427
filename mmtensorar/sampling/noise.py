"""Which noise a token is drawn with, and the token that it draws.

Each picture has a key, and each of its tokens a key made from it, its place and its
factor (see `mmtensorar.model.noise`). So nothing that happens while decoding (batch,
order, lookahead, filters) can change the noise of a token.
Shapes: B batch, K window, V vocabulary; m consecutive steps, N any number of windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from mmtensorar.model import noise
from mmtensorar.sampling import filters

# (logits [N, K, V], keys [N, K] int64) -> tokens [N, K] int64, called for one factor
# after the other.
Draw = Callable[[Tensor, Tensor], Tensor]
# An element of SamplerSettings.per_factor, where every list is replaced by one number.
# Any, since the declared types still allow lists.
FactorSettings = Any
Generators = Generator | Sequence[Generator] | None


def picture_keys(batch: int, generator: Generators) -> Tensor:
    """One key for each picture: [B] int64.

    Args:
        generator: one for the batch; or one per row, which makes a row independent of
            its neighbours; None draws from the global one.

    Raises ValueError when the number of generators is not B.
    """
    if generator is None or isinstance(generator, Generator):
        device = None if generator is None else generator.device
        return noise.random_keys((batch,), generator, device)
    if len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for {batch} rows; expected one generator per row")
    return torch.stack([noise.random_keys((), each, each.device) for each in generator])


def token_keys(
    pictures: Tensor, steps: Tensor, offsets: Tensor, factor: int, num_factors: int, *, coupled: bool
) -> Tensor:
    """The keys of the windows of some steps, for one factor: [B, m, K] int64.

    A final token (offset 0) has the key of its place. It is the same for any window, so
    models with different windows are compared on equal noise.

    Args:
        pictures: [B] keys.
        steps: [B, m].
        offsets: [K] int64, 0 to K - 1. A tensor, since the compiler would compute with a
            range of its own in 32 bits.
        coupled: a draft has the key of the place that it is a draft of, so it is what
            the final token will be if the model learns nothing in between. Otherwise
            each draft has a key of its own.
    """
    pictures = pictures[:, None, None]
    if coupled:
        places_BmK = steps[..., None] + offsets
        return noise.child_keys(pictures, places_BmK * num_factors + factor)
    places_BmK = steps[..., None].expand(*steps.shape, len(offsets))
    keys_BmK = noise.child_keys(pictures, places_BmK * num_factors + factor)
    return torch.where(offsets == 0, keys_BmK, noise.child_keys(keys_BmK, offsets))


def draw_tokens(logits: Tensor, keys: Tensor, settings: FactorSettings) -> Tensor:
    """Logits [N, K, V], keys [N, K] -> tokens [N, K], by one factor's settings."""
    kept = filters.filtered(
        logits, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
    )
    tokens = noise.draw(kept, keys)
    if settings.greedy_drafts:
        tokens[:, 1:] = greedy(logits[:, 1:], keys)
    return tokens


def greedy(logits: Tensor, keys: Tensor) -> Tensor:
    """The likeliest tokens; the keys are not used. A `draw` for `decode`."""
    return logits.argmax(-1)
