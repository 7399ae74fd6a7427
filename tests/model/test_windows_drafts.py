"""Windows and noise: indices checked by eye, schedules against formulas, noise by
counting.
"""

import math

import pytest
import torch

from mmtensorar.model.drafts import SCHEDULES, FixedSchedule, input_windows
from mmtensorar.model.windows import slide, valid_slots

NAMES = list(SCHEDULES)


def fixed(rates: list[float], batch: int, tokens: int) -> torch.Tensor:
    """Codes of shape [B, T, K], and a schedule with one fixed rate per offset."""
    return torch.tensor(rates).expand(batch, tokens, len(rates))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- windows -------------------------------------------------------------------------------------


def test_slide_by_hand():
    """Row t holds tokens t, t+1, t+2, and zeros past the end.

    All of training depends on this order.
    """
    windows, valid = slide(torch.tensor([[[5], [6], [7], [8]]]), 3)
    assert windows[0, :, :, 0].tolist() == [[5, 6, 7], [6, 7, 8], [7, 8, 0], [8, 0, 0]]
    assert valid.int().tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]]


def test_factors_of_a_token_stay_together():
    """Two factors move as one token, and stay in their own columns."""
    windows, _ = slide(torch.tensor([[[1, 10], [2, 20], [3, 30]]]), 2)
    assert windows[0].tolist() == [[[1, 10], [2, 20]], [[2, 20], [3, 30]], [[3, 30], [0, 0]]]


def test_window_1_is_the_sequence_itself():
    """K = 1 must be the plain model, so nothing is cut, padded or masked."""
    codes = torch.arange(8).view(2, 4, 1)
    windows, valid = slide(codes, 1)
    assert torch.equal(windows[:, :, 0], codes)
    assert valid.all()


def test_window_as_long_as_the_image():
    """The largest window allowed: only its first row is complete."""
    assert valid_slots(3, 3).int().tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("window", [0, -1, 5])
def test_window_outside_the_image_is_refused(window):
    """Indexing would clamp, and train on repeated tokens without an error."""
    with pytest.raises(ValueError, match=f"window is {window}; expected 1 to 4"):
        slide(torch.zeros(1, 4, 1, dtype=torch.int64), window)


# ---- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, rates",
    [
        ("linear", [0, 0.25, 0.5, 0.75]),
        ("sine", [0, math.sin(math.pi / 8), math.sqrt(0.5), math.sin(3 * math.pi / 8)]),
        ("sqrt", [0, 0.5, math.sqrt(0.5), math.sqrt(0.75)]),
        ("exponential", [0, 1 - math.exp(-0.5), 1 - math.exp(-1), 1 - math.exp(-1.5)]),
        ("none", [0, 0, 0, 0]),
        ("full", [0, 1, 1, 1]),
    ],
)
def test_formulas_at_window_4(name, rates):
    """The documented formulas, with u = offset / 4.

    A mistake here would silently change the method.
    """
    assert FixedSchedule(name).rates(4).tolist() == pytest.approx(rates, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("window", [1, 2, 4, 16])
def test_rates_start_at_exactly_0_and_grow(name, window):
    """Offset 0 is the final token and stays true; later drafts are noisier.

    Only `full` reaches rate 1.
    """
    rates = FixedSchedule(name).rates(window)
    assert rates[0] == 0 and (rates.diff() >= 0).all() and (rates <= 1).all()
    if name not in ("none", "full"):
        assert (rates.diff() > 0).all() and (rates < 1).all()


def test_rates_cover_every_row():
    """A schedule returns a rate for every row of the batch, in float32."""
    rates = FixedSchedule("linear")((2, 3, 4))
    assert rates.shape == (2, 3, 4) and rates.dtype == torch.float32
    assert torch.equal(rates[1, 2], torch.tensor([0, 0.25, 0.5, 0.75]))


def test_an_unknown_schedule_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(ValueError, match=f"cosine.*{'.*'.join(SCHEDULES)}"):
        FixedSchedule("cosine")


# ---- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_share_of_changed_tokens_follows_the_schedule(name):
    """A redraw may pick the same token, so rate * (1 - 1/V) of the tokens change; per
    offset, within 5 sigma.
    """
    N, K, V = 20_000, 4, 5
    windows = torch.full((1, N, K, 1), 3)
    rates = FixedSchedule(name)((1, N, K))
    noisy = input_windows(windows, rates, (V,), generator=seeded())
    changed = (noisy != windows).float().mean(dim=(0, 1, 3))
    expected = FixedSchedule(name).rates(K) * (1 - 1 / V)
    tolerance = 5 * (expected * (1 - expected) / N).sqrt()
    assert ((changed - expected).abs() <= tolerance).all(), (changed, expected)


def test_redraws_are_uniform_over_the_codebook():
    """Every token of the codebook is drawn equally often, including the first, the last
    and the old token.
    """
    N, V = 20_000, 5
    noisy = input_windows(torch.full((1, N, 1, 1), 3), fixed([1.0], 1, N), (V,), generator=seeded())
    share = torch.bincount(noisy.flatten(), minlength=V) / N
    assert len(share) == V
    assert ((share - 1 / V).abs() <= 5 * math.sqrt(0.2 * 0.8 / N)).all(), share


def test_all_factors_of_a_token_are_redrawn_together():
    """With one factor redrawn, a token would combine two halves that the image
    tokenizer never produced together.

    In codebooks this large a redraw practically always changes a factor, so both change
    or neither does.
    """
    V = 2**40
    windows = torch.zeros(1, 2000, 1, 2, dtype=torch.int64)
    noisy = input_windows(windows, fixed([0.5], 1, 2000), (V, V), generator=seeded())
    changed = noisy != 0
    assert torch.equal(changed[..., 0], changed[..., 1])
    assert 0.4 < changed[..., 0].float().mean() < 0.6
    both = noisy[changed.all(-1)]
    assert (both[:, 0] != both[:, 1]).all(), "the factors are drawn apart"


def test_every_factor_stays_in_its_own_codebook():
    noisy = input_windows(torch.zeros(1, 500, 2, 2, dtype=torch.int64), fixed([1.0, 1.0], 1, 500), (2, 7))
    assert noisy[..., 0].unique().tolist() == [0, 1]
    assert noisy[..., 1].unique().tolist() == list(range(7))


def test_redraws_are_independent_for_rows_positions_and_offsets():
    """Random numbers shared along any of these would noise whole windows, rows or
    batches together.
    """
    V = 2**40
    noisy = input_windows(
        torch.zeros(8, 8, 8, 1, dtype=torch.int64),
        torch.full((8, 8, 8), 0.5),
        (V,),
        generator=seeded(),
    )
    coins = noisy[..., 0] != 0
    for dim in range(3):
        assert not (coins == coins.narrow(dim, 0, 1)).all(), dim


def test_rate_0_never_and_rate_1_always():
    """Both ends are exact, not only likely: offset 0 must be true in each of billions
    of tokens.
    """
    V = 2**40
    windows = torch.full((4, 1000, 2, 1), 3)
    noisy = input_windows(windows, fixed([0.0, 1.0], 4, 1000), (V,), generator=seeded())
    assert (noisy[:, :, 0] == 3).all()
    assert (noisy[:, :, 1] != 3).all()
    assert (windows == 3).all(), "the input is not written to"


def test_a_schedule_may_be_a_rate_per_offset():
    assert FixedSchedule([0, 0.25, 0.75]).rates(3).tolist() == [0, 0.25, 0.75]
    with pytest.raises(ValueError, match="has 3 rates; expected 4, one per offset"):
        FixedSchedule([0, 0.25, 0.75]).rates(4)
    for rates in ([], [0.1, 0.2], [0, 1.1]):
        with pytest.raises(ValueError, match="expected rates from 0 to 1, the first of them 0"):
            FixedSchedule(rates)


def test_same_generator_seed_same_noise():
    """Resuming a run and comparing two runs depend on this."""
    windows = torch.zeros(2, 50, 3, 1, dtype=torch.int64)
    first, again, other = (
        input_windows(windows, torch.full((2, 50, 3), 0.5), (9,), generator=seeded(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
