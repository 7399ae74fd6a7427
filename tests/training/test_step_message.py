"""The message of a step: every rank packs its values, and all ranks unpack the mean
over the ranks.
"""

import torch

from mmtensorar.training.step_message import StepMessage


def pack(losses, **reports):
    reports = {"stop_requested": False, "save_failed": False, "num_skipped": 0} | reports
    return StepMessage.pack(torch.tensor(losses), **reports)


def test_the_mean_of_two_ranks():
    ranks = [pack([1.0, 0.5, 2.0], num_skipped=3), pack([3.0, 1.5, 4.0], stop_requested=True)]
    message = StepMessage.unpack((sum(ranks) / 2).tolist())
    assert message == StepMessage(2.0, [1.0, 3.0], True, False, True, False) and message.is_finite


def test_a_prompt_cut_on_one_rank_reaches_all():
    """Only then do the ranks gather the names of what was cut."""
    ranks = [pack([1.0, 0.5]), pack([1.0, 0.5], num_cut=1)]
    message = StepMessage.unpack((sum(ranks) / 2).tolist())
    assert message.any_cut and not message.any_skipped


def test_a_loss_that_is_not_finite_on_one_rank_reaches_all():
    ranks = [pack([1.0, 0.5]), pack([float("nan"), 0.5], save_failed=True)]
    message = StepMessage.unpack((sum(ranks) / 2).tolist())
    assert not message.is_finite and message.save_failed
