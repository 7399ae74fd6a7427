"""Janus and Janus-Pro, text to image, on transformers' own classes.

Only the generation path is built and loaded: language model, generation embeddings,
aligner and head. It is read from the layout of transformers or of DeepSeek, and saved
in that of transformers. The vision tower, its aligner and lm_head are not used; the VQ
model is an image tokenizer (image_tokenizers/janus_vq.py). Prompt, padding and the
unconditional prompt follow the official sampler (deepseek-ai/Janus at 1daa72f,
generation_inference.py).
Shapes: B batch, P prefix, S rows, T image tokens, D width, V codebook size.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from pydantic import Field
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModel, Cache, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer
from transformers.models.janus.configuration_janus import JanusConfig
from transformers.models.janus.modeling_janus import JanusVQVAEAlignerMLP, JanusVQVAEHead

from mmtensorar.captions.limits import DEFAULT_MAX_TOKENS, beginning
from mmtensorar.checkpoints import janus_deepseek
from mmtensorar.checkpoints.released import (
    LazyWeights,
    ReleasedWeights,
    building,
    fill,
    hub_config,
    locate,
    read_config,
    tensors_bar,
    write_safetensors,
)
from mmtensorar.files import new_path, read_json
from mmtensorar.model import attention, kv_cache, layers
from mmtensorar.model.conditions import Condition, ConditionKind, Excess, Prefix
from mmtensorar.model.protocols import ImageTokenizer
from mmtensorar.recipe import BackboneConfig, setting

SIGNATURES = ("gen_embed.weight", "model.generation_embeddings.weight")  # DeepSeek's layout, transformers'
MODEL_TYPES = ("janus", janus_deepseek.MODEL_TYPE)
IMAGE_TOKENIZER = "janus_vq"
INSIDE = "model.vqmodel."  # prefix of the image tokenizer's tensors in transformers' layout
IMAGE_TOKENIZER_PREFIXES = (INSIDE, janus_deepseek.VQ)

# The name of `attention.attend` among transformers' attention functions. For a name whose
# mask it does not know, transformers makes none, which would take a wait for the GPU.
OWN_ATTENTION = "mmtensorar"

PROMPT = "<|User|>: {caption}\n\n<|Assistant|>:<begin_of_image>"
BEGIN_OF_IMAGE = "<begin_of_image>"
# Looked up by name where a tokenizer file does not name the token of a role.
SPECIAL = {"bos_token": "<｜begin▁of▁sentence｜>", "pad_token": "<｜▁pad▁｜>"}

# Our names -> the names in transformers' layout.
KEYS = {
    "prefix.embed_tokens.": "model.language_model.embed_tokens.",
    "language_model.": "model.language_model.",
    "embed.embeddings.": "model.generation_embeddings.",
    "embed.aligner.": "model.generation_aligner.",
    "head.head.": "model.generation_head.",
}

# What else a complete Janus holds, in either layout: image understanding, the text
# head, the image tokenizer.
NOT_LOADED = re.compile(
    r"(model\.)?(vision_model|aligner|vqmodel|gen_vision_model)\.|(language_model\.)?lm_head\.|.*\.inv_freq$"
)

# Sizes of the released models, so that a plan needs no download. From their
# config.json; the 7B's leaves most to Llama's defaults. Training and generation read
# the downloaded config and text tokenizer.
RELEASED = {
    f"{owner}/Janus-Pro-{size}": {
        "text_config": {
            "model_type": "llama",
            "vocab_size": 102400,
            "max_position_embeddings": 16384,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "pad_token_id": pad,
        },
        "vision_config": {"image_size": 384, "patch_size": 16},
        "vq_config": {"projection_dim": width, "image_token_embed_dim": width},
        "tie_word_embeddings": False,
    }
    for owner in ("deepseek-community", "deepseek-ai")
    for size, width, inner, layers, heads, pad in (
        ("1B", 2048, 5632, 24, 16, 100002),
        ("7B", 4096, 11008, 30, 32, 100015),
    )
}


class Config(BackboneConfig):
    """The recipe's `backbone` section."""

    name: Literal["janus"]
    path: str = Field(
        min_length=1, description="folder or Hugging Face id, in the layout of transformers or DeepSeek"
    )
    text_tokenizer: str | None = Field(
        default=None, description="folder or Hugging Face id with tokenizer.json; null: the one in path"
    )
    attn_implementation: attention.Implementation = Field(
        default="sdpa", description="sdpa, flash_attention_2 (a CUDA GPU in bf16 or fp16) or eager"
    )
    max_prompt_tokens: int | None = setting(
        None,
        ge=1,
        description="most tokens of a prompt in training and sampling, including about 10 of the template; "
        "longer captions are cut at their end, or refused in training (`data.long_prompts`); null is 256, or "
        "what the model's configuration allows if that is less",
        on_resume=True,
    )

    def at(self, path: str) -> Config:
        """See BackboneConfig. Saving copies the text tokenizer into the folder."""
        return self.model_copy(update={"path": path, "text_tokenizer": None})

    def has_sizes(self) -> bool:
        """See BackboneConfig."""
        return self.path in RELEASED or super().has_sizes()


class JanusEmbed(nn.Module):
    """codes [..., 1] -> [..., D]: a table (not the codebook), then an MLP."""

    def __init__(self, config: JanusConfig):
        super().__init__()
        vq: Any = config.vq_config
        self.embeddings = nn.Embedding(vq.num_embeddings, vq.embed_dim)
        self.aligner = JanusVQVAEAlignerMLP(vq)

    def forward(self, codes: Tensor) -> Tensor:
        return self.aligner(self.embeddings(codes[..., 0]))


class JanusPrefix(nn.Module):
    """Prompt token ids -> embeddings."""

    def __init__(self, embed_tokens: nn.Embedding, pad_id: int):
        super().__init__()
        self.embed_tokens = embed_tokens
        self.pad_id = pad_id

    def forward(self, condition: Condition, uncond: Tensor) -> Prefix:
        """Token ids -> embeddings.

        The unconditional prompt keeps its length, BOS and begin-of-image; the pads
        between are attended to.
        """
        values, mask = condition
        real = mask.long()
        kept = (real.cumsum(1) == 1) & mask
        kept[:, -1] = True
        blank = uncond[:, None] & mask & ~kept
        return Prefix(self.embed_tokens(values.masked_fill(blank, self.pad_id)), mask)


class JanusHead(nn.Module):
    """See mmtensorar.model.protocols.Head. A token has one factor, so prev is empty."""

    def __init__(self, config: JanusConfig):
        super().__init__()
        vq: Any = config.vq_config
        self.head = JanusVQVAEHead(vq)
        layers.use_output_map(self.head.vision_head)

    @property
    def output_maps(self) -> tuple[nn.Module]:
        return (self.head.vision_head,)

    def states(self, hidden: Tensor, prev: Tensor) -> Tensor:
        return self.head.activation_fn(self.head.proj_out(hidden))

    def forward(self, hidden: Tensor, prev: Tensor) -> Tensor:
        """[..., D] -> logits [..., V]."""
        return self.head(hidden)


class JanusCacheLayer(DynamicLayer):
    """A layer of our cache, in the form that transformers' layers call."""

    def __init__(self, layer: kv_cache.LayerCache):
        super().__init__()
        self.layer = layer

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.is_initialized = True
        return self.layer.append(key_states, value_states)


class JanusCache(kv_cache.KVCache):
    """Our cache, with the object that transformers' model takes."""

    def __init__(self, num_layers: int, max_len: int, implementation: attention.Implementation):
        super().__init__(num_layers, max_len, implementation)
        self.for_transformers = Cache(layers=[JanusCacheLayer(layer) for layer in self.layers])


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    pattern: attention.Pattern,
    **options,
) -> tuple[Tensor, None]:
    """Our attention, as transformers' layers call it: -> [B, S, H, C]."""
    return attention.attend(query, key, value, pattern).transpose(1, 2), None


AttentionInterface.register(OWN_ATTENTION, _attend)


class JanusBackbone(nn.Module):
    """See mmtensorar.model.protocols.Backbone. pad_id fills the unconditional
    prompt.
    """

    name = "janus"
    condition: ConditionKind = "tokens"
    prefix_len = None
    default_sampling: dict[str, Any] = {"cfg_scale": 5.0}  # that of the official sampler
    lora_targets = r"language_model\.layers\.\d+\..*_proj"  # the matrices of the language model's layers

    def __init__(
        self, config: JanusConfig, pad_id: int, attn_implementation: attention.Implementation = "sdpa"
    ):
        super().__init__()
        text: Any = config.text_config
        vq: Any = config.vq_config
        vision: Any = config.vision_config
        self.config = config
        self.dim: int = text.hidden_size
        self.num_tokens: int = vq.num_patches**2
        self.image_size: int = vision.image_size
        self.factor_sizes: tuple[int, ...] = (vq.num_embeddings,)
        self.max_prefix_len: int = max_prompt_tokens(config)
        self.text_tokenizer: Any = None  # a PreTrainedTokenizerFast
        self._activation_checkpointing: layers.Checkpointing = False
        self.attn_implementation: attention.Implementation = attn_implementation
        self.language_model = AutoModel.from_config(config.text_config, attn_implementation=OWN_ATTENTION)
        # The table moves into the prefix module, which uses it: each parameter has one
        # owner.
        self.prefix = JanusPrefix(self.language_model.embed_tokens, pad_id)
        self.language_model.embed_tokens = None
        self.embed = JanusEmbed(config)
        self.head = JanusHead(config)
        layers.use_fast_linear(self)

    @property
    def layers(self) -> nn.ModuleList:
        return self.language_model.layers

    @property
    def activation_checkpointing(self) -> layers.Checkpointing:
        return self._activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, policy: layers.Checkpointing) -> None:
        # transformers renamed both methods. It also warns of missing input embeddings;
        # adapters need them.
        model, verbosity = self.language_model, transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        if policy:
            enable = (
                getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            )
            enable(layers.checkpoint_options(policy))
        elif self._activation_checkpointing:
            disable = (
                getattr(model, "activation_checkpointing_disable", None)
                or model.gradient_checkpointing_disable
            )
            disable()
        transformers.logging.set_verbosity(verbosity)
        self._activation_checkpointing = policy

    def new_cache(self, max_len: int) -> JanusCache:
        return JanusCache(len(self.language_model.layers), max_len, self.attn_implementation)

    def forward(self, embeds: Tensor, mask: Tensor | None, cache: JanusCache | None = None) -> Tensor:
        """See Backbone."""
        B, S, _ = embeds.shape
        if cache is not None:
            pattern = cache.begin(B, S, embeds.device, mask).pattern
            positions = cache.positions_RS
        else:
            assert mask is not None
            real = attention.padding(mask)
            pattern = attention.pattern(real, S, S, self.attn_implementation, embeds.device)
            # Positions count from the first real token, whatever the padding.
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        return self.language_model(
            inputs_embeds=embeds,
            position_ids=positions,
            past_key_values=None if cache is None else cache.for_transformers,
            use_cache=cache is not None,
            pattern=pattern,
        ).last_hidden_state

    def example_condition(self, num_rows: int, prompt_len: int) -> Condition:
        """See Backbone: token ids."""
        values = torch.zeros(num_rows, prompt_len, dtype=torch.long)
        return Condition(values, torch.ones(num_rows, prompt_len, dtype=torch.bool))

    def check_prompts(self, section: Config) -> None:
        """See Backbone: there is a text tokenizer, with the tokens that prompts
        need.
        """
        if self.text_tokenizer is None:
            raise ValueError(
                f"{section.path} has no tokenizer.json: give a folder that has one as --text-tokenizer"
            )
        _CaptionEncoder(section)

    def save_pretrained(self, folder: str | Path, text_tokenizer: str | Path | None = None) -> None:
        """Write the generation path in transformers' layout: config.json, safetensors,
        text tokenizer.

        text_tokenizer: the folder to copy it from; None writes the one that the
        backbone was loaded with.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {transformers_name(name): value.detach().cpu() for name, value in self.state_dict().items()}
        save_torch_state_dict(state, folder, max_shard_size="5GB")
        self.save_config(folder, text_tokenizer)

    def save_config(self, folder: Path, text_tokenizer: str | Path | None = None) -> None:
        """The same into an existing folder, without the weights."""
        self.config.save_pretrained(folder)
        if text_tokenizer is not None:
            PreTrainedTokenizerFast.from_pretrained(text_tokenizer).save_pretrained(folder)
        elif self.text_tokenizer is not None:
            self.text_tokenizer.save_pretrained(folder)


def max_prompt_tokens(config: JanusConfig | None, section: Config | None = None, told: int = 0) -> int:
    """The most tokens of a prompt that a section and a model's configuration allow.

    Args:
        config: the model's; None allows any number.
        section: its max_prompt_tokens is used if it is set.
        told: model_max_length of the text tokenizer. Where nobody set it, it is 0 or
            enormous.

    Raises ValueError when the section asks for more than the model has positions for.
    """
    wanted = section and section.max_prompt_tokens
    limits = [wanted or DEFAULT_MAX_TOKENS]
    if config is not None:
        text: Any = config.text_config
        vq: Any = config.vq_config
        positions, num_images = text.max_position_embeddings, vq.num_patches**2
        limits.append(positions - num_images)
        if wanted and wanted > limits[-1]:
            raise ValueError(
                f"backbone.max_prompt_tokens is {wanted}, but the model has {positions} positions, of which "
                f"{num_images} are image tokens; expected {limits[-1]} or fewer"
            )
    if told > 0 and not wanted:
        limits.append(told)
    return min(limits)


def build(
    config: JanusConfig,
    pad_id: int | None = None,
    device: str | torch.device = "cpu",
    attn_implementation: attention.Implementation = "sdpa",
) -> JanusBackbone:
    """A backbone with random weights. pad_id: None takes that of the configuration."""
    text: Any = config.text_config
    if pad_id is None:
        pad_id = text.pad_token_id
    if pad_id is None:
        raise ValueError(
            "the Janus configuration has no text_config.pad_token_id, and there is no text tokenizer with it"
        )
    with torch.device(device):
        return JanusBackbone(config, pad_id, attn_implementation)


def load(
    section: Config, *, weights: bool = True, device: str = "cpu", sizes_only: bool = False
) -> JanusBackbone:
    """See mmtensorar.backbones.load."""
    attention.require(section.attn_implementation, key="backbone.attn_implementation")
    implementation = section.attn_implementation
    if sizes_only and section.path in RELEASED and not Path(section.path).is_dir():
        config = JanusConfig(**RELEASED[section.path])
        backbone = build(config, device=device, attn_implementation=implementation)
        backbone.max_prefix_len = max_prompt_tokens(config, section)
        return backbone
    config, source, rename, text_tokenizer = _locate(section, weights=weights)
    with building(Path(section.path)):
        pad_id = None if text_tokenizer is None else text_tokenizer.pad_token_id
        backbone = build(config, pad_id, device, implementation)
    backbone.text_tokenizer = text_tokenizer
    told = 0 if text_tokenizer is None else text_tokenizer.model_max_length
    backbone.max_prefix_len = max_prompt_tokens(config, section, told)
    if weights:
        fill(backbone.state_dict(), source, rename, ignore=NOT_LOADED.match)
    return backbone


def lazy_weights(section: Config) -> LazyWeights:
    """See mmtensorar.backbones.lazy_weights."""
    config, source, rename, text_tokenizer = _locate(section)
    with building(Path(section.path)):
        backbone = build(config, None if text_tokenizer is None else text_tokenizer.pad_token_id, "meta")
    backbone.text_tokenizer = text_tokenizer
    source = source if isinstance(source, ReleasedWeights) else ReleasedWeights(source)
    return LazyWeights(backbone, source, rename, transformers_name, NOT_LOADED.match)


def _locate(
    section: Config, *, weights: bool = True
) -> tuple[JanusConfig, Path | ReleasedWeights, Callable[[str], str], Any]:
    """Configuration, weights, our names -> those in the weights, and the text tokenizer
    if there is one.
    """
    folder = locate(section.path, key="backbone.path", weights=weights)
    settings = read_config(folder, *MODEL_TYPES, key="backbone.path")
    source: Path | ReleasedWeights = folder
    if settings["model_type"] == janus_deepseek.MODEL_TYPE:
        source = ReleasedWeights(folder, optional=not weights)
        config, rename = janus_deepseek.config(settings, source.shapes, folder), janus_deepseek.backbone_name
    else:
        config, rename = hub_config(JanusConfig, settings, folder), transformers_name
    text_tokenizer = _load_text_tokenizer(
        section.text_tokenizer or folder, required=section.text_tokenizer is not None
    )
    return config, source, rename, text_tokenizer


def transformers_name(name: str) -> str:
    """transformers' name of one of our tensors."""
    for ours, theirs in KEYS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(f"no name in transformers' layout for {name}")


def _load_text_tokenizer(source: str | Path, *, required: bool = True) -> Any:
    """A PreTrainedTokenizerFast, or None where there is none and it is not required."""
    folder = locate(str(source), key="backbone.text_tokenizer", weights=False)
    if not (folder / "tokenizer.json").is_file():
        if required:
            raise ValueError(f"{folder}: there is no tokenizer.json, which holds the text tokenizer")
        return None
    # Not AutoTokenizer: its Llama class replaces the pre-tokenizer of the file.
    text_tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    for role, name in SPECIAL.items():
        unknown = (None, text_tokenizer.unk_token_id)
        if (
            getattr(text_tokenizer, role) is None
            and text_tokenizer.convert_tokens_to_ids(name) not in unknown
        ):
            setattr(text_tokenizer, role, name)
    return text_tokenizer


class _CaptionEncoder:
    """Captions -> Condition: the official prompt, BOS in front, left-padded to the
    longest.
    """

    kind: ConditionKind = "tokens"
    num_classes = None

    def __init__(self, section: Config):
        source = section.text_tokenizer or section.path
        self.text_tokenizer = _load_text_tokenizer(source)
        # Ids are looked up by name: the 1B and the 7B number their special tokens
        # differently.
        self.bos_id, self.pad_id = self.text_tokenizer.bos_token_id, self.text_tokenizer.pad_token_id
        added = self.text_tokenizer.added_tokens_decoder.values()
        self.special_names = [token.content for token in added if token.special and len(token.content) > 1]
        begin = self.text_tokenizer.convert_tokens_to_ids(BEGIN_OF_IMAGE)
        unknown = {None, self.text_tokenizer.unk_token_id}
        if self.bos_id is None or self.pad_id is None or begin in unknown:
            raise ValueError(
                f"the text tokenizer of {source} lacks a token that Janus needs: BOS, pad or {BEGIN_OF_IMAGE}"
            )
        config = _text_limits(section)
        self.max_tokens = max_prompt_tokens(config, section, self.text_tokenizer.model_max_length)
        self.backend = self.text_tokenizer.backend_tokenizer
        if self.max_tokens <= (needed := self._count("")):
            raise ValueError(
                f"backbone.max_prompt_tokens is {self.max_tokens}, but a prompt without a caption has "
                f"{needed} tokens; expected {needed + 1} or more"
            )

    def __call__(self, captions: Sequence[str]) -> Condition:
        """B captions -> values [B, P] int64, mask [B, P] bool."""
        texts = [self._plain(self._beginning(caption)) for caption in captions]
        # BOS is added here, since only some tokenizer files add it.
        rows = self.text_tokenizer(
            [PROMPT.format(caption=text) for text in texts], add_special_tokens=False, verbose=False
        )["input_ids"]
        rows = [[self.bos_id, *row] for row in rows]
        rows = [
            self._cut(text) if len(row) > self.max_tokens else row
            for text, row in zip(texts, rows, strict=True)
        ]
        P = max(map(len, rows))
        values = torch.tensor([[self.pad_id] * (P - len(row)) + row for row in rows])
        mask = torch.tensor([[False] * (P - len(row)) + [True] * len(row) for row in rows])
        return Condition(values, mask)

    def excess(self, caption: str) -> Excess | None:
        """See CaptionEncoder."""
        read = self._beginning(caption)
        num_tokens = self._count(read)
        if num_tokens <= self.max_tokens:
            return None
        return Excess(num_tokens, self.max_tokens, len(caption) - len(read))

    def _beginning(self, caption: str) -> str:
        return beginning(caption, self.max_tokens, self._count)

    def _count(self, caption: str) -> int:
        """Tokens of the whole prompt, BOS included."""
        return 1 + len(self._encode(self._plain(caption)).ids)

    def _encode(self, text: str) -> Any:
        """The tokens of the prompt without BOS, and the characters of each, of a
        caption from `_plain`.
        """
        # A tokenizer's file may have limits of its own. `encode` runs in this thread:
        # the threads of `encode_batch` would hang in a forked process.
        self.backend.no_truncation()
        self.backend.no_padding()
        return self.backend.encode(PROMPT.format(caption=text), add_special_tokens=False)

    def _cut(self, text: str) -> list[int]:
        """The prompt of the text's beginning, as long as the limit allows.

        The tokens are exactly those of a shorter caption: the template follows it, as
        in every prompt, and no character is cut in two.
        """
        first = PROMPT.index("{caption}")
        while (excess := len((encoding := self._encode(text)).ids) + 1 - self.max_tokens) > 0:
            starts = [
                start for start, stop in encoding.offsets if first <= start < min(stop, first + len(text))
            ]
            # Tokens at the new end may split into more, so this can take a second
            # round.
            text = text[: starts[-excess] - first].rstrip() if excess < len(starts) else ""
        return [self.bos_id, *encoding.ids]

    def to(self, device: torch.device) -> None:
        """Nothing to move: a text tokenizer runs on the CPU."""

    def identity(self) -> None:
        """Token ids are not text features."""

    def _plain(self, caption: str) -> str:
        """The caption with a space inside the names of special tokens, so that they
        cannot end the prompt.
        """
        for name in self.special_names:
            caption = caption.replace(name, f"{name[0]} {name[1:]}")
        return caption


def _text_limits(section: Config) -> JanusConfig | None:
    """The configuration, for its number of positions; None where a folder holds a text
    tokenizer alone.
    """
    folder = locate(section.path, key="backbone.path", weights=False)
    if not (folder / "config.json").is_file():
        return None
    settings = read_config(folder, *MODEL_TYPES, key="backbone.path")
    if settings["model_type"] == janus_deepseek.MODEL_TYPE:
        return janus_deepseek.config(settings, (), folder)
    return hub_config(JanusConfig, settings, folder)


def caption_encoder(section: Config) -> _CaptionEncoder:
    """See mmtensorar.backbones.caption_encoder."""
    return _CaptionEncoder(section)


# ---- back into the authors' layout ---------------------------------------------------------------


def write_original(
    target: Path,
    weights: LazyWeights,
    *,
    image_tokenizer: ImageTokenizer | None,
    base: Callable[[], str],
) -> str:
    """See BackboneFile: a folder in the layout of the base.

    Every tensor and file of the base is written, with the trained values instead of the
    base's.
    """
    path = base()
    try:
        began_as = lazy_weights(Config.model_validate({"name": "janus", "path": path}))
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; give the original Janus as --base") from None
    values = _trained_values(weights, began_as)
    base_folder = began_as.source.path
    in_transformers = read_config(base_folder, *MODEL_TYPES, key="--base")["model_type"] == "janus"
    if image_tokenizer is not None and image_tokenizer.name == IMAGE_TOKENIZER:
        vq_name = INSIDE.__add__ if in_transformers else janus_deepseek.vq_name
        values |= {vq_name(name): value for name, value in image_tokenizer.official_tensors().items()}

    widened: list[str] = []  # tensors that do not fit the base's dtype

    def merged() -> Iterator[tuple[str, Tensor]]:
        tensors = began_as.source.read(began_as.source.shapes)
        for name, value in tensors_bar(tensors, len(began_as.source.shapes), f"janus to {target.name}"):
            ours = values[name] if name in values else value
            if ours.dtype != value.dtype and torch.equal(ours.to(value.dtype).to(ours.dtype), ours):
                ours = ours.to(value.dtype)
            if ours.dtype != value.dtype:
                widened.append(name)
            yield name, ours

    with new_path(target) as partial:
        write_safetensors(partial, merged())
        for file in sorted(base_folder.iterdir()):
            if file.suffix in (".json", ".jinja", ".txt", ".model") and not file.name.endswith(".index.json"):
                shutil.copyfile(file, partial / file.name)
        if not (partial / "tokenizer.json").is_file() and weights.model.text_tokenizer is not None:
            weights.model.text_tokenizer.save_pretrained(partial)
        if widened:
            # Training in float32 gave numbers that the base's dtype cannot hold. With
            # that dtype in config.json, transformers would round them again.
            config = read_json(partial / "config.json")
            _set_dtype(config)
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return "Janus in its original layout"


def _trained_values(weights: LazyWeights, began_as: LazyWeights) -> dict[str, Tensor]:
    """Name in the base -> trained value, which stays on disk until it is used.

    Raises ValueError when the base is not a complete Janus, or has other shapes.
    """
    path, shapes, trained_shapes = began_as.source.path, began_as.source.shapes, weights.source.shapes
    if not any(name.startswith(("model.vision_model.", "vision_model.")) for name in shapes):
        raise ValueError(
            f"{path} has no vision tower, so it is not a complete Janus; give the original one as --base"
        )
    saved_names = {began_as.rename(name): weights.saved_name(name) for name in weights.model.state_dict()}
    for name, saved in saved_names.items():
        if shapes.get(name) != trained_shapes[saved]:
            problem = f"has shape {shapes[name]} there" if name in shapes else "is missing there"
            raise ValueError(
                f"{path} is not what {weights.source.path} began as: {name} {problem}, "
                f"expected {trained_shapes[saved]}"
            )
    trained = dict(weights.tensors())
    return {name: trained[saved] for name, saved in saved_names.items()}


def _set_dtype(config: dict, dtype: str = "float32") -> None:
    """Set the dtype of weights in a config.json and in its nested configurations."""
    if "model_type" in config and not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = dtype
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            config[key] = dtype
        elif isinstance(value, dict):
            _set_dtype(value, dtype)
