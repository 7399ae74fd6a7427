"""activation_memory: the peak bytes of a computation, measured on tensors without
values.
"""

import torch
from torch import nn

from mmtensorar.training import activation_memory

MIB = 2**20


def test_tensors_count_from_when_they_are_made_until_they_are_gone():
    with activation_memory.Peak() as peak:
        given = torch.zeros(MIB)  # 4 MiB
        kept = given + 1
        for _ in range(3):
            passing = kept * 2
            del passing
        view = kept[:10]
    assert peak.peak == 3 * 4 * MIB and peak.live == 2 * 4 * MIB
    del kept
    assert peak.live == 2 * 4 * MIB, "the view holds it"
    del view, given
    assert peak.live == 0


def test_tensors_that_existed_before_do_not_count():
    given = torch.zeros(MIB)
    with activation_memory.Peak() as peak:
        peak.ignore([given])
        given.add_(1)
        made = given[: MIB // 2] + 1
    assert peak.peak == made.nbytes == 2 * MIB


def test_measuring_a_step_needs_no_memory_for_it():
    """Measuring a step needs no memory for it: the model is on the meta device, so
    nothing is computed. A chain of layers keeps the input of every layer for the
    backward pass. The gradients of the parameters are not counted.
    """
    with torch.device("meta"):
        model = nn.Sequential(
            *(nn.Sequential(nn.Linear(4096, 4096, bias=False), nn.ReLU()) for _ in range(10))
        )
    rows = 4096
    found = activation_memory.of_a_step(model, lambda model: model(torch.zeros(rows, 4096)).sum())
    one = rows * 4096 * 4
    # The input and the output of every ReLU are kept; the backward pass holds a few
    # more for a while.
    assert 11 * one <= found <= 15 * one
