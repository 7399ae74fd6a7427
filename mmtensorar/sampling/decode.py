"""Sliding-window sampling with guidance and a KV cache.

Each step samples a whole window; its offset 0 is final, the rest are drafts that the
next step sees and may revise. Refinement happens in the window, never in past keys: the
cache only grows, but for guesses of lookahead that were wrong. Shapes: B batch, P prefix,
T image tokens, K window, F factors, V vocabulary; R rows, B, with guidance 2B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from mmtensorar.model.categorical import invert_cdf
from mmtensorar.model.conditions import Condition
from mmtensorar.model.tensorar import TensorAR
from mmtensorar.model.windows import valid_slots

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
            value = tuple(
                value
            )  # a list would make the sampler unhashable, and unlike one with an equal tuple
            object.__setattr__(self, name, value)
        if not all(map(fits, value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{name} is {value}; expected {expected}")

    def per_factor(self, num_factors: int) -> list[Sampler]:
        """One sampler of single numbers per factor. Raises ValueError for a list of another length."""
        columns = [per_factor(getattr(self, name), num_factors, name) for name in PER_FACTOR]
        return [
            replace(self, **dict(zip(PER_FACTOR, row, strict=True))) for row in zip(*columns, strict=True)
        ]

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
    trace: (
        Tensor | None
    )  # [B, T, K, F] int64: trace[:, t] is the window of step t, 0 past the last token, -1 where a stride left none
    passes: int = 0  # through the backbone, that over the prefix included


@torch.no_grad()
def decode(
    model: TensorAR,
    condition: Condition,
    sampler: Sampler | Callable[[Tensor, Tensor], Tensor],
    *,
    cfg_scale: float | Sequence[float] = 1.0,
    cfg_tokens: int | None = None,
    stride: int = 1,
    lookahead: int = 1,
    generator: Generator | Sequence[Generator] | None = None,
    keep_trace: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Decoded:
    """Generate one image per row of the condition, in T passes through the backbone whatever the window, or fewer.

    condition: B rows, on any device. sampler: or any function of logits [B, K, V] and numbers
    [B, K] to tokens [B, K], called for one factor after the other. cfg_scale: s in
    uncond + s (cond - uncond), applied to the logits of every offset, one number or one per
    factor; 1 everywhere runs no uncond rows. The guided token of a factor goes to both halves
    before the logits of the next. cfg_tokens: guide the first so many steps only; None guides
    all. stride: emit so many tokens of each window, unrevised but the first, in T / stride passes; 1 to K; train with tensorar.max_stride.
    lookahead: feed so many steps at once, the later ones guessed, and keep what the pass confirms: with its own random numbers for
    each step that is the image of one step at a time, up to rounding, in fewer passes; of a batch, what all its rows confirm.
    generator: one for the batch, or one per row, which makes a row independent of its
    neighbours; None draws from the global one. progress is called with (tokens done, T) after
    each step. The model should be in eval mode.
    Raises ValueError when the number of generators is not B, or of a setting's numbers not F; for a stride that is no number from 1 to
    K, a lookahead below 1, or both above 1.
    """
    backbone, K = model.backbone, model.window
    if not 1 <= stride <= K:
        raise ValueError(f"stride is {stride}; expected 1 to {K}, the model's window")
    if lookahead < 1 or (lookahead > 1 and stride > 1):
        raise ValueError(
            f"lookahead is {lookahead} and stride {stride}; expected 1 or more, and one of them 1"
        )
    T, sizes = backbone.num_tokens, backbone.factor_sizes
    device = next(model.parameters()).device
    values, mask = condition.values.to(device), condition.mask.to(device)
    B = len(values)
    # [B, T, F, K]; first those of the final tokens, which are then the same whatever the window.
    uniform = torch.cat([_uniform((T, len(sizes), k), B, generator) for k in (1, K - 1)], dim=-1).to(device)
    scales = per_factor(cfg_scale, len(sizes), "cfg_scale")
    samplers = sampler.per_factor(len(sizes)) if isinstance(sampler, Sampler) else [sampler] * len(sizes)

    uncond = torch.zeros(B, dtype=torch.bool, device=device)
    guided = any(scale != 1 for scale in scales)
    if guided:
        values, mask = values.repeat(2, *[1] * (values.ndim - 1)), mask.repeat(2, 1)
        uncond = torch.cat([uncond, ~uncond])
    R = len(values)

    def both(rows: Tensor) -> Tensor:
        """[B, ...] -> [R, ...]: all rows of an image continue with the same window."""
        return rows.repeat(R // B, *[1] * (rows.ndim - 1))

    prefix = backbone.prefix(condition._replace(values=values, mask=mask), uncond)
    P = prefix.mask.shape[1]
    # The last window is never fed back, hence T - 1 places after the prefix; lookahead feeds guesses beyond it.
    seen = torch.cat([prefix.mask, prefix.mask.new_ones(R, T - 1)], dim=1)
    cache = backbone.new_cache(P + T - 1)
    hidden, passes = backbone(prefix.embeds, prefix.mask, cache)[:, -1:], 1

    valid, offsets = valid_slots(T, K, device), torch.arange(K, device=device)

    def predict(hidden: Tensor, first: int) -> Tensor:
        """Hidden states [R, m, D] of the steps from first on -> their windows [B, m, K, F], 0 past the last token."""
        m = hidden.shape[1]

        def choose(logits: Tensor, factor: int) -> Tensor:
            """Logits [R, m, K, V_f] -> tokens [R, m, K], equal for all rows of an image."""
            logits = logits.float()
            if guided:
                cond_logits, uncond_logits = logits.chunk(2)
                logits = uncond_logits + scales[factor] * (cond_logits - uncond_logits)
                if cfg_tokens is not None:
                    logits[:, max(0, cfg_tokens - first) :] = cond_logits[:, max(0, cfg_tokens - first) :]
            numbers = uniform[:, first : first + m, factor]
            return both(samplers[factor](logits.flatten(0, 1), numbers.flatten(0, 1)).unflatten(0, (B, m)))

        windows = model.draft(hidden, choose)[:B]
        return windows * valid[first : first + m, :, None]

    def feed(windows: Tensor, first: int, known: Tensor) -> Tensor:
        """Windows [B, m, K, F] of the steps from first on, of which slots known [m, K] hold something -> hidden states [R, m, D]."""
        stop = first + windows.shape[1]
        embeds = model.encode(both(windows), valid[first:stop] & known)
        return backbone(embeds, seen[:, : P + stop], cache)

    trace = torch.zeros(B, T, K, len(sizes), dtype=torch.int64, device=device)
    t = 0
    if lookahead > 1:
        every = torch.ones(1, K, dtype=torch.bool, device=device)
        trace[:, :1] = predict(hidden, 0)
        guesses = trace[:, :0]
        while t + 1 < T:
            # The window of step t is exact; what follows is guessed, from the pass before or by moving on by a token.
            m = min(lookahead, T - 1 - t)
            fed = torch.cat([trace[:, t : t + 1], guesses[:, : m - 1]], dim=1)
            while fed.shape[1] < m:
                fed = torch.cat([fed, torch.cat([fed[:, -1:, 1:], fed[:, -1:, -1:]], dim=2)], dim=1)
            fed = fed * valid[t : t + m, :, None]
            found = predict(feed(fed, t, every), t + 1)  # of steps t + 1 to t + m
            passes += 1
            # A guess that is what was found was right, and so was all that was computed from it.
            right = (fed[:, 1:] == found[:, : m - 1]).flatten(2).all(-1).all(0).long().cumprod(0).sum().item()
            trace[:, t + 1 : t + right + 2] = found[:, : right + 1]
            guesses = found[:, right + 1 :]
            t += right + 1
            for layer in getattr(cache, "layers", cache):
                layer.crop(P + t)
            if progress is not None:
                progress(t, T)
        if progress is not None:
            progress(T, T)
        return Decoded(trace[:, :, 0].clone(), trace if keep_trace else None, passes)
    while t < T:
        s = min(stride, T - t)
        window = predict(hidden[:, -1:], t)[:, 0]
        for row in range(s):  # a step later fewer of the same drafts are ahead
            trace[:, t + row, : K - row] = window[:, row:]
            trace[:, t + row, K - row :] = torch.where(valid[t + row, K - row :, None], -1, 0)
        if t + s < T:
            hidden = feed(
                trace[:, t : t + s].clamp(min=0), t, torch.arange(s, device=device)[:, None] + offsets < K
            )
            passes += 1
        t += s
        if progress is not None:
            progress(t, T)
    return Decoded(trace[:, :, 0].clone(), trace if keep_trace else None, passes)


def revised_per_offset(trace: Tensor) -> list[float]:
    """Windows of every step [B, T, K, F] -> for each offset but the last, the share of its tokens that differ from the draft before.

    Of tokens that have both; -1 is no draft.
    """
    later, earlier = (
        trace[:, 1:, :-1],
        trace[:, :-1, 1:],
    )  # the same places, one step later at one offset less
    valid = (
        valid_slots(trace.shape[1], trace.shape[2], trace.device)[1:, :-1]
        & (later >= 0).all(-1)
        & (earlier >= 0).all(-1)
    )
    return (((later != earlier).any(-1) & valid).sum((0, 1)) / valid.sum((0, 1)).clamp(min=1)).tolist()


def _uniform(shape: tuple[int, ...], batch: int, generator: Generator | Sequence[Generator] | None) -> Tensor:
    """[B, *shape] float64 in [0, 1), drawn up front so that nothing else can shift a row's stream."""
    if generator is None or isinstance(generator, Generator):
        device = None if generator is None else generator.device
        return torch.rand(batch, *shape, generator=generator, device=device, dtype=torch.float64)
    if len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for {batch} rows; expected one generator per row")
    return torch.stack(
        [torch.rand(shape, generator=g, device=g.device, dtype=torch.float64) for g in generator]
    )
