"""What a recipe will need, computed from shapes: parameters, memory per GPU under ZeRO, tokens and FLOPs per step.

The model is built on the meta device, so no weights are read and no memory is used. Formulas: ZeRO memory as in
Rajbhandari et al. (arXiv:1910.02054, section 3): with bf16 parameters and Adam, 2 bytes of parameters, 2 of
gradients and 12 of optimiser state (fp32 copy, two moments) each; stage 1 shares the 12 over the ranks, stage 2 the
gradients too, stage 3 all. FLOPs: 2 per weight and token forward, twice that backward, once more when activations
are recomputed; attention adds 4 D S per token and layer forward (causal, half of that is useful and counted).
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mmtensorar import adapters, backbones, tensorar
from mmtensorar.recipe import Recipe

GIB = 2**30
NUM_GPUS = (1, 8, 64)
FOUR_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes: 4 bits, a scale of 8 bits for 64 numbers, one of 32 bits for 256 scales
PROMPT_TOKENS = 32  # a typical caption with the prompt template, where its length is free; the plan cannot know yours


def shapes(recipe: Recipe) -> tensorar.TensorAR:
    """The recipe's model on the meta device. Raises ValueError when neither its files nor its sizes are at hand."""
    section = recipe.backbone
    try:
        backbone = backbones.load(section, weights=False, device="meta", sizes_only=True)
    except ValueError as error:
        unsaid = [f"backbone.{key}" for key in ("size", "condition", "image_size") if getattr(section, key, "") is None]
        if unsaid and not Path(section.path).exists():
            raise ValueError(f"{error}; to plan a released model without its file, set {', '.join(unsaid)}") from None
        raise
    model = tensorar.build(recipe, backbone).to("meta")
    adapters.prepare(model, recipe)
    return model


def parameters(model) -> dict[str, int]:
    """Counts: backbone (adapters included), tensorar (the codec), trainable, and of the backbone's those held in 4 bits."""
    counts = {"backbone": 0, "tensorar": 0, "trainable": 0, "four_bit": 0}
    for name, parameter in model.named_parameters():
        counts["tensorar" if name.startswith(adapters.CODEC_PARTS) else "backbone"] += parameter.numel()
        counts["trainable"] += parameter.numel() * parameter.requires_grad
        counts["four_bit"] += parameter.numel() * (type(parameter).__name__ == "Params4bit")
    return counts


def state_bytes(total: int, trainable: int, *, stage: int, num_gpus: int, precision: str, four_bit: int = 0) -> int:
    """Bytes per GPU of parameters, gradients and optimiser state, without activations and offloading.

    four_bit: how many of total are held in NF4.
    """
    # Under fp32 there is no second copy: 4 + 4 + 8 bytes instead of 2 + 2 + 12.
    weight, gradient, optimiser = (2, 2, 12) if precision == "bf16" else (4, 4, 8)
    shares = [num_gpus if stage >= at else 1 for at in (3, 2, 1)]
    weights = (total - four_bit) * weight + four_bit * FOUR_BIT
    return round(weights / shares[0] + trainable * gradient / shares[1] + trainable * optimiser / shares[2])


def flops_per_step(recipe: Recipe, model) -> tuple[int, int]:
    """(image tokens, FLOPs) of one optimiser step over all ranks. Parameters of tables count nothing.

    What is computed again in the backward counts again: the layers with activation checkpointing, and decoder and head where
    the loss is made in chunks (as it is on one rank; with a small micro batch on many it may fit into one).
    """
    K, T, D = model.window, model.backbone.num_tokens, model.backbone.dim
    prefix_len = prompt_tokens(model)
    rows = prefix_len + T
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    layer_passes = 4 if recipe.train.activation_checkpointing else 3
    places = recipe.data.batch_size // recipe.train.grad_accum * T
    loss_passes = 4 if places > max(1, recipe.train.loss_chunk_tokens // K) else 3
    per_sample = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in tables or "offset_" in name:
            continue
        # The embedding maps and the codec see K slots of each window, the head predicts K tokens.
        if name.startswith("backbone.head.factorized_blocks"):
            times = 3 * K * T * loss_passes  # one place for the first factor, two for the second
        elif name.startswith("backbone.head"):
            times = K * T * loss_passes
        elif name.startswith("backbone.embed") or name.startswith("encoder"):
            times = K * T * 3
        elif name.startswith("decoder"):
            times = (K + 1) * T * loss_passes
        elif name.startswith("backbone.prefix"):
            times = prefix_len * 3
        else:
            times = rows * (layer_passes - (not parameter.requires_grad))  # a frozen weight needs no gradient of its own
        per_sample += 2 * parameter.numel() * times
    per_sample += model.backbone.num_layers * 2 * D * rows * rows * layer_passes
    return recipe.data.batch_size * T, recipe.data.batch_size * per_sample


def prompt_tokens(model) -> int:
    """Places of a prompt: the backbone's own number where it is fixed."""
    return getattr(getattr(model.backbone, "config", None), "prefix_len", PROMPT_TOKENS)


def report(recipe: Recipe) -> str:
    """The plan of a recipe as text. Raises ValueError when the model's configuration cannot be had."""
    model = shapes(recipe)
    counts = parameters(model)
    total = counts["backbone"] + counts["tensorar"]
    tokens, flops = flops_per_step(recipe, model)
    stages = dict.fromkeys((recipe.zero.stage, 2 if recipe.train.parts == "qlora" else 3))
    steps = recipe.train.steps
    if steps is None:
        run = f"{recipe.train.epochs:g} epochs"
    else:
        run = f"{steps:,} steps, {tokens * steps:,} image tokens, {flops * steps:.3g} FLOPs"
    lines = [
        f"{recipe.backbone.path}, window {model.window}, depth {recipe.tensorar.depth}",
        f"parameters   backbone   {counts['backbone']:>15,}",
        f"             TensorAR   {counts['tensorar']:>15,}  (+{counts['tensorar'] / counts['backbone']:.2%})",
        f"             trainable  {counts['trainable']:>15,}",
        f"memory per GPU in GiB: weights, gradients and AdamW in {recipe.train.precision}, without activations",
        "             " + "".join(f"{f'{n} GPU' + 's' * (n > 1):>10}" for n in NUM_GPUS),
    ]
    held = {"precision": recipe.train.precision, "four_bit": counts["four_bit"]}
    for stage in stages:
        row = [
            state_bytes(total, counts["trainable"], stage=stage, num_gpus=n, **held) / GIB
            for n in NUM_GPUS
        ]
        lines.append(f"  ZeRO-{stage}     " + "".join(f"{value:>10.1f}" for value in row))
    lines += [
        f"step         {recipe.data.batch_size} images, {tokens:,} image tokens, {tokens * model.window:,} predictions",
        f"             {flops:.3g} FLOPs with {prompt_tokens(model)} prompt tokens an image"
        + (", activations recomputed" if recipe.train.activation_checkpointing else ""),
        f"run          {run}",
    ]
    return "\n".join(lines)
