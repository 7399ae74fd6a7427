"""Which parameters are trained: all, the heads, or low-rank adapters on frozen
matrices.

The window codec is always trained completely: it is new, and small. Low-rank adapters
(LoRA, Hu et al., arXiv:2106.09685) are peft's. With qlora (Dettmers et al.,
arXiv:2305.14314) the matrices under the adapters are in 4 bits (NF4) during training.
`fold` adds adapters to the matrices as training saw them, that is, rounded to NF4.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmtensorar.recipe import Lora, Train
from mmtensorar.seeds import seed_for

CODEC_PARTS = ("encoder.", "decoder.")
WITH_ADAPTERS = ("lora", "qlora")
BLOCK = 64  # numbers that share a scale in NF4


# When it is imported (peft may do that), bitsandbytes recommends a package for
# inference in 4 bits on CPUs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class Counts(NamedTuple):
    """One row of the table of trained parameters.

    part: the first components of their names.
    """

    part: str
    trained: int
    total: int


def prepare(model: nn.Module, train: Train, lora: Lora, *, seed: int) -> None:
    """Insert adapters if train.parts asks for them, and freeze everything that is not
    trained.

    Args:
        model: a TensorAR, changed in place. It may be on the meta device.
        train: the recipe's section; parts, freeze and precision are used.
        lora: the recipe's section.
        seed: run.seed, under which adapters get their first values.

    Raises ValueError when a pattern of train.freeze or lora.targets matches nothing,
    when nothing is left to train, or a library is missing.
    """
    if train.parts in WITH_ADAPTERS:
        names = _targeted(model, lora)
        if train.parts == "qlora":
            _quantise(model, names, torch.bfloat16 if train.precision == "bf16" else torch.float32)
        _insert(model, names, train, lora)
        _initialise(model, seed)
    for name, parameter in model.named_parameters():
        if not _is_trained(name, train.parts):
            parameter.requires_grad_(False)
    for pattern in train.freeze:
        _freeze(model, pattern)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"train.parts {train.parts} and train.freeze {list(train.freeze)} leave nothing to train"
        )


def _is_trained(name: str, parts: str) -> bool:
    """Whether train.parts trains the parameter of this name."""
    if parts == "all":
        return True
    if parts == "heads":
        return name.startswith((*CODEC_PARTS, "backbone.head."))
    return name.startswith(CODEC_PARTS) or ".lora_" in name


def _freeze(model: nn.Module, pattern: str) -> None:
    """Freeze the parameters whose names match one pattern of train.freeze."""
    names = [name for name, _ in model.named_parameters() if re.search(pattern, name)]
    if not names:
        examples = ", ".join(name for name, _ in list(model.named_parameters())[:3])
        raise ValueError(f"train.freeze: {pattern!r} matches no parameter; examples of names: {examples}")
    for name in names:
        model.get_parameter(name).requires_grad_(False)


def _shape(parameter: Tensor) -> torch.Size:
    return parameter.shape


def counts(model: nn.Module, shape_of: Callable[[Tensor], torch.Size] = _shape) -> list[Counts]:
    """Numbers of trained and of all parameters, by part.

    shape_of: gives a parameter's complete shape; under ZeRO-3 each rank holds a share
    of it.
    """
    sums: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            part = "adapters"
        else:
            part = ".".join(name.split(".")[: 2 if name.startswith("backbone.") else 1])
        number = shape_of(parameter).numel()
        # In 4 bits two numbers share a byte.
        if type(parameter).__name__ == "Params4bit" and parameter.dtype == torch.uint8:
            number *= 2
        trained_and_total = sums.setdefault(part, [0, 0])
        trained_and_total[0] += number * parameter.requires_grad
        trained_and_total[1] += number
    return [Counts(part, *numbers) for part, numbers in sums.items()]


def table(model: nn.Module, shape_of: Callable[[Tensor], torch.Size] = _shape) -> str:
    """The counts as lines of text. shape_of: see `counts`."""
    rows = counts(model, shape_of)
    rows.append(Counts("in all", sum(row.trained for row in rows), sum(row.total for row in rows)))
    return "\n".join(f"  {row.part:<28} {row.trained:>15,} of {row.total:>15,} trained" for row in rows)


# ---- adapters ------------------------------------------------------------------------------------


def targets(model: nn.Module, lora: Lora) -> str:
    """Pattern of the names, inside the backbone, of the matrices that get adapters."""
    return str(model.get_submodule("backbone").lora_targets) if lora.targets is None else lora.targets


def _targeted(model: nn.Module, lora: Lora) -> list[str]:
    """The names, inside the backbone, of the matrices that get adapters."""
    pattern = re.compile(targets(model, lora))
    modules = model.get_submodule("backbone").named_modules()
    linear = [name for name, module in modules if isinstance(module, nn.Linear)]
    names = [name for name in linear if pattern.fullmatch(name)]
    if not names:
        raise ValueError(
            f"lora.targets {pattern.pattern!r} matches no matrix of the backbone; "
            f"examples of names: {', '.join(linear[:3])}"
        )
    return names


def _matrix(model: nn.Module, name: str) -> nn.Linear:
    """The linear map of this name inside the backbone."""
    module = model.get_submodule(f"backbone.{name}")
    assert isinstance(module, nn.Linear)
    return module


def _insert(model: nn.Module, names: list[str], train: Train, lora: Lora) -> None:
    """Put peft's adapters around the matrices of these names inside the backbone, in
    place.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            f"train.parts {train.parts} needs peft: pip install 'mmtensorar[small]' ({error})"
        ) from None
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  (a float works as well)
        lora_dropout=lora.dropout,
        target_modules=names,
        bias="none",
    )
    on_meta = next(model.parameters()).is_meta
    peft.inject_adapter_in_model(config, model.get_submodule("backbone"), low_cpu_mem_usage=on_meta)


def _initialise(model: nn.Module, seed: int) -> None:
    """Give the adapters their first values, except on the meta device."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name and not parameter.is_meta:
            parameter.data.copy_(initial(name, parameter.shape, seed))


def initial(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The first value of an adapter's parameter, float32.

    As in peft: B is 0, A is drawn like a linear map's weight. Each parameter has its
    own seed, so the order in which they are made has no influence.
    """
    value = torch.zeros(shape)
    if ".lora_A." in name:
        generator = torch.Generator().manual_seed(seed_for(seed, name))
        nn.init.kaiming_uniform_(value, a=5**0.5, generator=generator)
    return value


def state(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapters' entries of a state dict with TensorAR's names."""
    return {name: value for name, value in state_dict.items() if ".lora_" in name}


def fold(model: nn.Module, train: Train, lora: Lora, adapters: dict[str, Tensor]) -> None:
    """Add adapters to the matrices of a model without adapters, in place.

    adapters: what `state` returns. Raises ValueError when they do not fit lora's
    settings.
    """
    names = _targeted(model, lora)
    if train.parts == "qlora":
        for name in names:
            weight = _matrix(model, name).weight
            weight.data.copy_(_rounded(weight.data))
    _insert(model, names, train, lora)
    from peft.tuners.tuners_utils import BaseTunerLayer

    expected = {name: value.shape for name, value in state(model.state_dict()).items()}
    if expected != {name: value.shape for name, value in adapters.items()}:
        raise ValueError(
            "the adapters do not fit the recipe's lora settings: "
            f"got {len(adapters)} tensors, expected {len(expected)}"
        )
    model.load_state_dict(adapters, strict=False)
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            _replace(model, name, module.get_base_layer())


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the module of this name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


# ---- four bits -----------------------------------------------------------------------------------


def bitsandbytes_for(setting: str) -> ModuleType:
    """The library, for a setting that needs it.

    Raises ValueError, naming the setting, when it is missing.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(f"{setting} needs bitsandbytes: pip install 'mmtensorar[small]' ({error})") from None
    return bitsandbytes


def _quantise(model: nn.Module, names: list[str], compute_dtype: torch.dtype) -> None:
    """Put the matrices of these names inside the backbone into NF4, in place."""
    bitsandbytes = bitsandbytes_for("train.parts qlora")
    for name in names:
        old = _matrix(model, name)
        if old.in_features % BLOCK:
            raise ValueError(
                f"train.parts qlora: backbone.{name} has {old.in_features} inputs; "
                f"4 bits need a multiple of {BLOCK}"
            )
        new = bitsandbytes.nn.Linear4bit(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            compute_dtype=compute_dtype,
            quant_type="nf4",
            device="meta",
        )
        new.weight = bitsandbytes.nn.Params4bit(
            old.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
        )
        if old.bias is not None:
            new.bias = old.bias
        if not old.weight.is_meta:
            new = new.to(old.weight.device)  # this call rounds the weight
            if new.weight.quant_state is None:
                new.weight = new.weight._quantize(old.weight.device)
        _replace(model, f"backbone.{name}", new)


def _rounded(weight: Tensor) -> Tensor:
    """A matrix rounded to NF4, in its old dtype."""
    functional = bitsandbytes_for("train.parts qlora").functional
    packed, quant_state = functional.quantize_4bit(
        weight.contiguous(), quant_type="nf4", compress_statistics=True
    )
    return functional.dequantize_4bit(packed, quant_state).to(weight.dtype)
