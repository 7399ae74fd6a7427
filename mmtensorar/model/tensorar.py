"""TensorAR: windows -> noise -> encoder -> backbone -> decoder -> loss.

A next-token backbone made to predict K consecutive tokens at each step, so that each
token is drafted K - 1 times before it is final (arXiv:2505.16324). With K = 1 this is
plain next-token training. Shapes: B batch, P prefix, T image tokens, S rows, K window,
F factors, V vocabulary, D width.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmtensorar.model import layers
from mmtensorar.model.codec import WindowDecoder, WindowEncoder
from mmtensorar.model.conditions import Condition
from mmtensorar.model.drafts import (
    FixedSchedule,
    Schedule,
    invert_cdf,
    redraw,
)
from mmtensorar.model.protocols import Backbone
from mmtensorar.model.windows import slide
from mmtensorar.recipe import Recipe


class Output(NamedTuple):
    loss: Tensor  # [] float32
    loss_per_offset: (
        Tensor  # [K] float32, nats per token: cross entropy alone, without offset weights and detached
    )
    accuracy_per_offset: (
        Tensor | None
    )  # [K] float32, share of tokens whose likeliest code is the true one; in eval mode only


class TensorAR(nn.Module):
    """A backbone with the window codec around it.

    encoder and decoder are None when the window is 1. offset_weights: K numbers, whose
    count is the window. chunk_tokens: the most rows of logits held at once. label_smoothing: share of each target spread over
    all codes. loss_kernel: auto takes Liger's fused loss on a GPU where it is installed and the head allows, torch and liger are
    as they say. self_drafts: share of the redrawn slots that hold what the model itself drafts there, instead of uniform noise; costs a forward more. max_stride: each
    sample is trained as if so many tokens of each window, 1 to max_stride, were emitted at once (see `decode`): drafts of later steps
    are missing then, and the rest further ahead. z_loss: weight of log(Z)^2 of each prediction (Chowdhery et al., arXiv:2204.02311,
    section 5), which keeps logits from drifting.
    """

    def __init__(
        self,
        backbone: Backbone,
        encoder: WindowEncoder | None,
        decoder: WindowDecoder | None,
        schedule: Schedule,
        *,
        offset_weights: Sequence[float],
        chunk_tokens: int = 2048,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        loss_kernel: str = "auto",
        self_drafts: float = 0.0,
        max_stride: int = 1,
    ):
        super().__init__()
        if not 1 <= max_stride <= len(offset_weights):
            raise ValueError(
                f"tensorar.max_stride is {max_stride}; expected 1 to {len(offset_weights)}, the window"
            )
        self.window = len(offset_weights)
        if not 1 <= self.window <= backbone.num_tokens:
            raise ValueError(
                f"tensorar.window is {self.window}; expected 1 to {backbone.num_tokens}, "
                "the number of image tokens of the backbone"
            )
        if chunk_tokens < 1:
            raise ValueError(f"train.loss_chunk_tokens is {chunk_tokens}; expected 1 or more")
        assert (encoder is None) == (decoder is None) == (self.window == 1)
        self.backbone = backbone
        self.encoder = encoder
        self.decoder = decoder
        self.schedule = schedule
        self.offset_weights = tuple(float(weight) for weight in offset_weights)
        self.chunk_tokens = chunk_tokens
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.loss_kernel = loss_kernel
        self.self_drafts, self.max_stride = self_drafts, max_stride

    def forward(
        self,
        codes: Tensor,
        condition: Condition,
        uncond: Tensor,
        generator: Generator | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Output:
        """Teacher-forced loss over all windows.

        codes: [B, T, F] int64. condition: B rows. uncond: [B] bool, True rows are trained
        without their prompt. generator: draws the noise; None draws from the global one. rows: see `redraw`.
        """
        targets_BTKF, valid_TK = slide(codes, self.window)
        clean_BSKF, seen = targets_BTKF[:, :-1], valid_TK[:-1]
        rates_BSK = self.schedule(tuple(clean_BSKF.shape[:3]), generator)
        steps_S, offsets_K = (torch.arange(size, device=codes.device) for size in clean_BSKF.shape[1:3])
        phases_BS = None
        if self.training and self.max_stride > 1:
            strides_B = 1 + (_uniform((len(codes),), generator, rows, codes.device) * self.max_stride).long()
            # How far ahead a slot's token was drafted: a row that is emitted with others sees what the first of them saw.
            phases_BS = steps_S % strides_B[:, None]
            ahead_BSK = phases_BS[..., None] + offsets_K
            further_BSK = rates_BSK.to(codes.device).gather(-1, ahead_BSK.clamp(max=self.window - 1))
            rates_BSK, seen = further_BSK * (offsets_K > 0), seen & (ahead_BSK < self.window)
        sizes = self.backbone.factor_sizes
        redrawn_BSK, drawn_BSKF = redraw(
            tuple(clean_BSKF.shape[:3]), rates_BSK.to(codes.device), sizes, generator, rows
        )
        inputs_BSKF = torch.where(redrawn_BSK[..., None], drawn_BSKF, clean_BSKF)
        if self.self_drafts and self.window > 1:
            # In validation too, and made without a look at the redrawn slots: a model does not meet their uniform noise elsewhere.
            own_BSKF = self.own_drafts(clean_BSKF, seen & ~redrawn_BSK, condition, uncond, generator, rows)
            if phases_BS is not None:
                samples = torch.arange(len(codes), device=codes.device)[:, None, None]
                slots_BSK = (phases_BS[..., None] + offsets_K).clamp(max=self.window - 1)
                own_BSKF = own_BSKF[samples, (steps_S - phases_BS)[..., None], slots_BSK]
            taken_BSK = redrawn_BSK & (
                _uniform(redrawn_BSK.shape, generator, rows, redrawn_BSK.device) < self.self_drafts
            )
            inputs_BSKF = torch.where(taken_BSK[..., None], own_BSKF, inputs_BSKF)
        return self.score(inputs_BSKF, seen, codes, condition, uncond)

    def score(
        self, inputs: Tensor, seen: Tensor, codes: Tensor, condition: Condition, uncond: Tensor
    ) -> Output:
        """Loss of codes [B, T, F] when the model is given the input windows [B, T - 1, K, F]; seen: as valid of `hidden`."""
        targets_BTKF, valid_TK = slide(codes, self.window)
        hidden_BTD = self.hidden(inputs, seen, condition, uncond)
        # T is fixed, so every offset counts the same tokens on every rank: a local mean is the global one.
        goal_K, loss_K, right_K = self._summed_loss(hidden_BTD, targets_BTKF, valid_TK) / (
            len(codes) * valid_TK.sum(0)
        )
        weights_K = torch.tensor(self.offset_weights, device=loss_K.device)
        return Output(
            (weights_K * goal_K).sum(), loss_K.detach(), None if self.training else right_K.detach()
        )

    def hidden(self, inputs: Tensor, valid: Tensor, condition: Condition, uncond: Tensor) -> Tensor:
        """Input windows [B, S, K, F], valid [S, K] or [B, S, K] -> [B, S + 1, D]; row t predicts window t.

        Row 0 is the last place of the prefix and has seen no window; row t has seen t of them.
        """
        prefix = self.backbone.prefix(condition, uncond)
        embeds = torch.cat([prefix.embeds, self.encode(inputs, valid)], dim=1)
        seen = prefix.mask.new_ones(inputs.shape[:2])
        hidden = self.backbone(embeds, torch.cat([prefix.mask, seen], dim=1))
        return hidden[:, prefix.embeds.shape[1] - 1 :]

    def encode(self, windows: Tensor, valid: Tensor) -> Tensor:
        """[B, S, K, F] int64, valid [S, K] or [B, S, K] bool -> [B, S, D]; slots that are not valid add nothing."""
        embeds = self.backbone.embed(windows)
        return embeds[..., 0, :] if self.encoder is None else self.encoder(embeds, valid)

    @torch.no_grad()
    def own_drafts(
        self,
        inputs: Tensor,
        valid: Tensor,
        condition: Condition,
        uncond: Tensor,
        generator: Generator | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Tensor:
        """[B, S, K, F]: the input windows with what the model samples at temperature 1 as drafts, having seen the windows before.

        Arguments as of `forward` and `hidden`.
        """
        hidden_BSD = self.hidden(inputs, valid, condition, uncond)[:, :-1]
        uniform = _uniform(inputs.shape, generator, rows, inputs.device)
        size, parts = max(1, self.chunk_tokens // (self.window * len(inputs))), []
        for hidden, numbers in zip(hidden_BSD.split(size, 1), uniform[:, :, 1:].split(size, 1), strict=True):

            def choose(logits: Tensor, factor: int, numbers: Tensor = numbers) -> Tensor:
                # Thin slices of the line may be a little off in float32, which is near enough for noise. Logits that are not finite
                # have no token; the loss tells of them, an index out of range would not.
                return invert_cdf(logits.float().softmax(-1), numbers[..., factor]).clamp(
                    max=logits.shape[-1] - 1
                )

            parts.append(self._fill(self._states(hidden)[:, :, 1:], choose))
        return torch.cat([inputs[:, :, :1], torch.cat(parts, dim=1)], dim=2)

    def draft(self, hidden: Tensor, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Fill windows: [B, S, D] -> [B, S, K, F] int64.

        choose: (logits [B, S, K, V_f], factor f) -> tokens [B, S, K], called for one factor after the other.
        """
        return self._fill(self._states(hidden), choose)

    def _fill(self, states: Tensor, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
        """States of some slots [B, S, k, D] -> their tokens [B, S, k, F]; see `draft`."""
        tokens = torch.zeros(*states.shape[:-1], 0, dtype=torch.int64, device=states.device)
        for factor in range(len(self.backbone.factor_sizes)):
            tokens = torch.cat(
                [tokens, choose(self.backbone.head(states, tokens), factor)[..., None]], dim=-1
            )
        return tokens

    def logits(self, hidden: Tensor, prev: Tensor) -> Tensor:
        """[B, S, D], earlier factors of each token [B, S, K, f] int64 -> logits [B, S, K, V_f] of factor f."""
        return self.backbone.head(self._states(hidden), prev)

    def _states(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., K, D], one state per offset."""
        return hidden[..., None, :] if self.decoder is None else self.decoder(hidden)

    def _summed_loss(self, hidden: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        """[B, T, D], [B, T, K, F], [T, K] -> [3, K] float32, summed over B and valid T.

        What is minimised, cross entropy, and (in eval mode) the number of tokens whose likeliest code is the true one.

        All logits at once would be B * T * K rows of V numbers, the largest tensor of a
        step by far. They are made in chunks, and each chunk is made again in the backward.
        The chunks depend on shapes only, so under ZeRO-3 all ranks gather alike.
        """
        if self._fused(hidden):
            return self._fused_loss(hidden, targets, valid)
        rows = hidden.flatten(0, 1)
        row_targets = targets.flatten(0, 1)
        row_valid = valid.repeat(len(hidden), 1)
        size = max(1, self.chunk_tokens // self.window)
        chunks = list(zip(rows.split(size), row_targets.split(size), row_valid.split(size), strict=True))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            sums = [self._chunk_loss(*chunk) for chunk in chunks]
        else:
            # Not reentrant: ZeRO-3 counts on one gradient per parameter and backward.
            sums = [checkpoint(self._chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(sums).sum(0)

    def _fused(self, hidden: Tensor) -> bool:
        """Whether Liger makes the loss: it knows one factor, and no other goal than cross entropy here."""
        if self.loss_kernel == "torch" or not torch.is_grad_enabled():
            return False
        fits = type(getattr(self.backbone.head, "last_map", None)) is layers.Linear and not (
            self.label_smoothing or self.z_loss
        )
        if self.loss_kernel == "liger" and not fits:
            raise ValueError(
                "train.loss_kernel liger: this head or this loss is none that it makes; use auto"
            )
        return fits and (self.loss_kernel == "liger" or hidden.is_cuda and layers.has_fused_loss())

    def _fused_loss(self, hidden: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        """As `_summed_loss`. Only the decoder is made in chunks, and again; the states of all offsets are in memory."""
        chunks = hidden.flatten(0, 1)[None].split(max(1, self.chunk_tokens // self.window), dim=1)
        if self.decoder is None:
            states = [self._states(chunk) for chunk in chunks]
        else:
            states = [checkpoint(self._states, chunk, use_reentrant=False) for chunk in chunks]
        states = torch.cat(states, dim=1)
        wanted = targets[..., 0].masked_fill(~valid, layers.IGNORED).flatten(0, 1)[None]
        none = targets.new_empty(*states.shape[:2], 0)
        losses = torch.stack(
            [self.backbone.head(states[:, :, k], none, wanted[..., k]) for k in range(self.window)]
        )
        return torch.stack([losses, losses.detach(), torch.zeros_like(losses)])

    def _chunk_loss(self, hidden: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        """[N, D], [N, K, F], [N, K] -> [3, K] float32, summed over valid N and over factors; see `_summed_loss`."""
        # One batch row of N steps, since a head expects [B, S, ...] as in `logits`.
        targets = targets[None]
        states = self._states(hidden[None])
        goals = losses = 0
        right = targets.new_zeros(targets[..., 0].numel(), dtype=torch.float32)
        if not self.training:
            right += 1
        for factor in range(targets.shape[-1]):
            logits = self.backbone.head(states, targets[..., :factor]).float().flatten(0, -2)
            loss = goal = functional.cross_entropy(logits, targets[..., factor].flatten(), reduction="none")
            if self.training and self.label_smoothing:
                uniform = logits.logsumexp(-1) - logits.mean(-1)
                goal = (1 - self.label_smoothing) * loss + self.label_smoothing * uniform
            if self.training and self.z_loss:
                goal = goal + self.z_loss * logits.logsumexp(-1).square()
            losses, goals = losses + loss, goals + goal
            if not self.training:
                right *= logits.argmax(-1) == targets[..., factor].flatten()
        sums = torch.stack([goals, losses, right]).unflatten(1, valid.shape)
        return torch.where(valid, sums, 0).sum(1)


def _uniform(
    shape: Sequence[int], generator: Generator | None, rows: tuple[int, int] | None, device: torch.device
) -> Tensor:
    """Numbers in [0, 1) of a shape whose first axis is the samples; generator, rows: see `redraw`."""
    first, number = rows or (0, shape[0])
    made_on = device if generator is None else generator.device
    numbers = torch.rand((number, *shape[1:]), generator=generator, device=made_on)
    return numbers[first : first + shape[0]].to(device)


def resolve_offset_weights(spec: Sequence[float] | str | None, window: int) -> list[float]:
    """The K weights of the loss: a list of K numbers, a name, or None for 1 then 0.1 per draft.

    Names: uniform (1, 1, ...), first_only (1, 0, ...), geometric (1, 1/2, 1/4, ...).
    Raises ValueError for another name, another count, or weights that are negative,
    not finite or all zero.
    """
    named = {
        "uniform": [1.0] * window,
        "first_only": [1.0] + [0.0] * (window - 1),
        "geometric": [0.5**offset for offset in range(window)],
    }
    if spec is None:
        # Equal weights made a small model clearly worse in a sketch of the method.
        return [1.0] + [0.1] * (window - 1)
    if isinstance(spec, str):
        if spec not in named:
            raise ValueError(
                f"tensorar.offset_weights is {spec!r}; expected {window} numbers or one of {', '.join(named)}"
            )
        return named[spec]
    weights = [float(weight) for weight in spec]
    if len(weights) != window:
        raise ValueError(
            f"tensorar.offset_weights has {len(weights)} numbers; expected {window}, one per offset of the window"
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise ValueError(
            f"tensorar.offset_weights is {weights}; expected finite numbers >= 0, at least one above 0"
        )
    return weights


def build(recipe: Recipe, backbone: Backbone) -> TensorAR:
    """The model a recipe describes, with a fresh codec around the backbone (none at window 1).

    Raises ValueError for a window longer than the image, a num_heads that does not
    divide the backbone's width, or an unknown schedule or form of offset weights.
    """
    settings = recipe.tensorar
    encoder = decoder = None
    if settings.window > 1:
        shape = {"num_heads": settings.num_heads, "depth": settings.depth}
        encoder = WindowEncoder(backbone.dim, settings.window, **shape)
        decoder = WindowDecoder(backbone.dim, settings.window, **shape)
    return TensorAR(
        backbone,
        encoder,
        decoder,
        FixedSchedule(settings.schedule if settings.window > 1 else "none"),
        offset_weights=resolve_offset_weights(settings.offset_weights, settings.window),
        chunk_tokens=recipe.train.loss_chunk_tokens,
        label_smoothing=recipe.train.label_smoothing,
        z_loss=recipe.train.z_loss,
        loss_kernel=recipe.train.loss_kernel,
        self_drafts=settings.self_drafts,
        max_stride=min(settings.max_stride, settings.window),
    )
