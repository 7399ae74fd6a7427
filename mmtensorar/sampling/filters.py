"""From logits to probabilities: guidance, temperature, top-k, top-p.

Pure functions of tensors, applied in this order.
Shapes: V vocabulary; any axes in front.
"""

from __future__ import annotations

import torch
from torch import Tensor


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on logits: uncond + scale (cond - uncond)."""
    return uncond + scale * (cond - uncond)


def keep_top_k(logits: Tensor, count: int) -> Tensor:
    """Logits [..., V] with -inf for all but the `count` likeliest tokens; 0 keeps all.

    Tokens as likely as the last one kept are kept too, as in the samplers that the
    released models come with: they compare values.
    """
    if not 0 < count < logits.shape[-1]:
        return logits
    edge = logits.topk(count, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < edge, float("-inf"))


def keep_top_p(probs: Tensor, share: float) -> Tensor:
    """Probabilities [..., V] with 0 for the unlikely tail; 1 keeps all.

    The likeliest tokens are kept until their sum exceeds `share`; the result is not
    normalised again.
    """
    if share >= 1:
        return probs
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    # A token stays when those before it do not yet exceed the share, so the first
    # always stays.
    stays = ordered.cumsum(-1) - ordered <= share
    return torch.zeros_like(probs).scatter(-1, order, ordered * stays)


def probabilities(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits [..., V] -> float64 [..., V], not normalised; 0 where filtered out."""
    kept = keep_top_k(logits.float() / temperature, top_k)
    return keep_top_p(kept.double().softmax(-1), top_p)
