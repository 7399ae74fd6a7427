"""Recipes: one strict YAML file holds every setting of a run.

    python -m mmtensorar.recipe RECIPE.yaml [key=value ...]           check it and print it resolved
    python -m mmtensorar.recipe RECIPE.yaml [key=value ...] --plan    sizes, memory and FLOPs; loads no weights

A recipe may start from another one: `extends: other.yaml`, a path relative to the file, whose
settings come first. Sections are merged key by key; lists are replaced, and so is a backbone or
image_tokenizer section that changes the name. Relative paths in settings are relative to the
working directory. The recipe of study.train_image_tokenizer is checked and printed too.
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, one problem a line."""


class Removed(NamedTuple):
    """A setting of earlier versions. Recipes saved then hold it; at `neutral` it had no effect."""

    neutral: Any
    reason: str


class Section(BaseModel):
    """A group of settings: unknown keys are refused, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    removed: ClassVar[dict[str, Removed]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_removed_settings_without_effect(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        neutral = {key for key, old in cls.removed.items() if settings.get(key, old) == old.neutral}
        return {key: value for key, value in settings.items() if key not in neutral}

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic takes true for 1.
        kind = cls.model_fields[info.field_name].annotation
        inside = value if isinstance(value, (list, tuple)) else [value]
        if bool not in (kind, *get_args(kind)) and any(isinstance(each, bool) for each in inside):
            raise PydanticCustomError("truth", "true and false are no numbers")
        return value

    def dump(self) -> str:
        """The settings as YAML, which loads again as it is."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class Run(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", description="run folder inside out")
    out: str = "runs"
    seed: int = Field(0, ge=0)


STRIDES_REMOVED = "pictures sampled with strides were ruined in all three worlds of docs/study"
NVME_REMOVED = "offloading to NVMe was never run beside a GPU; use zero.offload_optimizer cpu"


class TensorARSettings(Section):
    """window 1 is the plain next-token model: it has no codec, and the other settings have no effect.

    The defaults are what did least harm in docs/study; the paper's are window 4 and schedule exponential.

    schedule: a name, or the rate of each offset. self_drafts: share of redrawn slots that hold the model's own draft; unless given, 1
    with schedule full and 0 with another.
    """

    removed = {"max_stride": Removed(1, STRIDES_REMOVED)}

    window: int = Field(2, ge=1)
    schedule: (
        Literal["linear", "sine", "sqrt", "exponential", "none", "full"]
        | list[Annotated[float, Ge(0), Le(1)]]
    ) = "full"
    offset_weights: list[float] | Literal["uniform", "first_only", "geometric"] | None = None
    depth: int = Field(1, ge=1)
    num_heads: int = Field(8, ge=1)
    self_drafts: float = Field(1.0, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _noise_that_was_asked_for(cls, settings: Any) -> Any:
        if (
            isinstance(settings, dict)
            and "self_drafts" not in settings
            and settings.get("schedule", "full") != "full"
        ):
            return settings | {"self_drafts": 0.0}
        return settings


class Data(Section):
    """shards: a folder made by data_tools, or several with their weights. batch_size: samples of one optimiser step over all ranks.

    shuffle: samples that the shuffle buffers of all ranks hold together, about. uncond_rate: share of rows trained without
    their prompt, which guidance needs. text_features: of a backbone that reads a text encoder's features; live encodes the
    captions in the training step, cached takes what data_tools/encode_text.py has put into the shards. on_error: what a
    damaged sample does; skip puts the next whole one in its place, until more than max_skipped of an epoch were skipped.
    validation: a folder whose loss is measured every train.validate_every steps. A folder may also be a URL (http, https, s3,
    gs, hf); its shards are downloaded to the folder cache, which holds up to cache_gb (10^9 bytes).
    """

    shards: str | Annotated[dict[str, Annotated[float, Gt(0)]], MinLen(1)]
    batch_size: int = Field(ge=1)
    shuffle: int = Field(1000, ge=0)
    uncond_rate: float = Field(0.1, ge=0, le=1)
    num_workers: int = Field(0, ge=0)
    text_features: Literal["live", "cached"] = "live"
    on_error: Literal["raise", "skip"] = "raise"
    max_skipped: float = Field(0.01, ge=0, le=1)
    validation: str | None = None
    validation_batch_size: int = Field(16, ge=1)
    cache: str = "~/.cache/mmtensorar/shards"
    cache_gb: float = Field(50, gt=0)

    @field_validator("shards", mode="before")
    @classmethod
    def _weights_are_numbers(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for folder, weight in value.items():
                if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight > 0:
                    raise ValueError(f"the weight of {folder} is {weight!r}; expected a number above 0")
            names = [folder.rstrip("/") for folder in value]
            if len(set(names)) < len(names):
                raise ValueError("a folder is named twice")
        return value

    @property
    def weights(self) -> dict[str, float]:
        """Folder -> weight of each shard set."""
        return {self.shards: 1.0} if isinstance(self.shards, str) else self.shards


Beta = Annotated[float, Ge(0), Lt(1)]


class Optim(Section):
    """AdamW with linear warm-up and a cosine to final_lr_ratio. tensorar_lr: rate of the codec, None as lr.

    name: torch's own; bitsandbytes' with moments in 8 bits, or paged out of a GPU that is full; DeepSpeed's for
    zero.offload_optimizer cpu, several times as fast there as torch's.
    """

    name: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "cpu_adam"] = "adamw"
    lr: float = Field(2e-5, gt=0)
    tensorar_lr: float | None = Field(None, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    grad_clip: float = Field(1.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    final_lr_ratio: float = Field(0.1, ge=0, le=1)


class Train(Section):
    """Either steps or epochs. label_smoothing, z_loss: see TensorAR; the losses in the log stay cross entropy per offset.

    loss_kernel: auto is Liger's on a GPU where liger-kernel is installed. activation_checkpointing: true computes each layer again
    in the backward, selective only what is no matrix product or attention. compile: the layers, by torch.compile. parts: what of
    the backbone is trained beside the codec: all, its head, or adapters (lora), on matrices in 4 bits (qlora). freeze: patterns of
    names of parameters that are not, on top. max_grad_norm: a gradient norm (before clipping) beyond which the run stops, None is
    any. ema_decay: of a moving average of the weights, written beside the model as model_ema. sample_every, validate_every,
    save_every: 0 is never (a finished or stopped run is always saved).
    """

    steps: Annotated[int, Ge(1)] | None = None
    epochs: Annotated[float, Gt(0)] | None = None
    grad_accum: int = Field(1, ge=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    parts: Literal["all", "heads", "lora", "qlora"] = "all"
    freeze: list[str] = []
    activation_checkpointing: bool | Literal["selective"] = False
    compile: bool = False
    loss_chunk_tokens: int = Field(2048, ge=1)
    loss_kernel: Literal["auto", "torch", "liger"] = "auto"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    z_loss: float = Field(0.0, ge=0)
    max_grad_norm: float | None = Field(None, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    init_from: str | None = None
    resume: Literal["auto", "never"] = "never"
    log_every: int = Field(10, ge=1)
    monitors: list[Literal["tensorboard", "wandb", "csv"]] = ["tensorboard"]
    save_every: int = Field(1000, ge=0)
    save_in_background: bool = False
    keep_last: int = Field(2, ge=1)
    keep_best: bool = True
    validate_every: int = Field(0, ge=0)
    sample_every: int = Field(0, ge=0)
    sample_prompts: list[str] = []


class Lora(Section):
    """Low-rank adapters, for train.parts lora and qlora. targets: pattern of the names of the backbone's matrices that get one,
    None for those of all its layers.
    """

    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | None = None


class Zero(Section):
    """ZeRO stage and offloading; extra goes into DeepSpeed's zero_optimization untouched."""

    removed = {"nvme_path": Removed(None, NVME_REMOVED)}

    stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_params: Literal["none", "cpu"] = "none"
    extra: dict[str, Any] = {}

    @field_validator("offload_optimizer", mode="before")
    @classmethod
    def _no_nvme(cls, value: Any) -> Any:
        if value == "nvme":
            raise ValueError(f"nvme was removed: {NVME_REMOVED}")
        return value


Number = TypeVar("Number")
PerFactor = Number | Annotated[list[Number], MinLen(1)]


class SamplerSettings(Section):
    """How pictures are drawn by default: sample grids during training, generation, evaluation.

    Each number may be a list with one per factor of a code (two in Open-MAGVIT2).
    """

    removed = {"stride": Removed(1, STRIDES_REMOVED)}

    temperature: PerFactor[Annotated[float, Gt(0)]] = 1.0
    top_k: PerFactor[Annotated[int, Ge(0)]] = 0
    top_p: PerFactor[Annotated[float, Gt(0), Le(1)]] = 1.0
    cfg_scale: PerFactor[Annotated[float, Ge(0)]] = 5.0
    greedy_drafts: bool = False
    lookahead: int = Field(1, ge=1)


class Recipe(Section):
    """The settings of one run.

    backbone and image_tokenizer are validated by the Config class beside the code they set:
    `backbone: {name: janus, ...}` by mmtensorar/backbones/janus.py.
    """

    run: Run
    backbone: SerializeAsAny[Section]
    image_tokenizer: SerializeAsAny[Section]
    tensorar: TensorARSettings = TensorARSettings()
    data: Data
    optim: Optim = Optim()
    train: Train
    lora: Lora = Lora()
    zero: Zero = Zero()
    sampler: SamplerSettings = SamplerSettings()

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        weights, problems = self.tensorar.offset_weights, []
        if isinstance(weights, list) and len(weights) != self.tensorar.window:
            problems.append(
                f"tensorar.offset_weights has {len(weights)} numbers, tensorar.window is {self.tensorar.window}; "
                "expected one number per offset"
            )
        rates = self.tensorar.schedule
        if (
            self.tensorar.window > 1
            and isinstance(rates, list)
            and (len(rates) != self.tensorar.window or rates[0] != 0)
        ):
            problems.append(
                f"tensorar.schedule is {rates}; expected {self.tensorar.window} rates, one per offset, the first of them 0"
            )
        if isinstance(weights, list) and (min(weights, default=0) < 0 or not any(weights)):
            problems.append(
                f"tensorar.offset_weights is {weights}; expected numbers >= 0, at least one above 0"
            )
        if "stage" in self.zero.extra:
            problems.append("zero.extra.stage has a setting of its own, zero.stage")
        if self.train.loss_kernel == "liger" and (self.train.label_smoothing or self.train.z_loss):
            problems.append("train.loss_kernel liger makes neither label_smoothing nor z_loss; use auto")
        if self.train.compile and self.zero.stage == 3:
            problems.append(
                "train.compile does not go with zero.stage 3, which gathers weights inside each layer; use stage 2"
            )
        if self.train.compile and self.train.activation_checkpointing == "selective":
            problems.append(
                "train.compile hides from activation_checkpointing selective what it selects; use true or false"
            )
        for key, chosen in (
            ("offload_optimizer", self.zero.offload_optimizer),
            ("offload_param", self.zero.offload_params),
        ):
            if chosen != "none" and key in self.zero.extra:
                problems.append(
                    f"zero.extra.{key} would take the place of what zero says of it; set one of them"
                )
            moved = self.zero.extra.get(key) if isinstance(self.zero.extra.get(key), dict) else {}
            if moved.get("device") == "nvme" or moved.get("ratio", 1) != 1:
                nearest = key.replace("_param", "_params")
                problems.append(
                    f"zero.extra.{key}: what is moved so cannot be saved for resuming; the nearest is zero.{nearest} cpu"
                )
        if self.data.batch_size % self.train.grad_accum:
            problems.append(
                f"data.batch_size {self.data.batch_size} is not a multiple of train.grad_accum {self.train.grad_accum}"
            )
        if (self.train.steps is None) == (self.train.epochs is None):
            found = "neither" if self.train.steps is None else "both; set one of them to null"
            problems.append(f"expected either train.steps or train.epochs, found {found}")
        if bool(self.train.validate_every) != (self.data.validation is not None):
            problems.append("data.validation and train.validate_every have an effect only together")
        if self.zero.offload_params != "none" and self.zero.stage != 3:
            problems.append(f"zero.offload_params needs zero.stage 3, found {self.zero.stage}")
        if self.train.parts == "qlora" and self.zero.stage == 3:
            problems.append(
                "train.parts qlora does not go with zero.stage 3, which would cut 4-bit matrices up; use stage 2, or train.parts lora"
            )
        for pattern in [*self.train.freeze, *([self.lora.targets] if self.lora.targets else [])]:
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(f"{pattern!r} is no pattern ({error})")
        offloaded = self.zero.offload_optimizer != "none"
        if self.optim.name == "cpu_adam" and not offloaded:
            problems.append("optim.name cpu_adam is for zero.offload_optimizer cpu; without it use adamw")
        if self.zero.offload_optimizer == "cpu" and self.zero.stage == 0:
            problems.append("zero.offload_optimizer needs zero.stage 1, 2 or 3, found 0")
        if offloaded and self.optim.name not in ("adamw", "cpu_adam"):
            problems.append(
                f"zero.offload_optimizer does not go with optim.name {self.optim.name}; use cpu_adam"
            )
        if (
            self.train.precision == "fp32"
            and getattr(self.backbone, "attn_implementation", None) == "flash_attention_2"
        ):
            problems.append(
                "backbone.attn_implementation flash_attention_2 needs train.precision bf16, found fp32; sdpa computes in both"
            )
        if problems:
            raise ValueError(*problems)
        return self

    @property
    def run_dir(self) -> Path:
        return Path(self.run.out) / self.run.name

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe file and put `key=value` overrides (dotted keys, YAML values) on top.

        Raises RecipeError, naming the file and each key, with all problems at once.
        """
        return read_recipe(cls, path, overrides)

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe, which loads again as it is."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(self.dump(), encoding="utf-8")
        os.replace(partial, path)


# ---- sections chosen by name ---------------------------------------------------------------------

PACKAGES = {"backbone": "mmtensorar.backbones", "image_tokenizer": "mmtensorar.image_tokenizers"}


def known_names(key: str) -> list[str]:
    """Names that `KEY: {name: ...}` may have: the modules present in its package."""
    folder = Path(__file__).parents[1] / (key + "s")
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def named_section(key: str, settings: Any) -> tuple[Section | None, list[tuple[str, str]]]:
    """Validate a backbone or image_tokenizer section by the Config of the module it names."""
    if not isinstance(settings, dict):
        return None, [
            (key, f"expected settings with a name ({', '.join(known_names(key))}), got {settings!r}")
        ]
    name = settings.get("name")
    if name not in known_names(key):
        nearest = _nearest(str(name), known_names(key))
        hint = f"; did you mean {nearest}?" if nearest else ""
        return None, [(f"{key}.name", f"expected one of {', '.join(known_names(key))}, got {name!r}{hint}")]
    config = importlib.import_module(f"{PACKAGES[key]}.{name}").Config
    try:
        return config.model_validate(settings), []
    except ValidationError as error:
        return None, _problems(error, (key,), config, settings)


# ---- reading -------------------------------------------------------------------------------------


def read_recipe(model: type[Section], path: str | Path, overrides: Sequence[str] = ()) -> Section:
    """A recipe file with overrides on top, validated by any model; see Recipe.load."""
    files = _with_bases(Path(path))
    settings = _merge_all(files)
    if model is Recipe and (kind := recipe_class(settings)) is not Recipe:
        raise RecipeError(f"{path}: a recipe of {kind.__module__}, not of mmtensorar.train")
    problems = []
    for override in overrides:
        problems += _override(settings, override)
    recipe, invalid = _validate(model, settings)
    given = tuple(override.partition("=")[0] + "." for override in overrides)
    problems += [
        (key, text if f"{key}.".startswith(given) else text + _set_in(key, files)) for key, text in invalid
    ]
    if problems:
        raise RecipeError(_report(str(path), problems))
    return recipe


def recipe_class(settings: dict) -> type[Section]:
    """What validates a file's settings: Recipe, or the image tokenizer trainer's class.

    A file is the latter's when it has keys of its own at the top and none of Recipe's.
    """
    if settings.keys() & Recipe.model_fields.keys():
        return Recipe
    other = importlib.import_module("study.train_image_tokenizer").ImageTokenizerRecipe
    return other if settings.keys() & other.model_fields.keys() else Recipe


class _Loader(yaml.SafeLoader):
    """YAML whose keys are names, each given once; plain YAML lets the last one win in silence."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key, problem = key_node.value, None
            if key_node.tag != "tag:yaml.org,2002:str":
                problem = f"a key is a name, found {key!r}" if isinstance(key, str) else "a key is a name"
            elif key in seen:
                problem = f"the key {key!r} is given twice"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Writes what _Loader reads back the same."""


# PyYAML takes 2e-5 for text, since it has no point.
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def read_settings(path: str | Path) -> dict:
    """The settings of a recipe file on top of those it extends, before validation.

    Raises RecipeError for a file that is missing, is not YAML, or extends itself.
    """
    return _merge_all(_with_bases(Path(path)))


def _with_bases(path: Path, extended_by: tuple[Path, ...] = ()) -> list[tuple[Path, dict]]:
    """(file, what it states itself) of a recipe and of all that it extends, the last base first."""
    if path.resolve() in [user.resolve() for user in extended_by]:
        raise RecipeError(f"{path}: extends itself through {' -> '.join(user.name for user in extended_by)}")
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        near = (
            _nearest(path.name, [p.name for p in path.parent.glob("*.yaml")])
            if path.parent.is_dir()
            else None
        )
        hint = f"; did you mean {path.parent / near}?" if near else ""
        wanted = f", which {extended_by[-1]} extends" if extended_by else ""
        raise RecipeError(f"no recipe at {path}{wanted}{hint}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}:" if mark else ""
        raise RecipeError(f"{path}:{where} {getattr(error, 'problem', error)}") from None
    if not isinstance(settings, dict):
        found = "an empty file" if settings is None else type(settings).__name__
        raise RecipeError(f"{path}: expected settings (key: value), got {found}")
    base = settings.pop("extends", None)
    if base is None:
        return [(path, settings)]
    if not isinstance(base, str):
        raise RecipeError(f"{path}: extends: expected the path of a recipe, got {base!r}")
    return [*_with_bases(path.parent / base, (*extended_by, path)), (path, settings)]


def _merge_all(files: list[tuple[Path, dict]]) -> dict:
    # A copy, since overrides change it in place and _set_in wants to know what the files state.
    return copy.deepcopy(functools.reduce(_merged, (settings for _, settings in files)))


def _merged(base: dict, top: dict) -> dict:
    merged = dict(base)
    for key, value in top.items():
        both = (
            isinstance(value, dict) and isinstance(base.get(key), dict) and key != "shards"
        )  # whose keys are folders
        if both and key in PACKAGES and value.get("name", base[key].get("name")) != base[key].get("name"):
            both = False  # the settings of another module mean nothing to this one
        merged[key] = _merged(base[key], value) if both else value
    return merged


def _set_in(key: str, files: list[tuple[Path, dict]]) -> str:
    """' (in FILE)' for a setting that comes from a base of the last file, else ''."""
    absent = object()
    for path, settings in reversed(files):
        for part in key.split("."):
            settings = settings.get(part, absent) if isinstance(settings, dict) else absent
        if settings is not absent:
            return "" if path == files[-1][0] else f" (in {path})"
    return ""


def _override(settings: dict, override: str) -> list[tuple[str, str]]:
    """Apply one key=value in place; returns its problems."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return [(override, "expected key=value on the command line, for example train.steps=100")]
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return [(key, f"the value on the command line is not YAML: {text!r}")]
    *parents, leaf = key.split(".")
    for parent in parents:
        child = settings.get(parent)
        if not isinstance(child, dict):
            if child is not None:
                return [(key, f"{parent} is {child!r} and has no keys inside")]
            settings[parent] = child = {}
        settings = child
    settings[leaf] = value
    return []


# ---- validation ----------------------------------------------------------------------------------


def _validate(cls: type[Section], settings: dict) -> tuple[Section | None, list[tuple[str, str]]]:
    settings, problems = dict(settings), []
    for key in PACKAGES:
        if key in settings:
            section, found = named_section(key, settings[key])
            problems += found
            # A stand-in, so that the other sections are checked all the same.
            settings[key] = section or Section()
    try:
        recipe = cls.model_validate(settings)
    except ValidationError as error:
        return None, problems + _problems(error, (), cls, settings)
    return recipe, problems


def _problems(
    errors: ValidationError, prefix: tuple[str, ...], model: type[BaseModel], settings: dict
) -> list[tuple[str, str]]:
    """(key path, what is wrong) of each pydantic error, prefix in front of the paths.

    A list or a choice of types gives pydantic several errors for one setting; here it is one problem.
    """
    found = []
    for error in errors.errors():
        field, keys = _locate(model, error["loc"])
        path = ".".join([*prefix, *map(str, error["loc"])]) if field is None else ".".join([*prefix, *keys])
        if error["type"] == "extra_forbidden" and (old := _removed(model, error["loc"])):
            found.append((path, f"was removed (only {old.neutral!r} is read): {old.reason}"))
        elif error["type"] == "extra_forbidden":
            found.append((path, f"unknown key; {_known(path, prefix, model)}"))
        elif error["type"] == "missing" and len(keys) == len(error["loc"]):
            found.append((path, "missing; this setting has no default"))
        elif error["type"] == "value_error":
            found += [(path, problem) for problem in error["ctx"]["error"].args]
        else:
            value = settings
            for key in keys:
                value = value[key]
            found.append((path, f"expected {_expected(field.annotation, field)}, got {value!r}"))
    return list(dict.fromkeys(found))


def _removed(model: type[BaseModel], location: tuple[str | int, ...]) -> Removed | None:
    """The removed setting that an unknown key at a pydantic location is."""
    *sections, key = location
    for part in sections:
        kind = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            return None
        model = kind
    return model.removed.get(key) if issubclass(model, Section) else None


def _locate(model: type[BaseModel], location: tuple[str | int, ...]) -> tuple[FieldInfo | None, list[str]]:
    """The setting that a pydantic location is in or at, and its key path; None for an unknown key."""
    field, keys, named = None, [], False
    for part in location:
        if named:  # whatever name a section has in a dictionary of sections
            keys.append(part)
            named = False
            continue
        if part not in model.model_fields:
            return None, keys
        field = model.model_fields[part]
        keys.append(part)
        kind = field.annotation
        if get_origin(kind) is dict:
            kind, named = get_args(kind)[-1], True
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            break
        model = kind
    return field, keys


_KINDS = {int: "an integer", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
_SIGNS = {Ge: ">=", Gt: ">", Le: "<=", Lt: "<"}


def _expected(kind: Any, field: FieldInfo | None = None) -> str:
    """A type in words, with the bounds that a field or annotation puts on it: `an integer >= 1`."""
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    bounds = field.metadata if field else ()
    if origin is Annotated:
        kind, *bounds = arguments
        words = _expected(kind)
    elif origin in (Union, UnionType):
        words = " or ".join(map(_expected, arguments))
    elif origin is Literal:
        words = " or ".join(map(repr, arguments))
    elif origin in (list, tuple):
        count = f"{len(arguments)} " if origin is tuple else ""
        noun, *rest = _expected(arguments[0]).removeprefix("a ").removeprefix("an ").split(" ")
        words = " ".join([f"a list of {count}{noun}s", *rest])
    else:
        words = _KINDS.get(origin, "settings (key: value)")
    limits = []
    for bound in bounds:
        if type(bound) in _SIGNS:
            limits.append(f"{_SIGNS[type(bound)]} {getattr(bound, type(bound).__name__.lower())}")
        elif isinstance(bound, MinLen):
            words += ", not empty"
        elif pattern := getattr(bound, "pattern", None):
            words += f" like {pattern}"
    return " ".join(filter(None, [words, " and ".join(limits)]))


def _known(path: str, prefix: tuple[str, ...], model: type[BaseModel]) -> str:
    """What an unknown key may have meant."""
    known = [".".join([*prefix, *keys]) for keys in _keys(model)]
    siblings = [key for key in known if key.rpartition(".")[0] == path.rpartition(".")[0]]
    # By the last part alone: with a section's name in front, any two of its keys resemble each other.
    nearest = _nearest_leaf(path, siblings) or _nearest_leaf(path, known)
    if nearest and not siblings:  # in one of a dictionary of sections
        nearest = f"{path.rpartition('.')[0]}.{nearest.rpartition('.')[2]}"
    return f"did you mean {nearest}?" if nearest else f"known here: {', '.join(siblings)}"


def _keys(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """Every key path of a model, sections included."""
    for name, field in model.model_fields.items():
        yield (name,)
        kinds = [field.annotation, *get_args(field.annotation)]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Section):
                for rest in _keys(kind):
                    yield (name, *rest)


def _nearest(word: str, known: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.6)), None)


def _nearest_leaf(path: str, known: Sequence[str]) -> str | None:
    """The known key whose last part equals or resembles that of path."""
    leaves = {key.rpartition(".")[2]: key for key in known}
    near = _nearest(path.rpartition(".")[2], list(leaves))
    return leaves[near] if near else None


def _report(source: str, problems: list[tuple[str, str]]) -> str:
    width = max(len(key) for key, _ in problems)
    lines = [f"  {key.ljust(width)}  {text}" if key else f"  {text}" for key, text in problems]
    return "\n".join([f"{source}: {len(problems)} problem{'s' * (len(problems) > 1)}", *lines])
