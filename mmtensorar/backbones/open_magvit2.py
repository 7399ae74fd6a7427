"""Open-MAGVIT2's class-conditional transformer (B, L, XL), whose codes have two factors.

Written after the published description and the tensors of TencentARC/SEED-Voken (at b9a17ea). A decoder over places
(the spatial blocks) predicts a token's state; a second, tiny decoder over its two factors (the factorised blocks, all
in the head) turns the state into logits of the first factor, and with the first factor given into logits of the
second. Differences on purpose: the rotation gives back the dtype it took, so bfloat16 works, where the original
fails; classes are dropped by `uncond`, not inside; label and drop-path settings are left out.
Shapes: B batch, P prefix (1: the class), S rows, T image tokens, F factors, V codebook size, D width, H heads, Dh
head width.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as functional
from huggingface_hub import save_torch_state_dict
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmtensorar.captions.encoders import ClassNumbers
from mmtensorar.checkpoints.released import (
    Checkpoint,
    Unread,
    fill,
    locate,
    own_config,
)
from mmtensorar.model import attention, kv_cache, layers
from mmtensorar.model.conditions import Condition, Prefix
from mmtensorar.recipe import Section

MODEL_TYPE = "open_magvit2"
NORM_EPS = 1e-5
ROTARY_BASE = 10000

# Our names -> the names in an official checkpoint.
KEYS = {
    "embed.": "transformer.",
    "prefix.": "transformer.",
    "layers.": "transformer.spatial_blocks.",
    "head.factorized_blocks.": "transformer.factorized_blocks.",
    "head.norm.": "transformer.norm.",
    "head.heads.": "transformer.head.",
}
# Also in such a file: the image tokenizer, and what sampling with the original code leaves in its state dict.
OTHERS = re.compile(r"first_stage_model\.|.*\.kv_cache\.")
WRAPPERS = ("state_dict",)  # where Lightning puts the tensors
FIRST_TABLE = "transformer.pre_emb.weight"

# The matrices of the transformer's layers.
LORA_TARGETS = r"layers\.\d+\.(attention|feed_forward)\.\w+"


class Config(Section):
    """path: a folder we saved, or an official file (AR_256_B.ckpt) or the Hugging Face id that has it.

    size: None takes the file's; B, L or XL refuses a file of another size, and lets a plan do without the file.
    dropout: on tokens, attention and feed-forward outputs; the official training used 0.1.
    """

    name: Literal["open_magvit2"]
    path: str = Field(min_length=1)
    size: Literal["B", "L", "XL"] | None = None
    dropout: float = Field(0.0, ge=0, lt=1)
    attn_implementation: attention.Implementation = "sdpa"


class Architecture(Section):
    """Sizes of a model; its config.json. grid: image tokens a side. ffn_width: None is the official rule."""

    dim: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    spatial_layers: int = Field(ge=1)
    factorized_layers: int = Field(ge=1)
    factorized_bits: tuple[int, int] = (6, 12)
    num_classes: int = Field(1000, ge=1)
    grid: int = Field(16, ge=1)
    ffn_width: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Architecture:
        # A head turns its first half with the row and its second with the column, in pairs of channels.
        if self.dim % self.num_heads or self.dim // self.num_heads % 4:
            raise ValueError(f"dim is {self.dim}; expected a multiple of 4 times num_heads, {self.num_heads}")
        return self

    @property
    def prefix_len(self) -> int:
        return 1

    @property
    def hidden(self) -> int:
        """Width of the feed-forward layers: 8/3 dim, rounded up to a multiple of 256."""
        return self.ffn_width or layers.ffn_width(self.dim)


RELEASED = {
    "B": Architecture(dim=1024, num_heads=16, spatial_layers=24, factorized_layers=2),
    "L": Architecture(dim=1280, num_heads=20, spatial_layers=36, factorized_layers=3),
    "XL": Architecture(dim=1536, num_heads=24, spatial_layers=48, factorized_layers=4),
}
HUB_IDS = {f"TencentARC/Open-MAGVIT2-AR-{size}-256-resolution": size for size in RELEASED}


# ---- blocks --------------------------------------------------------------------------------------


class FactorAttention(nn.Module):
    """Causal attention over [state; first factor], with the rotary table of the places.

    So the state has the class's row, and its query and key vanish; the first factor has the row of cell 0, which
    turns nothing. The state therefore sees its own value, and the first factor sees the state with logit 0 and
    itself: a softmax over two, of which one is 0, is a sigmoid. Written out, since these sequences are of two, but
    there are as many as predicted tokens, and fused kernels are built (and limited in batch size) for the opposite.
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
    """Class numbers [B, 1] -> one place. The last row of the table is no class at all."""

    def __init__(self, config: Architecture):
        super().__init__()
        self.num_classes = config.num_classes
        self.class_emb = ClassEmbedding(config.num_classes, config.dim)

    def forward(self, condition: Condition, uncond: Tensor) -> Prefix:
        classes = condition.values.masked_fill(uncond[:, None], self.num_classes)
        return Prefix(self.class_emb(classes), condition.mask)


class OpenMagvit2Head(nn.Module):
    """See mmtensorar.model.protocols.Head: the factorised blocks, the final norm and one linear map per factor.

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
        """[..., D], earlier factors [..., f] int64, f = 0 or 1 -> [..., D], what heads[f] takes."""
        states = hidden[..., None, :]
        if prev.shape[-1]:
            states = torch.cat([states, self.shared[0](prev)], dim=-2)
        for block in self.factorized_blocks:
            states = block(states)
        return self.norm(states[..., -1, :])

    def forward(self, hidden: Tensor, prev: Tensor) -> Tensor:
        """[..., D], earlier factors [..., f] int64, f = 0 or 1 -> logits [..., V_f]."""
        return self.heads[prev.shape[-1]](self.states(hidden, prev))


class OpenMagvit2Backbone(nn.Module):
    """See mmtensorar.model.protocols.Backbone. Hidden states are not normed: the final norm follows the factorised blocks.

    Weights start as the original's: normal of 0.02, the output layers at zero.
    """

    lora_targets = LORA_TARGETS

    def __init__(
        self,
        config: Architecture,
        *,
        dropout: float = 0.0,
        attn_implementation: attention.Implementation = "sdpa",
    ):
        super().__init__()
        self.config, self.dropout, self.attn_implementation = config, dropout, attn_implementation
        self.dim = config.dim
        self.num_tokens = config.grid**2
        self.factor_sizes = tuple(2**bits for bits in config.factorized_bits)
        self.activation_checkpointing: layers.Checkpointing = False
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
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for head in self.head.heads:
            nn.init.zeros_(head.weight)

    def new_cache(self, max_len: int) -> kv_cache.KVCache:
        return kv_cache.KVCache(len(self.layers), max_len)

    def forward(
        self, embeds: Tensor, mask: Tensor, cache: kv_cache.KVCache | None = None
    ) -> Tensor:
        """See the protocol. A class is one place in every row, so nothing is padded and mask is all True."""
        start = 0 if cache is None else cache.length
        stop = start + embeds.shape[1]
        assert mask.shape[1] == stop <= self.num_tokens + 1
        head_dim = self.dim // self.config.num_heads
        table = layers.rotary_table(1, self.num_tokens, head_dim, ROTARY_BASE, embeds.device)[start:stop]
        pattern = attention.pattern(None, stop - start, stop, self.attn_implementation, embeds.device)
        hidden = functional.dropout(embeds, self.dropout, self.training)
        checkpointing = self.activation_checkpointing
        return layers.run(self.layers, hidden, table, pattern, cache, activation_checkpointing=checkpointing)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, and safetensors under the official names."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_config(folder)
        state = {official_name(name): value.detach().cpu() for name, value in self.state_dict().items()}
        save_torch_state_dict(state, folder, max_shard_size="5GB")

    def save_config(self, folder: Path) -> None:
        write_config(self.config, folder)


# ---- files ---------------------------------------------------------------------------------------


def write_config(config: Architecture, folder: Path) -> None:
    settings = {"model_type": MODEL_TYPE} | config.model_dump()
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load(
    section: Config, *, weights: bool = True, device: str = "cpu", sizes_only: bool = False
) -> OpenMagvit2Backbone:
    """See mmtensorar.backbones.load."""
    attention.require(section.attn_implementation, key="backbone.attn_implementation")
    options = {"dropout": section.dropout, "attn_implementation": section.attn_implementation}
    size = section.size or HUB_IDS.get(section.path)
    if sizes_only and size is not None and not Path(section.path).exists():
        with torch.device(device):
            return OpenMagvit2Backbone(RELEASED[size], **options)
    source = locate(section.path, key="backbone.path")
    config = _config(source, size)
    with torch.device("meta" if weights else device):  # where all is filled, nothing need be drawn
        backbone = OpenMagvit2Backbone(config, **options)
    if weights:
        backbone.to_empty(device=device)
        fill(backbone.state_dict(), Checkpoint(source, WRAPPERS), official_name, ignore=OTHERS.match)
    return backbone


def unread(section: Config) -> Unread:
    """See mmtensorar.backbones.unread."""
    source = locate(section.path, key="backbone.path")
    with torch.device("meta"):
        backbone = OpenMagvit2Backbone(_config(source, section.size or HUB_IDS.get(section.path)))
    return Unread(backbone, Checkpoint(source, WRAPPERS), official_name, official_name, OTHERS.match)


def official_name(name: str) -> str:
    """The name of one of our parameters in an official checkpoint."""
    for ours, theirs in KEYS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(f"no official name for {name}")


def _config(source: Path, size: str | None) -> Architecture:
    """From a config.json of ours beside the weights, else that of the released model of the size, or of that width."""
    config = own_config(Architecture, source, MODEL_TYPE)
    if config is not None:
        if size is not None and config != RELEASED[size]:
            problem = _differences(config, RELEASED[size])
            raise ValueError(f"backbone.size is {size}, but {source} is of another size: {problem}")
        return config
    if size is not None:
        return RELEASED[size]
    shape = Checkpoint(source, WRAPPERS).shapes.get(FIRST_TABLE)
    for config in RELEASED.values():
        if shape is not None and shape[1] == config.dim:
            return config
    found = f"{FIRST_TABLE} is {shape[1]} wide" if shape else f"it has no {FIRST_TABLE}"
    widths = ", ".join(f"{released.dim} for {name}" for name, released in RELEASED.items())
    raise ValueError(
        f"backbone.path: {source} is no released Open-MAGVIT2 model ({found}, expected {widths}), "
        f"and has no config.json of model_type {MODEL_TYPE!r}"
    )


def _differences(found: Architecture, expected: Architecture) -> str:
    pairs = zip(found, expected, strict=True)
    return ", ".join(f"{name} {a}, expected {b}" for (name, a), (_, b) in pairs if a != b)


def caption_encoder(section: Config) -> ClassNumbers:
    """See mmtensorar.backbones.caption_encoder."""
    if section.size is not None or section.path in HUB_IDS:
        return ClassNumbers(RELEASED["B"].num_classes)
    return ClassNumbers(_config(locate(section.path, key="backbone.path"), None).num_classes)
