"""The model: fresh heads change nothing, windows leak nothing, the loss is the sum it claims to be."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from mmtensorar.model.codec import WindowDecoder, WindowEncoder
from mmtensorar.model.drafts import FixedSchedule, corrupt
from mmtensorar.model.tensorar import TensorAR, resolve_offset_weights
from mmtensorar.model.windows import slide
from tests.helpers.fakes import FakeBackbone, fake_condition, tiny_janus

BACKBONES = {
    "one_factor": lambda: FakeBackbone((11,)),
    "two_factors": lambda: FakeBackbone((5, 7)),
    "janus": tiny_janus,
}
BATCH = 3
ROOT = Path(__file__).resolve().parents[2]
UNCOND = torch.tensor([False, True, False])


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=BACKBONES)
def backbone(request):
    return BACKBONES[request.param]()


def wrap(
    backbone, window: int, *, depth: int = 1, schedule=FixedSchedule("linear"), weights=None, **options
) -> TensorAR:
    """A TensorAR with a fresh codec around the backbone itself, not a copy."""
    codec = [None, None]
    if window > 1:
        shape = {"num_heads": 2, "depth": depth}
        codec = [WindowEncoder(backbone.dim, window, **shape), WindowDecoder(backbone.dim, window, **shape)]
    return TensorAR(
        backbone, *codec, schedule, offset_weights=resolve_offset_weights(weights, window), **options
    )


@torch.no_grad()
def open_codec(model: TensorAR) -> TensorAR:
    """Move the projections off zero, as training does, so that the codec takes part."""
    for part in (model.encoder, model.decoder):
        part.layers[-1].output.weight.normal_(std=0.5)
    return model


def random_codes(backbone) -> Tensor:
    """[B, T, F]."""
    shape = (BATCH, backbone.num_tokens)
    return torch.stack([torch.randint(size, shape) for size in backbone.factor_sizes], dim=-1)


def noise(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drafts(rate: float):
    """A schedule with one rate at every offset above 0."""

    def schedule(shape, generator=None):
        rates = torch.full(shape, rate)
        rates[..., 0] = 0
        return rates

    return schedule


# ---- identity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("window, depth", [(2, 1), (3, 1), (4, 1), (3, 2)])
def test_fresh_heads_change_nothing(backbone, window, depth):
    """Training starts exactly at the released model, so offset 0 gives its logits bit for bit, noise or not."""
    plain, model = wrap(backbone, 1), wrap(backbone, window, depth=depth)
    codes = random_codes(backbone)
    windows, valid = slide(codes[:, :-1], window)
    rates = drafts(0.9)(windows.shape[:3])
    noisy = corrupt(windows, rates, backbone.factor_sizes)
    with torch.no_grad():
        expected = plain.hidden(codes[:, :-1, None], valid[:, :1], fake_condition(), UNCOND)
        hidden = model.hidden(noisy, valid, fake_condition(), UNCOND)
        assert torch.equal(hidden, expected)
        for factor in range(len(backbone.factor_sizes)):
            prev = codes[:, :, None, :factor]
            logits = model.logits(hidden, prev.expand(-1, -1, window, -1))
            assert torch.equal(logits[:, :, 0], plain.logits(expected, prev)[:, :, 0])


def test_window_1_is_next_token_training(backbone):
    """K = 1 is the control of every comparison: the plain cross entropy, computed here without TensorAR's code."""
    codes, condition = random_codes(backbone), fake_condition()
    loss = wrap(backbone, 1)(codes, condition, UNCOND, noise()).loss
    prefix = backbone.prefix(condition, UNCOND)
    embeds = torch.cat([prefix.embeds, backbone.embed(codes[:, :-1])], dim=1)
    mask = torch.cat([prefix.mask, torch.ones(codes.shape[0], codes.shape[1] - 1, dtype=torch.bool)], dim=1)
    hidden = backbone(embeds, mask)[:, -codes.shape[1] :]
    expected = sum(
        functional.cross_entropy(
            backbone.head(hidden, codes[..., :factor]).flatten(0, 1), codes[..., factor].flatten()
        )
        for factor in range(codes.shape[-1])
    )
    torch.testing.assert_close(loss, expected)


def test_slots_past_the_end_have_no_influence():
    """They hold zeros, and code 0 is a real token: the mask alone keeps it out."""
    model = open_codec(wrap(FakeBackbone(), 3))
    windows, valid = (
        torch.ones(1, 2, 3, 1, dtype=torch.int64),
        torch.tensor([[True, True, False], [True, False, False]]),
    )
    other = torch.where(valid[None, :, :, None], windows, 9)
    assert torch.equal(model.encode(windows, valid), model.encode(other, valid))
    assert not torch.equal(model.encode(windows, ~valid | True), model.encode(other, ~valid | True))


def test_the_order_in_a_window_matters():
    """Without offset positions the encoder would see a bag of drafts."""
    model = open_codec(wrap(FakeBackbone(), 3))
    everything = torch.ones(1, 3, dtype=torch.bool)
    one, two = (model.encode(torch.tensor(w).view(1, 1, 3, 1), everything) for w in ([1, 2, 3], [1, 3, 2]))
    assert not torch.allclose(one, two)


# ---- leakage -------------------------------------------------------------------------------------


def rows_that_change(model: TensorAR, token: int) -> list[int]:
    """Rows whose hidden state or logits, in a training step, differ when one token does."""
    backbone = model.backbone
    codes = random_codes(backbone)
    changed = codes.clone()
    changed[:, token] = (codes[:, token] + 1) % torch.tensor(backbone.factor_sizes)
    seen: list[Tensor] = []
    hidden = model.hidden

    def spy(*arguments):
        seen.append(hidden(*arguments))
        return seen[-1]

    model.hidden = spy
    with torch.no_grad():
        for tokens in (codes, changed):
            model(tokens, fake_condition(), UNCOND, noise())
    first, second = seen
    nothing = torch.zeros(*first.shape[:2], model.window, 0, dtype=torch.int64)
    differs = (first != second).any(-1) | (
        model.logits(first, nothing) != model.logits(second, nothing)
    ).flatten(2).any(-1)
    return differs.any(0).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("depth", [1, 2])
def test_drafts_that_are_pure_noise_leak_nothing(backbone, depth):
    """Row t predicts tokens t, t+1, ...; with rate 1 it has seen the truth of tokens before t only."""
    for token in range(backbone.num_tokens - 1):
        model = open_codec(wrap(backbone, 3, depth=depth, schedule=drafts(1.0)))
        assert rows_that_change(model, token) == list(range(token + 1, backbone.num_tokens)), token
    model = open_codec(wrap(backbone, 3, depth=depth, schedule=drafts(1.0)))
    assert rows_that_change(model, backbone.num_tokens - 1) == [], "no row comes after the last token"


def test_clean_drafts_do_leak(backbone):
    """The test above can fail: with rate 0, row t is shown tokens t and t+1 and could copy them."""
    model = open_codec(wrap(backbone, 3, schedule=FixedSchedule("none")))
    # Token 4 is at offset 2 of window 2, which row 3 has seen.
    assert rows_that_change(model, 4) == list(range(3, backbone.num_tokens))


# ---- loss ----------------------------------------------------------------------------------------


def test_loss_per_offset_is_a_mean_over_valid_slots(backbone):
    """Offset j has T - j targets: computed token by token from the logits, and weighted afterwards."""
    K, T = 3, backbone.num_tokens
    model = open_codec(wrap(backbone, K, weights=[1, 0.5, 0.25], schedule=FixedSchedule("none")))
    codes = random_codes(backbone)
    windows, valid = slide(codes, K)
    with torch.no_grad():
        output = model(codes, fake_condition(), UNCOND)
        hidden = model.hidden(windows[:, :-1], valid[:-1], fake_condition(), UNCOND)
        expected = []
        for offset in range(K):
            terms = []
            for factor in range(codes.shape[-1]):
                log_probs = model.logits(hidden, windows[..., :factor])[:, :, offset].log_softmax(-1)
                terms.append(
                    -sum(
                        log_probs[b, t, codes[b, t + offset, factor]]
                        for b in range(BATCH)
                        for t in range(T - offset)
                    )
                )
            expected.append(sum(terms) / (BATCH * (T - offset)))
    torch.testing.assert_close(output.loss_per_offset, torch.stack(expected))
    torch.testing.assert_close(output.loss, expected[0] + 0.5 * expected[1] + 0.25 * expected[2])


def test_accuracy_counts_the_tokens_whose_likeliest_code_is_right(backbone):
    """In every factor, given the true earlier ones; in eval mode, for it takes time."""
    K, T = 3, backbone.num_tokens
    model = open_codec(wrap(backbone, K, schedule=FixedSchedule("none"))).eval()
    codes = random_codes(backbone)
    windows, valid = slide(codes, K)
    with torch.no_grad():
        output = model(codes, fake_condition(), UNCOND)
        hidden = model.hidden(windows[:, :-1], valid[:-1], fake_condition(), UNCOND)
        right = torch.ones(BATCH, T, K, dtype=torch.bool)
        for factor in range(codes.shape[-1]):
            right &= model.logits(hidden, windows[..., :factor]).argmax(-1) == windows[..., factor]
    expected = [right[:, : T - offset, offset].float().mean() for offset in range(K)]
    torch.testing.assert_close(output.accuracy_per_offset, torch.stack(expected))
    assert model.train()(codes, fake_condition(), UNCOND).accuracy_per_offset is None


def gradients(model: TensorAR, codes: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(codes, fake_condition(), UNCOND, noise()).loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("chunk_tokens, most_rows", [(7, 6), (1, 3)])
def test_chunks_change_memory_and_nothing_else(backbone, chunk_tokens, most_rows):
    """All logits at once would be the largest tensor of a step; chunks hold K rows at least, and no remainder is lost."""
    whole = open_codec(wrap(backbone, 3))
    parts = copy.deepcopy(whole)
    parts.chunk_tokens = chunk_tokens
    codes = random_codes(backbone)
    rows: dict[str, list[int]] = {"whole": [], "parts": []}
    for name, model in (("whole", whole), ("parts", parts)):
        model.backbone.head.register_forward_hook(
            lambda _, __, out, name=name: rows[name].append(out.shape[:-1].numel())
        )
    a, b = (model(codes, fake_condition(), UNCOND, noise()) for model in (whole, parts))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(gradients(parts, codes), gradients(whole, codes))
    assert max(rows["whole"]) == BATCH * backbone.num_tokens * 3
    assert max(rows["parts"]) == most_rows


def test_label_smoothing_and_z_loss(backbone):
    """torch's own smoothing, and log(Z)^2 by hand; the loss per offset stays the cross entropy, and so does validation."""
    codes, condition, K = random_codes(backbone), fake_condition(), 2
    plain = open_codec(wrap(backbone, K, weights=[1, 0.5], schedule=FixedSchedule("none")))
    other = copy.deepcopy(plain)
    other.label_smoothing, other.z_loss = 0.1, 0.01
    windows, valid = slide(codes, K)
    with torch.no_grad():
        hidden = plain.hidden(windows[:, :-1], valid[:-1], condition, UNCOND)
        expected = 0
        for factor in range(codes.shape[-1]):
            logits = plain.logits(hidden, windows[..., :factor])
            for offset, weight in enumerate((1, 0.5)):
                rows = logits[:, :, offset][:, valid[:, offset]].flatten(0, 1)
                targets = windows[:, :, offset, factor][:, valid[:, offset]].flatten()
                smooth = functional.cross_entropy(rows, targets, label_smoothing=0.1)
                expected = expected + weight * (smooth + 0.01 * rows.logsumexp(-1).square().mean())
        before, after = plain(codes, condition, UNCOND), other(codes, condition, UNCOND)
        torch.testing.assert_close(after.loss, expected)
        torch.testing.assert_close(after.loss_per_offset, before.loss_per_offset)
        torch.testing.assert_close(other.eval()(codes, condition, UNCOND).loss, before.loss)


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_every_parameter_gets_a_gradient(backbone, depth):
    """A parameter without one is dead weight, and under ZeRO a rank that waits.

    At the zero start the layers behind the projections get a tensor of zeros; once those
    have moved, every gradient has something in it.
    """
    model = wrap(backbone, 3, depth=depth)
    codes = random_codes(backbone)
    fresh = gradients(model, codes)
    assert [name for name, gradient in fresh.items() if gradient is None] == []
    for part in ("encoder", "decoder"):
        assert fresh[f"{part}.layers.{depth - 1}.output.weight"].any(), "the projection itself leaves zero"
    assert [
        name for name, gradient in gradients(open_codec(model), codes).items() if not gradient.any()
    ] == []


def test_zero_start_survives_no_reset():
    """ZeRO-3 empties a weight as its module is built: zeros must come from the constructor, not from a later call."""
    for part in (WindowEncoder(8, 2, num_heads=2, depth=2), WindowDecoder(8, 2, num_heads=2, depth=2)):
        assert part.layers[0].output.weight.any() and not part.layers[1].output.weight.any()
        with torch.no_grad():
            part.layers[1].output.weight.fill_(1)
        part.layers[1].output.reset_parameters()
        assert not part.layers[1].output.weight.any()


def test_codec_stays_inside_the_papers_budget():
    """About 8.6 D^2 parameters for the pair at depth 1."""
    D = 64
    pair = [WindowEncoder(D, 4), WindowDecoder(D, 4)]
    assert 8 * D**2 <= sum(p.numel() for part in pair for p in part.parameters()) <= 8.6 * D**2


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, weights",
    [
        (None, [1, 0.1, 0.1]),
        ("uniform", [1, 1, 1]),
        ("first_only", [1, 0, 0]),
        ("geometric", [1, 0.5, 0.25]),
        ([2, 0, 1], [2, 0, 1]),
    ],
)
def test_offset_weights(spec, weights):
    """What each form means at K = 3."""
    assert resolve_offset_weights(spec, 3) == weights


def test_offset_weights_of_window_1():
    """One offset, and every form is plain training."""
    for spec in (None, "uniform", "first_only", "geometric"):
        assert resolve_offset_weights(spec, 1) == [1]


@pytest.mark.parametrize(
    "spec, problem",
    [
        ("unifrm", "'unifrm'; expected 3 numbers or one of uniform, first_only, geometric"),
        ([1, 1], "has 2 numbers; expected 3"),
        ([1, -1, 1], "expected finite numbers >= 0"),
        ([1, float("nan"), 1], "expected finite numbers >= 0"),
        ([1, float("inf"), 1], "expected finite numbers >= 0"),
        ([0, 0, 0], "at least one above 0"),
    ],
)
def test_offset_weights_that_cannot_train_are_refused(spec, problem):
    with pytest.raises(ValueError, match=problem):
        resolve_offset_weights(spec, 3)


def test_first_only_weights_leave_the_drafts_out():
    """The loss is then offset 0's, while every offset is still reported."""
    output = open_codec(wrap(FakeBackbone(), 3, weights="first_only"))(
        torch.zeros(BATCH, 6, 1, dtype=torch.int64), fake_condition(), UNCOND, noise()
    )
    assert output.loss.item() == output.loss_per_offset[0].item()
    assert len(output.loss_per_offset) == 3 and (output.loss_per_offset > 0).all()
    assert not output.loss_per_offset.requires_grad


def test_sizes_that_do_not_fit_are_refused():
    """Each names the recipe's key."""
    with pytest.raises(ValueError, match="tensorar.window is 7; expected 1 to 6"):
        wrap(FakeBackbone(num_tokens=6), 7)
    with pytest.raises(ValueError, match="train.loss_chunk_tokens is 0"):
        wrap(FakeBackbone(), 2, chunk_tokens=0)
    with pytest.raises(
        ValueError, match="tensorar.num_heads is 3; expected a divisor of the backbone's width, 16"
    ):
        WindowEncoder(16, 2, num_heads=3)
    with pytest.raises(ValueError, match="tensorar.depth is 0"):
        WindowDecoder(16, 2, depth=0)


def test_noise_follows_the_generator_alone():
    """The same generator gives the same loss whatever the global generator is at."""
    model, codes = open_codec(wrap(FakeBackbone(), 3)), torch.zeros(BATCH, 6, 1, dtype=torch.int64)
    losses = []
    for seed in (1, 1, 2):
        torch.rand(3)
        losses.append(model(codes, fake_condition(), UNCOND, noise(seed)).loss.item())
    assert losses[0] == losses[1] != losses[2]


LIGER = """
import torch
from mmtensorar import layers
from tests.helpers.fakes import fake_condition, tiny_janus, tiny_llamagen, llamagen_condition
from tests.model.test_tensorar import UNCOND, noise, open_codec, random_codes, wrap

torch.manual_seed(0)
for backbone, condition in ((tiny_janus(), fake_condition()), (tiny_llamagen(), None)):
    condition = condition or llamagen_condition(backbone)
    codes = random_codes(backbone)
    for window in (1, 3):
        model, found = open_codec(wrap(backbone, window)) if window > 1 else wrap(backbone, 1), []
        model.chunk_tokens = 6
        for model.loss_kernel in ("torch", "liger"):
            model.zero_grad()
            output = model(codes, condition, UNCOND, noise())
            output.loss.backward()
            found.append((output.loss.detach(), output.loss_per_offset, {n: p.grad for n, p in model.named_parameters()}))
        torch.testing.assert_close(*found, rtol=2e-5, atol=1e-6)
print("equal")
"""


def inputs_of(
    model: TensorAR, codes: Tensor, rows=None, seed: int = 7, training: bool = True
) -> tuple[Tensor, Tensor]:
    """The last windows and slots that a forward encodes."""
    seen = []
    encode = model.encode
    model.encode = lambda windows, valid: seen.append((windows, valid)) or encode(windows, valid)
    condition = fake_condition()
    first, stop = (0, len(codes)) if rows is None else (rows[0], rows[0] + len(codes))
    condition = type(condition)(*(value[first:stop] for value in condition))
    model.train(training)(codes, condition, UNCOND[first:stop], noise(seed), rows)
    del model.encode
    return seen[-1]


def test_samples_are_trained_at_every_stride():
    """What a row of a stride sees: drafts made as far ahead as its group's first row had them, none beyond the window."""
    model = open_codec(wrap(FakeBackbone((11,)), 3, schedule=FixedSchedule([0, 0, 1]), max_stride=3))
    codes, found = random_codes(model.backbone), set()
    clean, valid = slide(codes, 3)
    S, offsets = clean.shape[1] - 1, torch.arange(3)
    ahead = {stride: (torch.arange(S) % stride)[:, None] + offsets for stride in (1, 2, 3)}
    for seed in range(8):
        windows, slots = inputs_of(model, codes, seed=seed)
        for sample in range(BATCH):
            (stride,) = [s for s, a in ahead.items() if torch.equal(slots[sample], valid[:-1] & (a < 3))]
            found.add(stride)
            changed = (windows[sample] != clean[sample, :-1]).any(-1)
            # A rate of 1 at two tokens ahead and 0 nearer; the emitted token itself is always the true one.
            assert not changed[(ahead[stride] < 2) | (offsets == 0)].any()
            cut = inputs_of(model, codes[sample : sample + 1], (sample, BATCH), seed)
            assert torch.equal(cut[0][0], windows[sample]) and torch.equal(cut[1][0], slots[sample])
    assert found == {1, 2, 3}
    with pytest.raises(ValueError, match="max_stride is 4; expected 1 to 3"):
        wrap(model.backbone, 3, max_stride=4)


def test_self_drafts_of_a_stride_are_those_that_its_first_row_had(monkeypatch):
    """And they are made without a look at the noise."""
    model = open_codec(
        wrap(FakeBackbone((11,)), 3, schedule=FixedSchedule([0, 1, 1]), self_drafts=1.0, max_stride=3)
    )
    codes, asked = random_codes(model.backbone), []
    S = model.backbone.num_tokens - 1
    numbered = torch.arange(S * 3).view(1, S, 3, 1).expand(BATCH, -1, -1, -1) % 11

    def own_drafts(inputs: Tensor, valid: Tensor, *others) -> Tensor:
        asked.append(valid)
        return numbered

    monkeypatch.setattr(model, "own_drafts", own_drafts)
    found = set()
    for seed in range(8):
        windows, slots = inputs_of(model, codes, seed=seed)
        assert not asked[-1][..., 1:].any() and asked[-1][..., 0].all()
        for sample in range(BATCH):
            fits = []
            for stride in (1, 2, 3):
                phase = (torch.arange(S) % stride)[:, None]
                ahead = phase + torch.arange(3)
                expected = numbered[sample, torch.arange(S)[:, None] - phase, ahead.clamp(max=2), 0]
                same = torch.equal(slots[sample], (ahead < 3) & slide(codes, 3)[1][:-1])
                fits += [stride] if same else []
                if same:
                    assert torch.equal(
                        windows[sample, :, 1:, 0][slots[sample][:, 1:]], expected[:, 1:][slots[sample][:, 1:]]
                    )
            found.update(fits)
    assert found == {1, 2, 3}


@pytest.mark.parametrize("name", ["one_factor", "two_factors"])
def test_self_drafts_are_what_the_model_samples(name):
    """With pure noise at the drafts every one is the model's: of a model that always says the same, that; offset 0 stays true."""
    backbone = BACKBONES[name]()
    model = open_codec(wrap(backbone, 3, schedule=drafts(1.0), self_drafts=1.0, chunk_tokens=8))
    codes = random_codes(backbone)
    clean = slide(codes, 3)[0][:, :-1]
    said = torch.tensor([size - 2 for size in backbone.factor_sizes])
    real = backbone.head.forward
    backbone.head.forward = lambda states, prev: (
        functional.one_hot(
            said[prev.shape[-1]].expand(states.shape[:-1]), backbone.factor_sizes[prev.shape[-1]]
        ).float()
        * 1e4
    )
    windows, _ = inputs_of(model, codes)
    assert torch.equal(windows[:, :, 0], clean[:, :, 0])
    # Also where chance would have drawn the true token, which would make a draft more often right than it is.
    assert (windows[:, :, 1:] == said).all() and (clean[:, :, 1:] != said).any()
    validated, _ = inputs_of(model, codes, training=False)
    assert torch.equal(validated, windows), "validation would measure what the model never meets"
    backbone.head.forward = lambda states, prev: torch.full(
        (*states.shape[:-1], backbone.factor_sizes[prev.shape[-1]]), torch.nan
    )
    assert model(codes, fake_condition(), UNCOND, noise()).loss.isnan(), (
        "a model that diverged is told of by its loss"
    )
    backbone.head.forward = real
    together, _ = inputs_of(model, codes)
    for first in range(BATCH):
        assert torch.equal(inputs_of(model, codes[first : first + 1], (first, BATCH))[0][0], together[first])
    loss = model.train()(codes, fake_condition(), UNCOND, noise()).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_ligers_loss_is_ours():
    """The kernel itself, in Triton's interpreter, so that no GPU is needed: the same losses and gradients."""
    pytest.importorskip("liger_kernel")
    done = subprocess.run(
        [sys.executable, "-c", LIGER],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


def test_a_loss_that_liger_does_not_make_is_refused():
    model = wrap(FakeBackbone((11,)), 2, loss_kernel="liger")
    with pytest.raises(
        ValueError, match="train.loss_kernel liger: this head or this loss is none that it makes"
    ):
        model(random_codes(model.backbone), fake_condition(), UNCOND)
