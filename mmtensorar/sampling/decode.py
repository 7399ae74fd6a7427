"""Generate image tokens: sliding windows with guidance and a key-value cache.

Each step samples a whole window. Its offset 0 is final; the others are drafts that the
next step sees and may revise.
Shapes: B batch, P prefix, T image tokens, K window, F factors, V vocabulary; N any
number of windows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmtensorar.model.conditions import Condition
from mmtensorar.model.tensorar import TensorAR
from mmtensorar.recipe import SamplerSettings
from mmtensorar.sampling.noise import Draw, Generators
from mmtensorar.sampling.state import DecodeState
from mmtensorar.sampling.strategies import MOST_STEPS, strategy_for


class Decoded(NamedTuple):
    """The result of `decode`."""

    codes: Tensor  # [B, T, F] int64
    # [B, T, K, F] int64: trace[:, t] is the window of step t, 0 past the last token.
    trace: Tensor | None
    # of each picture through the backbone, including the one over the prefix
    passes: tuple[int, ...] = ()


@torch.no_grad()
def decode(
    model: TensorAR,
    condition: Condition,
    settings: SamplerSettings,
    *,
    draw: Draw | None = None,
    strategy: str | None = None,
    generator: Generators = None,
    keep_trace: bool = False,
    compile_passes: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Decoded:
    """Generate one image per row of the condition, in at most T passes of the backbone.

    Args:
        model: should be in eval mode.
        condition: B rows, on any device.
        settings: how tokens are drawn. A list gives each factor of a code its own
            number. With cfg_scale 1 for every factor no unconditional rows are
            computed.
        draw: replaces the settings' temperature, top_k, top_p and greedy_drafts:
            (logits [N, K, V] after guidance, keys [N, K] of the noise)
            -> tokens [N, K]. It is called for one factor after the other.
        strategy: a name of STRATEGIES; None chooses by the settings.
        generator: one for the batch; or one per row, which makes a row independent of
            its neighbours; None draws from the global one.
        keep_trace: return the windows of all steps too.
        compile_passes: see `mmtensorar.sampling.compiled`.
        progress: called with (final tokens, T) whenever more tokens are final.

    Raises ValueError when the number of generators is not B, a list of settings does
    not have F numbers, or the strategy is unknown.
    """
    run = strategy_for(settings, strategy)
    most_steps = MOST_STEPS if settings.lookahead == "auto" else settings.lookahead
    state = DecodeState(
        model,
        condition,
        settings,
        draw=draw,
        generator=generator,
        most_steps=most_steps,
        fixed_shapes=compile_passes,
    )
    for _ in run(state):
        if progress is not None:
            progress(state.num_final, state.num_tokens)
    trace = state.windows_BTKF[:, : state.num_tokens]
    return Decoded(trace[:, :, 0].clone(), trace.clone() if keep_trace else None, tuple(state.passes))
