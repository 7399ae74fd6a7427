"""Filters computed by hand, and the tokens that random numbers pick from the filtered
distribution.
"""

import pytest
import torch
from torch import Tensor

from mmtensorar.recipe import SamplerSettings
from mmtensorar.sampling import filters
from mmtensorar.sampling.noise import draw_tokens, greedy, token_numbers


def logits_of(*probabilities: float) -> Tensor:
    """Logits of shape [1, 1, V]."""
    return torch.tensor(probabilities).log()[None, None]


def shares(settings: dict, *probabilities: float) -> list[float]:
    probs = filters.probabilities(logits_of(*probabilities), **settings)[0, 0]
    return (probs / probs.sum()).tolist()


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [0.5, 0.3, 0.2]),
        ({"temperature": 0.5}, [25 / 38, 9 / 38, 4 / 38]),  # squared
        ({"top_k": 2}, [5 / 8, 3 / 8, 0]),
        ({"top_k": 1}, [1, 0, 0]),
        ({"top_k": 9}, [0.5, 0.3, 0.2]),  # more than there are tokens
        ({"top_p": 0.4}, [1, 0, 0]),  # the first token always stays
        ({"top_p": 0.6}, [5 / 8, 3 / 8, 0]),  # the token that crosses top_p stays
        ({"top_p": 0.9}, [0.5, 0.3, 0.2]),
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0]),  # top_p counts what top_k left: 5/8 is enough
        (
            {"temperature": 0.5, "top_p": 0.6},
            [1, 0, 0],
        ),  # and top_p sees the probabilities after temperature: 25/38
    ],
)
def test_filters_by_hand(settings, expected):
    """Temperature, then top_k, then top_p, on probabilities 0.5, 0.3, 0.2.

    top_p once raised a TypeError at its first use: torch's stable sort accepts dim by
    name only.
    """
    assert shares(settings, 0.5, 0.3, 0.2) == pytest.approx(expected, abs=1e-6)
    assert shares(settings, 0.2, 0.5, 0.3) == pytest.approx([expected[2], expected[0], expected[1]], abs=1e-6)


def test_ties_at_the_edge_of_top_k_all_stay():
    """The original samplers compare values too.

    Choosing by index favoured low code numbers among equals.
    """
    assert shares({"top_k": 2}, 0.25, 0.25, 0.25, 0.25) == pytest.approx([0.25] * 4)
    assert shares({"top_k": 2}, 0.4, 0.2, 0.2, 0.1, 0.1) == pytest.approx([0.5, 0.25, 0.25, 0, 0])


def test_guidance_by_hand():
    cond, uncond = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])
    assert filters.guide(cond, uncond, 1.0).tolist() == [3.0, 1.0]
    assert filters.guide(cond, uncond, 0.0).tolist() == [1.0, 2.0]
    assert filters.guide(cond, uncond, 2.0).tolist() == [5.0, 0.0]


@pytest.mark.parametrize(
    "number, token", [(0.0, 0), (0.49, 0), (0.51, 1), (0.79, 1), (0.81, 2), (1 - 2**-53, 2)]
)
def test_a_random_number_selects_the_slice_that_contains_it(number, token):
    """The slices are [0, .5), [.5, .8), [.8, 1)."""
    numbers = torch.tensor([[number]], dtype=torch.float64)
    assert draw_tokens(logits_of(0.5, 0.3, 0.2), numbers, SamplerSettings()).item() == token


@pytest.mark.parametrize("number, token", [(0.0, 1), (1 - 2**-53, 2)])
def test_a_filtered_token_is_never_selected(number, token):
    """Tokens filtered out at both ends of the codebook are not picked, for the smallest
    and the largest number.
    """
    numbers = torch.tensor([[number]], dtype=torch.float64)
    assert draw_tokens(logits_of(0.1, 0.4, 0.3, 0.2), numbers, SamplerSettings(top_k=2)).item() == token


def test_greedy_drafts_are_greedy_at_drafts_only():
    """Offset 0 is drawn, here from the last slice; offsets 1 and 2 take the most likely
    token.
    """
    logits = logits_of(0.5, 0.3, 0.2).expand(1, 3, 3)
    high = torch.full((1, 3), 0.99, dtype=torch.float64)
    assert draw_tokens(logits, high, SamplerSettings()).tolist() == [[2, 2, 2]]
    assert draw_tokens(logits, high, SamplerSettings(greedy_drafts=True)).tolist() == [[2, 0, 0]]
    assert greedy(logits, high).tolist() == [[0, 0, 0]]


def test_final_tokens_have_the_same_numbers_whatever_the_window():
    one, four = (token_numbers(5, window, 2, 1, [torch.Generator().manual_seed(3)]) for window in (1, 4))
    assert one.shape == (1, 5, 2, 1) and four.shape == (1, 5, 2, 4)
    assert torch.equal(one[..., 0], four[..., 0])
