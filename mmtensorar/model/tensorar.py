"""TensorAR: windows -> drafts -> encoder -> backbone -> decoder -> loss.

It makes a next-token backbone predict K consecutive tokens at each step, so that each
token is drafted K - 1 times before it is final (arXiv:2505.16324). With K = 1 this is
plain next-token training.
Shapes: B batch, P prefix, T image tokens, S windows, K window size, F factors, V
vocabulary, D width.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Generator, Tensor, nn

from mmtensorar.model import drafts, noise
from mmtensorar.model.codec import WindowDecoder, WindowEncoder
from mmtensorar.model.conditions import Condition
from mmtensorar.model.drafts import FixedSchedule, Schedule
from mmtensorar.model.loss import (
    DEFAULT_LOSS,
    LossOutput,
    LossSettings,
    resolve_offset_weights,
    window_loss,
)
from mmtensorar.model.protocols import Backbone
from mmtensorar.model.windows import slide
from mmtensorar.recipe import TensorARSettings

Choose = Callable[[Tensor, int], Tensor]
"""(logits [B, S, K, V_f], factor f) -> tokens [B, S, K] int64."""


class TensorAR(nn.Module):
    """A backbone with the window codec around it.

    Args:
        backbone: see the protocol.
        encoder, decoder: the codec; None when the window is 1.
        schedule: the rates at which drafts are redrawn in training.
        offset_weights: K weights of the loss; their count is the window.
        self_drafts: share of the redrawn slots that hold the model's own draft instead
            of uniform noise. Above 0 it costs one more forward pass.
        loss: how the loss is computed.

    Raises ValueError when the window is not between 1 and the number of image tokens.
    """

    def __init__(
        self,
        backbone: Backbone,
        encoder: WindowEncoder | None,
        decoder: WindowDecoder | None,
        schedule: Schedule,
        *,
        offset_weights: Sequence[float],
        self_drafts: float = 0.0,
        loss: LossSettings = DEFAULT_LOSS,
    ):
        super().__init__()
        self.window = len(offset_weights)
        if not 1 <= self.window <= backbone.num_tokens:
            raise ValueError(
                f"tensorar.window is {self.window}; expected 1 to {backbone.num_tokens}, "
                "the number of image tokens of the backbone"
            )
        assert (encoder is None) == (decoder is None) == (self.window == 1)
        self.backbone = backbone
        self.encoder = encoder
        self.decoder = decoder
        self.schedule = schedule
        self.offset_weights = tuple(float(weight) for weight in offset_weights)
        self.self_drafts = self_drafts
        self.loss_settings = loss

    def forward(
        self,
        codes: Tensor,
        condition: Condition,
        uncond: Tensor,
        generator: Generator | None = None,
        rows: tuple[int, int] | None = None,
    ) -> LossOutput:
        """Teacher-forced loss over all windows, with drafts made by
        `drafts.input_windows`.

        Args:
            codes: [B, T, F] int64.
            condition: B rows.
            uncond: [B] bool; True rows are trained without their prompt.
            generator: draws the noise; None draws from the global one.
            rows: the position of these rows in a larger batch, see `drafts.redraw`.
        """
        windows_BTKF, valid_TK = slide(codes, self.window)
        # The last window is predicted only, never fed back.
        clean_BSKF, valid_SK = windows_BTKF[:, :-1], valid_TK[:-1]

        def sample_self_drafts(redrawn_BSK: Tensor) -> Tensor:
            # Without the redrawn slots, since in sampling the model never sees uniform
            # noise.
            seen_BSK = valid_SK & ~redrawn_BSK
            return self.sample_self_drafts(clean_BSKF, seen_BSK, condition, uncond, generator, rows)

        inputs_BSKF = drafts.input_windows(
            clean_BSKF,
            self.schedule(clean_BSKF.shape[:3], generator),
            self.backbone.factor_sizes,
            self_drafts=self.self_drafts,
            sample_self_drafts=sample_self_drafts,
            generator=generator,
            rows=rows,
        )
        return self.score(inputs_BSKF, valid_SK, codes, condition, uncond)

    def score(
        self, inputs: Tensor, valid: Tensor, codes: Tensor, condition: Condition, uncond: Tensor
    ) -> LossOutput:
        """The loss of codes [B, T, F] when the model sees the given input windows.

        inputs: [B, T - 1, K, F]. valid: as of `hidden`.
        """
        windows_BTKF, valid_TK = slide(codes, self.window)
        return window_loss(
            self.hidden(inputs, valid, condition, uncond),
            windows_BTKF,
            valid_TK,
            offset_states=self.offset_states,
            head=self.backbone.head,
            offset_weights=self.offset_weights,
            settings=self.loss_settings,
            training=self.training,
        )

    def hidden(self, inputs: Tensor, valid: Tensor, condition: Condition, uncond: Tensor) -> Tensor:
        """The backbone's hidden states [B, S + 1, D]; row t predicts window t.

        Row 0 is the last position of the prefix and has seen no window; row t has seen
        t.

        Args:
            inputs: windows [B, S, K, F] int64.
            valid: [S, K] or [B, S, K] bool; other slots have no influence.
            condition: B rows.
            uncond: [B] bool.
        """
        prefix = self.backbone.prefix(condition, uncond)
        embeds = torch.cat([prefix.embeds, self.encode(inputs, valid)], dim=1)  # [B, P + S, D]
        image_mask = prefix.mask.new_ones(inputs.shape[:2])
        hidden = self.backbone(embeds, torch.cat([prefix.mask, image_mask], dim=1))
        return hidden[:, prefix.embeds.shape[1] - 1 :]

    def encode(self, windows: Tensor, valid: Tensor) -> Tensor:
        """Windows [B, S, K, F] int64 -> the backbone's inputs [B, S, D].

        valid: [S, K] or [B, S, K] bool; other slots have no influence.
        """
        embeds_BSKD = self.backbone.embed(windows)
        return embeds_BSKD[..., 0, :] if self.encoder is None else self.encoder(embeds_BSKD, valid)

    def offset_states(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> one state per offset [..., K, D], which the head
        takes.
        """
        return hidden[..., None, :] if self.decoder is None else self.decoder(hidden)

    @torch.no_grad()
    def sample_self_drafts(
        self,
        inputs: Tensor,
        valid: Tensor,
        condition: Condition,
        uncond: Tensor,
        generator: Generator | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Tensor:
        """The input windows, with drafts that the model samples at temperature 1:
        [B, S, K, F].

        Each window's drafts come from the state that has seen the windows before it.
        The arguments are those of `hidden` and `forward`.
        """
        hidden_BSD = self.hidden(inputs, valid, condition, uncond)[:, :-1]
        keys_BSKF = drafts.random_keys(inputs.shape, generator, rows, inputs.device)
        num_windows = max(1, self.loss_settings.chunk_tokens // (self.window * len(inputs)))
        chunks = zip(hidden_BSD.split(num_windows, 1), keys_BSKF[:, :, 1:].split(num_windows, 1), strict=True)
        sampled = [
            self._fill(self.offset_states(hidden)[:, :, 1:], partial(_sample, keys=keys))
            for hidden, keys in chunks
        ]
        return torch.cat([inputs[:, :, :1], torch.cat(sampled, dim=1)], dim=2)

    def draft(self, hidden: Tensor, choose: Choose) -> Tensor:
        """Fill windows: hidden states [B, S, D] -> tokens [B, S, K, F] int64.

        choose is called for one factor after the other.
        """
        return self._fill(self.offset_states(hidden), choose)

    def _fill(self, states: Tensor, choose: Choose) -> Tensor:
        """States of some offsets [B, S, k, D] -> their tokens [B, S, k, F] int64; see
        `draft`.
        """
        tokens = torch.zeros(*states.shape[:-1], 0, dtype=torch.int64, device=states.device)
        for factor in range(len(self.backbone.factor_sizes)):
            logits = self.backbone.head(states, tokens)
            tokens = torch.cat([tokens, choose(logits, factor)[..., None]], dim=-1)
        return tokens


def _sample(logits: Tensor, factor: int, *, keys: Tensor) -> Tensor:
    """Tokens [B, S, k] from logits [B, S, k, V_f] at temperature 1; keys: [B, S, k, F]."""
    return noise.draw(logits, keys[..., factor])


def build(
    backbone: Backbone,
    tensorar: TensorARSettings,
    *,
    loss: LossSettings = DEFAULT_LOSS,
) -> TensorAR:
    """A TensorAR with a fresh codec around the backbone (none at window 1).

    tensorar: the recipe's section. loss: see LossSettings.

    Raises ValueError for a window longer than the image, a num_heads that does not
    divide the backbone's width, or an unknown schedule or form of offset weights.
    """
    encoder = decoder = None
    if tensorar.window > 1:
        shape = {"num_heads": tensorar.num_heads, "depth": tensorar.depth}
        encoder = WindowEncoder(backbone.dim, tensorar.window, **shape)
        decoder = WindowDecoder(backbone.dim, tensorar.window, **shape)
    return TensorAR(
        backbone,
        encoder,
        decoder,
        FixedSchedule(tensorar.schedule if tensorar.window > 1 else "none"),
        offset_weights=resolve_offset_weights(tensorar.offset_weights, tensorar.window),
        self_drafts=tensorar.self_drafts,
        loss=loss,
    )
