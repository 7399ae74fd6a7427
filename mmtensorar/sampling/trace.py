"""Reading the trace of a decoding: what was revised, and when.

A trace is [B, T, K, F]: trace[:, t, j] is token t + j as step t predicted it, 0 past
the last token. Shapes: B batch, T image tokens, K window, F factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmtensorar.model.windows import valid_slots


def revised_per_offset(trace: Tensor) -> list[float]:
    """For each offset but the last, the share of tokens that changed since the step
    before.

    trace: [B, T, K, F]. Returns K - 1 shares. A token has changed when any of its
    factors has.
    """
    # The same tokens, one step later at one offset less.
    later, earlier = trace[:, 1:, :-1], trace[:, :-1, 1:]
    valid_TK = valid_slots(trace.shape[1], trace.shape[2], trace.device)[1:, :-1]
    changed = (later != earlier).any(-1) & valid_TK
    count = len(trace) * valid_TK.sum(0)
    return (changed.sum((0, 1)) / count.clamp(min=1)).tolist()


def revisions(trace: Tensor) -> Tensor:
    """The image after each revision: trace -> codes [B, K, T, F], the final image last.

    Revision r takes token p at offset K-1-r, from step p - (K-1-r). The first K-1
    tokens were never drafted that early and are taken from step 0.
    """
    T, K = trace.shape[1:3]
    tokens_T = torch.arange(T, device=trace.device)
    offsets_K = torch.arange(K - 1, -1, -1, device=trace.device)
    offsets_KT = torch.minimum(offsets_K[:, None], tokens_T)
    return trace[:, tokens_T - offsets_KT, offsets_KT]
