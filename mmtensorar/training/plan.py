"""What a recipe will need, computed from shapes: parameters, memory per GPU under ZeRO, tokens and FLOPs per step.

The model is built on the meta device, so no weights are read and no memory is used. Formulas: ZeRO memory as in
Rajbhandari et al. (arXiv:1910.02054, section 3): with bf16 parameters and Adam, 2 bytes of parameters, 2 of
gradients and 12 of optimiser state (fp32 copy, two moments) each; stage 1 shares the 12 over the ranks, stage 2 the
gradients too, stage 3 all. FLOPs: 2 per weight and token forward, twice that backward, once more when activations
are recomputed; attention adds 4 D S per token and layer forward (causal, half of that is useful and counted).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmtensorar import backbones
from mmtensorar.model import adapters, layers, tensorar
from mmtensorar.model.conditions import Condition
from mmtensorar.model.loss import LossSettings
from mmtensorar.recipe import Recipe
from mmtensorar.training import activation_memory

GIB = 2**30
NUM_GPUS = (1, 2, 8, 64)
FOUR_BIT = (
    0.5 + 1 / 64 + 4 / (64 * 256)
)  # bytes: 4 bits, a scale of 8 bits for 64 numbers, one of 32 bits for 256 scales
FEWER_ROWS, MANY_ROWS = (
    24,
    32,
)  # beyond which activations are taken to grow on a line: the first samples hide behind the loss
PROMPT_TOKENS = (
    32  # a typical caption with the prompt template, where its length is free; the plan cannot know yours
)


def shapes(recipe: Recipe) -> tensorar.TensorAR:
    """The recipe's model on the meta device. Raises ValueError when neither its files nor its sizes are at hand."""
    section = recipe.backbone
    # sdpa needs no GPU, and as much memory as flash-attn.
    section = section.model_copy(update={"attn_implementation": "sdpa"})
    backbone = backbones.load(section, weights=False, device="meta", sizes_only=True)
    model = tensorar.build(backbone, recipe.tensorar, loss=LossSettings.of(recipe.train)).to("meta")
    adapters.prepare(model, recipe.train, recipe.lora, seed=recipe.run.seed)
    return model


def parameters(model) -> dict[str, int]:
    """Counts: backbone (adapters included), tensorar (the codec), trainable, and of the backbone's those held in 4 bits."""
    counts = {"backbone": 0, "tensorar": 0, "trainable": 0, "four_bit": 0}
    for name, parameter in model.named_parameters():
        counts["tensorar" if name.startswith(adapters.CODEC_PARTS) else "backbone"] += parameter.numel()
        counts["trainable"] += parameter.numel() * parameter.requires_grad
        counts["four_bit"] += parameter.numel() * (type(parameter).__name__ == "Params4bit")
    return counts


class Memory(NamedTuple):
    """Bytes on each GPU. held: between the steps; activations: the most beside it in forward and backward.

    optimizer: of moments, float32 weights and their average. buffers: of ZeRO, for what is gathered and what is reduced. update: the most beside held while the optimiser works.
    host, nvme: per GPU in host memory and on NVMe, of what is offloaded. peak: of all together, without what PyTorch and CUDA take for themselves (1 GiB or so) and lose to fragmentation.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    update: float
    host: float
    nvme: float

    @property
    def held(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        return self.held + max(self.buffers + self.activations, self.update)


# Bytes that the moments of a parameter take. The update itself makes no tensors: torch's AdamW is the fused one.
MOMENTS = {"adamw": 8, "cpu_adam": 8, "adamw_8bit": 2, "paged_adamw": 8, "paged_adamw_8bit": 2}


def memory(recipe: Recipe, counts: dict[str, int], largest: int, activations: float, num_gpus: int) -> Memory:
    """counts: see `parameters`. largest: numbers of the largest parameter. activations: bytes, see `activation_bytes`."""
    stage, extra = recipe.zero.stage, recipe.zero.extra
    total, trained, half = (
        counts["backbone"] + counts["tensorar"],
        counts["trainable"],
        recipe.train.precision == "bf16",
    )
    weight = 2 if half else 4
    master = 4 if half or stage else 0  # with ZeRO there is a flat float32 copy whatever the precision
    shares = [num_gpus if stage >= at else 1 for at in (3, 2, 1)]
    on_gpu = recipe.zero.offload_optimizer == "none" and "offload_optimizer" not in extra
    params_on_gpu = recipe.zero.offload_params == "none" and "offload_param" not in extra
    weights = (total - counts["four_bit"]) * weight + counts["four_bit"] * FOUR_BIT
    # One micro batch's gradients are gone before the next forward; those of several are kept, by ZeRO-3 always.
    kept = stage == 3 or recipe.train.grad_accum > 1
    gradients = trained * weight / shares[1] if kept and on_gpu else 0
    average = 0 if recipe.train.ema_decay is None else 4
    states = master + MOMENTS[recipe.optim.name] + average
    optimizer = trained * states / shares[2] if on_gpu else 0

    buffers, bucket = 0.0, int(extra.get("reduce_bucket_size", 5e8))
    if stage == 3:
        buffers += max(bucket, largest) * weight  # a parameter larger than the bucket is reduced by itself
    elif stage == 2:
        buffers += bucket * weight * (2 if extra.get("overlap_comm") else 1)
    elif num_gpus > 1:
        buffers += min(bucket, trained) * weight
    if stage == 3 and (num_gpus > 1 or not params_on_gpu):
        live = int(extra.get("stage3_max_live_parameters", 1e9)) + int(
            extra.get("stage3_prefetch_bucket_size", 5e7)
        )
        buffers += min(total, max(live, largest)) * weight
    if counts["four_bit"]:
        buffers += largest * weight  # the matrix in use, unpacked

    update = 0.0
    if on_gpu:
        # Of what is updated at a time, gradients in float32.
        group = min(trained, int(extra.get("sub_group_size", 1e9))) if stage == 3 else trained
        update = (4 if half or stage else 0) * group / shares[2]
        update += 0 if kept else trained * weight / shares[1]
    # There the gradients are in float32, and in the precision of the weights on their way, those of several micro batches twice.
    host = 0 if on_gpu else trained * (4 + states + weight * (2 if kept else 1)) / shares[2]
    nvme = 0.0
    if recipe.zero.offload_optimizer == "nvme":
        nvme = trained * (states + 4) / shares[2]  # gradients too
        buffers += 4 * min(bucket, trained) / shares[2]  # a bucket's gradients in float32, on their way
        host = trained * weight / shares[2] + 4 * 4 * min(
            trained / shares[2], int(extra.get("sub_group_size", 1e9))
        )
    if recipe.train.save_in_background:
        host += trained * states / shares[2]
    if not params_on_gpu:
        host, weights = host + weights / shares[0], 0
    return Memory(weights / shares[0], gradients, optimizer, buffers, activations, update, host, nvme)


def activation_bytes(recipe: Recipe, numbers: Iterable[int]) -> dict[int, int]:
    """For micro batches of those numbers of samples: most bytes that forward and backward hold beside weights and gradients.

    Found by running them on tensors without values, so whatever the model does is counted; some seconds. Matrices in 4 bits are
    taken for whole ones, which their forward makes of them.
    """
    numbers = set(numbers)
    ends = (FEWER_ROWS, MANY_ROWS) if any(number > MANY_ROWS for number in numbers) else ()
    found = {
        number: _activation_bytes(recipe, number)
        for number in {*ends, *(n for n in numbers if n <= MANY_ROWS)}
    }
    for number in numbers - found.keys():
        fewer, many = (found[end] for end in ends)
        found[number] = many + (many - fewer) * (number - MANY_ROWS) // (MANY_ROWS - FEWER_ROWS)
    return found


def _activation_bytes(recipe: Recipe, rows: int) -> int:
    if recipe.train.parts == "qlora":
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"parts": "lora"})})
    model = shapes(recipe)
    if recipe.train.precision == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    model.backbone.activation_checkpointing = recipe.train.activation_checkpointing
    model.train()
    try:
        return activation_memory.of_a_step(model, lambda model: model(*_inputs(model, rows)).loss)
    finally:
        layers.rotary_table.cache_clear()  # a table without values would serve the next real model


def _inputs(model, rows: int) -> tuple[Tensor, Condition, Tensor]:
    """Codes, condition and uncond of some samples, of values that do not matter."""
    backbone, places = model.backbone, prompt_tokens(model)
    codes = torch.zeros(rows, backbone.num_tokens, len(backbone.factor_sizes), dtype=torch.long)
    return codes, backbone.example_condition(rows, places), torch.zeros(rows, dtype=torch.bool)


def flops_per_step(
    recipe: Recipe, model, *, prompt_len: int | None = None, recomputed: bool = True
) -> tuple[int, int]:
    """(image tokens, FLOPs) of one optimiser step over all ranks. Parameters of tables count nothing.

    prompt_len: places of the prompts; None is the backbone's, or a guess. recomputed: whether what is done again counts again.

    Computed again in the backward are the layers with activation checkpointing, and decoder and head where
    the loss is made in chunks (as it is on one rank; with a small micro batch on many it may fit into one).
    """
    K, T, D = model.window, model.backbone.num_tokens, model.backbone.dim
    prefix_len = prompt_len or prompt_tokens(model)
    rows = prefix_len + T
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    # With selective checkpointing no matrix product is done again.
    layer_passes = 4 if recipe.train.activation_checkpointing is True and recomputed else 3
    places = recipe.data.batch_size // recipe.train.grad_accum * T
    loss_passes = 4 if recomputed and places > max(1, recipe.train.loss_chunk_tokens // K) else 3
    # Self-drafts are a forward more, whose head makes all slots but the first.
    drafted = int(K > 1 and model.self_drafts > 0)
    drafted_slots = (K - 1) * drafted
    per_sample = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in tables or "offset_" in name:
            continue
        # The embedding maps and the codec see K slots of each window, the head predicts K tokens.
        if name.startswith("backbone.head.factorized_blocks"):
            times = (
                3 * T * (K * loss_passes + drafted_slots)
            )  # one place for the first factor, two for the second
        elif name.startswith("backbone.head"):
            times = T * (K * loss_passes + drafted_slots)
        elif name.startswith("backbone.embed") or name.startswith("encoder"):
            times = K * T * (3 + drafted)
        elif name.startswith("decoder"):
            times = (K + 1) * T * (loss_passes + drafted)
        elif name.startswith("backbone.prefix"):
            times = prefix_len * (3 + drafted)
        else:
            times = rows * (
                layer_passes + drafted - (not parameter.requires_grad)
            )  # a frozen weight needs no gradient of its own
        per_sample += 2 * parameter.numel() * times
    per_sample += len(model.backbone.layers) * 2 * D * rows * rows * (layer_passes + drafted)
    return recipe.data.batch_size * T, recipe.data.batch_size * per_sample


def prompt_tokens(model) -> int:
    """Places of a prompt: the backbone's own number where it is fixed."""
    return model.backbone.prefix_len or PROMPT_TOKENS


def report(recipe: Recipe, *, activations: bool = True) -> str:
    """The plan of a recipe as text; without activations it takes less time.

    Raises ValueError when the model's configuration cannot be had.
    """
    model = shapes(recipe)
    counts = parameters(model)
    largest = max(parameter.numel() for parameter in model.parameters())
    tokens, flops = flops_per_step(recipe, model)
    averages = 1 if recipe.train.ema_decay is None else 2
    checkpoint = counts["trainable"] * (MOMENTS[recipe.optim.name] + 4 * averages)
    model_bytes = (
        4
        * averages
        * (
            counts["trainable"]
            if recipe.train.parts in adapters.WITH_ADAPTERS
            else counts["backbone"] + counts["tensorar"]
        )
    )
    kept = recipe.train.keep_last + bool(recipe.train.keep_best and recipe.train.validate_every)
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
        f"memory per GPU in GiB, {recipe.train.precision}, ZeRO-{recipe.zero.stage}, {recipe.optim.name}",
        "".join([" " * 23, *(f"{f'{n} GPU' + 's' * (n > 1):>10}" for n in NUM_GPUS)]),
    ]
    rows = [micro_batch(recipe, n) for n in NUM_GPUS]
    known = activation_bytes(recipe, {*rows} - {None}) if activations else {}
    found = [
        memory(recipe, counts, largest, known.get(number, 0), n)
        for number, n in zip(rows, NUM_GPUS, strict=True)
    ]
    lines.append(_row("micro batch", [None if number is None else f"{number}" for number in rows]))
    for part in ("weights", "gradients", "optimizer", "buffers"):
        lines.append(_row(part, [f"{getattr(each, part) / GIB:.1f}" for each in found]))
    lines.append(_row("update", [f"{each.update / GIB:.1f}" for each in found]))
    if activations:
        lines.append(
            _row(
                "activations", [f"{known[number] / GIB:.1f}" if number in known else None for number in rows]
            )
        )
        lines.append(
            _row(
                "peak",
                [
                    f"{each.peak / GIB:.1f}" if number in known else None
                    for each, number in zip(found, rows, strict=True)
                ],
            )
        )
    if any(each.host for each in found):
        lines.append(_row("host memory per GPU", [f"{each.host / GIB:.1f}" for each in found]))
    if any(each.nvme for each in found):
        lines.append(_row("NVMe per GPU", [f"{each.nvme / GIB:.1f}" for each in found]))
    if None in rows:
        lines.append(
            f"             (-: data.batch_size {recipe.data.batch_size} cannot be divided among so many)"
        )
    if activations:
        lines.append(
            "             (peak: weights, gradients and optimizer, and of the other two, buffers with activations or update, the larger)"
        )
    if recipe.zero.stage == 3 and recipe.train.sample_every:
        weights = (
            (counts["backbone"] + counts["tensorar"]) * (2 if recipe.train.precision == "bf16" else 4) / GIB
        )
        lines.append(
            f"             (train.sample_every gathers all weights on each GPU meanwhile: {weights:.1f} beside what is held)"
        )
    lines += [
        "             (and about 1 GiB for CUDA, and what fragmentation takes)",
        f"step         {recipe.data.batch_size} images, {tokens:,} image tokens, {tokens * model.window:,} predictions",
        f"             {flops:.3g} FLOPs with {prompt_tokens(model)} prompt tokens an image",
        f"run          {run}",
        f"disk         {checkpoint / GIB:.1f} GiB a checkpoint (up to {kept} are kept, and one more while it is written), "
        f"{model_bytes / GIB:.1f} GiB the model",
    ]
    return "\n".join(lines)


def micro_batch(recipe: Recipe, num_gpus: int) -> int | None:
    """Samples per GPU and forward; None where the batch cannot be divided so."""
    rows, left = divmod(recipe.data.batch_size, recipe.train.grad_accum * num_gpus)
    return None if left else rows


def _row(name: str, cells: list[str | None]) -> str:
    return f"  {name:<21}" + "".join(f"{cell or '-':>10}" for cell in cells)
