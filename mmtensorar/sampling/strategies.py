"""Strategies: in which order the windows of an image are computed.

To add one, write one function here. A strategy is a generator function of a
`DecodeState`, which it advances until no step remains. It yields after every pass, so
that `decode` can report progress. `@strategy(NAME, when=...)` makes it known: `decode`
takes the last one whose `when` accepts the sampling settings, or the one that its
caller names.
Shapes: A pictures that are not finished, T image tokens, K window, F factors, m
consecutive steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from mmtensorar.recipe import SamplerSettings
from mmtensorar.sampling.compiled import compiled
from mmtensorar.sampling.state import DecodeState

# Of a pass with `lookahead: auto`. Measured on two CPU cores: more steps for a single
# picture save few passes, and more positions for a batch cost more than they save.
MOST_STEPS, POSITIONS = 16, 64

Run = Callable[[DecodeState], Iterator[None]]


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
def one_at_a_time(state: DecodeState) -> Iterator[None]:
    """One window per pass, T passes: each is fed before the next is predicted."""
    yield from _passes(state, lambda pictures: 1)


@strategy("lookahead", when=lambda settings: settings.lookahead != 1)
def with_lookahead(state: DecodeState) -> Iterator[None]:
    """Feed several steps per pass, all but the first guessed; keep what the pass
    confirms.

    The prediction that follows a right guess is that of `one_at_a_time`, since each
    token has its own noise. So the picture is the same, up to rounding, in fewer passes.
    Each picture of a batch goes on by as many steps as were confirmed in it.
    """
    steps = state.settings.lookahead
    yield from _passes(state, automatic_steps if steps == "auto" else lambda pictures: steps)


def _passes(state: DecodeState, steps_for: Callable[[int], int]) -> Iterator[None]:
    """Passes of `steps_for` (the number of pictures in the batch) steps."""
    state.keep(state.predict(state.prefill()), 1)
    state.settle(final=1)
    yield
    run = compiled(one_pass) if state.fixed_shapes else one_pass
    while state.remaining:
        steps = steps_for(len(state.steps))
        if not state.fixed_shapes:
            steps = min(steps, state.remaining)
        run(state, steps)
        state.settle(final=1 if steps == 1 else None)
        yield


def one_pass(state: DecodeState, m: int) -> None:
    """Feed m steps, all but the first guessed, and make final what follows right
    guesses.
    """
    fed = state.guesses(m)
    predicted = state.predict(state.feed(fed))
    state.keep(predicted, 1 + _count_equal(fed[:, 1:], predicted[:, :-1]))


def automatic_steps(pictures: int) -> int:
    """The steps per pass that `lookahead: auto` takes for so many pictures.

    It depends on their number alone, so that a picture can be made again exactly.
    """
    return max(1, min(MOST_STEPS, POSITIONS // pictures))


def _count_equal(guessed: Tensor, predicted: Tensor) -> Tensor:
    """[A]: the number of steps of each picture, from the first on, whose guesses are
    right.

    guessed, predicted: [A, m, K, F]. A guess equal to the prediction was right, and so
    is all that was computed from it.
    """
    return (guessed == predicted).flatten(2).all(-1).long().cumprod(1).sum(1)
