"""Decoding: the cache changes nothing, neighbours change nothing, and the sampler draws what it says."""

import copy

import pytest
import torch
from torch import Tensor

from benchmarks import decode as benchmark
from mmtensorar.model.conditions import Condition
from mmtensorar.model.tensorar import TensorAR
from mmtensorar.model.windows import valid_slots
from mmtensorar.pipeline import revisions
from mmtensorar.sampling.decode import Sampler, decode, revised_per_offset
from tests.helpers.fakes import FakeBackbone, fake_condition
from tests.helpers.models import window_logits
from tests.model.test_tensorar import BACKBONES, open_codec, wrap

GREEDY = Sampler(greedy=True)


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make(name: str, window: int) -> TensorAR:
    model = wrap(BACKBONES[name](), window)
    return (open_codec(model) if window > 1 else model).eval()


@torch.no_grad()
def recompute(model: TensorAR, condition: Condition, cfg_scale: float) -> Tensor:
    """The greedy trace [B, T, K, F] without a cache: every step runs the whole sequence, cond and uncond apart."""
    T, F, B = model.backbone.num_tokens, len(model.backbone.factor_sizes), len(condition.values)
    valid = valid_slots(T, model.window)
    trace = torch.zeros(B, 0, model.window, F, dtype=torch.int64)
    for t in range(T):
        states = [
            model.hidden(trace, valid[:t], condition, torch.full((B,), uncond))[:, -1:]
            for uncond in (False, True)
        ]
        window = trace.new_zeros(B, 1, model.window, 0)
        for _ in range(F):
            cond, uncond = (window_logits(model, state, window) for state in states)
            tokens = (uncond + cfg_scale * (cond - uncond)).argmax(-1)
            window = torch.cat([window, tokens[..., None]], dim=-1)
        trace = torch.cat([trace, window * valid[t, :, None]], dim=1)
    return trace


def rows(condition: Condition, start: int, stop: int) -> Condition:
    """Some rows of a batch, without the padding that only the others needed."""
    mask = condition.mask[start:stop]
    first = int(mask.any(0).int().argmax())
    return Condition(condition.values[start:stop, first:], mask[:, first:])


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ---- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("name", ["one_factor", "two_factors"])  # test_contract.py has the real ones
def test_cached_decode_equals_recomputation(name, window, cfg_scale):
    """Every window of every step, with prompts of unequal length: the cache, its places and its mask are exact."""
    model, condition = make(name, window), fake_condition()
    decoded = decode(model, condition, GREEDY, cfg_scale=cfg_scale, keep_trace=True)
    expected = recompute(model, condition, cfg_scale)
    assert torch.equal(decoded.trace, expected)
    assert len(decoded.codes.unique()) > 1, "a constant image would prove little"


@pytest.mark.parametrize("sampler", [GREEDY, Sampler(temperature=0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "window, settings", [(1, {}), (3, {"cfg_scale": 3.0}), (3, {"cfg_tokens": 2, "cfg_scale": 2.0})]
)
@pytest.mark.parametrize("name", ["one_factor", "two_factors", "janus"])
def test_lookahead_gives_the_image_of_one_step_at_a_time(name, window, settings, sampler):
    """Every window of it, however many guesses are fed at once; a pass is never wasted."""
    model, condition = make(name, window), fake_condition()
    settings = settings | {"keep_trace": True}
    expected = decode(model, condition, sampler, generator=generators(1, 2, 3), **settings)
    T = model.backbone.num_tokens
    assert expected.passes == T and len(expected.codes.unique()) > 1
    for lookahead in (2, 3, T + 5):
        found = decode(
            model, condition, sampler, generator=generators(1, 2, 3), lookahead=lookahead, **settings
        )
        assert torch.equal(found.trace, expected.trace), lookahead
        assert found.passes <= T


def test_lookahead_saves_passes_where_guesses_are_right():
    """A model that always says the same confirms all that it guessed, from the second pass on."""
    model = make("one_factor", 3)
    T = model.backbone.num_tokens
    always = Sampler(greedy=True)
    model.backbone.head.forward = lambda states, prev: torch.eye(11)[4].expand(*states.shape[:-1], 11)
    found = decode(model, fake_condition(), always, lookahead=T, keep_trace=True)
    assert (found.codes == 4).all() and found.passes <= 4 < T


@torch.no_grad()
def recompute_strided(model: TensorAR, condition: Condition, stride: int) -> Tensor:
    """The greedy codes [B, T, F] without a cache, with whole rows of slots built from the emitted windows alone."""
    T, K, F, B = (
        model.backbone.num_tokens,
        model.window,
        len(model.backbone.factor_sizes),
        len(condition.values),
    )
    codes, inputs, slots = (
        torch.zeros(B, 0, F, dtype=torch.int64),
        torch.zeros(B, 0, K, F, dtype=torch.int64),
        torch.zeros(0, K, dtype=torch.bool),
    )
    while codes.shape[1] < T:
        t = codes.shape[1]
        state = model.hidden(inputs, slots, condition, torch.zeros(B, dtype=torch.bool))[:, -1:]
        window = torch.zeros(B, 1, K, 0, dtype=torch.int64)
        for _ in range(F):
            window = torch.cat([window, window_logits(model, state, window).argmax(-1)[..., None]], dim=-1)
        for row in range(min(stride, T - t)):
            codes = torch.cat([codes, window[:, :, row]], dim=1)
            ahead = [row + slot for slot in range(K)]
            left = torch.stack([window[:, 0, min(a, K - 1)] for a in ahead], dim=1)
            inputs = torch.cat([inputs, left[:, None]], dim=1)
            slots = torch.cat([slots, torch.tensor([[a < K and t + a < T for a in ahead]])])
    return codes


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("name", ["one_factor", "two_factors", "janus"])
def test_strides_equal_recomputation(name, stride):
    model, condition = make(name, 3), fake_condition()
    found = decode(model, condition, GREEDY, stride=stride, keep_trace=True)
    T = model.backbone.num_tokens
    assert torch.equal(found.codes, recompute_strided(model, condition, stride))
    assert torch.equal(found.trace[:, :, 0], found.codes) and found.passes == -(-T // stride)
    if stride == 3:  # nothing is predicted twice, so nothing is revised
        assert revised_per_offset(found.trace) == [0, 0] and torch.equal(
            revisions(found.trace)[:, -1], found.codes
        )
        missing = (torch.arange(T) % 3)[:, None] + torch.arange(3) > 2
        assert (
            torch.equal((found.trace < 0).any(-1)[0], missing & valid_slots(T, 3))
            and (revisions(found.trace) >= 0).all()
        )


def test_strides_and_lookaheads_that_cannot_be_are_refused():
    model = make("one_factor", 3)
    for settings, problem in (
        ({"stride": 4}, "expected 1 to 3"),
        ({"lookahead": 0}, "expected 1"),
        ({"lookahead": 2, "stride": 2}, "one of them 1"),
    ):
        with pytest.raises(ValueError, match=problem):
            decode(model, fake_condition(), GREEDY, **settings)


@pytest.mark.parametrize("name", BACKBONES)
def test_guidance_changes_the_image(name):
    """Otherwise the comparison above could pass with guidance left out on both sides."""
    model = make(name, 3)
    one, three = (decode(model, fake_condition(), GREEDY, cfg_scale=scale).codes for scale in (1.0, 6.0))
    assert not torch.equal(one, three)


@pytest.mark.parametrize("sampler", [GREEDY, Sampler(temperature=0.9, top_k=8)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("window, cfg_scale", [(1, 1.0), (3, 3.0)])
def test_a_prompt_gives_the_image_it_has_alone(window, cfg_scale, sampler):
    """Padding, batch and neighbours leave no mark on a real backbone: tokens are equal."""
    model, condition = make("janus", window), fake_condition()
    together = decode(
        model, condition, sampler, cfg_scale=cfg_scale, generator=generators(5, 6, 7), keep_trace=True
    )
    for i in range(3):
        alone = decode(
            model,
            rows(condition, i, i + 1),
            sampler,
            cfg_scale=cfg_scale,
            generator=generators(5 + i),
            keep_trace=True,
        )
        assert torch.equal(together.trace[i], alone.trace[0]), i


def test_a_generator_per_row_belongs_to_its_row():
    """A seed means one image whoever its neighbours are: other seeds, other prompts, another order."""
    model, condition = make("two_factors", 3), fake_condition()
    first = decode(model, condition, Sampler(), generator=generators(1, 2, 3)).codes
    assert torch.equal(first, decode(model, condition, Sampler(), generator=generators(1, 2, 3)).codes)
    other = decode(model, condition, Sampler(), generator=generators(8, 2, 9)).codes
    assert torch.equal(first[1], other[1])
    assert not torch.equal(first[0], other[0])
    turned = Condition(condition.values.flip(0), condition.mask.flip(0))
    assert torch.equal(first.flip(0), decode(model, turned, Sampler(), generator=generators(3, 2, 1)).codes)


def test_one_generator_for_the_batch_and_none():
    """Rows of one generator differ from each other; without one the global seed rules."""
    model = make("one_factor", 3)
    same = Condition(torch.ones(4, 2, dtype=torch.int64), torch.ones(4, 2, dtype=torch.bool))
    codes = decode(model, same, Sampler(), generator=torch.Generator().manual_seed(0)).codes
    assert len(codes.unique(dim=0)) > 1
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(decode(model, same, Sampler()).codes)
    assert torch.equal(*runs)
    with pytest.raises(ValueError, match="2 generators for 4 rows"):
        decode(model, same, Sampler(), generator=generators(1, 2))


@pytest.mark.parametrize("name, window", [("one_factor", 1), ("one_factor", 6), ("two_factors", 3)])
def test_the_trace_holds_the_image(name, window):
    """Offset 0 of step t is token t, for good; slots past the image are 0; every code is in its codebook."""
    model = make(name, window)
    decoded = decode(model, fake_condition(), Sampler(), keep_trace=True)
    T, sizes = model.backbone.num_tokens, model.backbone.factor_sizes
    assert decoded.trace.shape == (3, T, window, len(sizes))
    assert torch.equal(decoded.trace[:, :, 0], decoded.codes)
    assert not decoded.trace[:, ~valid_slots(T, window)].any()
    assert (decoded.codes >= 0).all() and (decoded.codes < torch.tensor(sizes)).all()
    assert decode(model, fake_condition(), Sampler()).trace is None


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("cfg_scale, batch_rows", [(1.0, 3), (2.0, 6)])
def test_one_backbone_step_per_token(window, cfg_scale, batch_rows):
    """T steps for any K, each of one row after the prompt; guidance doubles the rows, scale 1 does not."""
    model, done = make("one_factor", window), []
    decode(
        model,
        fake_condition(),
        GREEDY,
        cfg_scale=cfg_scale,
        progress=lambda t, total: done.append((t, total)),
    )
    assert model.backbone.calls == [(batch_rows, 5)] + [(batch_rows, 1)] * 5
    assert done == [(t, 6) for t in range(1, 7)]


def test_drafts_are_fed_back():
    """A draft must reach the next step, or there is nothing to refine: with other drafts the image differs."""
    model = make("one_factor", 3)

    def no_drafts(logits: Tensor, uniform: Tensor) -> Tensor:
        tokens = logits.argmax(-1)
        tokens[:, 1:] = 0
        return tokens

    assert not torch.equal(
        decode(model, fake_condition(), GREEDY).codes, decode(model, fake_condition(), no_drafts).codes
    )


def test_a_fresh_codec_generates_the_plain_models_image():
    """Zero-initialised heads change no offset-0 logits, so before training a window has no effect."""
    plain = wrap(FakeBackbone(), 1).eval()
    fresh = wrap(copy.deepcopy(plain.backbone), 3).eval()
    assert torch.equal(
        decode(plain, fake_condition(), GREEDY).codes, decode(fresh, fake_condition(), GREEDY).codes
    )
    # Final tokens have random numbers of their own, so that models of other windows are compared on the same ones.
    one, other = (
        decode(model, fake_condition(), Sampler(), generator=generators(1, 2, 3)).codes
        for model in (plain, fresh)
    )
    assert torch.equal(one, other)


# ---- the sampler ---------------------------------------------------------------------------------


def logits_of(*probabilities: float) -> Tensor:
    """[1, 1, V]."""
    return torch.tensor(probabilities).log()[None, None]


def shares(sampler: Sampler, *probabilities: float) -> list[float]:
    probs = sampler.probabilities(logits_of(*probabilities))[0, 0]
    return (probs / probs.sum()).tolist()


@pytest.mark.parametrize(
    "sampler, expected",
    [
        (Sampler(), [0.5, 0.3, 0.2]),
        (Sampler(temperature=0.5), [25 / 38, 9 / 38, 4 / 38]),  # squared
        (Sampler(top_k=2), [5 / 8, 3 / 8, 0]),
        (Sampler(top_k=1), [1, 0, 0]),
        (Sampler(top_k=9), [0.5, 0.3, 0.2]),  # more than there are
        (Sampler(top_p=0.4), [1, 0, 0]),  # the first always stays
        (Sampler(top_p=0.6), [5 / 8, 3 / 8, 0]),  # the one that crosses stays
        (Sampler(top_p=0.9), [0.5, 0.3, 0.2]),
        (Sampler(top_k=2, top_p=0.6), [1, 0, 0]),  # top_p counts what top_k left: 5/8 is enough
        (Sampler(temperature=0.5, top_p=0.6), [1, 0, 0]),  # and what temperature made of it: 25/38
    ],
)
def test_filters_by_hand(sampler, expected):
    """Temperature, then top_k, then top_p, on probabilities 0.5, 0.3, 0.2.

    top_p once raised a TypeError at its first use: torch's stable sort takes dim by name only.
    """
    assert shares(sampler, 0.5, 0.3, 0.2) == pytest.approx(expected, abs=1e-6)
    assert shares(sampler, 0.2, 0.5, 0.3) == pytest.approx([expected[2], expected[0], expected[1]], abs=1e-6)


def test_ties_at_the_edge_of_top_k_all_stay():
    """As in the original samplers, which compare values: choosing by index favoured low code numbers among equals."""
    assert shares(Sampler(top_k=2), 0.25, 0.25, 0.25, 0.25) == pytest.approx([0.25] * 4)
    assert shares(Sampler(top_k=2), 0.4, 0.2, 0.2, 0.1, 0.1) == pytest.approx([0.5, 0.25, 0.25, 0, 0])


def test_guidance_of_the_first_tokens_only():
    """A guided step differs from a plain one, so the image follows the guided one exactly as long as it should."""
    model = make("janus", 1)
    scores = {}
    for tokens in (None, 0, 2):
        seen = []

        def keep(logits: Tensor, uniform: Tensor, seen=seen) -> Tensor:
            seen.append(logits[:, 0])
            return torch.zeros(logits.shape[:2], dtype=torch.int64)  # the same input whatever the logits

        decode(model, fake_condition(), keep, cfg_scale=4.0, cfg_tokens=tokens)
        scores[tokens] = torch.stack(seen, dim=1)
    assert torch.equal(scores[2][:, :2], scores[None][:, :2])
    assert torch.equal(scores[2][:, 2:], scores[0][:, 2:])
    assert not torch.equal(scores[0][:, 1], scores[None][:, 1])


@pytest.mark.parametrize(
    "uniform, token", [(0.0, 0), (0.49, 0), (0.51, 1), (0.79, 1), (0.81, 2), (1 - 2**-53, 2)]
)
def test_a_number_picks_the_slice_it_falls_in(uniform, token):
    """Slices [0, .5), [.5, .8), [.8, 1)."""
    assert Sampler()(logits_of(0.5, 0.3, 0.2), torch.tensor([[uniform]], dtype=torch.float64)).item() == token


@pytest.mark.parametrize("uniform, token", [(0.0, 1), (1 - 2**-53, 2)])
def test_an_empty_slice_is_never_picked(uniform, token):
    """Tokens filtered out at both ends of the codebook stay out for the smallest and the largest number."""
    number = torch.tensor([[uniform]], dtype=torch.float64)
    assert Sampler(top_k=2)(logits_of(0.1, 0.4, 0.3, 0.2), number).item() == token


def test_greedy_drafts_are_greedy_at_drafts_only():
    """Offset 0 is drawn, here from the last slice; offsets 1 and 2 take the likeliest."""
    logits = logits_of(0.5, 0.3, 0.2).expand(1, 3, 3)
    high = torch.full((1, 3), 0.99, dtype=torch.float64)
    assert Sampler()(logits, high).tolist() == [[2, 2, 2]]
    assert Sampler(greedy_drafts=True)(logits, high).tolist() == [[2, 0, 0]]
    assert Sampler(greedy=True)(logits, high).tolist() == [[0, 0, 0]]


def test_each_factor_has_its_own_settings():
    """Lists are one number per factor, single numbers are for all; a list of another length is refused."""
    sampler = Sampler(temperature=[0.5, 2.0], top_k=3, top_p=(0.9, 1), greedy_drafts=True)
    assert sampler.per_factor(2) == [
        Sampler(temperature=0.5, top_k=3, top_p=0.9, greedy_drafts=True),
        Sampler(temperature=2.0, top_k=3, top_p=1, greedy_drafts=True),
    ]
    with pytest.raises(
        ValueError, match=r"temperature has 2 numbers \(0.5, 2.0\); expected one number, or one per factor"
    ):
        sampler.per_factor(1)
    with pytest.raises(ValueError, match="cfg_scale has 3 numbers"):
        decode(make("two_factors", 1), fake_condition(), GREEDY, cfg_scale=[1, 2, 3])


def test_one_number_is_that_number_for_every_factor():
    model = make("two_factors", 3)
    images = [
        decode(model, fake_condition(), sampler, cfg_scale=scale, generator=generators(1, 2, 3)).codes
        for sampler, scale in (
            (Sampler(temperature=0.8, top_k=4), 3.0),
            (Sampler(temperature=[0.8, 0.8], top_k=[4, 4]), (3.0, 3.0)),
        )
    ]
    assert torch.equal(*images)


def test_a_factors_guidance_is_its_own():
    """The first factor of the first token knows nothing of the second's scale; the second factor follows it."""
    model = make("two_factors", 1)
    seen = {}
    for scales in ([4.0, 1.0], [4.0, 6.0], [1.0, 6.0]):
        logits = seen[tuple(scales)] = []

        def keep(shown: Tensor, uniform: Tensor, logits=logits) -> Tensor:
            logits.append(shown)
            return torch.zeros_like(uniform, dtype=torch.int64)

        decode(model, fake_condition(), keep, cfg_scale=scales)
    assert torch.equal(seen[4.0, 1.0][0], seen[4.0, 6.0][0]) and not torch.equal(
        seen[4.0, 6.0][0], seen[1.0, 6.0][0]
    )
    assert torch.equal(seen[4.0, 6.0][1], seen[1.0, 6.0][1]) and not torch.equal(
        seen[4.0, 1.0][1], seen[4.0, 6.0][1]
    )


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"temperature": 0}, "temperature is 0; expected a number above 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"temperature": [1.0, 0]}, r"temperature is \(1.0, 0\); expected a number above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        Sampler(**settings)


# ---- the benchmark -------------------------------------------------------------------------------

TINY = "--dim 16 --layers 2 --heads 2 --codes 11 --tokens 9 --runs 1 --threads 1".split()


def test_the_benchmark_compares_equal_tokens(capsys):
    """Ours and transformers' generate make the same greedy images in the runs that are timed; no time is asserted."""
    assert benchmark.main(["janus", *TINY]) == 0
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in table[2:]] == ["1", "8"]
    assert [row[-1].strip() for row in table[2:]] == ["100.00%", "100.00%"]
    assert all(float(cell) > 0 for row in table[2:] for cell in row[2:7])


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["llamagen"], "llamagen needs --reference"),
        (["llamagen", "--reference", "nowhere"], "--reference nowhere has no autoregressive/models/gpt.py"),
        (["janus", "--tokens", "8"], "--tokens is 8; expected a square"),
        (["janus", "--dim", "20"], "--dim is 20; expected a multiple of 8 and of 4 times --heads, 48"),
        (["janus", "--runs", "0"], "--runs is 0; expected 1 or more"),
    ],
)
def test_the_benchmark_refuses_what_it_cannot_run(arguments, problem, capsys):
    assert benchmark.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {problem}")


def test_revised_tokens_are_counted_by_offset():
    """Two tokens of three are drafted before they are final; of the last window's slots one is past the end."""
    trace = torch.tensor([[[1, 2], [2, 3], [4, 0]], [[1, 5], [6, 7], [8, 0]]])[
        ..., None
    ]  # [B=2, T=3, K=2, F=1]
    # Picture 0: 2 stays, 3 becomes 4. Picture 1: 5 becomes 6, 7 becomes 8.
    assert revised_per_offset(trace) == [0.75]
    assert revised_per_offset(trace[:, :, :1]) == []
    trace[1, 0, 1] = -1  # no draft
    assert revised_per_offset(trace) == pytest.approx([2 / 3])
