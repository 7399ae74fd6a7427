"""The state of decoding between passes: the model, its cache, and the tokens so far.

Each picture goes on at its own pace. Of a picture at step t, the windows of the steps
before t are final; all of them but the last have been fed to the backbone.
Shapes: B batch, A pictures that are not finished, R rows of the backbone (A, or 2A with
guidance, the two of a picture next to each other), P prefix, T image tokens, K window,
F factors, V vocabulary, D width; m consecutive steps.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as functional
from torch import Tensor

from mmtensorar.model.conditions import Condition
from mmtensorar.model.tensorar import TensorAR
from mmtensorar.recipe import SamplerSettings
from mmtensorar.sampling import filters
from mmtensorar.sampling.noise import (
    Draw,
    FactorSettings,
    Generators,
    draw_tokens,
    picture_keys,
    token_keys,
)

PROMPT_LEN = 16  # with fixed shapes, prompts are padded to a multiple of it


class DecodeState:
    """One batch of pictures in the making, for a strategy to advance.

    A strategy calls `prefill` once. From then on `predict` turns hidden states into the
    windows of the next steps, `keep` makes the first ones final, and `feed` turns windows
    into the hidden states of the steps after them. `settle` ends each pass; none of the
    others waits for the device. A window depends only on its step, the windows fed
    before it and its own noise. So the order of computation does not change it.

    Args: see `decode`. most_steps: the largest m that the strategy will feed.
        fixed_shapes: no shape depends on how far the pictures are, so that a pass can be
            compiled. Then finished pictures stay in the batch.

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
        most_steps: int = 1,
        fixed_shapes: bool = False,
    ):
        backbone = model.backbone
        self.model, self.settings = model, settings
        self.num_tokens, self.window = backbone.num_tokens, model.window
        self.num_factors = len(backbone.factor_sizes)
        self.device = next(model.parameters()).device
        self.condition = condition.to(self.device)
        B = len(condition.values)
        factors: list[FactorSettings] = settings.per_factor(self.num_factors)
        self.draws = [draw or partial(draw_tokens, settings=factor) for factor in factors]
        self.cfg_scales = [factor.cfg_scale for factor in factors]
        self.coupled = settings.coupled_drafts
        # The unconditional rows are computed only if some factor uses them.
        self.guided = any(scale != 1 for scale in self.cfg_scales)
        self.most_steps = min(most_steps, self.num_tokens)
        self.fixed_shapes = fixed_shapes
        # Final windows, and behind them what was predicted of later ones.
        self.windows_BTKF = torch.zeros(
            B,
            self.num_tokens + self.most_steps,
            self.window,
            self.num_factors,
            dtype=torch.int64,
            device=self.device,
        )
        self._offsets_K = self._range(self.window)
        self.passes = [0] * B  # of each picture, through the backbone
        # Of the pictures in the batch, which are those that are not finished:
        self.pictures = list(range(B))  # their numbers
        self.steps = [0] * B  # their t
        self._rows_A = torch.arange(B, device=self.device)
        self._steps_A = torch.zeros(B, dtype=torch.int64, device=self.device)
        self._known_A = torch.zeros_like(self._steps_A)  # the steps before it have a window
        self._keys_A = picture_keys(B, generator).to(self.device)

    # ---- passes ----------------------------------------------------------------------

    def prefill(self) -> Tensor:
        """Run the prompts into a new cache; return hidden states [R, 1, D] of step
        0.
        """
        values, mask = self._padded() if self.fixed_shapes else self.condition
        uncond = torch.zeros(len(values), dtype=torch.bool, device=self.device)
        if self.guided:
            values, mask = self._to_rows(values), self._to_rows(mask)
            uncond = torch.stack([uncond, ~uncond], dim=1).flatten()
        backbone = self.model.backbone
        prefix = backbone.prefix(Condition(values, mask), uncond)
        self.prefix_len = prefix.mask.shape[1]
        # The last window is never fed. The steps past it only fill up a pass.
        self.cache = backbone.new_cache(self.prefix_len + self.num_tokens - 1 + self.most_steps)
        hidden = backbone(prefix.embeds, prefix.mask, self.cache)[:, -1:]
        if self.fixed_shapes:
            self.cache.fix_shapes()
            # A CUDA graph may change what stays at its address.
            for tensor in (self.windows_BTKF, self._rows_A, self._steps_A, self._known_A, self._keys_A):
                torch._dynamo.mark_static_address(tensor)
        return hidden

    def feed(self, windows: Tensor) -> Tensor:
        """Feed the windows [A, m, K, F] of the steps t - 1 to t + m - 2.

        What was fed of steps that are not final is dropped from the cache before.
        Returns hidden states [R, m, D], those of the steps t to t + m - 1.
        """
        valid_AmK = self._valid(windows.shape[1], first=-1)
        # Windows past the image only fill up a pass. With one slot in view they become
        # numbers; NaN in the cache would reach the other rows through a weight of 0.
        valid_AmK[..., 0] = True
        lengths_R = self._to_rows(self.prefix_len + self._steps_A - 1)
        if self.fixed_shapes:
            self.cache.rewind(lengths_R)
        else:
            longest = max(self.steps)
            self.cache.rewind(lengths_R, self.prefix_len + longest - 1, level=longest == min(self.steps))
        embeds = self.model.encode(self._to_rows(windows), self._to_rows(valid_AmK))
        return self.model.backbone(embeds, None, self.cache)

    def predict(self, hidden: Tensor) -> Tensor:
        """Draw the windows of the steps t to t + m - 1.

        hidden: [R, m, D]. Returns [A, m, K, F] int64, with 0 in slots past the last
        token.
        """
        rows_per_picture = 2 if self.guided else 1
        windows_AmKF = self.model.draft(hidden, self._choose)[::rows_per_picture]
        return windows_AmKF * self._valid(hidden.shape[1], first=0)[..., None]

    def keep(self, windows: Tensor, num_final: Tensor | int) -> None:
        """Make the first predicted windows [A, m, K, F] of the steps from t on final.

        The rest serve as guesses.

        num_final: how many are final, for each picture ([A] int64) or for all.
        """
        places_Am = self._steps_A[:, None] + self._range(windows.shape[1])
        self.windows_BTKF[self._rows_A[:, None], places_Am] = windows
        # In place, since a compiled pass finds its tensors by their addresses.
        self._known_A.copy_(self._steps_A + windows.shape[1])
        self._steps_A.add_(num_final).clamp_(max=self.num_tokens)

    def guesses(self, m: int) -> Tensor:
        """The window of step t - 1, which is final, and guesses of the m - 1 after it:
        [A, m, K, F].

        A guess is what the last pass predicted. Where it predicted nothing, it is the
        last window that it did predict, with its drafts one offset lower per step.
        """
        steps_Am = self._steps_A[:, None] - 1 + self._range(m)
        source_Am = torch.minimum(steps_Am, self._known_A[:, None] - 1)
        offsets_AmK = ((steps_Am - source_Am)[..., None] + self._offsets_K).clamp(max=self.window - 1)
        windows = self.windows_BTKF[self._rows_A[:, None, None], source_Am[..., None], offsets_AmK]
        return windows * self._valid(m, first=-1)[..., None]

    # ---- pictures --------------------------------------------------------------------

    def settle(self, final: int | None = None) -> None:
        """End a pass: read how far each picture is, and let finished ones leave.

        final: windows that the pass made final in every picture. None: that differs, and
            reading it from the device waits for the pass.
        """
        for picture, step in zip(self.pictures, self.steps, strict=True):
            self.passes[picture] += step < self.num_tokens
        if final is None:
            self.steps = self._steps_A.tolist()
        else:
            self.steps = [min(step + final, self.num_tokens) for step in self.steps]
        if max(self.steps) >= self.num_tokens and not self.fixed_shapes:
            self._drop_finished()

    @property
    def num_final(self) -> int:
        """Final tokens of a picture, the mean over the batch, rounded down."""
        B = len(self.passes)
        return (self.num_tokens * (B - len(self.pictures)) + sum(self.steps)) // B

    @property
    def remaining(self) -> int:
        """Steps of the picture that has most of them left; 0 when all are finished."""
        return self.num_tokens - min(self.steps, default=self.num_tokens)

    def _drop_finished(self) -> None:
        """Let the last pictures move to the places of the finished ones."""
        alive = [index for index, step in enumerate(self.steps) if step < self.num_tokens]
        tail = [index for index in alive if index >= len(alive)]
        order = [index if self.steps[index] < self.num_tokens else tail.pop() for index in range(len(alive))]
        self.pictures = [self.pictures[index] for index in order]
        self.steps = [self.steps[index] for index in order]
        index_A = torch.tensor(order, dtype=torch.int64, device=self.device)
        self._rows_A, self._keys_A = self._rows_A[index_A], self._keys_A[index_A]
        self._steps_A, self._known_A = self._steps_A[index_A], self._known_A[index_A]
        if order:
            self.cache.keep_rows(order, 2 if self.guided else 1)

    def _padded(self) -> Condition:
        """The condition, with prompts of text tokens padded to a multiple of PROMPT_LEN,
        so that their length takes few values.
        """
        values, mask = self.condition
        if self.model.backbone.prefix_len is not None:
            return self.condition
        more = -values.shape[1] % PROMPT_LEN
        return Condition(functional.pad(values, (more, 0)), functional.pad(mask, (more, 0)))

    # ---- tokens ----------------------------------------------------------------------

    def _choose(self, logits_RmKV: Tensor, factor: int) -> Tensor:
        """Tokens [R, m, K] of one factor.

        The two rows of a picture get the same token: the guided one goes to both before
        the logits of the next factor are computed.
        """
        logits = logits_RmKV.float()
        if self.guided:
            cond, uncond = logits.unflatten(0, (-1, 2)).unbind(1)
            logits = filters.guide(cond, uncond, self.cfg_scales[factor])
        A, m = logits.shape[:2]
        steps_Am = self._steps_A[:, None] + self._range(m)
        keys_AmK = token_keys(
            self._keys_A,
            steps_Am,
            self._offsets_K,
            factor,
            self.num_factors,
            coupled=self.coupled,
        )
        tokens = self.draws[factor](logits.flatten(0, 1), keys_AmK.flatten(0, 1))
        return self._to_rows(tokens.unflatten(0, (A, m)))

    def _valid(self, m: int, *, first: int) -> Tensor:
        """[A, m, K] bool: slots inside the image, of m steps from t + first on."""
        slots_mK = first + self._range(m)[:, None] + self._offsets_K
        return self._steps_A[:, None, None] + slots_mK < self.num_tokens

    def _range(self, stop: int) -> Tensor:
        return torch.arange(stop, device=self.device)

    def _to_rows(self, pictures: Tensor) -> Tensor:
        """[A, ...] -> [R, ...]: both rows of a picture continue with the same window."""
        return pictures.repeat_interleave(2, 0) if self.guided else pictures
