"""Strategies: lookahead gives the image of the plain one-token strategy, and a new
strategy is one function.
"""

import pytest
import torch

from mmtensorar.recipe import SamplerSettings
from mmtensorar.sampling.decode import decode
from mmtensorar.sampling.noise import greedy
from mmtensorar.sampling.strategies import STRATEGIES, strategy
from tests.helpers.decoding import PLAIN, generators, make
from tests.helpers.fakes import fake_condition


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize("draw", [greedy, None], ids=["greedy", "sampled"])
@pytest.mark.parametrize("window, cfg_scale", [(1, 1.0), (3, 3.0)])
@pytest.mark.parametrize("name", ["one_factor", "two_factors", "janus"])
def test_lookahead_gives_the_image_of_one_step_at_a_time(name, window, cfg_scale, draw):
    """Every window is equal, for any number of guesses per pass, and every pass yields
    at least one token.
    """
    model = make(name, window)

    def traced(lookahead: int):
        settings = SamplerSettings(cfg_scale=cfg_scale, temperature=0.9, lookahead=lookahead)
        numbers = generators(1, 2, 3)
        return decode(model, fake_condition(), settings, draw=draw, generator=numbers, keep_trace=True)

    expected, T = traced(1), model.backbone.num_tokens
    assert expected.passes == T and len(expected.codes.unique()) > 1
    for lookahead in (2, 3, T + 5):
        ahead = traced(lookahead)
        assert torch.equal(ahead.trace, expected.trace), lookahead
        assert ahead.passes <= T


def test_lookahead_saves_passes_where_guesses_are_right():
    """A model that always predicts the same token confirms all its guesses, from the
    second pass on.
    """
    model = make("one_factor", 3)
    T, done = model.backbone.num_tokens, []
    model.backbone.head.forward = lambda states, prev: torch.eye(11)[4].expand(*states.shape[:-1], 11)
    settings = SamplerSettings(cfg_scale=1.0, lookahead=T)
    decoded = decode(model, fake_condition(), settings, draw=greedy, progress=lambda t, total: done.append(t))
    assert (decoded.codes == 4).all() and decoded.passes <= 4 < T
    assert done == sorted(set(done)) and done[-1] == T


def test_a_new_strategy_is_one_function():
    """Register a strategy, use it through `decode` by its name and by its settings,
    then remove it.
    """
    model, ran = make("two_factors", 3), []
    expected = decode(model, fake_condition(), PLAIN, generator=generators(1, 2, 3), keep_trace=True)

    @strategy("twice", when=lambda settings: settings.greedy_drafts)
    def twice(state):
        """Predicts every window twice.

        This changes nothing, because a step has its own random numbers.
        """
        ran.append(state.num_tokens)
        hidden = state.prefill()
        for step in range(state.num_tokens):
            state.predict(hidden, step)
            window = state.predict(hidden, step)
            yield window
            if step + 1 < state.num_tokens:
                hidden = state.feed(window, step)

    try:
        numbers = generators(1, 2, 3)
        named = decode(model, fake_condition(), PLAIN, strategy="twice", generator=numbers, keep_trace=True)
        assert torch.equal(named.trace, expected.trace) and len(ran) == 1
        decode(model, fake_condition(), PLAIN)
        assert len(ran) == 1, "settings that do not ask for it do not get it"
        decode(model, fake_condition(), SamplerSettings(greedy_drafts=True))
        assert len(ran) == 2
    finally:
        del STRATEGIES["twice"]
    with pytest.raises(ValueError, match="'twice'.*one_at_a_time, lookahead"):
        decode(model, fake_condition(), PLAIN, strategy="twice")
