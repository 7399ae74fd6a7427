"""The loss equals the sum that it is defined as, in chunks and with Liger's kernel."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional

from mmtensorar.model.drafts import FixedSchedule
from mmtensorar.model.loss import LossSettings, resolve_offset_weights
from mmtensorar.model.windows import slide
from tests.helpers.fakes import FakeBackbone, fake_condition
from tests.helpers.models import (
    BATCH,
    UNCOND,
    gradients,
    noise,
    open_codec,
    random_codes,
    window_logits,
    wrap,
)

ROOT = Path(__file__).resolve().parents[2]


# ---- values --------------------------------------------------------------------------------------


def test_loss_per_offset_is_a_mean_over_valid_slots(backbone):
    """Offset j has T - j targets.

    The expected loss is computed token by token from the logits, and weighted
    afterwards.
    """
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
                log_probs = window_logits(model, hidden, windows[..., :factor])[:, :, offset].log_softmax(-1)
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
    """A token is right when every factor is right, given the true earlier factors.

    Computed in eval mode only, because it takes time.
    """
    K, T = 3, backbone.num_tokens
    model = open_codec(wrap(backbone, K, schedule=FixedSchedule("none"))).eval()
    codes = random_codes(backbone)
    windows, valid = slide(codes, K)
    with torch.no_grad():
        output = model(codes, fake_condition(), UNCOND)
        hidden = model.hidden(windows[:, :-1], valid[:-1], fake_condition(), UNCOND)
        right = torch.ones(BATCH, T, K, dtype=torch.bool)
        for factor in range(codes.shape[-1]):
            right &= window_logits(model, hidden, windows[..., :factor]).argmax(-1) == windows[..., factor]
    expected = [right[:, : T - offset, offset].float().mean() for offset in range(K)]
    torch.testing.assert_close(output.accuracy_per_offset, torch.stack(expected))
    assert model.train()(codes, fake_condition(), UNCOND).accuracy_per_offset is None


@pytest.mark.parametrize("chunk_tokens, most_rows", [(7, 6), (1, 3)])
def test_chunks_change_memory_and_nothing_else(backbone, chunk_tokens, most_rows):
    """Chunks bound the largest tensor of a step.

    A chunk holds at least K rows, and no remainder is lost.
    """
    whole = open_codec(wrap(backbone, 3))
    parts = copy.deepcopy(whole)
    parts.loss_settings = LossSettings(chunk_tokens=chunk_tokens)
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
    """Compared with torch's own label smoothing, and with log(Z)^2 computed here.

    The loss per offset and the validation loss stay plain cross entropy.
    """
    codes, condition, K = random_codes(backbone), fake_condition(), 2
    plain = open_codec(wrap(backbone, K, weights=[1, 0.5], schedule=FixedSchedule("none")))
    other = copy.deepcopy(plain)
    other.loss_settings = LossSettings(label_smoothing=0.1, z_loss=0.01)
    windows, valid = slide(codes, K)
    with torch.no_grad():
        hidden = plain.hidden(windows[:, :-1], valid[:-1], condition, UNCOND)
        expected = 0
        for factor in range(codes.shape[-1]):
            logits = window_logits(plain, hidden, windows[..., :factor])
            for offset, weight in enumerate((1, 0.5)):
                rows = logits[:, :, offset][:, valid[:, offset]].flatten(0, 1)
                targets = windows[:, :, offset, factor][:, valid[:, offset]].flatten()
                smooth = functional.cross_entropy(rows, targets, label_smoothing=0.1)
                expected = expected + weight * (smooth + 0.01 * rows.logsumexp(-1).square().mean())
        before, after = plain(codes, condition, UNCOND), other(codes, condition, UNCOND)
        torch.testing.assert_close(after.loss, expected)
        torch.testing.assert_close(after.loss_per_offset, before.loss_per_offset)
        torch.testing.assert_close(other.eval()(codes, condition, UNCOND).loss, before.loss)


# ---- offset weights ------------------------------------------------------------------------------


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
def test_offset_weights_of_every_form(spec, weights):
    """The weights that every form gives at K = 3."""
    assert resolve_offset_weights(spec, 3) == weights


def test_offset_weights_of_window_1():
    """With one offset every form is plain training."""
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
    """The loss is then that of offset 0, but every offset is still reported."""
    output = open_codec(wrap(FakeBackbone(), 3, weights="first_only"))(
        torch.zeros(BATCH, 6, 1, dtype=torch.int64), fake_condition(), UNCOND, noise()
    )
    assert output.loss.item() == output.loss_per_offset[0].item()
    assert len(output.loss_per_offset) == 3 and (output.loss_per_offset > 0).all()
    assert not output.loss_per_offset.requires_grad


# ---- Liger's kernel ------------------------------------------------------------------------------

LIGER = """
import torch
from mmtensorar.model.loss import LossSettings
from tests.helpers.fakes import fake_condition, tiny_janus, tiny_llamagen, llamagen_condition
from tests.helpers.models import UNCOND, noise, open_codec, random_codes, wrap

torch.manual_seed(0)
for backbone, condition in ((tiny_janus(), fake_condition()), (tiny_llamagen(), None)):
    condition = condition or llamagen_condition(backbone)
    codes = random_codes(backbone)
    for window in (1, 3):
        model, results = open_codec(wrap(backbone, window)) if window > 1 else wrap(backbone, 1), []
        for kernel in ("torch", "liger"):
            model.loss_settings = LossSettings(chunk_tokens=6, kernel=kernel)
            model.zero_grad()
            output = model(codes, condition, UNCOND, noise())
            output.loss.backward()
            gradients = {name: p.grad for name, p in model.named_parameters()}
            results.append((output.loss.detach(), output.loss_per_offset, gradients))
        torch.testing.assert_close(*results, rtol=2e-5, atol=1e-6)
print("equal")
"""


@pytest.mark.launch
def test_ligers_loss_equals_ours():
    """Runs the real kernel in Triton's interpreter, which needs no GPU.

    Losses and gradients are equal.
    """
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


def test_a_loss_that_liger_does_not_support_is_refused():
    model = wrap(FakeBackbone((11,)), 2, loss=LossSettings(kernel="liger"))
    with pytest.raises(ValueError, match="train.loss_kernel=liger"):
        model(random_codes(model.backbone), fake_condition(), UNCOND)
