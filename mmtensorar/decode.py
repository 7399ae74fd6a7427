"""Sliding-window sampling with guidance and a KV cache.

Each step samples a whole window; its offset 0 is final, the rest are drafts that the
next step sees and may revise. The cache only grows: refinement happens in the window,
never in past keys. Shapes: B batch, P prefix, T image tokens, K window, F factors,
V vocabulary; R rows, B or with guidance 2B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from mmtensorar.noise import invert_cdf
from mmtensorar.tensorar import Condition, TensorAR
from mmtensorar.windows import valid_slots

# The settings that may be one number, or a list with one per factor of a code.
PER_FACTOR = ("temperature", "top_k", "top_p")


def per_factor(value: Any, num_factors: int, name: str) -> list:
    """One number per factor, from a setting that is one number for all or a list of so many. Raises ValueError."""
    if not isinstance(value, Sequence):
        return [value] * num_factors
    if len(value) != num_factors:
        raise ValueError(
            f"{name} has {len(value)} numbers ({', '.join(map(str, value))}); expected one number, "
            f"or one per factor of a code, {num_factors}"
        )
    return list(value)


@dataclass(frozen=True)
class Sampler:
    """How a token is drawn from logits.

    temperature: > 0. top_k: keep the k likeliest and those as likely as the k-th, 0 keeps
    all. top_p: keep likeliest tokens until they have more than this probability, 1 keeps
    all. Each of these is one number, or a list with one per factor of a code. greedy: take
    the likeliest everywhere; greedy_drafts: only at offsets above 0.
    Raises ValueError for a value out of range.
    """

    temperature: float | Sequence[float] = 1.0
    top_k: int | Sequence[int] = 0
    top_p: float | Sequence[float] = 1.0
    greedy: bool = False
    greedy_drafts: bool = False

    def __post_init__(self) -> None:
        self._check("temperature", lambda x: x > 0, "a number above 0 (or greedy decoding)")
        self._check("top_k", lambda x: x >= 0, "0 (off) or more")
        self._check("top_p", lambda x: 0 < x <= 1, "a number above 0 and at most 1")

    def _check(self, name: str, fits: Callable[[float], bool], expected: str) -> None:
        value = getattr(self, name)
        if isinstance(value, Sequence):
            value = tuple(value)  # a list would make the sampler unhashable, and unlike one with an equal tuple
            object.__setattr__(self, name, value)
        if not all(map(fits, value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{name} is {value}; expected {expected}")

    def per_factor(self, num_factors: int) -> list[Sampler]:
        """One sampler of single numbers per factor. Raises ValueError for a list of another length."""
        columns = [per_factor(getattr(self, name), num_factors, name) for name in PER_FACTOR]
        return [replace(self, **dict(zip(PER_FACTOR, row, strict=True))) for row in zip(*columns, strict=True)]

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Logits [B, K, V], numbers in [0, 1) [B, K] float64 -> tokens [B, K] int64."""
        if self.greedy:
            return logits.argmax(-1)
        tokens = invert_cdf(self.probabilities(logits), uniform)
        if self.greedy_drafts:
            tokens[:, 1:] = logits[:, 1:].argmax(-1)
        return tokens

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., V] -> [..., V] float64, not normalised; a token filtered out is exactly 0."""
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            # By value: ties at the edge all stay, as in the samplers that the released models come with.
            edge = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < edge, float("-inf"))
        probs = logits.double().softmax(-1)
        if self.top_p < 1:
            ordered, order = probs.sort(dim=-1, descending=True, stable=True)
            # A token stays when those before it do not yet exceed top_p, so the first always stays.
            stays = ordered.cumsum(-1) - ordered <= self.top_p
            probs = torch.zeros_like(probs).scatter(-1, order, ordered * stays)
        return probs


class Decoded(NamedTuple):
    codes: Tensor  # [B, T, F] int64
    trace: Tensor | None  # [B, T, K, F] int64: trace[:, t] is the window of step t, 0 past the last token


@torch.no_grad()
def decode(
    model: TensorAR,
    condition: Condition,
    sampler: Sampler | Callable[[Tensor, Tensor], Tensor],
    *,
    cfg_scale: float | Sequence[float] = 1.0,
    cfg_tokens: int | None = None,
    draft_guidance: float = 1.0,
    generator: Generator | Sequence[Generator] | None = None,
    keep_trace: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Decoded:
    """Generate one image per row of the condition, in T backbone steps whatever the window.

    condition: B rows, on any device. sampler: or any function of logits [B, K, V] and numbers
    [B, K] to tokens [B, K], called for one factor after the other. cfg_scale: s in
    uncond + s (cond - uncond), applied to the logits of every offset, one number or one per
    factor; 1 everywhere runs no uncond rows. The guided token of a factor goes to both halves
    before the logits of the next. cfg_tokens: guide the first so many steps only; None guides
    all. draft_guidance: w in without + w (with - without), of rows that see drafts and rows that see none: 1 trusts drafts as the
    model was trained to and runs no further rows, 0 ignores them, for which it must have been trained with draft dropout.
    generator: one for the batch, or one per row, which makes a row independent of its
    neighbours; None draws from the global one. progress is called with (tokens done, T) after
    each step. The model should be in eval mode.
    Raises ValueError when the number of generators is not B, or of a setting's numbers not F.
    """
    backbone, K = model.backbone, model.window
    T, sizes = backbone.num_tokens, backbone.factor_sizes
    device = next(model.parameters()).device
    values, mask = condition.values.to(device), condition.mask.to(device)
    B = len(values)
    uniform = _uniform((T, len(sizes), K), B, generator).to(device)  # [B, T, F, K]
    scales = per_factor(cfg_scale, len(sizes), "cfg_scale")
    samplers = sampler.per_factor(len(sizes)) if isinstance(sampler, Sampler) else [sampler] * len(sizes)

    uncond = torch.zeros(B, dtype=torch.bool, device=device)
    guided = any(scale != 1 for scale in scales)
    if guided:
        values, mask = values.repeat(2, *[1] * (values.ndim - 1)), mask.repeat(2, 1)
        uncond = torch.cat([uncond, ~uncond])
    dialled = K > 1 and draft_guidance != 1
    if dialled:  # the later half sees no drafts
        values, mask, uncond = values.repeat(2, *[1] * (values.ndim - 1)), mask.repeat(2, 1), uncond.repeat(2)
    R = len(values)

    def both(rows: Tensor) -> Tensor:
        """[B, ...] -> [R, ...]: all rows of an image continue with the same window."""
        return rows.repeat(R // B, *[1] * (rows.ndim - 1))

    prefix = backbone.prefix(condition._replace(values=values, mask=mask), uncond)
    P = prefix.mask.shape[1]
    # The last window is never fed back, hence T - 1 places after the prefix.
    seen = torch.cat([prefix.mask, prefix.mask.new_ones(R, T - 1)], dim=1)
    cache = backbone.new_cache(P + T - 1)
    hidden = backbone(prefix.embeds, prefix.mask, cache)[:, -1:]

    valid = valid_slots(T, K, device)
    seen_slots = valid.expand(R, T, K)
    if dialled:
        blind = torch.arange(R, device=device) >= R // 2
        seen_slots = seen_slots & ~(blind[:, None, None] & (torch.arange(K, device=device) > 0))
    trace = torch.zeros(B, T, K, len(sizes), dtype=torch.int64, device=device)
    for t in range(T):
        window = trace[:, t : t + 1, :, :0]  # [B, 1, K, f], one factor longer each round
        for factor in range(len(sizes)):
            logits = model.logits(hidden, both(window)).float()[:, 0]  # [R, K, V_f]
            if dialled:
                informed, blind_logits = logits.chunk(2)
                logits = blind_logits + draft_guidance * (informed - blind_logits)
            if guided:
                cond_logits, uncond_logits = logits.chunk(2)
                logits = cond_logits
                if cfg_tokens is None or t < cfg_tokens:
                    logits = uncond_logits + scales[factor] * (cond_logits - uncond_logits)
            tokens = samplers[factor](logits, uniform[:, t, factor])
            window = torch.cat([window, tokens[:, None, :, None]], dim=-1)
        trace[:, t] = window[:, 0] * valid[t, :, None]
        if t + 1 < T:
            embeds = model.encode(both(trace[:, t : t + 1]), seen_slots[:, t : t + 1])
            hidden = backbone(embeds, seen[:, : P + t + 1], cache)
        if progress is not None:
            progress(t + 1, T)
    return Decoded(trace[:, :, 0].clone(), trace if keep_trace else None)


def revised_per_offset(trace: Tensor) -> list[float]:
    """Windows of every step [B, T, K, F] -> for each offset but the last, the share of its tokens that differ from the draft before."""
    changed = (trace[:, 1:, :-1] != trace[:, :-1, 1:]).any(-1)  # the same places, one step later at one offset less
    valid = valid_slots(trace.shape[1], trace.shape[2], trace.device)[1:, :-1]
    return ((changed & valid).sum((0, 1)) / (len(trace) * valid.sum(0)).clamp(min=1)).tolist()


def _uniform(shape: tuple[int, ...], batch: int, generator: Generator | Sequence[Generator] | None) -> Tensor:
    """[B, *shape] float64 in [0, 1), drawn up front so that nothing else can shift a row's stream."""
    if generator is None or isinstance(generator, Generator):
        device = None if generator is None else generator.device
        return torch.rand(batch, *shape, generator=generator, device=device, dtype=torch.float64)
    if len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for {batch} rows; expected one generator per row")
    return torch.stack([torch.rand(shape, generator=g, device=g.device, dtype=torch.float64) for g in generator])
