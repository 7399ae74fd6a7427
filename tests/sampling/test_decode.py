"""Decoding: cache and batch neighbours do not change the result, and a seed gives one
image.
"""

import copy

import pytest
import torch
from torch import Tensor

from mmtensorar.model.conditions import Condition
from mmtensorar.model.windows import valid_slots
from mmtensorar.recipe import SamplerSettings
from mmtensorar.sampling.decode import decode
from mmtensorar.sampling.noise import greedy
from tests.helpers.decoding import PLAIN, generators, make, recompute
from tests.helpers.fakes import FakeBackbone, fake_condition
from tests.helpers.models import BACKBONES, wrap


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def rows(condition: Condition, start: int, stop: int) -> Condition:
    """Some rows of a batch, without the padding that only the other rows needed."""
    mask = condition.mask[start:stop]
    first = int(mask.any(0).int().argmax())
    return Condition(condition.values[start:stop, first:], mask[:, first:])


# ---- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("name", ["one_factor", "two_factors"])  # test_contract.py tests the real backbones
def test_cached_decode_equals_recomputation(name, window, cfg_scale):
    """Compares every window of every step, with prompts of unequal length: cache,
    positions and mask are exact.
    """
    model, condition = make(name, window), fake_condition()
    settings = SamplerSettings(cfg_scale=cfg_scale)
    decoded = decode(model, condition, settings, draw=greedy, keep_trace=True)
    expected = recompute(model, condition, cfg_scale)
    assert torch.equal(decoded.trace, expected)
    assert len(decoded.codes.unique()) > 1, "a constant image would prove little"


@pytest.mark.parametrize("name", BACKBONES)
def test_guidance_changes_the_image(name):
    """Otherwise the comparison above could pass with guidance left out on both
    sides.
    """
    model = make(name, 3)
    one, six = (
        decode(model, fake_condition(), SamplerSettings(cfg_scale=scale), draw=greedy).codes
        for scale in (1.0, 6.0)
    )
    assert not torch.equal(one, six)


@pytest.mark.parametrize("draw", [greedy, None], ids=["greedy", "sampled"])
@pytest.mark.parametrize("window, cfg_scale", [(1, 1.0), (3, 3.0)])
def test_an_image_does_not_depend_on_the_other_prompts_of_its_batch(window, cfg_scale, draw):
    """On a real backbone, padding, batch size and neighbours change no token."""
    model, condition = make("janus", window), fake_condition()
    settings = SamplerSettings(cfg_scale=cfg_scale, temperature=0.9, top_k=8)

    def traced(condition: Condition, *seeds: int) -> Tensor:
        numbers = generators(*seeds)
        return decode(model, condition, settings, draw=draw, generator=numbers, keep_trace=True).trace

    together = traced(condition, 5, 6, 7)
    for i in range(3):
        assert torch.equal(together[i], traced(rows(condition, i, i + 1), 5 + i)[0]), i


def test_every_row_draws_from_its_own_generator():
    """A seed gives one image whatever its neighbours are: with other seeds, other
    prompts, or in another order.
    """
    model, condition = make("two_factors", 3), fake_condition()
    first = decode(model, condition, PLAIN, generator=generators(1, 2, 3)).codes
    assert torch.equal(first, decode(model, condition, PLAIN, generator=generators(1, 2, 3)).codes)
    other = decode(model, condition, PLAIN, generator=generators(8, 2, 9)).codes
    assert torch.equal(first[1], other[1])
    assert not torch.equal(first[0], other[0])
    turned = Condition(condition.values.flip(0), condition.mask.flip(0))
    assert torch.equal(first.flip(0), decode(model, turned, PLAIN, generator=generators(3, 2, 1)).codes)


def test_one_generator_for_the_batch_and_none():
    """Rows that share one generator differ from each other.

    Without a generator the global seed is used.
    """
    model = make("one_factor", 3)
    same = Condition(torch.ones(4, 2, dtype=torch.int64), torch.ones(4, 2, dtype=torch.bool))
    codes = decode(model, same, PLAIN, generator=torch.Generator().manual_seed(0)).codes
    assert len(codes.unique(dim=0)) > 1
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(decode(model, same, PLAIN).codes)
    assert torch.equal(*runs)
    with pytest.raises(ValueError, match="2 generators for 4 rows"):
        decode(model, same, PLAIN, generator=generators(1, 2))


@pytest.mark.parametrize("name, window", [("one_factor", 1), ("one_factor", 6), ("two_factors", 3)])
def test_the_trace_holds_the_image(name, window):
    """Offset 0 of step t is the final token t; slots past the image are 0; every code
    is in its codebook.
    """
    model = make(name, window)
    decoded = decode(model, fake_condition(), PLAIN, keep_trace=True)
    T, sizes = model.backbone.num_tokens, model.backbone.factor_sizes
    assert decoded.trace.shape == (3, T, window, len(sizes))
    assert torch.equal(decoded.trace[:, :, 0], decoded.codes)
    assert not decoded.trace[:, ~valid_slots(T, window)].any()
    assert (decoded.codes >= 0).all() and (decoded.codes < torch.tensor(sizes)).all()
    assert decode(model, fake_condition(), PLAIN).trace is None


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("cfg_scale, batch_rows", [(1.0, 3), (2.0, 6)])
def test_one_backbone_step_per_token(window, cfg_scale, batch_rows):
    """T steps for any K, and every step after the prompt has one position per row.

    Guidance doubles the rows, except at scale 1.
    """
    model, done = make("one_factor", window), []
    settings = SamplerSettings(cfg_scale=cfg_scale, lookahead=1)
    decode(model, fake_condition(), settings, progress=lambda t, total: done.append((t, total)))
    assert model.backbone.calls == [(batch_rows, 5)] + [(batch_rows, 1)] * 5
    assert done == [(t, 6) for t in range(1, 7)]


def test_drafts_are_fed_back():
    """A draft must reach the next step, or nothing could be refined: other drafts give
    another image.
    """
    model = make("one_factor", 3)

    def no_drafts(logits: Tensor, keys: Tensor) -> Tensor:
        tokens = logits.argmax(-1)
        tokens[:, 1:] = 0
        return tokens

    images = [decode(model, fake_condition(), PLAIN, draw=draw).codes for draw in (greedy, no_drafts)]
    assert not torch.equal(*images)


def test_a_fresh_codec_generates_the_plain_models_image():
    """Zero-initialised heads do not change the logits of offset 0, so before training a
    window has no effect.
    """
    plain = wrap(FakeBackbone(), 1).eval()
    fresh = wrap(copy.deepcopy(plain.backbone), 3).eval()
    # This also holds for sampling: final tokens have their own random numbers, the same
    # for every window.
    for draw in (greedy, None):
        images = [
            decode(model, fake_condition(), PLAIN, draw=draw, generator=generators(1, 2, 3)).codes
            for model in (plain, fresh)
        ]
        assert torch.equal(*images)


def test_a_single_number_applies_to_every_factor():
    model = make("two_factors", 3)
    images = [
        decode(model, fake_condition(), settings, generator=generators(1, 2, 3)).codes
        for settings in (
            SamplerSettings(temperature=0.8, top_k=4, cfg_scale=3.0),
            SamplerSettings(temperature=[0.8, 0.8], top_k=[4, 4], cfg_scale=[3.0, 3.0]),
        )
    ]
    assert torch.equal(*images)


def test_every_factor_has_its_own_guidance():
    """The first factor of the first token does not depend on the second factor's scale;
    the second factor does.
    """
    model = make("two_factors", 1)
    seen = {}
    for scales in ([4.0, 1.0], [4.0, 6.0], [1.0, 6.0]):
        logits = seen[tuple(scales)] = []

        def keep(shown: Tensor, keys: Tensor, logits=logits) -> Tensor:
            logits.append(shown)
            return torch.zeros_like(keys)

        decode(model, fake_condition(), SamplerSettings(cfg_scale=scales), draw=keep)
    first, second = ({scales: shown[factor] for scales, shown in seen.items()} for factor in (0, 1))
    assert torch.equal(first[4.0, 1.0], first[4.0, 6.0])
    assert not torch.equal(first[4.0, 6.0], first[1.0, 6.0])
    assert torch.equal(second[4.0, 6.0], second[1.0, 6.0])
    assert not torch.equal(second[4.0, 1.0], second[4.0, 6.0])


def test_settings_for_another_number_of_factors_are_refused():
    with pytest.raises(ValueError, match="cfg_scale has 3 numbers"):
        decode(make("two_factors", 1), fake_condition(), SamplerSettings(cfg_scale=[1, 2, 3]))
