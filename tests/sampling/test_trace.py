"""The trace: which tokens were revised, and the image after each revision."""

import torch

from mmtensorar.sampling.trace import revised_per_offset, revisions


def test_revised_tokens_are_counted_by_offset():
    """Two of three tokens are drafted before they are final; the last window has a slot
    past the end.
    """
    trace = torch.tensor([[[1, 2], [2, 3], [4, 0]], [[1, 5], [6, 7], [8, 0]]])[
        ..., None
    ]  # [B=2, T=3, K=2, F=1]
    # Image 0: 2 stays, 3 becomes 4. Image 1: 5 becomes 6, 7 becomes 8.
    assert revised_per_offset(trace) == [0.75]
    assert revised_per_offset(trace[:, :, :1]) == []


def test_revisions_of_windows_written_by_hand():
    """4 tokens, K = 3.

    Token p of step t is written as 10 t + p, which shows the step that it comes from.
    """
    T, K = 4, 3
    rows = [[10 * t + t + j if t + j < T else 0 for j in range(K)] for t in range(T)]
    trace = torch.tensor([rows])[..., None]
    assert revisions(trace)[0, :, :, 0].tolist() == [
        [0, 1, 2, 13],  # offset 2, from step p - 2; tokens 0 and 1 from step 0
        [0, 1, 12, 23],  # offset 1, from step p - 1
        [0, 11, 22, 33],  # final
    ]
