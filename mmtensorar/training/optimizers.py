"""Optimizers by name, parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from mmtensorar.model import adapters
from mmtensorar.recipe import Optim
from mmtensorar.training import engine_private


def groups(model: nn.Module, optim: Optim) -> list[dict]:
    """Parameter groups of all trained parameters.

    The codec's groups come last and have tensorar_lr; the others have lr.

    Norms, biases and embeddings have no weight decay: pulling them towards zero does
    not make a model simpler.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    by_kind: dict[tuple[bool, bool], list[nn.Parameter]] = {}  # (of the codec, with decay) -> parameters
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = len(engine_private.full_shape(parameter)) > 1
            decays = is_matrix and id(parameter) not in embeddings
            by_kind.setdefault((name.startswith(adapters.CODEC_PARTS), decays), []).append(parameter)
    rates = {False: optim.lr, True: optim.lr if optim.tensorar_lr is None else optim.tensorar_lr}
    return [
        {"params": parameters, "lr": rates[in_codec], "weight_decay": optim.weight_decay if decays else 0.0}
        for (in_codec, decays), parameters in sorted(
            by_kind.items(), key=lambda pair: (pair[0][0], not pair[0][1])
        )
    ]


def check(optim: Optim, device: torch.device) -> None:
    """Raise ValueError when this machine cannot run the optimizer of optim.name."""
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
    """The optimizer that optim.name asks for.

    Raises ValueError when it is not available on this machine.

    Args:
        optim: the section `optim` of a recipe.
        groups: parameter groups, see `groups`.
        device: the device that trains.
        cpu_adam: DeepSpeed's class DeepSpeedCPUAdam, which only training/engine.py may
            import; required for optim.name cpu_adam.
    """
    common = {"betas": tuple(optim.betas), "eps": optim.eps, "weight_decay": optim.weight_decay}
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **common)
    if optim.name == "cpu_adam":
        assert cpu_adam is not None
        try:
            return cpu_adam(groups, adamw_mode=True, **common)
        except Exception as error:  # any: the machine's compiler compiles it at first use
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"optim.name cpu_adam: DeepSpeed could not compile it on this machine ({reason}); use adamw"
            ) from error
    check(optim, device)
    bitsandbytes = adapters.bitsandbytes_for(f"optim.name {optim.name}")
    classes = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw": bitsandbytes.optim.PagedAdamW32bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }
    return classes[optim.name](groups, **common)


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int, final_lr_ratio: float) -> float:
    """Factor on a group's learning rate: linear warm-up, then a cosine.

    Args:
        step: the step, 0 is the first.
        steps: steps of the whole run, where the cosine ends.
        warmup_steps: steps until the factor is 1.
        final_lr_ratio: the factor at the end.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return final_lr_ratio + (1 - final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def schedule(optimizer: torch.optim.Optimizer, optim: Optim, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """torch's scheduler with `learning_rate_factor`, for a run of `steps` steps."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(
            step, steps=steps, warmup_steps=optim.warmup_steps, final_lr_ratio=optim.final_lr_ratio
        ),
    )
