"""Optimisers: which there are, and which parameters each setting is for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from mmtensorar.model import adapters
from mmtensorar.recipe import Optim


def groups(model: nn.Module, optim: Optim) -> list[dict]:
    """Parameter groups of all that is trained: the codec's at tensorar_lr, the others' at lr.

    Norms, biases and embeddings have no weight decay: pulling them towards zero does not make a model simpler.
    """
    embeddings = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters(recurse=False)
    }
    found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 a parameter is a flat piece, and its shape stands beside it.
            matrix = (
                len(getattr(parameter, "ds_shape", parameter.shape)) > 1 and id(parameter) not in embeddings
            )
            found.setdefault((name.startswith(adapters.CODEC_PARTS), matrix), []).append(parameter)
    rates = {False: optim.lr, True: optim.lr if optim.tensorar_lr is None else optim.tensorar_lr}
    return [
        {"params": parameters, "lr": rates[added], "weight_decay": optim.weight_decay if matrix else 0.0}
        for (added, matrix), parameters in sorted(
            found.items(), key=lambda pair: (pair[0][0], not pair[0][1])
        )
    ]


def check(optim: Optim, device: torch.device) -> None:
    """Raise ValueError when the optimiser that optim.name asks for cannot be had here."""
    if optim.name.startswith("paged") and device.type != "cuda":
        raise ValueError(
            f"optim.name is {optim.name}, which pages between GPU and host memory, and there is no GPU"
        )
    if optim.name not in ("adamw", "cpu_adam"):
        adapters.bitsandbytes_for(f"optim.name {optim.name}")


def build(
    optim: Optim,
    groups: list[dict],
    device: torch.device,
    cpu_adam: Callable[..., torch.optim.Optimizer] | None = None,
) -> torch.optim.Optimizer:
    """The optimiser that optim.name asks for; cpu_adam: DeepSpeed's class. Raises ValueError when it cannot be had here."""
    common = {"betas": tuple(optim.betas), "eps": optim.eps, "weight_decay": optim.weight_decay}
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **common)
    if optim.name == "cpu_adam":
        try:
            return cpu_adam(groups, adamw_mode=True, **common)
        except Exception as error:  # it is compiled at first use, by whatever compiler is there
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"optim.name cpu_adam: DeepSpeed cannot compile it here ({reason}); adamw works"
            ) from error
    check(optim, device)
    bitsandbytes = adapters.bitsandbytes_for(f"optim.name {optim.name}")
    kinds = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw": bitsandbytes.optim.PagedAdamW32bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }
    return kinds[optim.name](groups, **common)
