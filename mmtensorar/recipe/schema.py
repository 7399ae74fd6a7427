"""The sections of a recipe: every setting with its type, bounds, default and
description.

To add a setting, add one line here. Rules between settings of several sections are in
rules.py. `docs/recipe.md` is made from this file:
`python -m mmtensorar.recipe --docs > docs/recipe.md`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import SerializeAsAny, field_validator, model_validator

from mmtensorar.recipe.errors import did_you_mean
from mmtensorar.recipe.names import known_schedules
from mmtensorar.recipe.section import BackboneConfig, NamedSection, Removed, Section, setting

STRIDES_REMOVED = "pictures sampled with strides were ruined in all three worlds of docs/study"
NVME_REMOVED = "offloading to NVMe was never run with a GPU; use zero.offload_optimizer cpu"

Rate = Annotated[float, Ge(0), Le(1)]
Weight = Annotated[float, Gt(0)]
Beta = Annotated[float, Ge(0), Lt(1)]


class Run(Section):
    """The run folder, and the seed of everything that is drawn."""

    name: str = setting(
        pattern=r"^[A-Za-z0-9][\w.-]*$",
        description="name of the run folder inside `run.out`",
        on_resume=True,
    )
    out: str = setting("runs", description="folder that holds the run folders", on_resume=True)
    seed: int = setting(
        0, ge=0, description="seed of the order of samples, the noise and the weights that start untrained"
    )


class TensorARSettings(Section):
    """The method.

    With `window` 1 the model is a plain next-token model without a codec, and the other
    settings of this section have no effect (`--plain`).

    The defaults are the settings that did least harm in docs/study. The paper has
    window 4 and schedule exponential.
    """

    removed_settings = {"max_stride": Removed(1, STRIDES_REMOVED)}

    window: int = setting(2, ge=1, description="tokens predicted at each step, K")
    schedule: str | list[Rate] = setting(
        "full",
        description="how often a draft in training is redrawn, by its offset: `full` (always), "
        "`exponential` (the paper's) or another name in `SCHEDULES` of mmtensorar/model/drafts.py; "
        "or a list with the rate of each offset, the first one 0",
    )
    offset_weights: list[float] | Literal["uniform", "first_only", "geometric"] | None = setting(
        None,
        description="weights of the loss of the final token and of each draft: a number for each offset, "
        "`uniform` (1, 1, ...), `first_only` (1, 0, ...) or `geometric` (1, 1/2, 1/4, ...); "
        "null is 1 for the final token and 0.1 for each draft",
    )
    depth: int = setting(1, ge=1, description="layers of the window encoder, and of the window decoder")
    num_heads: int = setting(
        8, ge=1, description="attention heads of these layers; must divide the backbone's width"
    )
    self_drafts: float = setting(
        1.0,
        ge=0,
        le=1,
        description="share of the redrawn drafts that the model itself makes, the others are uniform noise; "
        "above 0 it costs one more forward pass per step. When it is not given, it is 1 with schedule "
        "`full` and 0 (the paper's) with any other schedule",
    )

    @model_validator(mode="before")
    @classmethod
    def _self_drafts_only_with_full(cls, settings: Any) -> Any:
        if (
            isinstance(settings, dict)
            and "self_drafts" not in settings
            and settings.get("schedule", "full") != "full"
        ):
            return settings | {"self_drafts": 0.0}
        return settings

    @field_validator("schedule")
    @classmethod
    def _schedule_is_known(cls, value: str | list[float]) -> str | list[float]:
        # Reading a recipe imports the backbone's module anyway, so looking the names up
        # is free.
        if isinstance(value, str) and value not in (known := known_schedules()):
            expected = f"expected one of {', '.join(known)}, or a rate for each offset, got {value!r}"
            raise ValueError(expected + did_you_mean(value, known))
        return value


class Data(Section):
    """The training data.

    A folder may also be a URL (http, https, s3, gs, hf); its shards are downloaded to
    `cache`.
    """

    shards: str | Annotated[dict[str, Weight], MinLen(1)] = setting(
        description="a folder of shards made by data_tools, or several with their weights: "
        "`{FOLDER: 3, FOLDER: 1}`"
    )
    batch_size: int = setting(
        ge=1, description="samples of one optimizer step, over all ranks and micro batches"
    )
    shuffle: int = setting(
        1000, ge=0, description="about how many samples the shuffle buffers of all ranks hold together"
    )
    uncond_rate: float = setting(
        0.1, ge=0, le=1, description="share of samples trained without their prompt, which guidance needs"
    )
    num_workers: int = setting(
        0,
        ge=0,
        description="processes of each rank that read samples; 0 reads in the training process",
        on_resume=True,
    )
    text_features: Literal["live", "cached"] = setting(
        "live",
        description="for a backbone that reads a text encoder's features: `live` encodes the captions in the "
        "training step, `cached` reads what `mmtensorar shards encode-text` wrote into the shards",
    )
    on_error: Literal["raise", "skip"] = setting(
        "raise",
        description="what a damaged sample does: `raise` stops the run, `skip` replaces it by the next "
        "undamaged sample",
    )
    long_prompts: Literal["cut", "refuse"] = setting(
        "cut",
        description="what happens in training to a prompt with more tokens than the backbone's limit: `cut` "
        "leaves out the end of its caption and lists it in cut_prompts.jsonl, `refuse` treats its sample as "
        "damaged (`data.on_error`)",
        on_resume=True,
    )
    max_skipped: float = setting(
        0.01,
        ge=0,
        le=1,
        description="with `on_error: skip`, the run stops after this share of an epoch was skipped",
        on_resume=True,
    )
    validation: str | None = setting(
        None,
        description="folder of shards on which the loss is measured every `train.validate_every` steps",
        on_resume=True,
    )
    validation_batch_size: int = setting(
        16, ge=1, description="samples of one forward pass of the validation", on_resume=True
    )
    cache: str = setting(
        "~/.cache/mmtensorar/shards",
        description="folder to which shards from URLs are downloaded",
        on_resume=True,
    )
    cache_gb: float = setting(
        50, gt=0, description="most that `data.cache` holds, in units of 10^9 bytes", on_resume=True
    )

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


class Optim(Section):
    """AdamW, with a linear warm-up of the learning rate and then a cosine."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "cpu_adam"] = setting(
        "adamw",
        description="`adamw` is torch's; `_8bit` keeps the moments in 8 bits and `paged_` moves them to "
        "the host when the GPU is full (both from bitsandbytes); `cpu_adam` is DeepSpeed's for "
        "`zero.offload_optimizer: cpu`, where it is several times as fast as torch's",
    )
    lr: float = setting(2e-5, gt=0, description="highest learning rate", on_resume=True)
    tensorar_lr: float | None = setting(
        None,
        gt=0,
        description="highest learning rate of the window encoder and decoder; null is `optim.lr`",
        on_resume=True,
    )
    betas: tuple[Beta, Beta] = setting((0.9, 0.95), description="decay rates of AdamW's two moments")
    eps: float = setting(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = setting(
        0.01, ge=0, description="weight decay of matrices; norms, biases and embeddings have none"
    )
    grad_clip: float = setting(
        1.0,
        ge=0,
        description="largest norm of the gradient, which is scaled down to it; 0 is off",
        on_resume=True,
    )
    warmup_steps: int = setting(
        0, ge=0, description="steps over which the learning rate rises to its highest"
    )
    final_lr_ratio: float = setting(
        0.1,
        ge=0,
        le=1,
        description="learning rate of the last step, as a share of the highest",
        on_resume=True,
    )


class Train(Section):
    """The loop. Give either `steps` or `epochs`.

    Other `steps` on resuming stretch the rest of the learning rate's cosine, so such a
    run is not equal to one that was planned longer from its start.
    """

    steps: Annotated[int, Ge(1)] | None = setting(
        None, description="optimizer steps of the whole run", on_resume=True
    )
    epochs: Annotated[float, Gt(0)] | None = setting(
        None, description="passes over `data.shards`, instead of `train.steps`"
    )
    grad_accum: int = setting(
        1, ge=1, description="micro batches into which each rank's share of a step is cut", on_resume=True
    )
    precision: Literal["bf16", "fp32"] = setting(
        "bf16", description="number format of the forward and backward passes"
    )
    parts: Literal["all", "heads", "lora", "qlora"] = setting(
        "all",
        description="what of the backbone is trained, in addition to the window encoder and decoder: all of "
        "it, its output head, low-rank adapters, or adapters on matrices in 4 bits",
    )
    freeze: list[str] = setting(
        [], description="regular expressions; parameters whose names they match are not trained"
    )
    activation_checkpointing: bool | Literal["selective"] = setting(
        False,
        description="saves memory: true computes each layer again in the backward pass, `selective` only "
        "what is not a matrix product or attention",
        on_resume=True,
    )
    compile: bool = setting(
        False, description="compile the layers with torch.compile; not with `zero.stage: 3`", on_resume=True
    )
    loss_chunk_tokens: int = setting(
        2048,
        ge=1,
        description="rows of logits held at once by the loss; fewer take less memory and more time",
    )
    loss_kernel: Literal["auto", "torch", "liger"] = setting(
        "auto",
        description="code of the cross entropy; `auto` is Liger's on a GPU where liger-kernel is installed "
        "and supports the loss, else torch's",
    )
    label_smoothing: float = setting(
        0.0,
        ge=0,
        lt=1,
        description="share of each target that is spread over all codes; losses in the log stay "
        "cross entropy",
    )
    z_loss: float = setting(
        0.0,
        ge=0,
        description="weight of the squared log of the softmax's denominator; losses in the log "
        "stay cross entropy",
    )
    max_grad_norm: float | None = setting(
        None,
        gt=0,
        description="norm of the gradient, before clipping, beyond which the run stops; null is any",
        on_resume=True,
    )
    ema_decay: float | None = setting(
        None,
        gt=0,
        lt=1,
        description="decay of a moving average of the trained weights, written as `model_ema` next to "
        "`model`; null keeps none",
    )
    init_from: str | None = setting(
        None, description="model folder whose weights training starts from, instead of `backbone.path`"
    )
    resume: Literal["auto", "never"] = setting(
        "never",
        description="`auto` resumes the run in the run folder, if there is one, as `--resume` does",
        on_resume=True,
    )
    log_every: int = setting(10, ge=1, description="steps between printed lines", on_resume=True)
    monitors: list[Literal["tensorboard", "wandb", "csv"]] = setting(
        ["tensorboard"],
        description="where curves go, in addition to log.jsonl in the run folder",
        on_resume=True,
    )
    save_every: int = setting(
        1000,
        ge=0,
        description="steps between saved run states; 0 saves only a finished or stopped run",
        on_resume=True,
    )
    save_in_background: bool = setting(
        False,
        description="write run states while training continues; needs memory for a copy",
        on_resume=True,
    )
    keep_last: int = setting(2, ge=1, description="newest run states that are kept", on_resume=True)
    keep_best: bool = setting(
        True, description="also keep the run state with the lowest validation loss", on_resume=True
    )
    validate_every: int = setting(
        0, ge=0, description="steps between measurements on `data.validation`; 0 is never", on_resume=True
    )
    sample_every: int = setting(
        0, ge=0, description="steps between sample pictures; 0 is never", on_resume=True
    )
    sample_prompts: list[str] = setting(
        [], description="prompts (or class numbers) of the sample pictures", on_resume=True
    )


class Lora(Section):
    """Low-rank adapters, for `train.parts` lora and qlora."""

    rank: int = setting(16, ge=1, description="rank of each adapter")
    alpha: float = setting(32, gt=0, description="an adapter's output is scaled by alpha / rank")
    dropout: float = setting(0.0, ge=0, lt=1, description="dropout on the adapters' inputs")
    targets: str | None = setting(
        None,
        description="regular expression for the names of the backbone's matrices that get an adapter; "
        "null is those of all its layers",
    )


class Zero(Section):
    """DeepSpeed's ZeRO: what is split over the ranks, and what is moved to the host."""

    removed_settings = {"nvme_path": Removed(None, NVME_REMOVED)}

    stage: Literal[0, 1, 2, 3] = setting(
        0,
        description="what the ranks split: 0 nothing, 1 optimizer states, 2 also gradients, 3 also weights",
        on_resume=True,
    )
    offload_optimizer: Literal["none", "cpu"] = setting(
        "none", description="`cpu` keeps optimizer states, and the update, on the host", on_resume=True
    )
    offload_params: Literal["none", "cpu"] = setting(
        "none", description="`cpu` keeps the split weights on the host; needs stage 3", on_resume=True
    )
    extra: dict[str, Any] = setting(
        {},
        description="more settings of DeepSpeed's `zero_optimization`, passed on as they are",
        on_resume=True,
    )

    @field_validator("offload_optimizer", mode="before")
    @classmethod
    def _nvme_was_removed(cls, value: Any) -> Any:
        if value == "nvme":
            raise ValueError(f"'nvme' was removed, since {NVME_REMOVED}")
        return value


Number = TypeVar("Number")
PerFactor = Number | Annotated[list[Number], MinLen(1)]


class SamplerSettings(Section):
    """How pictures are drawn: samples during training, and the defaults of generation
    and evaluation.

    Each number of the first four may be a list with one per factor of a code
    (Open-MAGVIT2 has two).
    """

    removed_settings = {"stride": Removed(1, STRIDES_REMOVED)}

    temperature: PerFactor[Annotated[float, Gt(0)]] = setting(
        1.0, description="logits are divided by it", on_resume=True
    )
    top_k: PerFactor[Annotated[int, Ge(0)]] = setting(
        0, description="keep the k likeliest tokens; 0 keeps all", on_resume=True
    )
    top_p: PerFactor[Annotated[float, Gt(0), Le(1)]] = setting(
        1.0,
        description="keep the likeliest tokens that have this probability together; 1 keeps all",
        on_resume=True,
    )
    cfg_scale: PerFactor[Annotated[float, Ge(0)]] = setting(
        5.0, description="guidance: uncond + scale * (cond - uncond); 1 is off", on_resume=True
    )
    greedy_drafts: bool = setting(
        False, description="drafts (offsets above 0) are the likeliest tokens", on_resume=True
    )
    coupled_drafts: bool = setting(
        False,
        description="a draft is drawn with the noise of its place, so that it is the final token unless the "
        "model learns something in between; otherwise with noise of its own",
        on_resume=True,
    )
    lookahead: Literal["auto"] | Annotated[int, Ge(1)] = setting(
        "auto",
        description="steps fed per pass, all but the first of them guessed, of which a pass keeps those that "
        "it confirms: the same picture, up to rounding, in fewer passes; 1 is one token at a time; auto "
        "is 16 or 64 / pictures of the batch, the smaller",
        on_resume=True,
    )

    def per_factor(self, num_factors: int) -> list[SamplerSettings]:
        """The settings of each factor of a code: a list gives each factor its own
        number.

        Raises ValueError for a list that does not hold num_factors numbers.
        """
        lists = {name: value for name, value in self if isinstance(value, list)}
        for name, value in lists.items():
            if len(value) != num_factors:
                raise ValueError(
                    f"{name} has {len(value)} numbers ({', '.join(map(str, value))}); expected one "
                    f"number, or one per factor of a code, {num_factors}"
                )
        return [
            self.model_copy(update={name: value[factor] for name, value in lists.items()})
            for factor in range(num_factors)
        ]


class RecipeSections(Section):
    """All sections of a recipe, each checked by itself."""

    run: Run = setting(description="the run folder and the seed")
    backbone: SerializeAsAny[BackboneConfig] = setting(
        description="`name` is a module of mmtensorar/backbones, whose Config has the other settings"
    )
    image_tokenizer: SerializeAsAny[NamedSection] = setting(
        description="`name` is a module of mmtensorar/image_tokenizers, whose Config has the other settings"
    )
    tensorar: TensorARSettings = setting(TensorARSettings(), description="the method")
    data: Data = setting(description="the shards")
    optim: Optim = setting(Optim(), description="the optimizer")
    train: Train = setting(description="the loop")
    lora: Lora = setting(Lora(), description="adapters")
    zero: Zero = setting(Zero(), description="DeepSpeed's ZeRO")
    sampler: SamplerSettings = setting(SamplerSettings(), description="sampling")
