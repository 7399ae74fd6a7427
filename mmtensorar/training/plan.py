"""What a recipe will need, computed from shapes: parameters, memory per GPU under ZeRO,
tokens and FLOPs per step.

The model is built on the meta device, so no weights are read and no memory is used.

Memory: formulas of ZeRO as in Rajbhandari et al. (arXiv:1910.02054, section 3). With
bf16 parameters and Adam, each parameter takes 2 bytes of weights, 2 of gradients and 12
of optimizer state (float32 copy, two moments); stage 1 shares the 12 over the ranks,
stage 2 the gradients too, stage 3 all. Activations: measured on tensors without values.

FLOPs: counted by `torch.utils.flop_counter` in a forward and backward pass on tensors
without values. It counts matrix products, with 2 FLOPs for one multiplication and
addition. Attention counts as a complete matrix; kernels that skip the part above the
diagonal do half of that. Of a stack of equal layers one and two are counted, and the
rest follows exactly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from mmtensorar import backbones
from mmtensorar.model import adapters, layers, tensorar
from mmtensorar.model.conditions import Condition
from mmtensorar.model.loss import LossSettings
from mmtensorar.recipe import Recipe
from mmtensorar.training import activation_memory
from mmtensorar.words import counted

GIB = 2**30
NUM_GPUS = (1, 2, 8, 64)
# Bytes of a parameter in 4 bits: a scale of 8 bits for 64 numbers, one of 32 bits for
# 256 scales.
FOUR_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
# Activations are measured at these two numbers of samples, and extrapolated linearly
# beyond. With fewer samples the loss dominates, so the growth is not linear.
FEWER_ROWS, MANY_ROWS = 24, 32
# Tokens of a typical prompt, its template included, where prompts have no fixed length.
PROMPT_TOKENS = 32

# ---- model ---------------------------------------------------------------------------------------


def meta_model(recipe: Recipe) -> tensorar.TensorAR:
    """The recipe's model on the meta device.

    Raises ValueError when its sizes are known neither from its files nor from the
    recipe.
    """
    # sdpa needs no GPU, and as much memory as flash-attn.
    section = recipe.backbone.model_copy(update={"attn_implementation": "sdpa"})
    with torch.device("meta"), _NoRandomWeights():
        backbone = backbones.load(section, weights=False, device="meta", sizes_only=True)
        model = tensorar.build(backbone, recipe.tensorar, loss=LossSettings.of(recipe.train)).to("meta")
        adapters.prepare(model, recipe.train, recipe.lora, seed=recipe.run.seed)
    return model


class _NoRandomWeights(TorchFunctionMode):
    """Inside this with statement no weights are drawn.

    On the meta device drawing them has no effect, and takes longer than all the rest.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def parameters(model) -> dict[str, int]:
    """Counts of parameters.

    Keys: backbone (adapters included), tensorar (the codec), trainable (of both),
    four_bit (those of the backbone that are held in 4 bits).
    """
    counts = {"backbone": 0, "tensorar": 0, "trainable": 0, "four_bit": 0}
    for name, parameter in model.named_parameters():
        counts["tensorar" if name.startswith(adapters.CODEC_PARTS) else "backbone"] += parameter.numel()
        counts["trainable"] += parameter.numel() * parameter.requires_grad
        counts["four_bit"] += parameter.numel() * (type(parameter).__name__ == "Params4bit")
    return counts


# ---- memory --------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """Bytes on each GPU, without fragmentation and PyTorch's and CUDA's own memory.

    That is about 1 GiB.
    """

    weights: float
    gradients: float  # kept between micro batches
    optimizer: float  # moments, float32 weights and their average
    buffers: float  # ZeRO's, for weights that are gathered and gradients that are reduced
    activations: float  # peak of what forward and backward add
    update: float  # peak of what the optimizer's step adds
    host: float  # host memory per GPU, for what is offloaded or saved in the background

    @property
    def held(self) -> float:
        """Bytes between the steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        """The most bytes at any time."""
        return self.held + max(self.buffers + self.activations, self.update)


# Bytes of a parameter's moments. The update itself makes no tensors: torch's AdamW is
# the fused one.
MOMENTS = {"adamw": 8, "cpu_adam": 8, "adamw_8bit": 2, "paged_adamw": 8, "paged_adamw_8bit": 2}


def memory(recipe: Recipe, counts: dict[str, int], largest: int, activations: float, num_gpus: int) -> Memory:
    """Memory per GPU.

    Args:
        recipe: the recipe.
        counts: see `parameters`.
        largest: size of the largest parameter.
        activations: bytes, see `activation_bytes`.
        num_gpus: number of GPUs, one rank each.
    """
    stage, extra, trained = recipe.zero.stage, recipe.zero.extra, counts["trainable"]
    total, half = counts["backbone"] + counts["tensorar"], recipe.train.precision == "bf16"
    weight = 2 if half else 4
    master = 4 if half or stage else 0  # ZeRO has a flat float32 copy whatever the precision
    weight_ranks, gradient_ranks, state_ranks = (num_gpus if stage >= at else 1 for at in (3, 2, 1))
    on_gpu = recipe.zero.offload_optimizer == "none" and "offload_optimizer" not in extra
    params_on_gpu = recipe.zero.offload_params == "none" and "offload_param" not in extra
    weights = (total - counts["four_bit"]) * weight + counts["four_bit"] * FOUR_BIT
    # The gradients of one micro batch are gone before the next forward; those of
    # several are kept, and always by ZeRO-3.
    kept = stage == 3 or recipe.train.grad_accum > 1
    gradients = trained * weight / gradient_ranks if kept and on_gpu else 0
    average = 0 if recipe.train.ema_decay is None else 4
    states = master + MOMENTS[recipe.optim.name] + average
    optimizer = trained * states / state_ranks if on_gpu else 0
    update = 0.0
    if on_gpu:
        # Float32 gradients of the parameters that are updated at a time.
        group = min(trained, int(extra.get("sub_group_size", 1e9))) if stage == 3 else trained
        update = (4 if half or stage else 0) * group / state_ranks
        update += 0 if kept else trained * weight / gradient_ranks
    # On the host, gradients are in float32, and in the precision of the weights while
    # they are moved; those of several micro batches twice.
    host = 0 if on_gpu else trained * (4 + states + weight * (2 if kept else 1)) / state_ranks
    if recipe.train.save_in_background:
        host += trained * states / state_ranks
    buffers = _buffers(recipe, counts, largest, num_gpus, gathers=num_gpus > 1 or not params_on_gpu)
    weights /= weight_ranks
    if not params_on_gpu:
        host, weights = host + weights, 0
    return Memory(weights, gradients, optimizer, buffers, activations, update, host)


def _buffers(recipe: Recipe, counts: dict[str, int], largest: int, num_gpus: int, *, gathers: bool) -> float:
    """Bytes of ZeRO's buffers; see `memory`.

    gathers: whether stage 3 gathers weights, from other ranks or from the host.
    """
    stage, extra = recipe.zero.stage, recipe.zero.extra
    weight = 2 if recipe.train.precision == "bf16" else 4
    bucket, buffers = int(extra.get("reduce_bucket_size", 5e8)), 0.0
    if stage == 3:
        buffers += max(bucket, largest) * weight  # a parameter larger than the bucket is reduced by itself
    elif stage == 2:
        buffers += bucket * weight * (2 if extra.get("overlap_comm") else 1)
    elif num_gpus > 1:
        buffers += min(bucket, counts["trainable"]) * weight
    if stage == 3 and gathers:
        live = int(extra.get("stage3_max_live_parameters", 1e9))
        live += int(extra.get("stage3_prefetch_bucket_size", 5e7))
        buffers += min(counts["backbone"] + counts["tensorar"], max(live, largest)) * weight
    if counts["four_bit"]:
        buffers += largest * weight  # the matrix in use, unpacked
    return buffers


def activation_bytes(recipe: Recipe, numbers: Iterable[int]) -> dict[int, int]:
    """The most bytes that forward and backward hold besides weights and gradients.

    Measured by running both on tensors without values, which takes some seconds. 4-bit
    matrices count as 16-bit or 32-bit ones, because their forward unpacks them. A batch
    is padded to its longest prompt; it is measured with prompts as long as the limit.

    numbers: sizes of a micro batch, in samples; the result has one entry for each.
    """
    numbers = set(numbers)
    ends = (FEWER_ROWS, MANY_ROWS) if any(number > MANY_ROWS for number in numbers) else ()
    measured = {
        number: _activation_bytes(recipe, number)
        for number in {*ends, *(n for n in numbers if n <= MANY_ROWS)}
    }
    for number in numbers - measured.keys():
        fewer, many = (measured[end] for end in ends)
        measured[number] = many + (many - fewer) * (number - MANY_ROWS) // (MANY_ROWS - FEWER_ROWS)
    return measured


def _activation_bytes(recipe: Recipe, rows: int) -> int:
    recipe = _without_4_bits(recipe)
    model = meta_model(recipe)
    if recipe.train.precision == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    model.backbone.activation_checkpointing = recipe.train.activation_checkpointing
    model.train()
    try:
        return activation_memory.of_a_step(model, lambda model: model(*example_inputs(model, rows)).loss)
    finally:
        layers.rotary_table.cache_clear()  # a table without values would serve the next real model


def _without_4_bits(recipe: Recipe) -> Recipe:
    """The recipe with lora instead of qlora: 4-bit kernels need tensors with values."""
    return _changed(recipe, parts="lora") if recipe.train.parts == "qlora" else recipe


def _changed(recipe: Recipe, **train: object) -> Recipe:
    """The recipe with other settings in its section train."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})


def example_inputs(model, rows: int, prompt_len: int | None = None) -> tuple[Tensor, Condition, Tensor]:
    """Codes, condition and uncond of `rows` samples; their values do not matter.

    prompt_len: None is the longest that the backbone takes.
    """
    backbone, prompt_len = model.backbone, prompt_len or model.backbone.max_prefix_len
    codes = torch.zeros(rows, backbone.num_tokens, len(backbone.factor_sizes), dtype=torch.long)
    return codes, backbone.example_condition(rows, prompt_len), torch.zeros(rows, dtype=torch.bool)


def prompt_tokens(model) -> int:
    """Tokens of a typical prompt: the backbone's prefix_len if it is fixed, else
    PROMPT_TOKENS.
    """
    return model.backbone.prefix_len or min(PROMPT_TOKENS, model.backbone.max_prefix_len)


# ---- FLOPs ---------------------------------------------------------------------------------------


def _stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Name -> list of layers, of the backbone's outermost lists of three or more equal
    layers.
    """
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if not name.startswith("backbone."):
            continue
        is_inside = any(name.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and len(module) > 2 and not is_inside:
            if len({_shapes(layer) for layer in module}) == 1:
                stacks[name] = module
    return stacks


def _shapes(layer: nn.Module) -> tuple:
    named = layer.named_parameters()
    return type(layer), tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in named)


def _set_submodule(module: nn.Module, name: str, submodule: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, submodule)


class SampleFlops:
    """FLOPs of forward and backward of one sample, by the length of its prompt.

    Three lengths are counted; since the count is a polynomial of degree 2 in the length
    (attention is square), all others follow from them exactly.
    """

    def __init__(self, recipe: Recipe, *, recomputed: bool):
        """recomputed: whether to count what the backward computes a second time.

        These are the layers with train.activation_checkpointing, and decoder and head
        when the loss is computed in chunks. Chunks are counted as on one rank. On many
        ranks with a small micro batch, one chunk may be enough.
        """
        recipe = _without_4_bits(recipe)
        # Global random numbers stay as they are, here and in `_count_with`.
        with torch.random.fork_rng(devices=[]):
            model = meta_model(recipe)
        K, T = model.window, model.backbone.num_tokens
        in_chunks = recipe.data.batch_size // recipe.train.grad_accum * T > max(
            1, recipe.train.loss_chunk_tokens // K
        )
        # One sample is counted for the whole batch, so its loss is in chunks when the
        # batch's loss is.
        chunk = K * math.ceil(T / 2) if recomputed and in_chunks else K * T
        model.loss_settings = dataclasses.replace(model.loss_settings, chunk_tokens=chunk)
        model.backbone.activation_checkpointing = recomputed and recipe.train.activation_checkpointing
        self.model = model.train()
        self.typical_prompt_len = prompt_tokens(model)
        self.num_tokens = T
        self.counted: dict[int, int] = {}

    def __call__(self, prompt_len: int) -> int:
        """FLOPs of a sample whose prompt has this many tokens, with padding."""
        if prompt_len not in self.counted and len(self.counted) < 3:
            self.counted[prompt_len] = self.count(prompt_len)
        return self.counted.get(prompt_len) or self._interpolated(prompt_len)

    def count(self, prompt_len: int) -> int:
        """Count with one and with two of a stack of equal layers, and add the
        others.
        """
        stacks = _stacks(self.model)
        shortest = {name: 1 for name in stacks}
        total = first = self._count_with(stacks, shortest, prompt_len)
        for name, stack in stacks.items():
            second = self._count_with(stacks, shortest | {name: 2}, prompt_len)
            total += (len(stack) - 1) * (second - first)
        return total

    def _count_with(self, stacks: dict[str, nn.ModuleList], lengths: dict[str, int], prompt_len: int) -> int:
        """Count with the first layers of each stack only. lengths: stack -> layers."""
        for name, stack in stacks.items():
            _set_submodule(self.model, name, stack[: lengths[name]])
        counter = FlopCounterMode(display=False)
        try:
            # As plain matrix products: fused kernels recompute, each in its own way.
            with (
                torch.random.fork_rng(devices=[]),
                torch.device("meta"),
                counter,
                sdpa_kernel(SDPBackend.MATH),
            ):
                self.model(*example_inputs(self.model, 1, prompt_len)).loss.backward()
        finally:
            layers.rotary_table.cache_clear()  # a table without values would serve the next real model
            for name, stack in stacks.items():
                _set_submodule(self.model, name, stack)
        return counter.get_total_flops()

    def _interpolated(self, prompt_len: int) -> int:
        """Lagrange's polynomial through the counts."""
        total = Fraction(0)
        for at, flops in self.counted.items():
            others = [other for other in self.counted if other != at]
            total += flops * math.prod(Fraction(prompt_len - other, at - other) for other in others)
        return round(total)


def flops_per_step(
    recipe: Recipe, *, prompt_len: int | None = None, recomputed: bool = True
) -> tuple[int, int]:
    """(image tokens, FLOPs) of one optimizer step over all ranks.

    prompt_len: tokens of the prompts with padding; None is the backbone's fixed number,
    or a guess.
    recomputed: see `SampleFlops`.
    """
    flops = SampleFlops(recipe, recomputed=recomputed)
    per_sample = flops(prompt_len or flops.typical_prompt_len)
    return recipe.data.batch_size * flops.num_tokens, recipe.data.batch_size * per_sample


# ---- report --------------------------------------------------------------------------------------


def _longest_prompt_line(recipe: Recipe, sample_flops: SampleFlops) -> list[str]:
    """FLOPs of a step whose prompts are padded to the limit; nothing where their length
    is fixed.
    """
    backbone = sample_flops.model.backbone
    if backbone.prefix_len:
        return []
    longest = backbone.max_prefix_len
    flops = recipe.data.batch_size * sample_flops(longest)
    return [
        f"             {flops:.3g} FLOPs with {longest}, the most that a prompt has (longer ones are cut, or "
        "refused: data.long_prompts)"
    ]


def report(recipe: Recipe, *, activations: bool = True) -> str:
    """The plan of a recipe as text.

    activations: measure activation memory, which takes some seconds.

    Raises ValueError when the model's sizes are not known; see `meta_model`.
    """
    model = meta_model(recipe)
    counts = parameters(model)
    share = counts["tensorar"] / counts["backbone"]
    sample_flops = SampleFlops(recipe, recomputed=True)
    tokens = recipe.data.batch_size * sample_flops.num_tokens
    flops = recipe.data.batch_size * sample_flops(prompt_tokens(model))
    lines = [
        f"{recipe.backbone.path}, window {model.window}, depth {recipe.tensorar.depth}",
        f"parameters   backbone   {counts['backbone']:>15,}",
        f"             TensorAR   {counts['tensorar']:>15,}  (+{share:.2%})",
        f"             trainable  {counts['trainable']:>15,}",
        *_memory_lines(recipe, model, counts, activations),
        f"step         {counted(recipe.data.batch_size, 'image')}, {tokens:,} image tokens, "
        f"{tokens * model.window:,} predictions",
        f"             {flops:.3g} FLOPs with {prompt_tokens(model)} prompt tokens an image, with padding",
        *_longest_prompt_line(recipe, sample_flops),
        _run_line(recipe, tokens, flops),
        _disk_line(recipe, counts),
    ]
    return "\n".join(lines)


def _memory_lines(recipe: Recipe, model, counts: dict[str, int], activations: bool) -> list[str]:
    largest = max(parameter.numel() for parameter in model.parameters())
    rows = [micro_batch(recipe, num_gpus) for num_gpus in NUM_GPUS]
    active = activation_bytes(recipe, {number for number in rows if number}) if activations else {}
    per_gpu = [
        memory(recipe, counts, largest, active.get(number or 0, 0), num_gpus)
        for number, num_gpus in zip(rows, NUM_GPUS, strict=True)
    ]
    lines = [
        f"memory per GPU in GiB, {recipe.train.precision}, ZeRO-{recipe.zero.stage}, {recipe.optim.name}",
        "".join([" " * 23, *(f"{f'{n} GPU' + 's' * (n > 1):>10}" for n in NUM_GPUS)]),
        _row("micro batch", [None if number is None else f"{number}" for number in rows]),
    ]
    for part in ("weights", "gradients", "optimizer", "buffers", "update"):
        lines.append(_row(part, [_gib(getattr(needed, part)) for needed in per_gpu]))
    if activations:
        for part in ("activations", "peak"):
            cells = [
                _gib(getattr(needed, part)) if number in active else None
                for needed, number in zip(per_gpu, rows, strict=True)
            ]
            lines.append(_row(part, cells))
    if any(needed.host for needed in per_gpu):
        lines.append(_row("host memory per GPU", [_gib(needed.host) for needed in per_gpu]))
    notes = []
    if None in rows:
        notes.append(
            f"-: data.batch_size {recipe.data.batch_size} cannot be divided among this number of GPUs"
        )
    if activations:
        notes.append(
            "peak = weights + gradients + optimizer + the larger of (buffers + activations) and update"
        )
        if not model.backbone.prefix_len:
            notes.append(
                f"activations: with prompts padded to {model.backbone.max_prefix_len} tokens, the limit; a "
                "batch is padded to its longest prompt"
            )
    if recipe.zero.stage == 3 and recipe.train.sample_every:
        weights = (counts["backbone"] + counts["tensorar"]) * (2 if recipe.train.precision == "bf16" else 4)
        notes.append(
            f"while sampling (train.sample_every), each GPU gathers all weights: {_gib(weights)} more"
        )
    notes.append("not included: about 1 GiB for CUDA, and fragmentation")
    return lines + [f"             ({note})" for note in notes]


def _run_line(recipe: Recipe, tokens: int, flops: int) -> str:
    steps = recipe.train.steps
    if steps is None:
        return f"run          {recipe.train.epochs:g} epoch{'s' * (recipe.train.epochs != 1)}"
    return f"run          {steps:,} steps, {tokens * steps:,} image tokens, {flops * steps:.3g} FLOPs"


def _disk_line(recipe: Recipe, counts: dict[str, int]) -> str:
    averages = 1 if recipe.train.ema_decay is None else 2
    run_state = counts["trainable"] * (MOMENTS[recipe.optim.name] + 4 * averages)
    with_adapters = recipe.train.parts in adapters.WITH_ADAPTERS
    saved = counts["trainable"] if with_adapters else counts["backbone"] + counts["tensorar"]
    kept = recipe.train.keep_last + bool(recipe.train.keep_best and recipe.train.validate_every)
    return (
        f"disk         {_gib(run_state)} GiB a run state (up to {kept} are kept, and one more while it is "
        f"written), {_gib(4 * averages * saved)} GiB the model"
    )


def micro_batch(recipe: Recipe, num_gpus: int) -> int | None:
    """Samples per GPU and forward; None where the batch cannot be divided evenly."""
    rows, left = divmod(recipe.data.batch_size, recipe.train.grad_accum * num_gpus)
    return None if left else rows


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f}"


def _row(name: str, cells: list[str | None]) -> str:
    return f"  {name:<21}" + "".join(f"{cell or '-':>10}" for cell in cells)
