"""The state of decoding between steps: the model, its cache, and how tokens are drawn.

Drafts are revised in the window, never in the cache. The cache only grows, except that
`rewind` drops the steps that lookahead guessed wrong.
Shapes: B batch, R rows (B, or 2B with guidance), P prefix, T image tokens, K window, F
factors, V vocabulary, D width; m consecutive steps.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mmtensorar.model.conditions import Condition
from mmtensorar.model.tensorar import TensorAR
from mmtensorar.model.windows import valid_slots
from mmtensorar.recipe import SamplerSettings
from mmtensorar.sampling import filters
from mmtensorar.sampling.noise import Draw, FactorSettings, Generators, draw_tokens, token_numbers


class DecodeState:
    """One batch of images in the making, for a strategy to advance.

    A strategy calls `prefill` once. From then on `predict` turns hidden states into
    windows, and `feed` turns the windows of some steps into the hidden states of the
    steps after them. A window depends only on its step, the rows fed before it and its
    own random numbers. So the order of computation does not change it.

    Args: see `decode`.

    Raises ValueError when the number of generators is not B, or a list of settings does
    not have F numbers.
    """

    def __init__(
        self,
        model: TensorAR,
        condition: Condition,
        settings: SamplerSettings,
        *,
        draw: Draw | None = None,
        generator: Generators = None,
    ):
        backbone = model.backbone
        self.model, self.settings = model, settings
        self.num_tokens, self.window = backbone.num_tokens, model.window
        self.num_factors = len(backbone.factor_sizes)
        self.device = next(model.parameters()).device
        self.condition = condition.to(self.device)
        self.batch = len(condition.values)
        factors: list[FactorSettings] = settings.per_factor(self.num_factors)
        self.draws = [draw or partial(draw_tokens, settings=factor) for factor in factors]
        self.cfg_scales = [factor.cfg_scale for factor in factors]
        # The unconditional rows are computed only if some factor uses them.
        self.guided = any(scale != 1 for scale in self.cfg_scales)
        numbers = token_numbers(self.num_tokens, self.window, self.num_factors, self.batch, generator)
        self.numbers_BTFK = numbers.to(self.device)
        self.valid_TK = valid_slots(self.num_tokens, self.window, self.device)
        self.passes = 0  # through the backbone

    def prefill(self) -> Tensor:
        """Run the prompts into a new cache; return hidden states [R, 1, D] of step
        0.
        """
        values, mask = self.condition.values, self.condition.mask
        uncond = torch.zeros(self.batch, dtype=torch.bool, device=self.device)
        if self.guided:
            values, mask = values.repeat(2, *[1] * (values.ndim - 1)), mask.repeat(2, 1)
            uncond = torch.cat([uncond, ~uncond])
        backbone = self.model.backbone
        prefix = backbone.prefix(self.condition._replace(values=values, mask=mask), uncond)
        self.prefix_len = prefix.mask.shape[1]
        # The last window is never fed, hence T - 1 rows after the prefix.
        seen = prefix.mask.new_ones(len(values), self.num_tokens - 1)
        self.mask_RS = torch.cat([prefix.mask, seen], dim=1)
        self.cache = backbone.new_cache(self.mask_RS.shape[1])
        self.passes += 1
        return backbone(prefix.embeds, prefix.mask, self.cache)[:, -1:]

    def predict(self, hidden: Tensor, first: int) -> Tensor:
        """Draw the windows of steps first to first + m - 1.

        hidden: [R, m, D]. Returns [B, m, K, F] int64, with 0 in slots past the last
        token.
        """
        windows_BmKF = self.model.draft(hidden, partial(self._choose, first))[: self.batch]
        return self.mask_invalid(windows_BmKF, first)

    def mask_invalid(self, windows: Tensor, first: int) -> Tensor:
        """Windows [B, m, K, F] of steps from `first` on, with 0 past the last token."""
        return windows * self.valid_TK[first : first + windows.shape[1], :, None]

    def _choose(self, first: int, logits_RmKV: Tensor, factor: int) -> Tensor:
        """Tokens [R, m, K] of one factor.

        All rows of an image get the same token: the guided one goes to both before the
        logits of the next factor are computed.
        """
        logits = logits_RmKV.float()
        if self.guided:
            cond, uncond = logits.chunk(2)
            logits = filters.guide(cond, uncond, self.cfg_scales[factor])
        steps = logits.shape[1]
        numbers_BmK = self.numbers_BTFK[:, first : first + steps, factor]
        tokens = self.draws[factor](logits.flatten(0, 1), numbers_BmK.flatten(0, 1))
        return self._to_rows(tokens.unflatten(0, (self.batch, steps)))

    def feed(self, windows: Tensor, first: int) -> Tensor:
        """Feed the windows [B, m, K, F] of steps first to first + m - 1.

        Returns hidden states [R, m, D], those of the steps first + 1 to first + m.
        """
        stop = first + windows.shape[1]
        embeds = self.model.encode(self._to_rows(windows), self.valid_TK[first:stop])
        self.passes += 1
        return self.model.backbone(embeds, self.mask_RS[:, : self.prefix_len + stop], self.cache)

    def rewind(self, step: int) -> None:
        """Drop from the cache what was fed from this step on."""
        for layer in self.cache.layers:
            layer.crop(self.prefix_len + step)

    def _to_rows(self, images: Tensor) -> Tensor:
        """[B, ...] -> [R, ...]: all rows of an image continue with the same window."""
        return images.repeat(2 if self.guided else 1, *[1] * (images.ndim - 1))
