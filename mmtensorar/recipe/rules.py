"""Rules between settings of several sections: one function each, listed in RULES.

A rule yields (key, sentence) for settings that do not fit together. The sentence names
the value and the nearest setting that works. When rules run, each section is already
valid by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from mmtensorar.recipe.errors import Problem
from mmtensorar.recipe.schema import RecipeSections

Rule = Callable[[RecipeSections], Iterator[Problem]]


def offset_weights_fit_the_window(recipe: RecipeSections) -> Iterator[Problem]:
    weights, window = recipe.tensorar.offset_weights, recipe.tensorar.window
    if isinstance(weights, list) and len(weights) != window:
        yield (
            "tensorar.offset_weights",
            f"expected one number per offset, {window} (tensorar.window), got {len(weights)}",
        )
    if isinstance(weights, list) and (min(weights, default=0) < 0 or not any(weights)):
        yield "tensorar.offset_weights", f"expected numbers >= 0, at least one above 0, got {weights}"


def rates_fit_the_window(recipe: RecipeSections) -> Iterator[Problem]:
    rates, window = recipe.tensorar.schedule, recipe.tensorar.window
    if window > 1 and isinstance(rates, list) and (len(rates) != window or rates[0] != 0):
        yield (
            "tensorar.schedule",
            f"expected {window} rates (tensorar.window), one per offset, the first of them 0, got {rates}",
        )


def batch_is_a_multiple_of_micro_batches(recipe: RecipeSections) -> Iterator[Problem]:
    batch_size, grad_accum = recipe.data.batch_size, recipe.train.grad_accum
    if batch_size % grad_accum:
        yield "data.batch_size", f"expected a multiple of {grad_accum} (train.grad_accum), got {batch_size}"


def steps_or_epochs(recipe: RecipeSections) -> Iterator[Problem]:
    steps, epochs = recipe.train.steps, recipe.train.epochs
    if steps is None and epochs is None:
        yield "train.steps", "expected train.steps or train.epochs, got neither"
    if steps is not None and epochs is not None:
        yield "train.steps", "expected train.steps or train.epochs, got both; set one of them to null"


def validation_has_shards_and_steps(recipe: RecipeSections) -> Iterator[Problem]:
    if recipe.train.validate_every and recipe.data.validation is None:
        yield "train.validate_every", "has an effect only together with data.validation, which is not set"
    if recipe.data.validation is not None and not recipe.train.validate_every:
        yield "data.validation", "has an effect only together with train.validate_every, which is 0"


def cached_features_are_cut_already(recipe: RecipeSections) -> Iterator[Problem]:
    if recipe.data.long_prompts == "refuse" and recipe.data.text_features == "cached":
        yield (
            "data.long_prompts",
            "refuse needs data.text_features live, since data_tools/encode_text.py has already cut what "
            "the cached features are made of; use cut",
        )


def patterns_are_regular_expressions(recipe: RecipeSections) -> Iterator[Problem]:
    patterns = [("train.freeze", pattern) for pattern in recipe.train.freeze]
    if recipe.lora.targets:
        patterns.append(("lora.targets", recipe.lora.targets))
    for key, pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield key, f"{pattern!r} is not a valid regular expression ({error})"


def liger_computes_plain_cross_entropy(recipe: RecipeSections) -> Iterator[Problem]:
    if recipe.train.loss_kernel == "liger" and (recipe.train.label_smoothing or recipe.train.z_loss):
        yield "train.loss_kernel", "liger supports neither label_smoothing nor z_loss; use auto"


def compile_fits_zero_and_recomputation(recipe: RecipeSections) -> Iterator[Problem]:
    if recipe.train.compile and recipe.zero.stage == 3:
        yield (
            "train.compile",
            "does not work with zero.stage 3, which gathers weights inside each layer; use stage 2",
        )
    if recipe.train.compile and recipe.train.activation_checkpointing == "selective":
        yield (
            "train.compile",
            "does not work with train.activation_checkpointing selective, which cannot see the operations "
            "of a compiled layer; use true or false",
        )


def four_bit_matrices_are_not_split(recipe: RecipeSections) -> Iterator[Problem]:
    if recipe.train.parts == "qlora" and recipe.zero.stage == 3:
        yield (
            "train.parts",
            "qlora does not work with zero.stage 3, which would split 4-bit matrices; use stage 2, or lora",
        )


def flash_attention_needs_bf16(recipe: RecipeSections) -> Iterator[Problem]:
    # Absent when the section is invalid, which is reported elsewhere.
    attention = recipe.backbone.model_dump().get("attn_implementation")
    if recipe.train.precision == "fp32" and attention == "flash_attention_2":
        yield (
            "backbone.attn_implementation",
            "flash_attention_2 needs train.precision bf16, found fp32; sdpa works with both",
        )


def offloading_needs_a_stage(recipe: RecipeSections) -> Iterator[Problem]:
    if recipe.zero.offload_params != "none" and recipe.zero.stage != 3:
        yield "zero.offload_params", f"needs zero.stage 3, found {recipe.zero.stage}"
    if recipe.zero.offload_optimizer == "cpu" and recipe.zero.stage == 0:
        yield "zero.offload_optimizer", "needs zero.stage 1, 2 or 3, found 0"


def optimizer_fits_offloading(recipe: RecipeSections) -> Iterator[Problem]:
    offloaded, name = recipe.zero.offload_optimizer != "none", recipe.optim.name
    if name == "cpu_adam" and not offloaded:
        yield "optim.name", "cpu_adam is for zero.offload_optimizer cpu; without it use adamw"
    if offloaded and name not in ("adamw", "cpu_adam"):
        yield "zero.offload_optimizer", f"does not work with optim.name {name}; use cpu_adam"


def extra_repeats_no_setting(recipe: RecipeSections) -> Iterator[Problem]:
    extra = recipe.zero.extra
    if "stage" in extra:
        yield "zero.extra.stage", "has a setting of its own; use zero.stage"
    for key, chosen in _offloaded(recipe).items():
        if chosen != "none" and key in extra:
            yield f"zero.extra.{key}", f"would replace zero.{_setting_of(key)}; set only one of them"


def extra_moves_nothing_that_cannot_be_saved(recipe: RecipeSections) -> Iterator[Problem]:
    for key in _offloaded(recipe):
        settings = recipe.zero.extra.get(key)
        if isinstance(settings, dict) and (settings.get("device") == "nvme" or settings.get("ratio", 1) != 1):
            yield (
                f"zero.extra.{key}",
                f"a run with these settings could not be saved for resuming; use zero.{_setting_of(key)} cpu",
            )


def _offloaded(recipe: RecipeSections) -> dict[str, str]:
    """DeepSpeed's key -> the value of our setting for it."""
    return {"offload_optimizer": recipe.zero.offload_optimizer, "offload_param": recipe.zero.offload_params}


def _setting_of(key: str) -> str:
    """The name of our setting for DeepSpeed's key."""
    return "offload_params" if key == "offload_param" else key


RULES: tuple[Rule, ...] = (
    offset_weights_fit_the_window,
    rates_fit_the_window,
    batch_is_a_multiple_of_micro_batches,
    steps_or_epochs,
    validation_has_shards_and_steps,
    cached_features_are_cut_already,
    patterns_are_regular_expressions,
    liger_computes_plain_cross_entropy,
    compile_fits_zero_and_recomputation,
    four_bit_matrices_are_not_split,
    flash_attention_needs_bf16,
    offloading_needs_a_stage,
    optimizer_fits_offloading,
    extra_repeats_no_setting,
    extra_moves_nothing_that_cannot_be_saved,
)


def broken_rules(recipe: RecipeSections) -> list[Problem]:
    """The problems that the rules find in a recipe."""
    return [problem for rule in RULES for problem in rule(recipe)]
