"""LlamaGen's GPT, class-conditional and text-conditional, in code of our own.

It computes what the original does (FoundationVision/LlamaGen at ce98ec4,
autoregressive/models/gpt.py) and reads its weights: official .pt files, or a folder
with config.json and safetensors under the official tensor names. The original's dropout
(0.1 in training from scratch) is left out.
Shapes: B batch, P prefix, S rows, T image tokens, D width, H heads, C width of a head
or of a caption feature.
"""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as functional
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from mmtensorar.backbones import _published
from mmtensorar.backbones._published import PublishedBackbone
from mmtensorar.captions.cleaning import Cleaning
from mmtensorar.captions.encoders import ClassNumbers, T5Features
from mmtensorar.checkpoints.released import (
    LazyWeights,
    ReleasedWeights,
    locate,
    parse_config,
    read_config,
    saved_config,
    write_torch,
)
from mmtensorar.model import attention, kv_cache, layers
from mmtensorar.model.conditions import Condition, ConditionKind, Prefix
from mmtensorar.model.protocols import ImageTokenizer
from mmtensorar.recipe import BackboneConfig

MODEL_TYPE = "llamagen"
SIGNATURES = ("tok_embeddings.weight",)
MODEL_TYPES = (MODEL_TYPE,)
IMAGE_TOKENIZER = "llamagen_vq"
IMAGE_TOKENIZER_PREFIXES = ()  # it is a separate file

# Our names -> the official ones; the others are the same.
KEYS = {
    "embed.embeddings.": "tok_embeddings.",
    "head.output.": "output.",
    "prefix.embeddings.": "cls_embedding.embedding_table.",
    "prefix.null_caption": "cls_embedding.uncond_embedding",
    "prefix.fc": "cls_embedding.cap_proj.fc",
}
# The authors' training wraps the state dict (with DeepSpeed in `module`), but not with
# FSDP.
WRAPPERS = ("model", "module", "state_dict")
# Tables that some versions of the original stored. Here they are computed.
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


class Config(BackboneConfig):
    """The recipe's `backbone` section.

    size, condition and image_size describe the model at path, and are checked against
    it. A file shows its image size only by its official name or its saved arguments;
    otherwise image_size is required. A plan without the file needs all three.
    """

    name: Literal["llamagen"]
    path: str = Field(
        min_length=1,
        description=".pt or .safetensors file with official names, or folder or Hugging Face id with "
        "config.json",
    )
    size: Literal["B", "L", "XL", "XXL", "3B"] | None = Field(
        default=None, description="null takes the file's"
    )
    condition: Literal["class", "text"] | None = Field(default=None, description="null takes the file's")
    image_size: int | None = Field(
        default=None,
        ge=PIXELS_PER_TOKEN,
        multiple_of=PIXELS_PER_TOKEN,
        description="pixels a side; null takes the file's",
    )
    attn_implementation: attention.Implementation = Field(
        default="sdpa", description="sdpa, flash_attention_2 (a CUDA GPU in bf16 or fp16) or eager"
    )
    text_encoder: str = Field(
        default="google/flan-t5-xl",
        description="T5 encoder of a text-conditional model: folder or Hugging Face id",
    )
    caption_cleaning: Cleaning = Field(
        default="original",
        description="of a text-conditional model; original_or_raw keeps captions of which original leaves "
        "nothing; see mmtensorar/captions/cleaning.py",
    )

    def has_sizes(self) -> bool:
        """See BackboneConfig."""
        return None not in (self.size, self.condition, self.image_size) or super().has_sizes()


class Architecture(BaseModel):
    """The sizes in config.json.

    num_classes: without the null class. caption_dim: C of the text encoder's features.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    condition: Literal["class", "text"]
    dim: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    ffn_dim: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    num_tokens: int = Field(ge=1)
    prefix_len: int = Field(default=1, ge=1)
    num_classes: int = 1000
    caption_dim: int = 2048
    rope_base: float = Field(default=10000, gt=0)
    norm_eps: float = Field(default=1e-5, gt=0)

    @model_validator(mode="after")
    def _can_be_built(self) -> Architecture:
        if self.dim % self.num_heads or self.head_dim % 4:
            raise ValueError(f"dim {self.dim} / num_heads {self.num_heads} is not a multiple of 4")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if math.isqrt(self.num_tokens) ** 2 != self.num_tokens:
            raise ValueError(f"num_tokens {self.num_tokens} is not a square number")
        if self.condition == "class" and self.prefix_len != 1:
            raise ValueError(f"prefix_len is {self.prefix_len}; expected 1 with a class as the condition")
        return self

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


# ---- the parts -----------------------------------------------------------------------------------


class LlamaGenEmbed(nn.Module):
    """codes [..., 1] -> [..., D]."""

    def __init__(self, config: Architecture):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.dim)

    def forward(self, codes: Tensor) -> Tensor:
        return self.embeddings(codes[..., 0])


class ClassPrefix(nn.Module):
    """Class ids [B, 1] -> embeddings [B, 1, D]; the row after the last class is the
    null class.
    """

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

    An uncond row gets the null caption under its own mask, as in the original: it sees
    as many of the last rows of the null caption as its caption had rows.
    """

    null_caption: Tensor

    def __init__(self, config: Architecture):
        super().__init__()
        # It is never trained and keeps its random start, so it must come from the
        # released file.
        start = torch.randn(config.prefix_len, config.caption_dim) / config.caption_dim**0.5
        self.register_buffer("null_caption", start)
        self.fc1 = nn.Linear(config.caption_dim, config.dim, bias=False)
        self.fc2 = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, condition: Condition, uncond: Tensor) -> Prefix:
        values, mask = condition
        if values.shape[1:] != self.null_caption.shape:
            raise ValueError(
                f"captions are {list(values.shape[1:])} features, "
                f"the backbone expects {list(self.null_caption.shape)}"
            )
        features = torch.where(uncond[:, None, None], self.null_caption, values.to(self.null_caption.dtype))
        hidden = self.fc1(features.to(self.fc1.weight.dtype))
        return Prefix(self.fc2(functional.gelu(hidden, approximate="tanh")), mask)

    def _apply(self, fn, recurse: bool = True):
        # No optimiser keeps a float32 copy of the buffer, so a cast to bf16 would be
        # saved as it is.
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


class LlamaGenBackbone(PublishedBackbone):
    """See mmtensorar.model.protocols.Backbone."""

    name = MODEL_TYPE
    pixels_per_token = PIXELS_PER_TOKEN
    official_names = KEYS

    def __init__(self, config: Architecture, attn_implementation: attention.Implementation = "sdpa"):
        super().__init__(
            config,
            grid=math.isqrt(config.num_tokens),
            factor_sizes=(config.vocab_size,),
            attn_implementation=attn_implementation,
        )
        by_class = config.condition == "class"
        self.condition: ConditionKind = "class" if by_class else "features"
        # Those of the original's sampling scripts.
        self.default_sampling: dict[str, Any] = (
            {"cfg_scale": 4.0, "top_k": 2000} if by_class else {"cfg_scale": 7.5, "top_k": 1000}
        )
        self.prefix = (ClassPrefix if by_class else TextPrefix)(config)
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
        self.init_weights(self.head.output)

    def example_condition(self, num_rows: int, prompt_len: int) -> Condition:
        """See Backbone."""
        if self.condition == "class":
            return super().example_condition(num_rows, prompt_len)
        values = torch.zeros(num_rows, self.prefix_len, self.config.caption_dim)
        return Condition(values, torch.ones(num_rows, self.prefix_len, dtype=torch.bool))

    def forward(self, embeds: Tensor, mask: Tensor | None, cache: kv_cache.KVCache | None = None) -> Tensor:
        """See Backbone."""
        config = self.config
        table = layers.rotary_table(
            config.prefix_len, config.num_tokens, config.head_dim, config.rope_base, embeds.device
        )
        # A class is one position and never padded. Reading that from the mask would
        # wait for the GPU.
        padding = mask if config.condition == "text" else None
        return self.norm(self.run_layers(embeds, table, padding, cache))


# ---- files ---------------------------------------------------------------------------------------


def load(
    section: Config, *, weights: bool = True, device: str = "cpu", sizes_only: bool = False
) -> LlamaGenBackbone:
    """See mmtensorar.backbones.load."""
    attention.require(section.attn_implementation, key="backbone.attn_implementation")
    config, source = _locate(section, weights=weights, sizes_only=sizes_only)
    make = partial(LlamaGenBackbone, config, section.attn_implementation)
    if not weights:
        return _published.build(make, device=device)
    assert source is not None, "only a plan, which loads no weights, does without the file"
    return _published.load(make, source, device=device, ignore=COMPUTED.fullmatch)


def lazy_weights(section: Config) -> LazyWeights:
    """See mmtensorar.backbones.lazy_weights."""
    config, source = _locate(section, weights=True)
    assert source is not None
    return _published.lazy_weights(partial(LlamaGenBackbone, config), source, ignore=COMPUTED.fullmatch)


def write_original(
    target: Path,
    weights: LazyWeights,
    *,
    image_tokenizer: ImageTokenizer | None,
    base: Callable[[], str],
) -> str:
    """See BackboneFile: a PyTorch file. The image tokenizer is a separate file."""
    write_torch(target, {"model": _published.tensors_of(weights)})
    return 'LlamaGen (a dictionary with the key "model", which the original sampling scripts read)'


def _locate(
    section: Config, *, weights: bool = False, sizes_only: bool = False
) -> tuple[Architecture, Path | ReleasedWeights | None]:
    """The architecture that a section names, and where its weights are.

    Raises ValueError when section and file disagree.
    """
    size, condition, image_size = section.size, section.condition, section.image_size
    if sizes_only and size and condition and image_size and not Path(section.path).exists():
        return released(size, condition, image_size), None
    sizes = {"size": size, "condition": condition, "image_size": image_size}
    unset = [key for key, value in sizes.items() if value is None]
    with _published.plan_hint(section.path, unset, wanted=sizes_only):
        path = locate(section.path, key="backbone.path", weights=weights)
    if path.is_dir() and not (path / "config.json").is_file():
        # An official file, alone in a folder, is its own configuration.
        path = locate(section.path, key="backbone.path")
    if path.is_dir():
        source: Path | ReleasedWeights = path
        config = parse_config(Architecture, read_config(path, *MODEL_TYPES, key="backbone.path"), path)
    else:
        source = ReleasedWeights(path, WRAPPERS)
        config = saved_config(Architecture, path, MODEL_TYPE) or _inferred(source, section.image_size)
    _check_claims(section, config, path)
    return config, source


def released(size: str, condition: Literal["class", "text"], image_size: int) -> Architecture:
    """The architecture of a released model. image_size: pixels a side."""
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


def _inferred(source: ReleasedWeights, image_size: int | None) -> Architecture:
    """The architecture that a file's tensors imply, with image_size for what they do
    not show.
    """
    shapes, path = source.shapes, source.path
    needed = ["tok_embeddings.weight", "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight"]
    if missing := [name for name in needed if len(shapes.get(name, ())) != 2]:
        raise ValueError(
            f"{path}: not a LlamaGen GPT: {', '.join(missing)} is missing; "
            f"it has {', '.join(sorted(shapes)[:10])}"
        )
    vocab_size, dim = shapes["tok_embeddings.weight"]
    num_layers = 1 + max(int(name.split(".")[1]) for name in shapes if re.match(r"layers\.\d+\.", name))
    heads = {(width, layers): count for width, layers, count in SIZES.values()}
    if (dim, num_layers) not in heads:
        raise ValueError(
            f"{path}: width {dim} and {num_layers} layers are not a released size ({', '.join(SIZES)}), "
            "so the number of heads is unknown; use a folder with config.json"
        )
    num_heads = heads[dim, num_layers]
    condition = _inferred_condition(source)
    known_size = _image_size_of(source)
    image_size = image_size or known_size
    if image_size is None:
        raise ValueError(
            f"backbone.image_size: {path} does not say its image size; released are 256, 384 and 512"
        )
    if known_size not in (None, image_size):
        raise ValueError(
            f"backbone.image_size is {image_size}, but {path} was trained at {known_size} pixels"
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


def _inferred_condition(source: ReleasedWeights) -> dict[str, Any]:
    """The settings of Architecture that the tensors of the condition imply."""
    classes = source.shapes.get("cls_embedding.embedding_table.weight")
    null_caption = source.shapes.get("cls_embedding.uncond_embedding")
    if classes is not None:
        return {"condition": "class", "num_classes": classes[0] - 1}
    if null_caption is not None:
        return {"condition": "text", "prefix_len": null_caption[0], "caption_dim": null_caption[1]}
    raise ValueError(
        f"{source.path}: expected cls_embedding.embedding_table.weight (class-conditional) or "
        "cls_embedding.uncond_embedding (text-conditional) in it"
    )


def _image_size_of(source: ReleasedWeights) -> int | None:
    """Pixels a side of an official file, where its name or the command line saved in it
    shows them.
    """
    if official := OFFICIAL_FILE.fullmatch(source.path.name):
        return int(official[1])
    arguments = source.others.get("args")  # an argparse.Namespace, which may be of another program
    return vars(arguments).get("image_size") if isinstance(arguments, Namespace) else None


def _check_claims(section: Config, config: Architecture, path: Path) -> None:
    """Raise ValueError when the architecture at path is not what the section says."""
    sizes = (config.dim, config.num_layers, config.num_heads)
    if section.size is not None and SIZES[section.size] != sizes:
        words = "width {}, {} layers, {} heads"
        raise ValueError(
            f"backbone.size is {section.size} ({words.format(*SIZES[section.size])}), "
            f"{path} has {words.format(*sizes)}"
        )
    if section.condition not in (None, config.condition):
        raise ValueError(
            f"backbone.condition is {section.condition}, {path} is {config.condition}-conditional"
        )
    side = math.isqrt(config.num_tokens)
    if section.image_size not in (None, side * PIXELS_PER_TOKEN):
        raise ValueError(
            f"backbone.image_size is {section.image_size}, but {path} is for "
            f"{side * PIXELS_PER_TOKEN} pixels ({side}x{side} image tokens)"
        )


# ---- conditions ----------------------------------------------------------------------------------


def caption_encoder(section: Config) -> ClassNumbers | T5Features:
    """See mmtensorar.backbones.caption_encoder."""
    config, _ = _locate(section)
    if config.condition == "class":
        return ClassNumbers(config.num_classes)
    return T5Features(
        section.text_encoder,
        num_slots=config.prefix_len,
        dim=config.caption_dim,
        cleaning=section.caption_cleaning,
    )
