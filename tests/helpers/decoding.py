"""Shared by tests of decoding: settings without guidance, models, seeds, and decoding
without a cache.
"""

import torch
from torch import Tensor

from mmtensorar.model.conditions import Condition
from mmtensorar.model.tensorar import TensorAR
from mmtensorar.model.windows import valid_slots
from mmtensorar.recipe import SamplerSettings
from tests.helpers.models import BACKBONES, open_codec, window_logits, wrap

PLAIN = SamplerSettings(cfg_scale=1.0, lookahead=1)


def make(name: str, window: int) -> TensorAR:
    model = wrap(BACKBONES[name](), window)
    return (open_codec(model) if window > 1 else model).eval()


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
def recompute(model: TensorAR, condition: Condition, cfg_scale: float) -> Tensor:
    """The greedy trace [B, T, K, F] without a cache: every step computes the whole
    sequence again.
    """
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
