"""The model: fresh heads change nothing, windows leak nothing, the loss is the sum it
is defined as.
"""

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from mmtensorar.model import drafts
from mmtensorar.model.codec import WindowDecoder, WindowEncoder
from mmtensorar.model.drafts import FixedSchedule
from mmtensorar.model.loss import LossSettings
from mmtensorar.model.tensorar import TensorAR
from mmtensorar.model.windows import slide
from tests.helpers.fakes import FakeBackbone, fake_condition
from tests.helpers.models import (
    BACKBONES,
    BATCH,
    UNCOND,
    gradients,
    noise,
    open_codec,
    random_codes,
    window_logits,
    wrap,
)


def constant_rate(rate: float):
    """A schedule with one rate at every offset above 0."""

    def schedule(shape, generator=None):
        rates = torch.full(shape, rate)
        rates[..., 0] = 0
        return rates

    return schedule


# ---- identity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("window, depth", [(2, 1), (3, 1), (4, 1), (3, 2)])
def test_fresh_heads_change_nothing(backbone, window, depth):
    """Training starts exactly at the released model: offset 0 gives its logits bit for
    bit, with or without noise.
    """
    plain, model = wrap(backbone, 1), wrap(backbone, window, depth=depth)
    codes = random_codes(backbone)
    windows, valid = slide(codes[:, :-1], window)
    rates = constant_rate(0.9)(windows.shape[:3])
    noisy = drafts.input_windows(windows, rates, backbone.factor_sizes)
    with torch.no_grad():
        expected = plain.hidden(codes[:, :-1, None], valid[:, :1], fake_condition(), UNCOND)
        hidden = model.hidden(noisy, valid, fake_condition(), UNCOND)
        assert torch.equal(hidden, expected)
        for factor in range(len(backbone.factor_sizes)):
            prev = codes[:, :, None, :factor]
            logits = window_logits(model, hidden, prev.expand(-1, -1, window, -1))
            assert torch.equal(logits[:, :, 0], window_logits(plain, expected, prev)[:, :, 0])


def test_window_1_is_next_token_training(backbone):
    """K = 1 is the control of every comparison.

    Its loss is the plain cross entropy, computed here without our code.
    """
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
    """These slots hold zeros, and code 0 is a real token: only the mask keeps them
    out.
    """
    model = open_codec(wrap(FakeBackbone(), 3))
    windows, valid = (
        torch.ones(1, 2, 3, 1, dtype=torch.int64),
        torch.tensor([[True, True, False], [True, False, False]]),
    )
    other = torch.where(valid[None, :, :, None], windows, 9)
    assert torch.equal(model.encode(windows, valid), model.encode(other, valid))
    assert not torch.equal(model.encode(windows, ~valid | True), model.encode(other, ~valid | True))


def test_the_order_in_a_window_matters():
    """Without offset positions the encoder would see the drafts as an unordered set."""
    model = open_codec(wrap(FakeBackbone(), 3))
    everything = torch.ones(1, 3, dtype=torch.bool)
    one, two = (model.encode(torch.tensor(w).view(1, 1, 3, 1), everything) for w in ([1, 2, 3], [1, 3, 2]))
    assert not torch.allclose(one, two)


# ---- leakage -------------------------------------------------------------------------------------


def rows_that_change(model: TensorAR, token: int) -> list[int]:
    """Rows whose hidden state or logits, in a training step, differ when one token
    differs.
    """
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
        window_logits(model, first, nothing) != window_logits(model, second, nothing)
    ).flatten(2).any(-1)
    return differs.any(0).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("depth", [1, 2])
def test_drafts_that_are_pure_noise_leak_nothing(backbone, depth):
    """Row t predicts tokens t, t+1, ...

    With rate 1 its only true inputs are tokens before t.
    """
    for token in range(backbone.num_tokens - 1):
        model = open_codec(wrap(backbone, 3, depth=depth, schedule=constant_rate(1.0)))
        assert rows_that_change(model, token) == list(range(token + 1, backbone.num_tokens)), token
    model = open_codec(wrap(backbone, 3, depth=depth, schedule=constant_rate(1.0)))
    assert rows_that_change(model, backbone.num_tokens - 1) == [], "no row comes after the last token"


def test_clean_drafts_do_leak(backbone):
    """Shows that the test above can fail: with rate 0, row t receives tokens t and t+1
    and could copy them.
    """
    model = open_codec(wrap(backbone, 3, schedule=FixedSchedule("none")))
    # Token 4 is at offset 2 of window 2, which is an input of row 3.
    assert rows_that_change(model, 4) == list(range(3, backbone.num_tokens))


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_every_parameter_gets_a_gradient(backbone, depth):
    """A parameter without a gradient is never trained, and under ZeRO it makes a rank
    wait.

    At the zero start the layers behind the projections receive a tensor of zeros. After
    the projections have moved, every gradient is nonzero.
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
    """ZeRO-3 empties a weight while its module is built, so the zeros must come from
    the constructor.
    """
    for part in (WindowEncoder(8, 2, num_heads=2, depth=2), WindowDecoder(8, 2, num_heads=2, depth=2)):
        assert part.layers[0].output.weight.any() and not part.layers[1].output.weight.any()
        with torch.no_grad():
            part.layers[1].output.weight.fill_(1)
        part.layers[1].output.reset_parameters()
        assert not part.layers[1].output.weight.any()


def test_codec_stays_inside_the_papers_budget():
    """Encoder and decoder together have about 8.6 D^2 parameters at depth 1."""
    D = 64
    pair = [WindowEncoder(D, 4), WindowDecoder(D, 4)]
    assert 8 * D**2 <= sum(p.numel() for part in pair for p in part.parameters()) <= 8.6 * D**2


# ---- settings ------------------------------------------------------------------------------------


def test_sizes_that_do_not_fit_are_refused():
    """The error names the key of the recipe."""
    with pytest.raises(ValueError, match="tensorar.window is 7; expected 1 to 6"):
        wrap(FakeBackbone(num_tokens=6), 7)
    with pytest.raises(ValueError, match="train.loss_chunk_tokens is 0"):
        LossSettings(chunk_tokens=0)
    with pytest.raises(
        ValueError, match="tensorar.num_heads is 3; expected a divisor of the backbone's width, 16"
    ):
        WindowEncoder(16, 2, num_heads=3)
    with pytest.raises(ValueError, match="tensorar.depth is 0"):
        WindowDecoder(16, 2, depth=0)


def test_noise_follows_the_generator_alone():
    """The same generator gives the same loss, whatever the state of the global
    generator.
    """
    model, codes = open_codec(wrap(FakeBackbone(), 3)), torch.zeros(BATCH, 6, 1, dtype=torch.int64)
    losses = []
    for seed in (1, 1, 2):
        torch.rand(3)
        losses.append(model(codes, fake_condition(), UNCOND, noise(seed)).loss.item())
    assert losses[0] == losses[1] != losses[2]


# ---- self-drafts ---------------------------------------------------------------------------------


def inputs_of(
    model: TensorAR, codes: Tensor, rows=None, seed: int = 7, training: bool = True
) -> tuple[Tensor, Tensor]:
    """The windows and valid slots of the last forward pass that encodes."""
    seen = []
    encode = model.encode
    model.encode = lambda windows, valid: seen.append((windows, valid)) or encode(windows, valid)
    condition = fake_condition()
    first, stop = (0, len(codes)) if rows is None else (rows[0], rows[0] + len(codes))
    condition = type(condition)(*(value[first:stop] for value in condition))
    model.train(training)(codes, condition, UNCOND[first:stop], noise(seed), rows)
    del model.encode
    return seen[-1]


@pytest.mark.parametrize("name", ["one_factor", "two_factors"])
def test_self_drafts_are_what_the_model_samples(name):
    """With rate 1 every draft is sampled from the model, which here always predicts one
    token.

    Offset 0 stays true. A batch that is split gives the same drafts.
    """
    backbone = BACKBONES[name]()
    model = open_codec(
        wrap(backbone, 3, schedule=constant_rate(1.0), self_drafts=1.0, loss=LossSettings(chunk_tokens=8))
    )
    codes = random_codes(backbone)
    clean = slide(codes, 3)[0][:, :-1]
    predicted = torch.tensor([size - 2 for size in backbone.factor_sizes])
    real = backbone.head.forward
    backbone.head.forward = lambda states, prev: (
        functional.one_hot(
            predicted[prev.shape[-1]].expand(states.shape[:-1]), backbone.factor_sizes[prev.shape[-1]]
        ).float()
        * 1e4
    )
    windows, _ = inputs_of(model, codes)
    assert torch.equal(windows[:, :, 0], clean[:, :, 0])
    # Whether a slot is redrawn does not depend on its token, so drafts are right no
    # more often than the model.
    assert (windows[:, :, 1:] == predicted).all() and (clean[:, :, 1:] != predicted).any()
    validated, _ = inputs_of(model, codes, training=False)
    assert torch.equal(validated, windows), "validation would measure inputs that the model never sees"
    backbone.head.forward = lambda states, prev: torch.full(
        (*states.shape[:-1], backbone.factor_sizes[prev.shape[-1]]), torch.nan
    )
    assert model(codes, fake_condition(), UNCOND, noise()).loss.isnan(), (
        "the loss reports that the model diverged"
    )
    backbone.head.forward = real
    whole_batch, _ = inputs_of(model, codes)
    for first in range(BATCH):
        assert torch.equal(
            inputs_of(model, codes[first : first + 1], (first, BATCH))[0][0], whole_batch[first]
        )
    loss = model.train()(codes, fake_condition(), UNCOND, noise()).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
