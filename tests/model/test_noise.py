"""Noise that is a function of key and code: its distribution, and what it must not depend
on.
"""

import pytest
import torch

from mmtensorar.model import noise


def keys(*shape: int, seed: int = 0) -> torch.Tensor:
    return noise.random_keys(shape, torch.Generator().manual_seed(seed))


def test_noise_depends_on_key_and_code_alone():
    """Not on the batch, its order, the number of codes, or what was drawn before."""
    some = keys(4, 5)
    whole = noise.gumbel(some, 300)
    assert torch.equal(whole, noise.gumbel(some, 300))
    assert torch.equal(whole[2:3, 1:], noise.gumbel(some[2:3, 1:], 300))
    assert torch.equal(whole.flip(0), noise.gumbel(some.flip(0), 300))
    assert torch.equal(whole[..., :70], noise.gumbel(some, 70))
    assert whole.isfinite().all() and len(whole.unique()) > 0.99 * whole.numel()


def test_noise_is_standard_gumbel():
    """Compared with the exact distribution function, in 50 bins of equal probability:
    over codes, over keys that count up, and in the tail that decides who wins.
    """
    for sample in (
        noise.gumbel(keys(64), 4096),
        noise.gumbel(torch.arange(4096) << 32, 64),
        noise.gumbel(torch.arange(4096), 64),
        noise.gumbel(noise.child_keys(keys(1), torch.arange(4096)), 64),
    ):
        uniform = torch.exp(-torch.exp(-sample.double())).flatten()
        for edges in (torch.linspace(0, 1, 51), 1 - torch.linspace(0, 1e-3, 51).flip(0)):
            inside = uniform[(uniform >= edges[0]) & (uniform <= edges[-1])]
            counts = torch.histogram(inside, edges.double())[0]
            expected = len(uniform) * (edges[1] - edges[0]).double()
            # 49 degrees of freedom: mean 49, standard deviation 10.
            assert ((counts - expected) ** 2 / expected).sum() < 49 + 5 * 10


@pytest.mark.parametrize("bit", [0, 1, 7, 31, 32, 33, 62, 63])
def test_keys_that_differ_in_one_bit_have_unrelated_noise(bit):
    some = keys(200)
    flipped = some ^ (1 << bit if bit < 63 else -(2**63))
    pairs = torch.stack([noise.gumbel(each, 1000).flatten() for each in (some, flipped)])
    assert abs(torch.corrcoef(pairs)[0, 1]) < 0.01  # 4.5 standard deviations


def test_neighbouring_codes_have_unrelated_noise():
    sample = noise.gumbel(keys(200), 1001)
    for step in (1, 2, 16, 256):
        pairs = torch.stack([sample[:, step:].flatten(), sample[:, :-step].flatten()])
        assert abs(torch.corrcoef(pairs)[0, 1]) < 0.01


def test_child_keys_are_all_different():
    parents = torch.stack([keys(100), keys(100) + 1]).flatten()
    children = noise.child_keys(parents[:, None], torch.arange(500))
    assert len(children.unique()) == children.numel()
    assert torch.equal(children[7, 30], noise.child_keys(parents[7], 30))


@pytest.mark.parametrize(
    "probabilities", [[0.5, 0.3, 0.2], [1e-4, 1 - 1e-4], [0.0, 0.25, 0.0, 0.75], [1 / 300] * 300]
)
def test_tokens_have_their_probabilities(probabilities):
    """A chi-square test over 200,000 draws; a code of probability 0 is never drawn."""
    expected = 200_000 * torch.tensor(probabilities, dtype=torch.float64)
    tokens = noise.draw((expected / 77).log(), keys(200_000))
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    assert not counts[expected == 0].any()
    kept = expected > 0
    freedom = kept.sum() - 1
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5 + 5


def test_similar_distributions_draw_mostly_the_same_token():
    """Exactly as often as the formula in the module says.

    This is what lookahead lives on: inverting the CDF gave 0.12 to 0.17 here.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1000, generator=generator)
    p, q = logits.softmax(-1), (logits + 0.3 * torch.randn(1000, generator=generator)).softmax(-1)
    distance = (p - q).abs().sum() / 2
    exact = (1 / torch.maximum(p / p[:, None], q / q[:, None]).sum(-1)).sum()
    some = keys(20_000)
    equal = (noise.draw(p.log(), some) == noise.draw(q.log(), some)).double().mean()
    assert abs(equal - exact) < 0.012 and exact > (1 - distance) / (1 + distance) > 0.7


def test_without_a_finite_logit_a_token_is_still_one():
    """A diverged model is reported by its loss; an index out of range would only crash."""
    for value in (float("nan"), float("-inf"), float("inf")):
        assert 0 <= noise.draw(torch.full((4, 9), value), keys(4)).min() < 9
