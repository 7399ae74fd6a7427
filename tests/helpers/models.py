"""Tiny TensorAR models around a backbone, with codes, generators and a recomputation to compare with."""

import torch
from torch import Tensor

from mmtensorar.model.codec import WindowDecoder, WindowEncoder
from mmtensorar.model.conditions import Condition
from mmtensorar.model.drafts import FixedSchedule
from mmtensorar.model.loss import resolve_offset_weights
from mmtensorar.model.tensorar import TensorAR
from mmtensorar.model.windows import valid_slots
from mmtensorar.recipe import SamplerSettings
from tests.helpers.fakes import FakeBackbone, fake_condition, tiny_janus


def window_logits(model: TensorAR, hidden: Tensor, prev: Tensor) -> Tensor:
    """hidden [B, S, D], earlier factors prev [B, S, K, f] -> logits [B, S, K, V_f] of factor f."""
    return model.backbone.head(model.offset_states(hidden), prev)


BACKBONES = {
    "one_factor": lambda: FakeBackbone((11,)),
    "two_factors": lambda: FakeBackbone((5, 7)),
    "janus": tiny_janus,
}


BATCH = 3


UNCOND = torch.tensor([False, True, False])


LINEAR = FixedSchedule("linear")


def wrap(backbone, window: int, *, depth: int = 1, schedule=LINEAR, weights=None, **options) -> TensorAR:
    """A TensorAR with a fresh codec around the backbone itself, not a copy."""
    codec = [None, None]
    if window > 1:
        shape = {"num_heads": 2, "depth": depth}
        codec = [WindowEncoder(backbone.dim, window, **shape), WindowDecoder(backbone.dim, window, **shape)]
    return TensorAR(
        backbone, *codec, schedule, offset_weights=resolve_offset_weights(weights, window), **options
    )


@torch.no_grad()
def open_codec(model: TensorAR) -> TensorAR:
    """Move the projections off zero, as training does, so that the codec takes part."""
    for part in (model.encoder, model.decoder):
        part.layers[-1].output.weight.normal_(std=0.5)
    return model


def random_codes(backbone) -> Tensor:
    """[B, T, F]."""
    shape = (BATCH, backbone.num_tokens)
    return torch.stack([torch.randint(size, shape) for size in backbone.factor_sizes], dim=-1)


def noise(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(model: TensorAR, codes: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(codes, fake_condition(), UNCOND, noise()).loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


PLAIN = SamplerSettings(cfg_scale=1.0)


def make(name: str, window: int) -> TensorAR:
    model = wrap(BACKBONES[name](), window)
    return (open_codec(model) if window > 1 else model).eval()


@torch.no_grad()
def recompute(model: TensorAR, condition: Condition, cfg_scale: float) -> Tensor:
    """The greedy trace [B, T, K, F] without a cache: every step runs the whole sequence anew."""
    T, F, B = model.backbone.num_tokens, len(model.backbone.factor_sizes), len(condition.values)
    valid = valid_slots(T, model.window)
    trace = torch.zeros(B, 0, model.window, F, dtype=torch.int64)
    for t in range(T):
        states = [
            model.hidden(trace, valid[:t], condition, torch.full((B,), uncond))[:, -1:]
            for uncond in (False, True)
        ]
        window = trace.new_zeros(B, 1, model.window, 0)
        for _ in range(F):
            cond, uncond = (window_logits(model, state, window) for state in states)
            tokens = (uncond + cfg_scale * (cond - uncond)).argmax(-1)
            window = torch.cat([window, tokens[..., None]], dim=-1)
        trace = torch.cat([trace, window * valid[t, :, None]], dim=1)
    return trace


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]
