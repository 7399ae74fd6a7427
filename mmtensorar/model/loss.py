"""The loss of the predicted windows: offset weights, chunks, kernels, and the reported
numbers.

    L = sum_j offset_weights[j] * mean_{b, t} CE(logits[b, t, j], codes[b, t + j])

The mean is over the valid slots. Each offset's cross entropy is also reported alone.
Heads give logits only; this file chooses how their cross entropy is computed:

    in chunks   logits of a chunk, then cross entropy; the backward computes them again
    liger       Liger's kernel, which fuses the head's last linear map with the cross entropy

Shapes: B batch, T image tokens, K window, F factors, V vocabulary, D width, N rows of
B * T.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmtensorar.model.layers import OutputMap
from mmtensorar.model.protocols import Head
from mmtensorar.recipe import Train

IGNORED = -100  # a target that does not count
OFFSET_WEIGHTS: dict[str, Callable[[int], float]] = {
    "uniform": lambda offset: 1.0,
    "first_only": lambda offset: float(offset == 0),
    "geometric": lambda offset: 0.5**offset,
}


@dataclass(frozen=True)
class LossSettings:
    """How the loss is computed; the recipe's section train has these keys.

    chunk_tokens: the most rows of logits in memory at once (train.loss_chunk_tokens).
    label_smoothing: share of each target that is spread over all codes, in training.
    z_loss: weight of log(Z)^2 of each prediction in training, which keeps logits from
        drifting (Chowdhery et al., arXiv:2204.02311, section 5).
    kernel: train.loss_kernel. auto uses Liger's on a GPU if it is installed and
        supports this head and loss.

    Raises ValueError when chunk_tokens is below 1.
    """

    chunk_tokens: int = 2048
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    kernel: Literal["auto", "torch", "liger"] = "auto"

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ValueError(f"train.loss_chunk_tokens is {self.chunk_tokens}; expected 1 or more")

    @classmethod
    def of(cls, train: Train) -> LossSettings:
        """The settings of a recipe's section train."""
        return cls(train.loss_chunk_tokens, train.label_smoothing, train.z_loss, train.loss_kernel)


DEFAULT_LOSS = LossSettings()


class LossOutput(NamedTuple):
    """What a training or validation step computes."""

    loss: Tensor
    """[] float32: what is minimised, offset weights, smoothing and z-loss included."""
    loss_per_offset: Tensor
    """[K] float32, nats per token: the cross entropy alone, without offset weights, detached."""
    accuracy_per_offset: Tensor | None
    """[K] float32: share of tokens whose likeliest code is the true one. None in train mode."""


def resolve_offset_weights(spec: Sequence[float] | str | None, window: int) -> list[float]:
    """The K weights of the loss, from a list of K numbers, a name, or None (1, then 0.1
    per draft).

    Names: uniform (1, 1, ...), first_only (1, 0, ...), geometric (1, 1/2, 1/4, ...).
    Raises ValueError for another name, another count, or weights that are negative,
    not finite or all zero.
    """
    if spec is None:
        # Equal weights made a small model clearly worse in a sketch of the method.
        return [1.0] + [0.1] * (window - 1)
    if isinstance(spec, str):
        if spec not in OFFSET_WEIGHTS:
            raise ValueError(
                f"tensorar.offset_weights is {spec!r}; expected {window} numbers "
                f"or one of {', '.join(OFFSET_WEIGHTS)}"
            )
        return [OFFSET_WEIGHTS[spec](offset) for offset in range(window)]
    weights = [float(weight) for weight in spec]
    if len(weights) != window:
        raise ValueError(
            f"tensorar.offset_weights has {len(weights)} numbers; expected {window}, "
            "one per offset of the window"
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise ValueError(
            f"tensorar.offset_weights is {weights}; expected finite numbers >= 0, at least one above 0"
        )
    return weights


def window_loss(
    hidden: Tensor,
    targets: Tensor,
    valid: Tensor,
    *,
    offset_states: Callable[[Tensor], Tensor],
    head: Head,
    offset_weights: Sequence[float],
    settings: LossSettings,
    training: bool,
) -> LossOutput:
    """The loss of the windows that hidden states predict.

    Args:
        hidden: [B, T, D]; row t predicts window t.
        targets: [B, T, K, F] int64, the true windows.
        valid: [T, K] bool; other slots are ignored.
        offset_states: [..., D] -> [..., K, D], the output decoder (or a view if K is
            1).
        head: the backbone's head.
        offset_weights: K weights.
        settings: see LossSettings.
        training: True applies label smoothing and z-loss; False computes accuracies.

    Raises ValueError when the kernel is liger and it does not support this head or
    loss.
    """
    sums = _liger_sums if _uses_liger(head, hidden, settings) else _chunked_sums
    sums_3K = sums(
        hidden,
        targets,
        valid,
        offset_states=offset_states,
        head=head,
        settings=settings,
        training=training,
    )
    # T is fixed, so every rank averages over equally many tokens per offset, and the
    # mean over ranks of these means is the global mean.
    goal_K, loss_K, right_K = sums_3K / (len(hidden) * valid.sum(0))
    weights_K = torch.tensor(tuple(offset_weights), device=loss_K.device)
    return LossOutput((weights_K * goal_K).sum(), loss_K.detach(), None if training else right_K.detach())


# ---- logits in chunks ----------------------------------------------------------------------------


def _chunked_sums(
    hidden: Tensor,
    targets: Tensor,
    valid: Tensor,
    *,
    offset_states: Callable[[Tensor], Tensor],
    head: Head,
    settings: LossSettings,
    training: bool,
) -> Tensor:
    """[3, K] float32: goal, cross entropy and number of right tokens, summed over B and
    valid T.

    All logits at once would be B * T * K rows of V numbers, by far the largest tensor
    of a step. They are computed in chunks, and the backward computes each chunk again.
    The chunks depend on shapes only, so under ZeRO-3 all ranks gather weights in the
    same order.
    """
    chunk_sums = partial(
        _chunk_sums, offset_states=offset_states, head=head, settings=settings, training=training
    )
    hidden_ND, targets_NKF = hidden.flatten(0, 1), targets.flatten(0, 1)
    valid_NK = valid.repeat(len(hidden), 1)
    size = _rows_per_chunk(settings, targets.shape[2])
    chunks = list(zip(hidden_ND.split(size), targets_NKF.split(size), valid_NK.split(size), strict=True))
    if len(chunks) == 1 or not torch.is_grad_enabled():
        sums = [chunk_sums(*chunk) for chunk in chunks]
    else:
        # Not reentrant: ZeRO-3 expects one gradient per parameter and backward.
        sums = [checkpoint(chunk_sums, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(sums).sum(0)


def _chunk_sums(
    hidden: Tensor,
    targets: Tensor,
    valid: Tensor,
    *,
    offset_states: Callable[[Tensor], Tensor],
    head: Head,
    settings: LossSettings,
    training: bool,
) -> Tensor:
    """hidden [N, D], targets [N, K, F], valid [N, K] -> [3, K] float32; see
    `_chunked_sums`.

    The losses of a token are summed over its factors; a token is right if all its
    factors are.
    """
    # One batch row of N steps, since a head expects [B, S, ...].
    targets_1NKF = targets[None]
    states_1NKD = offset_states(hidden[None])
    # Sums over factors, one number for each of the N * K slots.
    losses = targets.new_zeros(targets[..., 0].numel(), dtype=torch.float32)
    goals, right = losses, torch.zeros_like(losses) if training else torch.ones_like(losses)
    for factor in range(targets.shape[-1]):
        true = targets[..., factor].flatten()
        logits = head(states_1NKD, targets_1NKF[..., :factor]).float().flatten(0, -2)  # [N * K, V_f]
        loss = goal = functional.cross_entropy(logits, true, reduction="none")
        if training and settings.label_smoothing:
            uniform = logits.logsumexp(-1) - logits.mean(-1)
            goal = (1 - settings.label_smoothing) * loss + settings.label_smoothing * uniform
        if training and settings.z_loss:
            goal = goal + settings.z_loss * logits.logsumexp(-1).square()
        losses, goals = losses + loss, goals + goal
        if not training:
            right = right * (logits.argmax(-1) == true)
    sums_3NK = torch.stack([goals, losses, right]).unflatten(1, valid.shape)
    return torch.where(valid, sums_3NK, 0).sum(1)


def _rows_per_chunk(settings: LossSettings, window: int) -> int:
    return max(1, settings.chunk_tokens // window)


# ---- Liger's fused kernel ------------------------------------------------------------------------


def has_liger() -> bool:
    """Whether the package liger-kernel is installed."""
    return importlib.util.find_spec("liger_kernel") is not None


def _uses_liger(head: Head, hidden: Tensor, settings: LossSettings) -> bool:
    """Whether Liger computes the loss.

    It supports one factor and plain cross entropy.

    Only where gradients are needed: the kernel computes them in the forward.
    Raises ValueError when settings.kernel is liger, and it does not support this head
    or loss.
    """
    if settings.kernel == "torch" or not torch.is_grad_enabled():
        return False
    plain_head = len(head.output_maps) == 1 and isinstance(head.output_maps[0], OutputMap)
    supported = plain_head and not (settings.label_smoothing or settings.z_loss)
    if settings.kernel == "liger" and not supported:
        raise ValueError(
            "train.loss_kernel=liger supports only cross entropy with a plain linear head "
            "(no label_smoothing, no z_loss, one factor, no adapter on the head); use auto"
        )
    return supported and (settings.kernel == "liger" or hidden.is_cuda and has_liger())


def _liger_sums(
    hidden: Tensor,
    targets: Tensor,
    valid: Tensor,
    *,
    offset_states: Callable[[Tensor], Tensor],
    head: Head,
    settings: LossSettings,
    training: bool,
) -> Tensor:
    """[3, K] float32, as `_chunked_sums`; without the number of right tokens, which
    stays 0.

    Only the decoder runs in chunks, which the backward computes again. The states of
    all offsets are in memory at once.
    """
    K = targets.shape[2]
    chunks = hidden.flatten(0, 1)[None].split(_rows_per_chunk(settings, K), dim=1)
    if K == 1:  # there is no decoder
        states = [offset_states(chunk) for chunk in chunks]
    else:
        states = [checkpoint(offset_states, chunk, use_reentrant=False) for chunk in chunks]
    states_1NKD = torch.cat(states, dim=1)
    targets_1NK = targets[..., 0].masked_fill(~valid, IGNORED).flatten(0, 1)[None]
    no_factors = targets.new_empty(*states_1NKD.shape[:2], 0)
    losses_K = torch.stack(
        [
            head.output_maps[0](
                head.states(states_1NKD[:, :, offset], no_factors),
                kernel=partial(liger_cross_entropy, targets=targets_1NK[..., offset]),
            )
            for offset in range(K)
        ]
    )
    return torch.stack([losses_K, losses_K.detach(), torch.zeros_like(losses_K)])


def liger_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, *, targets: Tensor) -> Tensor:
    """The summed cross entropy of x @ weight.T + bias by Liger's kernel, an OutputMap's
    `kernel`.

    The forward computes logits and their gradients once, one part after the other.

    Args:
        x: [..., D].
        weight: [V, D].
        bias: [V] or None.
        targets: [...] int64; IGNORED does not count.

    Returns:
        [] float32.
    """
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    result = LigerFusedLinearCrossEntropyFunction.apply(
        x.flatten(0, -2), weight, targets.flatten(), bias, None, IGNORED, 0.0, 0.0, "sum"
    )
    return (result[0] if isinstance(result, tuple) else result).float()
