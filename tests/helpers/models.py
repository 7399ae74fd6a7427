"""Small models for tests, and functions of a TensorAR that only tests need."""

import torch
from torch import Tensor

from mmtensorar.model.codec import WindowDecoder, WindowEncoder
from mmtensorar.model.drafts import FixedSchedule
from mmtensorar.model.loss import resolve_offset_weights
from mmtensorar.model.tensorar import TensorAR
from tests.helpers.fakes import FakeBackbone, fake_condition, tiny_janus

BACKBONES = {
    "one_factor": lambda: FakeBackbone((11,)),
    "two_factors": lambda: FakeBackbone((5, 7)),
    "janus": tiny_janus,
}
BATCH = 3
UNCOND = torch.tensor([False, True, False])
LINEAR = FixedSchedule("linear")


def wrap(backbone, window: int, *, depth: int = 1, schedule=LINEAR, weights=None, **options) -> TensorAR:
    """A TensorAR with a fresh codec around the backbone itself, not around a copy."""
    codec = [None, None]
    if window > 1:
        shape = {"num_heads": 2, "depth": depth}
        codec = [WindowEncoder(backbone.dim, window, **shape), WindowDecoder(backbone.dim, window, **shape)]
    return TensorAR(
        backbone, *codec, schedule, offset_weights=resolve_offset_weights(weights, window), **options
    )


@torch.no_grad()
def open_codec(model: TensorAR) -> TensorAR:
    """Move the projections away from zero, as training does, so that the codec has an
    effect.
    """
    for part in (model.encoder, model.decoder):
        part.layers[-1].output.weight.normal_(std=0.5)
    return model


def random_codes(backbone) -> Tensor:
    """Random codes of shape [B, T, F]."""
    shape = (BATCH, backbone.num_tokens)
    return torch.stack([torch.randint(size, shape) for size in backbone.factor_sizes], dim=-1)


def noise(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(model: TensorAR, codes: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(codes, fake_condition(), UNCOND, noise()).loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def window_logits(model: TensorAR, hidden: Tensor, prev: Tensor) -> Tensor:
    """hidden [B, S, D], earlier factors prev [B, S, K, f] -> logits [B, S, K, V_f] of
    factor f.
    """
    return model.backbone.head(model.offset_states(hidden), prev)
