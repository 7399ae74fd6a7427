"""What is drawn from: guidance, temperature, top-k and top-p, on logits.

Pure functions of tensors, applied in this order.
Shapes: V vocabulary; any axes in front.
"""

from __future__ import annotations

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


def keep_top_p(logits: Tensor, share: float) -> Tensor:
    """Logits [..., V] with -inf for the unlikely tail; 1 keeps all.

    The likeliest tokens are kept until their probabilities together exceed `share`.
    """
    if share >= 1:
        return logits
    ordered, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    # A token stays when those before it do not yet exceed the share, so the first
    # always stays.
    goes = ordered.cumsum(-1) - ordered > share
    return logits.masked_fill(goes.scatter(-1, order, goes), float("-inf"))


def filtered(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits [..., V] of any dtype -> float32 [..., V], -inf where filtered out.

    Their softmax is the distribution that a token is drawn from.
    """
    return keep_top_p(keep_top_k(logits.float() / temperature, top_k), top_p)
