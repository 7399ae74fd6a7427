"""The window codec, the two modules that TensorAR adds to a backbone.

The encoder turns K embeddings into one state, the decoder turns one state into K
states. Both are small query transformers with a residual around the original path
(arXiv:2505.16324). Their last projection starts at zero, so a fresh pair changes
nothing: encoder(x) == x[..., 0, :] and decoder(h)[..., j, :] == h, bit for bit.
Neither has an MLP: each costs 4 D^2 per layer, inside the paper's budget of about
8.6 D^2 for the pair.
Shapes: B batch, S windows, K window size, D width, Q queries, C context, H heads.
"""

import torch
from torch import Tensor, nn

from mmtensorar.model.layers import Linear


class ZeroLinear(Linear):
    """A linear map that starts at zero.

    reset_parameters writes the zeros, inside the constructor: ZeRO-3 empties a weight
    as soon as its module is built, so writing zeros afterwards would have no effect.
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Attention(nn.Module):
    """Multi-head attention: four D x D maps without biases (a key bias would never get
    a gradient).

    zero_output: the output map starts at zero. Raises ValueError when num_heads does
    not divide dim.
    """

    def __init__(self, dim: int, num_heads: int, *, zero_output: bool):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"tensorar.num_heads is {num_heads}; expected a divisor of the backbone's width, {dim}"
            )
        self.num_heads = num_heads
        self.query = Linear(dim, dim, bias=False)
        self.key = Linear(dim, dim, bias=False)
        self.value = Linear(dim, dim, bias=False)
        self.output = (ZeroLinear if zero_output else Linear)(dim, dim, bias=False)

    def forward(self, query: Tensor, context: Tensor, visible: Tensor | None = None) -> Tensor:
        """query [..., Q, D], context [..., C, D], visible [..., C] bool ->
        [..., Q, D].
        """

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)

        q, k, v = heads(self.query(query)), heads(self.key(context)), heads(self.value(context))
        # Plain operations: a window has only a few slots, but there are B * T windows,
        # and fused kernels are made for (and limit the batch size to) the opposite
        # case.
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5  # [..., H, Q, C]
        if visible is not None:
            scores = scores.masked_fill(~visible[..., None, None, :], float("-inf"))
        mixed = scores.softmax(-1).to(v.dtype) @ v
        return self.output(mixed.transpose(-2, -3).flatten(-2))


def _offset_vectors(window: int, dim: int) -> nn.Parameter:
    """[K, D]: one learned vector per offset."""
    # They are added to inputs of unit RMS, and a fine-tune at 2e-5 barely moves them.
    # At the usual 0.02 the model could hardly tell the offsets apart.
    return nn.Parameter(0.5 * torch.randn(window, dim))


def _check(window: int, depth: int) -> None:
    if window < 2:
        raise ValueError(f"tensorar.window is {window}; a codec needs 2 or more (window 1 has no codec)")
    if depth < 1:
        raise ValueError(f"tensorar.depth is {depth}; expected 1 or more")


class WindowEncoder(nn.Module):
    """K embeddings -> one state: the offset-0 embedding attends to its window.

    Embeddings are normalised before the offset positions are added, so that the
    positions have the same weight at any scale of a backbone's embeddings.
    Raises ValueError when num_heads does not divide dim, window < 2 or depth < 1.
    """

    def __init__(self, dim: int, window: int, *, num_heads: int = 8, depth: int = 1):
        super().__init__()
        _check(window, depth)
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.offset_positions = _offset_vectors(window, dim)
        # Each layer refines the one query over the same window; only the last one
        # starts at zero.
        self.layers = nn.ModuleList(
            Attention(dim, num_heads, zero_output=i == depth - 1) for i in range(depth)
        )
        self.query_norms = nn.ModuleList(nn.RMSNorm(dim, eps=1e-6) for _ in range(depth - 1))

    def forward(self, embeds: Tensor, valid: Tensor) -> Tensor:
        """embeds [B, S, K, D], valid [S, K] or [B, S, K] bool -> [B, S, D].

        A slot that is not valid has no influence on the result. Slot 0 must be valid.
        """
        context = self.norm(embeds) + self.offset_positions
        state = context[..., :1, :]
        query = state
        for attention, norm in zip(self.layers[:-1], self.query_norms, strict=True):
            state = state + attention(query, context, valid)
            query = norm(state)
        update = self.layers[-1](query, context, valid)
        return embeds[..., 0, :] + update[..., 0, :]


class WindowDecoder(nn.Module):
    """One state -> K states: K learned offset queries attend to [state; queries].

    With the state as the only key, the softmax would be 1, and the query and key maps
    would never learn. With the queries as further keys, each head learns, per offset
    and per state, how much of the state to pass on. The query vector of offset j is
    state + query_j, so that this choice depends on the state.
    Raises ValueError when num_heads does not divide dim, window < 2 or depth < 1.
    """

    def __init__(self, dim: int, window: int, *, num_heads: int = 8, depth: int = 1):
        super().__init__()
        _check(window, depth)
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.offset_queries = _offset_vectors(window, dim)
        self.layers = nn.ModuleList(
            Attention(dim, num_heads, zero_output=i == depth - 1) for i in range(depth)
        )
        self.slot_norms = nn.ModuleList(nn.RMSNorm(dim, eps=1e-6) for _ in range(depth - 1))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> [..., K, D]."""
        state = self.norm(hidden)[..., None, :]
        slots = self.offset_queries.expand(*hidden.shape[:-1], -1, -1)
        normed = slots
        for attention, norm in zip(self.layers[:-1], self.slot_norms, strict=True):
            slots = slots + attention(state + normed, torch.cat([state, normed], dim=-2))
            normed = norm(slots)
        update = self.layers[-1](state + normed, torch.cat([state, normed], dim=-2))
        return hidden[..., None, :] + update
