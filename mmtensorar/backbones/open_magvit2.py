"""Open-MAGVIT2's class-conditional transformer (B, L, XL), whose codes have two
factors.

Written from the published description and the tensors of TencentARC/SEED-Voken (at
b9a17ea). A decoder over positions (the spatial blocks) predicts a token's state. A
second, tiny decoder over its two factors (the factorised blocks, all in the head) turns
the state into logits of the first factor, and, given the first factor, into logits of
the second.
Deliberate differences: the rotation returns the dtype it was given, so bfloat16 works,
where the original fails; classes are dropped by `uncond`, not inside; label and
drop-path settings are left out.
Shapes: B batch, P prefix (1: the class), S rows, T image tokens, F factors, V codebook
size, D width, H heads, Dh head width.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as functional
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmtensorar.backbones import _published
from mmtensorar.backbones._published import PublishedBackbone
from mmtensorar.captions.encoders import ClassNumbers
from mmtensorar.checkpoints.released import (
    LazyWeights,
    ReleasedWeights,
    locate,
    saved_config,
    write_torch,
)
from mmtensorar.model import attention, kv_cache, layers
from mmtensorar.model.conditions import Condition, ConditionKind, Prefix
from mmtensorar.model.protocols import ImageTokenizer
from mmtensorar.recipe import BackboneConfig, Section

MODEL_TYPE = "open_magvit2"
FIRST_TABLE = "transformer.pre_emb.weight"
SIGNATURES = (FIRST_TABLE,)
MODEL_TYPES = (MODEL_TYPE,)
IMAGE_TOKENIZER = "open_magvit2_lfq"
INSIDE = "first_stage_model."  # prefix of the image tokenizer's tensors in an official file
IMAGE_TOKENIZER_PREFIXES = (INSIDE,)
NORM_EPS = 1e-5
ROTARY_BASE = 10000

# Our names -> the names in an official file.
KEYS = {
    "embed.": "transformer.",
    "prefix.": "transformer.",
    "layers.": "transformer.spatial_blocks.",
    "head.factorized_blocks.": "transformer.factorized_blocks.",
    "head.norm.": "transformer.norm.",
    "head.heads.": "transformer.head.",
}
# Also in such a file: the image tokenizer, and the caches that sampling with the
# original code leaves there.
OTHERS = re.compile(rf"{re.escape(INSIDE)}|.*\.kv_cache\.")
WRAPPERS = ("state_dict",)  # where Lightning puts the tensors


class Config(BackboneConfig):
    """The recipe's `backbone` section."""

    name: Literal["open_magvit2"]
    path: str = Field(
        min_length=1,
        description="folder that we saved, official file (AR_256_B.ckpt), or Hugging Face id with that file",
    )
    size: Literal["B", "L", "XL"] | None = Field(
        default=None, description="null takes the file's; otherwise it is checked, and a plan needs no file"
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="on tokens, attention and feed-forward outputs; the official training used 0.1",
    )
    attn_implementation: attention.Implementation = Field(
        default="sdpa", description="sdpa, flash_attention_2 (a CUDA GPU in bf16 or fp16) or eager"
    )

    def has_sizes(self) -> bool:
        """See BackboneConfig."""
        return self.size is not None or self.path in HUB_IDS or super().has_sizes()


class Architecture(Section):
    """The sizes in config.json.

    grid: image tokens a side. ffn_width: None follows the official rule.
    """

    dim: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    spatial_layers: int = Field(ge=1)
    factorized_layers: int = Field(ge=1)
    factorized_bits: tuple[int, int] = (6, 12)
    num_classes: int = Field(default=1000, ge=1)
    grid: int = Field(default=16, ge=1)
    ffn_width: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Architecture:
        # A head turns its first half with the row and its second with the column, in
        # pairs of channels.
        if self.dim % self.num_heads or self.dim // self.num_heads % 4:
            raise ValueError(f"dim is {self.dim}; expected a multiple of 4 times num_heads, {self.num_heads}")
        return self

    @property
    def prefix_len(self) -> int:
        """One position: the class."""
        return 1

    @property
    def hidden(self) -> int:
        """Width of the feed-forward layers: 8/3 dim, rounded up to a multiple of
        256.
        """
        return self.ffn_width or layers.ffn_width(self.dim)


RELEASED = {
    "B": Architecture(dim=1024, num_heads=16, spatial_layers=24, factorized_layers=2),
    "L": Architecture(dim=1280, num_heads=20, spatial_layers=36, factorized_layers=3),
    "XL": Architecture(dim=1536, num_heads=24, spatial_layers=48, factorized_layers=4),
}
HUB_IDS = {f"TencentARC/Open-MAGVIT2-AR-{size}-256-resolution": size for size in RELEASED}


# ---- blocks --------------------------------------------------------------------------------------


class FactorAttention(nn.Module):
    """Causal attention over [state; first factor], with the rotary table of the spatial
    positions.

    The state takes the class's row of that table, so its query and key vanish. The
    first factor takes the row of cell 0, which rotates nothing. So the state sees only
    its own value, and the first factor sees the state with logit 0, and itself: a
    softmax over two logits of which one is 0 is a sigmoid. It is written out, because
    these sequences have length two and there is one for each predicted token; fused
    kernels are built (and limited in batch size) for the opposite case.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.wqkv = layers.Linear(dim, 3 * dim, bias=False)
        self.wo = layers.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., f + 1, D] -> [..., f + 1, D], f = 0 or 1."""
        qkv = self.wqkv(x).unflatten(-1, (3, self.num_heads, -1))  # [..., f + 1, 3, H, Dh]
        value = qkv[..., 2, :, :]
        if x.shape[-2] == 1:
            return self.wo(value.flatten(-2))
        query, key = qkv[..., 1, :2, :, :].float().unbind(-3)  # [..., H, Dh]
        share = torch.sigmoid((query * key).sum(-1, keepdim=True) * query.shape[-1] ** -0.5).to(value.dtype)
        first, second = value.unbind(-3)
        return self.wo(torch.stack([first, first + share * (second - first)], dim=-3).flatten(-2))


# ---- the parts -----------------------------------------------------------------------------------


class OpenMagvit2Embed(nn.Module):
    """codes [..., 2] -> [..., D]: the sum of one row per factor."""

    def __init__(self, config: Architecture):
        super().__init__()
        first, second = (2**bits for bits in config.factorized_bits)
        self.pre_emb = nn.Embedding(first, config.dim)
        self.post_emb = nn.Embedding(second, config.dim)

    def forward(self, codes: Tensor) -> Tensor:
        return self.pre_emb(codes[..., 0]) + self.post_emb(codes[..., 1])


class ClassEmbedding(nn.Module):
    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, classes: Tensor) -> Tensor:
        return self.embedding_table(classes)


class OpenMagvit2Prefix(nn.Module):
    """Class numbers [B, 1] -> one position.

    The last row of the table is the null class.
    """

    def __init__(self, config: Architecture):
        super().__init__()
        self.num_classes = config.num_classes
        self.class_emb = ClassEmbedding(config.num_classes, config.dim)

    def forward(self, condition: Condition, uncond: Tensor) -> Prefix:
        classes = condition.values.masked_fill(uncond[:, None], self.num_classes)
        return Prefix(self.class_emb(classes), condition.mask)


class OpenMagvit2Head(nn.Module):
    """See mmtensorar.model.protocols.Head: factorised blocks, final norm and one linear
    map per factor.

    The first factor is embedded by calling the embedding's own module, which stays the
    only owner of that table.
    """

    def __init__(self, config: Architecture, pre_emb: nn.Embedding, dropout: float):
        super().__init__()
        self.shared = (pre_emb,)  # in a tuple, so that it is not registered a second time
        self.factorized_blocks = nn.ModuleList(
            layers.Block(
                FactorAttention(config.dim, config.num_heads), config.dim, config.hidden, NORM_EPS, dropout
            )
            for _ in range(config.factorized_layers)
        )
        self.norm = layers.RMSNorm(config.dim, NORM_EPS)
        self.heads = nn.ModuleList(
            layers.Linear(config.dim, 2**bits, bias=False) for bits in config.factorized_bits
        )

    @property
    def output_maps(self) -> nn.ModuleList:
        return self.heads

    def states(self, hidden: Tensor, prev: Tensor) -> Tensor:
        """[..., D], earlier factors [..., f] int64, f = 0 or 1 -> [..., D], what
        heads[f] takes.
        """
        states = hidden[..., None, :]
        if prev.shape[-1]:
            states = torch.cat([states, self.shared[0](prev)], dim=-2)
        for block in self.factorized_blocks:
            states = block(states)
        return self.norm(states[..., -1, :])

    def forward(self, hidden: Tensor, prev: Tensor) -> Tensor:
        """[..., D], earlier factors [..., f] int64, f = 0 or 1 -> logits [..., V_f]."""
        return self.heads[prev.shape[-1]](self.states(hidden, prev))


class OpenMagvit2Backbone(PublishedBackbone):
    """See mmtensorar.model.protocols.Backbone.

    Hidden states are not normed: the final norm follows the factorised blocks.
    """

    name = MODEL_TYPE
    condition: ConditionKind = "class"
    default_sampling: dict[str, Any] = {"cfg_scale": [4.0, 4.0], "top_p": [0.96, 0.96]}
    pixels_per_token = 16
    official_names = KEYS

    def __init__(
        self,
        config: Architecture,
        *,
        dropout: float = 0.0,
        attn_implementation: attention.Implementation = "sdpa",
    ):
        factor_sizes = tuple(2**bits for bits in config.factorized_bits)
        super().__init__(
            config, grid=config.grid, factor_sizes=factor_sizes, attn_implementation=attn_implementation
        )
        self.dropout = dropout
        self.embed = OpenMagvit2Embed(config)
        self.prefix = OpenMagvit2Prefix(config)
        self.layers = nn.ModuleList(
            layers.Block(
                layers.SelfAttention(config.dim, config.num_heads, config.num_heads),
                config.dim,
                config.hidden,
                NORM_EPS,
                dropout,
            )
            for _ in range(config.spatial_layers)
        )
        self.head = OpenMagvit2Head(config, self.embed.pre_emb, dropout)
        self.init_weights(*self.head.heads)

    def forward(self, embeds: Tensor, mask: Tensor | None, cache: kv_cache.KVCache | None = None) -> Tensor:
        """See Backbone.

        A class is one position in every row, so nothing is padded and mask is all True.
        """
        head_dim = self.dim // self.config.num_heads
        table = layers.rotary_table(1, self.num_tokens, head_dim, ROTARY_BASE, embeds.device)
        hidden = functional.dropout(embeds, self.dropout, self.training)
        return self.run_layers(hidden, table, None, cache)


# ---- files ---------------------------------------------------------------------------------------


def load(
    section: Config, *, weights: bool = True, device: str = "cpu", sizes_only: bool = False
) -> OpenMagvit2Backbone:
    """See mmtensorar.backbones.load."""
    attention.require(section.attn_implementation, key="backbone.attn_implementation")
    size = section.size or HUB_IDS.get(section.path)
    if sizes_only and size is not None and not Path(section.path).exists():
        return _published.build(_maker(section, RELEASED[size]), device=device)
    with _published.plan_hint(section.path, [] if size else ["size"], wanted=sizes_only):
        source = locate(section.path, key="backbone.path")
    make = _maker(section, _config(source, size))
    if not weights:
        return _published.build(make, device=device)
    return _published.load(make, ReleasedWeights(source, WRAPPERS), device=device, ignore=OTHERS.match)


def lazy_weights(section: Config) -> LazyWeights:
    """See mmtensorar.backbones.lazy_weights."""
    source = locate(section.path, key="backbone.path")
    config = _config(source, section.size or HUB_IDS.get(section.path))
    return _published.lazy_weights(
        partial(OpenMagvit2Backbone, config), ReleasedWeights(source, WRAPPERS), ignore=OTHERS.match
    )


def _maker(section: Config, config: Architecture) -> Callable[[], OpenMagvit2Backbone]:
    return partial(
        OpenMagvit2Backbone,
        config,
        dropout=section.dropout,
        attn_implementation=section.attn_implementation,
    )


def write_original(
    target: Path,
    weights: LazyWeights,
    *,
    image_tokenizer: ImageTokenizer | None,
    base: Callable[[], str],
) -> str:
    """See BackboneFile: a PyTorch file with the image tokenizer inside."""
    tensors = _published.tensors_of(weights)
    note = ", without image tokenizer, which the original code expects inside"
    if image_tokenizer is not None:
        tensors |= {INSIDE + name: value for name, value in image_tokenizer.official_tensors().items()}
        note = ""
    write_torch(target, {"state_dict": tensors})
    return f'Open-MAGVIT2{note} (a dictionary with the key "state_dict", which the original code reads)'


def _config(source: Path, size: str | None) -> Architecture:
    """The config.json that we saved with the weights, else the released model of that
    size or width.
    """
    config = saved_config(Architecture, source, MODEL_TYPE)
    if config is not None:
        if size is not None and config != RELEASED[size]:
            problem = _published.differences(config, RELEASED[size])
            raise ValueError(f"backbone.size is {size}, but {source} is of another size: {problem}")
        return config
    if size is not None:
        return RELEASED[size]
    shape = ReleasedWeights(source, WRAPPERS).shapes.get(FIRST_TABLE)
    for config in RELEASED.values():
        if shape is not None and shape[1] == config.dim:
            return config
    problem = f"{FIRST_TABLE} is {shape[1]} wide" if shape else f"it has no {FIRST_TABLE}"
    widths = ", ".join(f"{released.dim} for {name}" for name, released in RELEASED.items())
    raise ValueError(
        f"backbone.path: {source} is not a released Open-MAGVIT2 model ({problem}, expected {widths}), "
        f"and has no config.json of model_type {MODEL_TYPE!r}"
    )


def caption_encoder(section: Config) -> ClassNumbers:
    """See mmtensorar.backbones.caption_encoder."""
    if section.size is not None or section.path in HUB_IDS:
        return ClassNumbers(RELEASED["B"].num_classes)
    return ClassNumbers(_config(locate(section.path, key="backbone.path"), None).num_classes)
