"""How many steps a pass feeds: what is chosen on machines and models that are made up."""

import random
from functools import partial

import pytest

from mmtensorar.sampling.pace import MOST_STEPS, Pace


def run(seconds, *right: int, passes: int = 40, pace: Pace | None = None) -> list[int]:
    """The choices of a run.

    Args:
        seconds: of a pass, by its new positions.
        right: guesses that turn out right in every pass, for each picture.
    """
    pace, chosen = pace or Pace(), []
    for _ in range(passes):
        steps = pace.choose(len(right), MOST_STEPS)
        chosen.append(steps)
        pace.record(len(right), steps, seconds(len(right) * steps), [min(each, steps) for each in right])
    return chosen


@pytest.mark.parametrize(
    "name, seconds, right, expected",
    [
        ("positions are free, and all guesses are right", lambda new: 1.0, 99, {64}),
        ("positions are free, and three guesses are right", lambda new: 1.0, 3, {4, 8, 16, 32, 64}),
        ("a position costs little, and three guesses are right", lambda new: 1 + 0.02 * new, 3, {4}),
        ("time grows with the positions, and no guess helps", lambda new: float(new), 3, {1, 2, 4}),
        ("no guess is ever right", lambda new: 1 + 0.02 * new, 0, {1}),
    ],
)
def test_the_choice_after_some_passes(name, seconds, right, expected):
    chosen = run(seconds, right, passes=100)[-32:]
    assert sum(steps in expected for steps in chosen) >= 31  # one pass measures a neighbour


def test_a_batch_on_a_machine_without_idle_arithmetic_stays_with_one_step():
    """Eight pictures at a time, where a pass takes time by its positions: few passes are
    spent on trying, and they cost less than 3 % of the time.
    """

    def seconds(new: int) -> float:
        return 1.0 + new

    chosen = run(seconds, *[0, 1] * 4, passes=64)
    assert chosen.count(1) >= 59 and max(chosen) == 2
    tokens = sum(1.5 if steps == 2 else 1 for steps in chosen)
    assert sum(seconds(8 * steps) for steps in chosen) / tokens < 1.03 * seconds(8)


def test_a_busy_machine_does_not_mislead():
    """Where passes take up to three times as long as alone, the choice is still good: it
    was stuck at the first size that happened to be measured in a quiet moment.
    """
    for seed in range(5):
        slowdown = partial(random.Random(seed).uniform, 1, 3)
        chosen = run(lambda new, slowdown=slowdown: (1 + 0.01 * new) * slowdown(), 7, passes=200)
        assert sum(steps in (4, 8, 16) for steps in chosen[100:]) > 90, seed


def test_a_change_of_the_guesses_is_noticed_with_one_step_too():
    """Guesses that were bad at the beginning of a picture may be good later."""
    pace = Pace()
    assert run(lambda new: 1 + 0.02 * new, 0, pace=pace)[-1] == 1
    assert run(lambda new: 1 + 0.02 * new, 20, passes=300, pace=pace)[-1] >= 8


def test_no_more_steps_than_remain():
    pace = Pace()
    run(lambda new: 1.0, 99, pace=pace)
    assert pace.choose(1, 5) in (4, 5) and pace.choose(1, 1) == 1
