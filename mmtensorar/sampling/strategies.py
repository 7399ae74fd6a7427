"""Strategies: in which order the windows of an image are computed.

To add one, write one function here. A strategy is a generator function of a
`DecodeState`. It yields the windows of the steps in order, [B, n, K, F] each time, as
soon as they are final; `decode` concatenates them and reports progress.
`@strategy(NAME, when=...)` makes it known: `decode` takes the last one whose `when`
accepts the sampling settings, or the one that its caller names.
Shapes: B batch, T image tokens, K window, F factors, m consecutive steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mmtensorar.recipe import SamplerSettings
from mmtensorar.sampling.state import DecodeState

Run = Callable[[DecodeState], Iterator[Tensor]]


class Strategy(NamedTuple):
    """A registered strategy."""

    run: Run
    when: Callable[[SamplerSettings], bool]  # whether these settings ask for it


STRATEGIES: dict[str, Strategy] = {}


def strategy(
    name: str, *, when: Callable[[SamplerSettings], bool] = lambda settings: False
) -> Callable[[Run], Run]:
    """Register a strategy. Without `when`, `decode` uses it only when it is named."""

    def register(run: Run) -> Run:
        STRATEGIES[name] = Strategy(run, when)
        return run

    return register


def strategy_for(settings: SamplerSettings, name: str | None = None) -> Run:
    """The strategy of this name; None means the one for these settings.

    Raises ValueError for an unknown name.
    """
    if name is None:
        return next(run for run, when in reversed(STRATEGIES.values()) if when(settings))
    if name not in STRATEGIES:
        raise ValueError(f"strategy is {name!r}; expected one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name].run


@strategy("one_at_a_time", when=lambda settings: True)
def one_at_a_time(state: DecodeState) -> Iterator[Tensor]:
    """One window per pass, T passes: each is fed before the next is predicted."""
    hidden = state.prefill()
    for step in range(state.num_tokens):
        window = state.predict(hidden, step)
        yield window
        if step + 1 < state.num_tokens:
            hidden = state.feed(window, step)


@strategy("lookahead", when=lambda settings: settings.lookahead > 1)
def with_lookahead(state: DecodeState) -> Iterator[Tensor]:
    """Feed several steps per pass, the later ones guessed; keep what the pass confirms.

    Every step has its own random numbers, so the image is that of `one_at_a_time`, up
    to rounding, in fewer passes. In a batch, only the steps that are confirmed in all
    images are kept.
    """
    exact = state.predict(state.prefill(), 0)  # the window of step t
    yield exact
    guesses = exact[:, :0]  # of the steps after t, left by the pass before
    t, last = 0, state.num_tokens - 1
    while t < last:
        steps = min(state.settings.lookahead, last - t)
        fed = torch.cat([exact, guesses[:, : steps - 1]], dim=1)
        while fed.shape[1] < steps:
            fed = torch.cat([fed, _shifted(fed[:, -1:])], dim=1)
        fed = state.mask_invalid(fed, t)
        predicted = state.predict(state.feed(fed, t), t + 1)  # of steps t + 1 to t + m
        confirmed = _count_equal(fed[:, 1:], predicted[:, :-1])
        yield predicted[:, : confirmed + 1]
        exact, guesses = predicted[:, confirmed : confirmed + 1], predicted[:, confirmed + 1 :]
        t += confirmed + 1
        state.rewind(t)


def _shifted(window: Tensor) -> Tensor:
    """Guess the next step's window [B, 1, K, F]: the same drafts one offset lower, the
    last one twice.
    """
    return torch.cat([window[:, :, 1:], window[:, :, -1:]], dim=2)


def _count_equal(guessed: Tensor, predicted: Tensor) -> int:
    """The number of steps, from the first on, whose guesses are right in all images.

    guessed, predicted: [B, m, K, F]. A guess equal to the prediction was right, and so
    is all that was computed from it.
    """
    equal_m = (guessed == predicted).flatten(2).all(-1).all(0)
    return int(equal_m.long().cumprod(0).sum())
