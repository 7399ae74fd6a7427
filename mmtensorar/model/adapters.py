"""What of a model is trained: all, the heads alone, or low-rank adapters (LoRA, Hu et al., arXiv:2106.09685) beside them.

Whatever is chosen, the window codec is trained whole: it is new, and small. Adapters are peft's. With qlora (Dettmers et al.,
arXiv:2305.14314) the adapted matrices themselves are held in 4 bits (NF4), which only training needs: adapters are folded
into the matrices as training saw them, rounded.
"""

from __future__ import annotations

import hashlib
import logging
import re
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmtensorar.recipe import Recipe

CODEC_PARTS = ("encoder.", "decoder.")
WITH_ADAPTERS = ("lora", "qlora")
BLOCK = 64  # numbers that share a scale in NF4


# At its import, which may be peft's doing, bitsandbytes recommends a package for inference in 4 bits on CPUs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class Counts(NamedTuple):
    """A line of the table of what is trained. part: the first names of the parameters in it."""

    part: str
    trained: int
    total: int


def prepare(model: nn.Module, recipe: Recipe) -> None:
    """Put adapters in, where the recipe asks for them, and freeze all that is not trained.

    Raises ValueError when a pattern of train.freeze matches nothing, when nothing is left to train, or a library is missing.
    """
    parts = recipe.train.parts
    if parts in WITH_ADAPTERS:
        if parts == "qlora":
            _quantise(model, recipe)
        _insert(model, recipe)
    for name, parameter in model.named_parameters():
        if parts == "all":
            trained = True
        elif parts == "heads":
            trained = name.startswith((*CODEC_PARTS, "backbone.head."))
        else:
            trained = name.startswith(CODEC_PARTS) or ".lora_" in name
        if not trained:
            parameter.requires_grad_(False)
    for pattern in recipe.train.freeze:
        matched = [parameter for name, parameter in model.named_parameters() if re.search(pattern, name)]
        if not matched:
            some = ", ".join(name for name, _ in list(model.named_parameters())[:3])
            raise ValueError(
                f"train.freeze: {pattern!r} matches no parameter; they have names such as {some}"
            )
        for parameter in matched:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"train.parts {parts} and train.freeze {list(recipe.train.freeze)} leave nothing to train"
        )


def counts(model: nn.Module) -> list[Counts]:
    """Trained and all parameters, by part."""
    found: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        part = (
            "adapters"
            if ".lora_" in name
            else ".".join(name.split(".")[: 2 if name.startswith("backbone.") else 1])
        )
        # Under ZeRO-3 a parameter is a piece; in 4 bits two numbers share a byte.
        number = getattr(parameter, "ds_numel", parameter.numel())
        if type(parameter).__name__ == "Params4bit" and parameter.dtype == torch.uint8:
            number *= 2
        sums = found.setdefault(part, [0, 0])
        sums[0] += number * parameter.requires_grad
        sums[1] += number
    return [Counts(part, *sums) for part, sums in found.items()]


def table(model: nn.Module) -> str:
    """The counts as lines of text."""
    rows = counts(model)
    rows.append(Counts("in all", sum(row.trained for row in rows), sum(row.total for row in rows)))
    return "\n".join(f"  {row.part:<28} {row.trained:>15,} of {row.total:>15,} trained" for row in rows)


# ---- adapters --------------------------------------------------------------------------------


def targets(model: nn.Module, recipe: Recipe) -> str:
    """Pattern of the names, inside the backbone, of the matrices that get adapters."""
    if recipe.lora.targets is not None:
        return recipe.lora.targets
    return model.backbone.lora_targets


def _targeted(model: nn.Module, recipe: Recipe) -> list[str]:
    pattern = re.compile(targets(model, recipe))
    found = [
        name
        for name, part in model.backbone.named_modules()
        if isinstance(part, nn.Linear) and pattern.fullmatch(name)
    ]
    if not found:
        linear = [name for name, part in model.backbone.named_modules() if isinstance(part, nn.Linear)]
        raise ValueError(
            f"lora.targets {pattern.pattern!r} matches no matrix of the backbone; there are {', '.join(linear[:3])}"
        )
    return found


def _insert(model: nn.Module, recipe: Recipe) -> None:
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            f"train.parts {recipe.train.parts} needs peft: pip install 'mmtensorar[small]' ({error})"
        ) from None
    settings = recipe.lora
    names = _targeted(model, recipe)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=names,
        bias="none",
    )
    on_meta = next(model.parameters()).is_meta
    peft.inject_adapter_in_model(config, model.backbone, low_cpu_mem_usage=on_meta)
    if not on_meta:
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data.copy_(initial(name, parameter.shape, recipe.run.seed))


def initial(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The value that a parameter of an adapter starts from, float32; each by its own seed, in whatever order they are made.

    As in peft: B is 0, A as a linear map's weight.
    """
    value = torch.zeros(shape)
    if ".lora_A." in name:
        generator = torch.Generator().manual_seed(
            int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
        )
        nn.init.kaiming_uniform_(value, a=5**0.5, generator=generator)
    return value


def state(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapters' entries of a state dict with TensorAR's names."""
    return {name: value for name, value in state_dict.items() if ".lora_" in name}


def fold(model: nn.Module, recipe: Recipe, adapters: dict[str, Tensor]) -> None:
    """Add adapters to the matrices of a model without any. Raises ValueError when they are not those of the recipe."""
    if recipe.train.parts == "qlora":
        for name in _targeted(model, recipe):
            weight = model.backbone.get_submodule(name).weight
            weight.data.copy_(_rounded(weight.data))
    _insert(model, recipe)
    expected = state(model.state_dict())
    if {name: value.shape for name, value in expected.items()} != {
        name: value.shape for name, value in adapters.items()
    }:
        raise ValueError(
            f"the adapters are not those that the recipe describes: {len(adapters)} tensors, expected {len(expected)}"
        )
    model.load_state_dict(adapters, strict=False)
    for name, module in list(model.named_modules()):
        if hasattr(module, "merge") and hasattr(module, "get_base_layer"):
            module.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())


# ---- four bits -------------------------------------------------------------------------------


def bitsandbytes_for(setting: str) -> ModuleType:
    """The library, for a setting that needs it. Raises ValueError, naming the setting, when it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(f"{setting} needs bitsandbytes: pip install 'mmtensorar[small]' ({error})") from None
    return bitsandbytes


def _quantise(model: nn.Module, recipe: Recipe) -> None:
    """Put the targeted matrices into NF4, in place."""
    bitsandbytes = bitsandbytes_for("train.parts qlora")
    computed_in = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    for name in _targeted(model, recipe):
        old = model.backbone.get_submodule(name)
        if old.in_features % BLOCK:
            raise ValueError(
                f"train.parts qlora: backbone.{name} is {old.in_features} wide; 4 bits need a multiple of {BLOCK}"
            )
        new = bitsandbytes.nn.Linear4bit(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            compute_dtype=computed_in,
            quant_type="nf4",
            device="meta",
        )
        new.weight = bitsandbytes.nn.Params4bit(
            old.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
        )
        if old.bias is not None:
            new.bias = old.bias
        if not old.weight.is_meta:
            new = new.to(old.weight.device)  # which is when it is rounded
            if new.weight.quant_state is None:
                new.weight = new.weight._quantize(old.weight.device)
        parent, _, leaf = name.rpartition(".")
        setattr(model.backbone.get_submodule(parent), leaf, new)


def _rounded(weight: Tensor) -> Tensor:
    """A matrix after NF4 and back."""
    functional = bitsandbytes_for("train.parts qlora").functional
    packed, quant_state = functional.quantize_4bit(
        weight.contiguous(), quant_type="nf4", compress_statistics=True
    )
    return functional.dequantize_4bit(packed, quant_state).to(weight.dtype)
