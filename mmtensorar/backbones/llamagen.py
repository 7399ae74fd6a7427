"""LlamaGen's GPT, class-conditional and text-conditional, written anew.

It computes what the original does (FoundationVision/LlamaGen at ce98ec4, autoregressive/models/gpt.py) and reads its
checkpoints: official .pt files, or a folder with config.json and safetensors under the official tensor names. Its
dropout (0.1 in training from scratch) is left out.
Shapes: B batch, P prefix, S rows, T image tokens, D width, H heads, C width of a head or of a caption feature.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as functional
from huggingface_hub import save_torch_state_dict
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from mmtensorar.captions import encoders
from mmtensorar.checkpoints.released import (
    Checkpoint,
    Unread,
    fill,
    locate,
    own_config,
    parse_config,
    read_config,
)
from mmtensorar.model import attention, kv_cache, layers
from mmtensorar.model.conditions import Condition, Prefix
from mmtensorar.recipe import Section

# Our names -> the official ones; the others are the same.
KEYS = {
    "embed.embeddings.": "tok_embeddings.",
    "head.output.": "output.",
    "prefix.embeddings.": "cls_embedding.embedding_table.",
    "prefix.null_caption": "cls_embedding.uncond_embedding",
    "prefix.fc": "cls_embedding.cap_proj.fc",
}
# A training checkpoint wraps its state dict, DeepSpeed's in `module`; those trained with FSDP are bare.
WRAPPERS = ("model", "module", "state_dict")
# Tables that some versions of the original stored; all are computed here.
COMPUTED = re.compile(r"freqs_cis|causal_mask|layers\.\d+\.attention\.kv_cache\..+")

SIZES = {  # released models: width, layers, heads
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1280, 36, 20),
    "XXL": (1536, 48, 24),
    "3B": (3200, 24, 32),
}
OFFICIAL_FILE = re.compile(r"(?:c2i|t2i)_(?:B|L|XL|XXL|3B)_(?:stage\d_)?(\d+)\.\w+")
PIXELS_PER_TOKEN = 16  # a side, with the VQ-16 tokenizer that all released models use

# The matrices of the transformer's layers.
LORA_TARGETS = r"layers\.\d+\.(attention|feed_forward)\.\w+"


class Config(Section):
    """path: a .pt or .safetensors file with official names, or a folder or Hugging Face id with config.json.

    size, condition and image_size (pixels a side) say what path should hold, and are checked against it. A file tells
    its image size by its official name or its saved arguments only, else image_size is required; a plan without the
    file needs all three.
    text_encoder, caption_cleaning: for text-conditional models, see mmtensorar.captions.encoders.
    """

    name: Literal["llamagen"]
    path: str = Field(min_length=1)
    size: Literal["B", "L", "XL", "XXL", "3B"] | None = None
    condition: Literal["class", "text"] | None = None
    image_size: int | None = Field(None, ge=PIXELS_PER_TOKEN, multiple_of=PIXELS_PER_TOKEN)
    attn_implementation: attention.Implementation = "sdpa"
    text_encoder: str = "google/flan-t5-xl"
    caption_cleaning: encoders.Cleaning = "original"


class Architecture(BaseModel):
    """What config.json says. num_classes: without the null class. caption_dim: C of the text encoder's features."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    condition: Literal["class", "text"]
    dim: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    ffn_dim: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    num_tokens: int = Field(ge=1)
    prefix_len: int = Field(1, ge=1)
    num_classes: int = 1000
    caption_dim: int = 2048
    rope_base: float = Field(10000, gt=0)
    norm_eps: float = Field(1e-5, gt=0)

    @model_validator(mode="after")
    def _can_be_built(self) -> Architecture:
        if self.dim % self.num_heads or self.head_dim % 4:
            raise ValueError(f"dim {self.dim} over num_heads {self.num_heads} is no multiple of 4")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if math.isqrt(self.num_tokens) ** 2 != self.num_tokens:
            raise ValueError(f"num_tokens {self.num_tokens} is no square")
        if self.condition == "class" and self.prefix_len != 1:
            raise ValueError(f"prefix_len is {self.prefix_len}; expected 1 with a class as the condition")
        return self

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


# ---- the seams -----------------------------------------------------------------------------------


class LlamaGenEmbed(nn.Module):
    """codes [..., 1] -> [..., D]."""

    def __init__(self, config: Architecture):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.dim)

    def forward(self, codes: Tensor) -> Tensor:
        return self.embeddings(codes[..., 0])


class ClassPrefix(nn.Module):
    """Class ids [B, 1] -> embeddings [B, 1, D]; the row after the last class is the null class."""

    def __init__(self, config: Architecture):
        super().__init__()
        self.null_class = config.num_classes
        self.embeddings = nn.Embedding(config.num_classes + 1, config.dim)

    def forward(self, condition: Condition, uncond: Tensor) -> Prefix:
        return Prefix(
            self.embeddings(condition.values.masked_fill(uncond[:, None], self.null_class)), condition.mask
        )


class TextPrefix(nn.Module):
    """Features of a text encoder [B, P, C], left-padded -> embeddings [B, P, D].

    An uncond row gets the null caption under its own mask, as in the original: it sees the last rows of the null
    caption, as many as its caption had.
    """

    def __init__(self, config: Architecture):
        super().__init__()
        # Never trained, it stays at its random start: a buffer that has to come from the checkpoint.
        start = torch.randn(config.prefix_len, config.caption_dim) / config.caption_dim**0.5
        self.register_buffer("null_caption", start)
        self.fc1 = nn.Linear(config.caption_dim, config.dim, bias=False)
        self.fc2 = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, condition: Condition, uncond: Tensor) -> Prefix:
        values, mask = condition
        if values.shape[1:] != self.null_caption.shape:
            raise ValueError(
                f"captions are {list(values.shape[1:])} features, the backbone expects {list(self.null_caption.shape)}"
            )
        features = torch.where(uncond[:, None, None], self.null_caption, values.to(self.null_caption.dtype))
        hidden = self.fc1(features.to(self.fc1.weight.dtype))
        return Prefix(self.fc2(functional.gelu(hidden, approximate="tanh")), mask)

    def _apply(self, fn, recurse: bool = True):
        # Having no optimiser, the buffer has no float32 master copy either: a cast to bf16 would be saved for good.
        exact = self.null_caption
        super()._apply(fn, recurse)
        if not exact.is_meta:
            self.null_caption = exact.to(self.null_caption.device)
        return self


class LlamaGenHead(nn.Module):
    """See mmtensorar.model.protocols.Head. A token has one factor, so prev is empty."""

    def __init__(self, config: Architecture):
        super().__init__()
        self.output = layers.OutputMap(config.dim, config.vocab_size, bias=False)

    @property
    def output_maps(self) -> tuple[nn.Module]:
        return (self.output,)

    def states(self, hidden: Tensor, prev: Tensor) -> Tensor:
        return hidden

    def forward(self, hidden: Tensor, prev: Tensor) -> Tensor:
        """[..., D] -> logits [..., V]."""
        return self.output(hidden)


class LlamaGenBackbone(nn.Module):
    """See mmtensorar.model.protocols.Backbone. Random weights are the original's: std 0.02, and zero logits."""

    lora_targets = LORA_TARGETS

    def __init__(self, config: Architecture, attn_implementation: attention.Implementation = "sdpa"):
        super().__init__()
        self.config = config
        self.attn_implementation = attn_implementation
        self.activation_checkpointing: layers.Checkpointing = False
        self.dim = config.dim
        self.num_tokens = config.num_tokens
        self.factor_sizes = (config.vocab_size,)
        self.prefix = (ClassPrefix if config.condition == "class" else TextPrefix)(config)
        self.embed = LlamaGenEmbed(config)
        self.layers = nn.ModuleList(
            layers.Block(
                layers.SelfAttention(config.dim, config.num_heads, config.num_kv_heads),
                config.dim,
                config.ffn_dim,
                config.norm_eps,
            )
            for _ in range(config.num_layers)
        )
        self.norm = layers.RMSNorm(config.dim, config.norm_eps)
        self.head = LlamaGenHead(config)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.output.weight)

    def new_cache(self, max_len: int) -> kv_cache.KVCache:
        return kv_cache.KVCache(len(self.layers), max_len)

    def forward(
        self, embeds: Tensor, mask: Tensor, cache: kv_cache.KVCache | None = None
    ) -> Tensor:
        start = 0 if cache is None else cache.length
        stop = start + embeds.shape[1]
        config = self.config
        table = layers.rotary_table(
            config.prefix_len, config.num_tokens, config.head_dim, config.rope_base, embeds.device
        )[start:stop]
        # A class is one place and always there, which a mask on the GPU could only tell by stopping for it.
        padding = mask if config.condition == "text" else None
        pattern = attention.pattern(padding, stop - start, stop, self.attn_implementation, embeds.device)
        checkpointing = self.activation_checkpointing
        hidden = layers.run(
            self.layers, embeds, table, pattern, cache, activation_checkpointing=checkpointing
        )
        return self.norm(hidden)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and safetensors under the official tensor names."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_config(folder)
        state = {
            official_name(name): value.detach().cpu().contiguous()
            for name, value in self.state_dict().items()
        }
        save_torch_state_dict(state, folder, max_shard_size="5GB")

    def save_config(self, folder: Path) -> None:
        write_config(self.config, folder)


# ---- files ---------------------------------------------------------------------------------------


def official_name(name: str) -> str:
    """The name of one of our tensors in an official checkpoint."""
    for ours, theirs in KEYS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def write_config(config: Architecture, folder: Path) -> None:
    settings = {"model_type": "llamagen"} | config.model_dump()
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load(
    section: Config, *, weights: bool = True, device: str = "cpu", sizes_only: bool = False
) -> LlamaGenBackbone:
    """See mmtensorar.backbones.load."""
    attention.require(section.attn_implementation, key="backbone.attn_implementation")
    config, source = _find(section, weights=weights, sizes_only=sizes_only)
    with torch.device("meta" if weights else device):  # where all is filled, nothing need be drawn
        backbone = LlamaGenBackbone(config, section.attn_implementation)
    if weights:
        backbone.to_empty(device=device)
        fill(backbone.state_dict(), source, official_name, ignore=COMPUTED.fullmatch)
    return backbone


def unread(section: Config) -> Unread:
    """See mmtensorar.backbones.unread."""
    config, source = _find(section, weights=True)
    with torch.device("meta"):
        backbone = LlamaGenBackbone(config)
    source = source if isinstance(source, Checkpoint) else Checkpoint(source)
    return Unread(backbone, source, official_name, official_name, COMPUTED.fullmatch)


def _find(
    section: Config, *, weights: bool = False, sizes_only: bool = False
) -> tuple[Architecture, Path | Checkpoint | None]:
    """The architecture that a section means, and where its weights are. Raises ValueError when they disagree."""
    claims = (section.size, section.condition, section.image_size)
    if sizes_only and not Path(section.path).exists() and None not in claims:
        return released(*claims), None
    path = locate(section.path, key="backbone.path", weights=weights)
    if path.is_dir() and not (path / "config.json").is_file():
        path = locate(
            section.path, key="backbone.path"
        )  # an official file, alone in a folder, is its own configuration
    if path.is_dir():
        source: Path | Checkpoint = path
        config = parse_config(Architecture, read_config(path, "llamagen", key="backbone.path"), path)
    else:
        source = Checkpoint(path, WRAPPERS)
        config = own_config(Architecture, path, "llamagen") or _inferred(source, section.image_size)
    _check_claims(section, config, path)
    return config, source


def released(size: str, condition: str, image_size: int) -> Architecture:
    """A released model: its size, condition (class or text) and image size in pixels."""
    dim, num_layers, num_heads = SIZES[size]
    return Architecture(
        condition=condition,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        ffn_dim=layers.ffn_width(dim),
        vocab_size=16384,
        num_tokens=(image_size // PIXELS_PER_TOKEN) ** 2,
        prefix_len=1 if condition == "class" else 120,
    )


def _inferred(source: Checkpoint, image_size: int | None) -> Architecture:
    """The architecture that a file's tensors show, with image_size for what they do not."""
    shapes, path = source.shapes, source.path
    needed = ["tok_embeddings.weight", "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight"]
    if missing := [name for name in needed if len(shapes.get(name, ())) != 2]:
        raise ValueError(
            f"{path}: no LlamaGen GPT, for {', '.join(missing)} is missing; it has {', '.join(sorted(shapes)[:10])}"
        )
    vocab_size, dim = shapes["tok_embeddings.weight"]
    num_layers = 1 + max(int(name.split(".")[1]) for name in shapes if re.match(r"layers\.\d+\.", name))
    heads = {(width, layers): count for width, layers, count in SIZES.values()}
    if (dim, num_layers) not in heads:
        raise ValueError(
            f"{path}: width {dim} and {num_layers} layers are no released size ({', '.join(SIZES)}), so the tensors do "
            "not tell the number of heads; use a folder with config.json"
        )
    num_heads = heads[dim, num_layers]
    classes, null = (
        shapes.get("cls_embedding.embedding_table.weight"),
        shapes.get("cls_embedding.uncond_embedding"),
    )
    if classes is None and null is None:
        raise ValueError(
            f"{path}: neither cls_embedding.embedding_table.weight (class-conditional) nor "
            "cls_embedding.uncond_embedding (text-conditional) is in it"
        )
    made_for = _made_for(source)
    image_size = image_size or made_for
    if image_size is None:
        raise ValueError(
            f"backbone.image_size: {path} does not tell its image size; released are 256, 384 and 512"
        )
    if made_for not in (None, image_size):
        raise ValueError(
            f"backbone.image_size is {image_size}, but {path} is a checkpoint for {made_for} pixels"
        )
    condition = (
        {"condition": "class", "num_classes": classes[0] - 1}
        if classes
        else {
            "condition": "text",
            "prefix_len": null[0],
            "caption_dim": null[1],
        }
    )
    return Architecture(
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=(shapes["layers.0.attention.wqkv.weight"][0] - dim) // 2 * num_heads // dim,
        ffn_dim=shapes["layers.0.feed_forward.w1.weight"][0],
        vocab_size=vocab_size,
        num_tokens=(image_size // PIXELS_PER_TOKEN) ** 2,
        **condition,
    )


def _made_for(source: Checkpoint) -> int | None:
    """Pixels a side of an official file, where its name or the command line saved in it says so."""
    if official := OFFICIAL_FILE.fullmatch(source.path.name):
        return int(official[1])
    return getattr(source.others.get("args"), "image_size", None)


def _check_claims(section: Config, config: Architecture, path: Path) -> None:
    if section.size is not None and SIZES[section.size] != (
        found := (config.dim, config.num_layers, config.num_heads)
    ):
        words = "width {}, {} layers, {} heads"
        raise ValueError(
            f"backbone.size is {section.size} ({words.format(*SIZES[section.size])}), {path} has {words.format(*found)}"
        )
    if section.condition not in (None, config.condition):
        raise ValueError(
            f"backbone.condition is {section.condition}, {path} is {config.condition}-conditional"
        )
    side = math.isqrt(config.num_tokens)
    if section.image_size not in (None, side * PIXELS_PER_TOKEN):
        raise ValueError(
            f"backbone.image_size is {section.image_size}, but {path} is for {side * PIXELS_PER_TOKEN} pixels "
            f"({side}x{side} image tokens)"
        )


# ---- conditions ----------------------------------------------------------------------------------


def caption_encoder(section: Config) -> encoders.ClassNumbers | encoders.T5Features:
    """See mmtensorar.backbones.caption_encoder."""
    config, _ = _find(section)
    if config.condition == "class":
        return encoders.ClassNumbers(config.num_classes)
    return encoders.T5Features(
        section.text_encoder,
        num_slots=config.prefix_len,
        dim=config.caption_dim,
        cleaning=section.caption_cleaning,
    )
