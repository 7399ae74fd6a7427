"""Sections and rules: a typo is never ignored, and all problems are reported at
once.
"""

from pathlib import Path

import pytest

from mmtensorar.model import drafts
from mmtensorar.recipe import Recipe, RecipeError, SamplerSettings, known_names
from mmtensorar.recipe.rules import RULES


def problems(path: Path, *overrides: str) -> dict[str, str]:
    """Key -> what is wrong with it, as the report has it."""
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, overrides)
    first, *rest = str(caught.value).splitlines()
    source = "the command line" if overrides else path
    assert first == f"{source}: {len(rest)} problem{'s' * (len(rest) > 1)}"
    return {key: text for key, text in (line.split(maxsplit=1) for line in rest)}


# ---- sections ------------------------------------------------------------------------------------


def test_all_problems_at_once_with_the_nearest_key(path):
    """The report as the style guide shows it: one run of the command finds every
    typo.
    """
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, ["tensorar.windw=3", "data.batch_size=four"])
    assert str(caught.value).splitlines() == [
        "the command line: 2 problems",
        "  tensorar.windw   unknown key; did you mean tensorar.window?",
        "  data.batch_size  expected an integer >= 1, got 'four'",
    ]


def test_problems_in_named_sections_are_reported_with_the_others(path):
    """backbone and image_tokenizer are checked by other classes, but their problems are
    in the same report.
    """
    report = problems(path, "backbone.pth=x", "image_tokenizer.name=janus_qv", "train.steps=0")
    assert report.keys() == {"backbone.pth", "image_tokenizer.name", "train.steps"}
    assert "did you mean backbone.path?" in report["backbone.pth"]
    assert all(name in report["image_tokenizer.name"] for name in known_names("image_tokenizer"))
    assert "did you mean janus_vq?" in report["image_tokenizer.name"]


@pytest.mark.parametrize(
    "override, key, text",
    [
        ("window=3", "window", "did you mean tensorar.window?"),  # right key, but the section is missing
        ("data.lr=1", "data.lr", "did you mean optim.lr?"),
        ("optim.xyz=1", "optim.xyz", "known here: optim.name, optim.lr, optim.tensorar_lr"),
        ("backbone.name=lamagen", "backbone.name", "did you mean llamagen?"),
        ("backbone=janus", "backbone", "got 'janus'"),
        ("backbone.path=", "backbone.path", "expected text, not empty, got None"),
        ("train.steps=1.5", "train.steps", "expected an integer >= 1 or null, got 1.5"),
        ("train.steps=true", "train.steps", "got True"),  # pydantic accepts it as 1
        ("train.precision=fp16", "train.precision", "expected 'bf16' or 'fp32', got 'fp16'"),
        ("data.uncond_rate=2", "data.uncond_rate", "expected a number >= 0 and <= 1, got 2"),
        ("optim.lr=.inf", "optim.lr", "expected a number > 0, got inf"),
        ("optim.tensorar_lr=0", "optim.tensorar_lr", "expected a number > 0 or null, got 0"),
        ("optim.betas=[0.9, 1]", "optim.betas", "expected a list of 2 numbers >= 0 and < 1"),
        ("optim.betas=[0.9]", "optim.betas", "got [0.9]"),
        ("tensorar.offset_weights=unifrm", "tensorar.offset_weights", "got 'unifrm'"),
        ("tensorar.offset_weights=[1, a, 1, 1]", "tensorar.offset_weights", "a list of numbers or"),
        ("tensorar.offset_weights=[true, true, 1, 1]", "tensorar.offset_weights", "got [True"),
        ("tensorar.schedule=exponental", "tensorar.schedule", "did you mean exponential?"),
        ("tensorar.schedule=[0, 2, 1, 1]", "tensorar.schedule", "a list of numbers >= 0 and <= 1"),
        ("train.sample_prompts=[a, 2]", "train.sample_prompts", "expected a list of texts"),
        ("sampler.top_k=[true]", "sampler.top_k", "got [True]"),
        ("sampler.cfg_scale=[2, -1]", "sampler.cfg_scale", "or a list of numbers >= 0, not empty"),
        ("sampler.top_p=[]", "sampler.top_p", "got []"),
        # Training ended with `Overflow when unpacking long long`.
        ("run.seed=99999999999999999999999", "run.seed", "expected a number less than 2^63"),
        ("train.steps=9223372036854775808", "train.steps", "expected a number less than 2^63"),
        ("sampler.top_k=[5, 0xffffffffffffffffffff]", "sampler.top_k", "expected a number less than 2^63"),
        ("backbone.max_prompt_tokens=1" + "0" * 50, "backbone.max_prompt_tokens", "less than 2^63"),
        ("run.name=a/b", "run.name", "expected text like ^[A-Za-z0-9]"),
        ("tensorar=3", "tensorar", "expected settings (key: value), got 3"),
        ("data.shards={a: 0}", "data.shards", "the weight of a is 0"),
        ("data.shards={a:3}", "data.shards", "the weight of a:3 is None"),
        ("data.shards={a: 1, a/: 2}", "data.shards", "twice"),
    ],
)
def test_one_mistake_is_one_problem(path, override, key, text):
    """The problem states what was found, what was expected and where, however many
    errors pydantic gives for it.
    """
    report = problems(path, override)
    assert report.keys() == {key} and text in report[key]


def test_missing_settings_are_named(path):
    path.write_text("run: {}\ndata: {shards: a}\n")
    assert problems(path).keys() == {
        "run.name",
        "backbone",
        "image_tokenizer",
        "data.batch_size",
        "train",
    }


def test_settings_do_not_change_after_validation(path):
    with pytest.raises(ValueError, match="frozen"):
        Recipe.load(path).train.steps = 4


def test_schedules_of_the_paper_use_no_self_drafts_by_default(path):
    """Self-drafts are on by default only for the schedule that they were measured
    with.
    """
    shares = {
        given: Recipe.load(path, [*given]).tensorar.self_drafts
        for given in (
            (),
            ("tensorar.schedule=full",),
            ("tensorar.schedule=exponential",),
            ("tensorar.schedule=[0, 1, 1, 1]",),
            ("tensorar.schedule=sqrt", "tensorar.self_drafts=0.5"),
            ("tensorar.self_drafts=0",),
        )
    }
    assert list(shares.values()) == [1, 1, 0, 0, 0.5, 0]


def test_a_new_noise_schedule_is_one_entry_of_its_table(path, monkeypatch):
    """The recipe has no list of names of its own."""
    monkeypatch.setitem(drafts.SCHEDULES, "cubic", lambda u: u**3)
    assert Recipe.load(path, ["tensorar.schedule=cubic"]).tensorar.schedule == "cubic"


def test_sampler_settings_are_split_per_factor(path):
    """Codes of two factors may have two temperatures; one number is for both."""
    sampler = SamplerSettings(temperature=[1.1, 1.0], cfg_scale=2.0, top_k=[0, 5], greedy_drafts=True)
    first, second = sampler.per_factor(2)
    assert (first.temperature, second.temperature) == (1.1, 1.0)
    assert (first.top_k, second.top_k, first.cfg_scale, second.greedy_drafts) == (0, 5, 2.0, True)
    with pytest.raises(ValueError, match="temperature"):
        sampler.per_factor(3)


# ---- removed settings ----------------------------------------------------------------------------


def test_saved_recipes_with_removed_settings_load(path):
    """Model folders and run folders of earlier versions hold these settings, nearly
    always without an effect.
    """
    saved = ["tensorar.max_stride=1", "sampler.stride=1", "zero.nvme_path=null"]
    assert Recipe.load(path, saved) == Recipe.load(path)


@pytest.mark.parametrize(
    "key, value",
    [
        ("tensorar.max_stride", "4"),
        ("sampler.stride", "2"),
        ("zero.nvme_path", "disk"),
        ("zero.offload_optimizer", "nvme"),
    ],
)
def test_a_removed_setting_with_an_effect_is_an_error_with_the_reason(path, key, value):
    report = problems(path, f"{key}={value}")
    assert report.keys() == {key} and "was removed, since" in report[key]


# ---- rules ---------------------------------------------------------------------------------------

BROKEN = {
    "offset_weights_fit_the_window": ("tensorar.offset_weights", ["tensorar.offset_weights=[1, 0.5]"]),
    "rates_fit_the_window": ("tensorar.schedule", ["tensorar.schedule=[0, 1]"]),
    "batch_is_a_multiple_of_micro_batches": ("data.batch_size", ["train.grad_accum=3"]),
    "steps_or_epochs": ("train.steps", ["train.epochs=1"]),
    "cached_features_are_cut_already": (
        "data.long_prompts",
        ["data.long_prompts=refuse", "data.text_features=cached"],
    ),
    "validation_has_shards_and_steps": ("data.validation", ["data.validation=a"]),
    "patterns_are_regular_expressions": ("train.freeze", ["train.freeze=['(']"]),
    "liger_computes_plain_cross_entropy": (
        "train.loss_kernel",
        ["train.loss_kernel=liger", "train.z_loss=0.1"],
    ),
    "compile_fits_zero_and_recomputation": ("train.compile", ["train.compile=true", "zero.stage=3"]),
    "four_bit_matrices_are_not_split": ("train.parts", ["train.parts=qlora", "zero.stage=3"]),
    "flash_attention_needs_bf16": (
        "backbone.attn_implementation",
        ["backbone.attn_implementation=flash_attention_2", "train.precision=fp32"],
    ),
    "offloading_needs_a_stage": ("zero.offload_params", ["zero.offload_params=cpu"]),
    "optimizer_fits_offloading": ("optim.name", ["optim.name=cpu_adam"]),
    "extra_repeats_no_setting": ("zero.extra.stage", ["zero.extra.stage=2"]),
    "extra_moves_nothing_that_cannot_be_saved": (
        "zero.extra.offload_param",
        ["zero.extra={offload_param: {device: nvme}}"],
    ),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_names_its_setting(path, rule):
    """One broken rule is one problem, at the setting to change."""
    key, overrides = BROKEN[rule.__name__]
    assert problems(path, *overrides).keys() == {key}


@pytest.mark.parametrize(
    "key, overrides",
    [
        ("tensorar.offset_weights", ["tensorar.offset_weights=[1, -1, 1, 1]"]),
        ("tensorar.offset_weights", ["tensorar.offset_weights=[0, 0, 0, 0]"]),
        ("tensorar.schedule", ["tensorar.schedule=[1, 1, 1, 1]"]),
        ("train.steps", ["train.steps=null"]),
        ("train.validate_every", ["train.validate_every=1"]),
        ("lora.targets", ["lora.targets='('"]),
        ("train.compile", ["train.compile=true", "train.activation_checkpointing=selective"]),
        ("zero.offload_optimizer", ["zero.offload_optimizer=cpu"]),
        (
            "zero.offload_optimizer",
            ["zero.offload_optimizer=cpu", "zero.stage=2", "optim.name=adamw_8bit"],
        ),
        (
            "zero.extra.offload_optimizer",
            [
                "zero.offload_optimizer=cpu",
                "zero.stage=2",
                "zero.extra={offload_optimizer: {device: cpu}}",
            ],
        ),
        ("zero.extra.offload_optimizer", ["zero.extra={offload_optimizer: {device: cpu, ratio: 0.5}}"]),
    ],
)
def test_every_condition_of_a_rule_names_its_setting(path, key, overrides):
    assert problems(path, *overrides).keys() == {key}


def test_broken_rules_are_reported_together(path):
    """These rules check the whole recipe; the first broken rule used to hide the
    others.
    """
    report = problems(
        path,
        "tensorar.offset_weights=[1, 0.5]",
        "train.grad_accum=3",
        "zero.offload_params=cpu",
    )
    assert report.keys() == {"tensorar.offset_weights", "data.batch_size", "zero.offload_params"}


def test_the_plain_control_differs_in_the_window_and_the_name(path):
    """Otherwise it would not separate TensorAR's effect from that of more training."""
    recipe = Recipe.load(path, ["tensorar.offset_weights=[1, 0.5, 0.5, 0.5]"])
    overrides = ["tensorar.window=1", "tensorar.offset_weights=null", "run.name=test_plain"]
    assert recipe.plain() == Recipe.load(path, overrides)
