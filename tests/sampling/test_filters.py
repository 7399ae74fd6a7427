"""Filters computed by hand, and which noise each token is drawn with."""

import pytest
import torch
from torch import Tensor

from mmtensorar.model import noise
from mmtensorar.recipe import SamplerSettings
from mmtensorar.sampling import filters
from mmtensorar.sampling.noise import draw_tokens, greedy, picture_keys, token_keys


def logits_of(*probabilities: float) -> Tensor:
    """Logits of shape [1, 1, V]."""
    return torch.tensor(probabilities).log()[None, None]


def shares(settings: dict, *probabilities: float) -> list[float]:
    return filters.filtered(logits_of(*probabilities), **settings)[0, 0].softmax(-1).tolist()


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


def test_greedy_drafts_are_greedy_at_drafts_only():
    """Offset 0 is drawn; offsets 1 and 2 take the most likely token."""
    logits = logits_of(0.5, 0.3, 0.2).expand(500, 3, 3)
    keys = noise.random_keys((500, 3), torch.Generator().manual_seed(0))
    drawn = draw_tokens(logits, keys, SamplerSettings())
    drafts_greedy = draw_tokens(logits, keys, SamplerSettings(greedy_drafts=True))
    assert torch.equal(drawn[:, 0], drafts_greedy[:, 0]) and len(drawn[:, 0].unique()) == 3
    assert not drafts_greedy[:, 1:].any() and drawn[:, 1:].any()
    assert not greedy(logits, keys).any()


def test_final_tokens_have_the_same_noise_whatever_the_window():
    pictures = picture_keys(2, [torch.Generator().manual_seed(seed) for seed in (3, 4)])
    steps = torch.arange(5).expand(2, 5)
    one, four = (token_keys(pictures, steps, torch.arange(window), 1, 2, coupled=False) for window in (1, 4))
    assert one.shape == (2, 5, 1) and four.shape == (2, 5, 4)
    assert torch.equal(one[..., 0], four[..., 0])
    assert len(four.unique()) == four.numel(), "every draft has noise of its own"
    other = token_keys(pictures, steps, torch.arange(4), 0, 2, coupled=False)
    assert not set(other.flatten().tolist()) & set(four.flatten().tolist()), "and so has every factor"


def test_a_coupled_draft_has_the_noise_of_its_place():
    """So a draft is what the final token will be, if the model learns nothing in
    between.
    """
    pictures, steps = picture_keys(1, torch.Generator().manual_seed(0)), torch.arange(5)[None]
    keys = token_keys(pictures, steps, torch.arange(3), 0, 1, coupled=True)
    for offset in (1, 2):
        assert torch.equal(keys[:, : 5 - offset, offset], keys[:, offset:, 0])
