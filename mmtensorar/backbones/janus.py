"""Janus and Janus-Pro, text to image, on transformers' own classes.

Only the generation path is built and loaded: language model, generation embeddings,
aligner and head, from the layout of transformers or of DeepSeek (saving is in that of
transformers). The vision tower, its aligner and lm_head play no part; the VQ model is an image
tokenizer (image_tokenizers/janus_vq.py). Prompt, padding and the unconditional
prompt follow the official sampler (deepseek-ai/Janus at 1daa72f, generation_inference.py).
Shapes: B batch, P prefix, S rows, T image tokens, D width, V codebook size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoModel, Cache, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer
from transformers.models.janus.configuration_janus import JanusConfig
from transformers.models.janus.modeling_janus import JanusVQVAEAlignerMLP, JanusVQVAEHead

from mmtensorar.checkpoints import janus_deepseek
from mmtensorar.checkpoints.released import (
    Checkpoint,
    Unread,
    fill,
    hub_config,
    locate,
    read_config,
)
from mmtensorar.model import attention, kv_cache, layers
from mmtensorar.model.conditions import Condition, Prefix
from mmtensorar.recipe import Section

PROMPT = "<|User|>: {caption}\n\n<|Assistant|>:<begin_of_image>"
BEGIN_OF_IMAGE = "<begin_of_image>"
# Looked up by name where a tokenizer file gives them no role.
SPECIAL = {"bos_token": "<｜begin▁of▁sentence｜>", "pad_token": "<｜▁pad▁｜>"}

# The matrices of the language model's layers.
LORA_TARGETS = r"language_model\.layers\.\d+\..*_proj"

# Our names -> the names in a transformers checkpoint.
KEYS = {
    "prefix.embed_tokens.": "model.language_model.embed_tokens.",
    "language_model.": "model.language_model.",
    "embed.embeddings.": "model.generation_embeddings.",
    "embed.aligner.": "model.generation_aligner.",
    "head.head.": "model.generation_head.",
}

# What else a whole Janus holds, in either layout: understanding, the text head, the image tokenizer.
ELSEWHERE = re.compile(
    r"(model\.)?(vision_model|aligner|vqmodel|gen_vision_model)\.|(language_model\.)?lm_head\.|.*\.inv_freq$"
)

# Sizes of the released models (their config.json; the 7B's leaves most to Llama's defaults), so
# that a plan needs no download. Training and generation read the downloaded config and text tokenizer.
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


class Config(Section):
    """path: a folder or Hugging Face id, in the layout of transformers or DeepSeek. text_tokenizer: None is in path."""

    name: Literal["janus"]
    path: str = Field(min_length=1)
    text_tokenizer: str | None = None
    attn_implementation: attention.Implementation = "sdpa"


class JanusEmbed(nn.Module):
    """codes [..., 1] -> [..., D]: a table of its own (not the codebook), then an MLP."""

    def __init__(self, config: JanusConfig):
        super().__init__()
        self.embeddings = nn.Embedding(config.vq_config.num_embeddings, config.vq_config.embed_dim)
        self.aligner = JanusVQVAEAlignerMLP(config.vq_config)

    def forward(self, codes: Tensor) -> Tensor:
        return self.aligner(self.embeddings(codes[..., 0]))


class JanusPrefix(nn.Module):
    """Prompt token ids -> embeddings."""

    def __init__(self, embed_tokens: nn.Embedding, pad_id: int):
        super().__init__()
        self.embed_tokens = embed_tokens
        self.pad_id = pad_id

    def forward(self, condition: Condition, uncond: Tensor) -> Prefix:
        """The unconditional prompt keeps its length, BOS and begin-of-image; the pads between are attended to."""
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
        self.head = JanusVQVAEHead(config.vq_config)
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
    """transformers' growing layer, in memory that is taken once: its own copies all earlier places at every step."""

    def __init__(self, max_len: int):
        super().__init__()
        self.memory = kv_cache.LayerCache(max_len)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.is_initialized = True
        self.keys, self.values = self.memory.append(key_states, value_states)
        return self.keys, self.values

    def crop(self, max_length: int) -> None:
        self.memory.crop(max_length)
        self.keys, self.values = (each[:, :, : self.memory.length] for each in (self.keys, self.values))


class JanusBackbone(nn.Module):
    """See mmtensorar.model.protocols.Backbone. pad_id fills the unconditional prompt."""

    lora_targets = LORA_TARGETS

    def __init__(self, config: JanusConfig, pad_id: int):
        super().__init__()
        self.config = config
        self.dim = config.text_config.hidden_size
        self.num_tokens = config.vq_config.num_patches**2
        self.factor_sizes = (config.vq_config.num_embeddings,)
        self.text_tokenizer: PreTrainedTokenizerFast | None = None
        self._activation_checkpointing: layers.Checkpointing = False
        self.language_model = AutoModel.from_config(config.text_config)
        # The table moves into the prefix module, which uses it: a parameter has one owner.
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
        # transformers renamed both; and it warns of missing input embeddings, which only adapters need.
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

    def new_cache(self, max_len: int) -> Cache:
        return Cache(layers=[JanusCacheLayer(max_len) for _ in self.language_model.layers])

    def forward(self, embeds: Tensor, mask: Tensor, cache: Cache | None = None) -> Tensor:
        # Places count from the first real token, whatever the padding.
        places = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        return self.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=places,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def save_pretrained(self, folder: str | Path, text_tokenizer: str | Path | None = None) -> None:
        """Write the generation path in the transformers layout: config.json, safetensors, text tokenizer.

        text_tokenizer: a folder to take it from; None takes the one the backbone was loaded with.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {_released_name(name): value.detach().cpu() for name, value in self.state_dict().items()}
        save_torch_state_dict(state, folder, max_shard_size="5GB")
        self.save_config(folder, text_tokenizer)

    def save_config(self, folder: Path, text_tokenizer: str | Path | None = None) -> None:
        self.config.save_pretrained(folder)
        if text_tokenizer is not None:
            PreTrainedTokenizerFast.from_pretrained(text_tokenizer).save_pretrained(folder)
        elif self.text_tokenizer is not None:
            self.text_tokenizer.save_pretrained(folder)


def build(
    config: JanusConfig, pad_id: int | None = None, device: str | torch.device = "cpu"
) -> JanusBackbone:
    """A backbone with random weights. pad_id: None takes the configuration's."""
    if pad_id is None:
        pad_id = config.text_config.pad_token_id
    if pad_id is None:
        raise ValueError(
            "the Janus configuration has no text_config.pad_token_id and no text tokenizer came with it"
        )
    with torch.device(device):
        return JanusBackbone(config, pad_id)


def load(
    section: Config, *, weights: bool = True, device: str = "cpu", sizes_only: bool = False
) -> JanusBackbone:
    """See mmtensorar.backbones.load."""
    if sizes_only and section.path in RELEASED and not Path(section.path).is_dir():
        return build(_with_attention(JanusConfig(**RELEASED[section.path]), section), device=device)
    config, source, rename, text_tokenizer = _find(section, weights=weights)
    backbone = build(config, None if text_tokenizer is None else text_tokenizer.pad_token_id, device)
    backbone.text_tokenizer = text_tokenizer
    if weights:
        fill(backbone.state_dict(), source, rename, ignore=ELSEWHERE.match)
    return backbone


def unread(section: Config) -> Unread:
    """See mmtensorar.backbones.unread."""
    config, source, rename, text_tokenizer = _find(section)
    backbone = build(config, None if text_tokenizer is None else text_tokenizer.pad_token_id, "meta")
    backbone.text_tokenizer = text_tokenizer
    source = source if isinstance(source, Checkpoint) else Checkpoint(source)
    return Unread(backbone, source, rename, _released_name, ELSEWHERE.match)


def _find(
    section: Config, *, weights: bool = True
) -> tuple[JanusConfig, Path | Checkpoint, Callable[[str], str], PreTrainedTokenizerFast | None]:
    """Configuration, weights, our names -> those of the weights, and the text tokenizer where there is one."""
    folder = locate(section.path, key="backbone.path", weights=weights)
    settings = read_config(folder, "janus", janus_deepseek.MODEL_TYPE, key="backbone.path")
    source: Path | Checkpoint = folder
    if settings["model_type"] == janus_deepseek.MODEL_TYPE:
        source = Checkpoint(folder, optional=not weights)
        config, rename = janus_deepseek.config(settings, source.shapes, folder), janus_deepseek.backbone_name
    else:
        config, rename = hub_config(JanusConfig, settings, folder), _released_name
    text_tokenizer = _load_text_tokenizer(
        section.text_tokenizer or folder, required=section.text_tokenizer is not None
    )
    return _with_attention(config, section), source, rename, text_tokenizer


def _with_attention(config: JanusConfig, section: Config) -> JanusConfig:
    attention.require(section.attn_implementation, key="backbone.attn_implementation")
    config.text_config._attn_implementation = section.attn_implementation
    return config


def _released_name(name: str) -> str:
    for ours, theirs in KEYS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(f"no released name for {name}")


def _load_text_tokenizer(source: str | Path, *, required: bool = True) -> PreTrainedTokenizerFast | None:
    folder = locate(str(source), key="backbone.text_tokenizer", weights=False)
    if not (folder / "tokenizer.json").is_file():
        if required:
            raise ValueError(f"{folder}: no tokenizer.json, so there is no text tokenizer")
        return None
    # Not AutoTokenizer: its Llama class replaces the file's own pre-tokenizer.
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
    """Captions -> Condition: the official prompt, BOS in front, left-padded to the longest."""

    def __init__(self, section: Config):
        self.text_tokenizer = _load_text_tokenizer(section.text_tokenizer or section.path)
        # Ids are looked up by name: the 1B and the 7B number their special tokens differently.
        self.bos_id, self.pad_id = self.text_tokenizer.bos_token_id, self.text_tokenizer.pad_token_id
        added = self.text_tokenizer.added_tokens_decoder.values()
        self.special_names = [token.content for token in added if token.special and len(token.content) > 1]
        begin = self.text_tokenizer.convert_tokens_to_ids(BEGIN_OF_IMAGE)
        unknown = {None, self.text_tokenizer.unk_token_id}
        if self.bos_id is None or self.pad_id is None or begin in unknown:
            raise ValueError(
                f"the text tokenizer of {section.text_tokenizer or section.path} lacks a token that Janus needs: "
                f"BOS, pad or {BEGIN_OF_IMAGE}"
            )

    def __call__(self, captions: Sequence[str]) -> Condition:
        """B captions -> values [B, P] int64, mask [B, P] bool."""
        prompts = [PROMPT.format(caption=self._plain(caption)) for caption in captions]
        # BOS is added here, since whether a tokenizer file does it by itself varies.
        rows = self.text_tokenizer(prompts, add_special_tokens=False)["input_ids"]
        rows = [[self.bos_id, *row] for row in rows]
        P = max(map(len, rows))
        values = torch.tensor([[self.pad_id] * (P - len(row)) + row for row in rows])
        mask = torch.tensor([[False] * (P - len(row)) + [True] * len(row) for row in rows])
        return Condition(values, mask)

    def _plain(self, caption: str) -> str:
        """The caption with the names of special tokens broken by a space: it is text, and must not end the prompt."""
        for name in self.special_names:
            caption = caption.replace(name, f"{name[0]} {name[1:]}")
        return caption


def caption_encoder(section: Config) -> _CaptionEncoder:
    """See mmtensorar.backbones.caption_encoder."""
    return _CaptionEncoder(section)
