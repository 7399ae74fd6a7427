"""How many steps a pass feeds: what is chosen on machines and models that are made up."""

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
    assert set(run(seconds, right)[-10:]) <= expected


def test_a_batch_on_a_machine_without_idle_arithmetic_stays_with_one_step():
    """Eight pictures at a time, where a pass takes time by its positions: only one pass
    is spent on trying.
    """
    chosen = run(lambda new: 1.0 + new, *[0, 1] * 4)
    assert chosen.count(1) >= len(chosen) - 2 and max(chosen) == 2


def test_a_change_of_the_guesses_is_noticed_with_one_step_too():
    """Guesses that were bad at the beginning of a picture may be good later."""
    pace = Pace()
    assert run(lambda new: 1 + 0.02 * new, 0, pace=pace)[-1] == 1
    assert run(lambda new: 1 + 0.02 * new, 20, passes=300, pace=pace)[-1] >= 8


def test_no_more_steps_than_remain():
    pace = Pace()
    run(lambda new: 1.0, 99, pace=pace)
    assert pace.choose(1, 5) == 5 and pace.choose(1, 1) == 1
