"""Strategies: lookahead gives the picture of one token at a time, and a new strategy is
one function.
"""

from collections import Counter

import pytest
import torch

from mmtensorar.model.conditions import Condition
from mmtensorar.recipe import SamplerSettings
from mmtensorar.sampling import filters
from mmtensorar.sampling.decode import decode
from mmtensorar.sampling.noise import greedy
from mmtensorar.sampling.strategies import STRATEGIES, automatic_steps, strategy
from tests.helpers.decoding import PLAIN, generators, make
from tests.helpers.fakes import FakeBackbone, fake_condition
from tests.helpers.models import wrap


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


SAMPLERS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8},
    "all": {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "greedy_drafts": True},
}


@pytest.mark.parametrize("sampler", [*SAMPLERS, "greedy"])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("window, cfg_scale", [(1, 1.0), (1, 2.0), (3, 3.0)])
@pytest.mark.parametrize("name", ["one_factor", "two_factors", "janus"])
def test_lookahead_gives_the_picture_of_one_step_at_a_time(name, window, cfg_scale, batch, sampler):
    """Every window is equal, for any number of steps per pass, in a batch whose prompts
    have different lengths and whose pictures go on at different paces.
    """
    model = make(name, window)
    draw = greedy if sampler == "greedy" else None

    def traced(lookahead):
        settings = SamplerSettings(cfg_scale=cfg_scale, lookahead=lookahead, **SAMPLERS.get(sampler, {}))
        numbers = generators(*range(batch))
        condition = fake_condition(batch)
        return decode(model, condition, settings, draw=draw, generator=numbers, keep_trace=True)

    expected, T = traced(1), model.backbone.num_tokens
    assert expected.passes == (T,) * batch and (batch == 1 or len(expected.codes.unique()) > 1)
    for lookahead in (2, 3, T + 5, "auto"):
        ahead = traced(lookahead)
        assert torch.equal(ahead.trace, expected.trace), lookahead
        assert max(ahead.passes) <= T


def test_lookahead_saves_passes_where_guesses_are_right():
    """A model that always predicts the same token confirms all its guesses, from the
    second pass on.
    """
    model = make("one_factor", 3)
    T, done = model.backbone.num_tokens, []
    model.backbone.head.forward = lambda states, prev: torch.eye(11)[4].expand(*states.shape[:-1], 11)
    settings = SamplerSettings(cfg_scale=1.0, lookahead=T)
    decoded = decode(model, fake_condition(), settings, draw=greedy, progress=lambda t, total: done.append(t))
    assert (decoded.codes == 4).all() and max(decoded.passes) <= 4 < T
    assert done == sorted(set(done)) and done[-1] == T


def test_each_picture_of_a_batch_goes_on_at_its_own_pace():
    """In a batch a picture takes as many passes as alone, and leaves when it is
    finished.
    """
    model = make("janus", 1)
    settings = SamplerSettings(cfg_scale=2.0, temperature=0.5, lookahead=4)
    condition = fake_condition(8)
    together = decode(model, condition, settings, generator=generators(*range(8)))
    alone = []
    for row in range(8):
        one = Condition(condition.values[row : row + 1], condition.mask[row : row + 1])
        alone += decode(model, one, settings, generator=generators(row)).passes
    assert together.passes == tuple(alone) and len(set(alone)) > 1
    rows = []
    model.backbone.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    decode(model, condition, settings, generator=generators(*range(8)))
    assert sum(rows) == 2 * sum(alone) and rows == sorted(rows, reverse=True)


def test_automatic_steps_depend_on_the_number_of_pictures_alone():
    """Chosen from measured times, they once grew to 64 in batches of 16 after the machine
    had been busy, and a picture took 15 times as long.
    """
    assert [automatic_steps(pictures) for pictures in (1, 4, 5, 8, 16, 64, 500)] == [16, 16, 12, 8, 4, 1, 1]


def enumerated(model, condition, settings) -> dict[tuple[int, ...], float]:
    """The exact probability of every picture of a model with one factor."""
    T, V = model.backbone.num_tokens, model.backbone.factor_sizes[0]
    codes = torch.cartesian_prod(*[torch.arange(V)] * T)
    rows = Condition(*(part[:1].expand(len(codes), -1) for part in condition))
    logits = []
    for uncond in (False, True):
        seen, unconds = torch.ones(T - 1, 1, dtype=torch.bool), torch.full((len(codes),), uncond)
        hidden = model.hidden(codes[:, :-1, None, None], seen, rows, unconds)
        logits.append(model.backbone.head(hidden, codes.new_zeros(*codes.shape, 0)))
    guided = logits[1] + settings.cfg_scale * (logits[0] - logits[1])
    kept = filters.filtered(
        guided, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
    )
    chosen = kept.double().log_softmax(-1).gather(-1, codes[..., None])[..., 0].sum(-1)
    return dict(zip(map(tuple, codes.tolist()), chosen.exp().tolist(), strict=True))


@torch.no_grad()
@pytest.mark.parametrize(
    "sampler", [{}, {"temperature": 0.6, "cfg_scale": 2.0}, {"top_k": 2}, {"top_p": 0.7, "cfg_scale": 0.5}]
)
def test_pictures_of_lookahead_have_their_exact_probabilities(sampler):
    """Of a model that is so small that all 81 pictures can be enumerated, 20,000 are
    drawn.

    A rule that keeps a guess because its old probability was high would fail here.
    """
    model = wrap(FakeBackbone((3,), num_tokens=4), 1).eval()
    settings = SamplerSettings(**{"cfg_scale": 1.0, "lookahead": 3, **sampler})
    condition = fake_condition(1)
    exact = enumerated(model, condition, settings)
    assert sum(exact.values()) == pytest.approx(1)
    many = Condition(*(part.expand(20_000, -1) for part in condition))
    decoded = decode(model, many, settings, generator=torch.Generator().manual_seed(0))
    assert sum(decoded.passes) < 20_000 * 4
    counts = Counter(map(tuple, decoded.codes[..., 0].tolist()))
    assert not [picture for picture in counts if exact[picture] == 0]
    # Pictures that are expected less than 5 times are counted together.
    often = {picture for picture in exact if 20_000 * exact[picture] >= 5}
    cells = [(counts[picture], exact[picture]) for picture in often]
    rare = [picture for picture in exact if picture not in often and exact[picture]]
    if rare:
        cells.append((sum(counts[picture] for picture in rare), sum(exact[picture] for picture in rare)))
    chi_square = sum((count - 20_000 * share) ** 2 / (20_000 * share) for count, share in cells)
    freedom = len(cells) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_a_new_strategy_is_one_function():
    """Register a strategy, use it through `decode` by its name and by its settings,
    then remove it.
    """
    model, ran = make("two_factors", 3), []
    expected = decode(model, fake_condition(), PLAIN, generator=generators(1, 2, 3), keep_trace=True)

    @strategy("twice", when=lambda settings: settings.greedy_drafts)
    def twice(state):
        """Predicts every window twice.

        This changes nothing, because each token has its own noise.
        """
        ran.append(state.num_tokens)
        hidden = state.prefill()
        while state.remaining:
            state.predict(hidden)
            state.keep(state.predict(hidden), 1)
            state.settle(final=1)
            yield
            if state.remaining:
                hidden = state.feed(state.guesses(1))

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
