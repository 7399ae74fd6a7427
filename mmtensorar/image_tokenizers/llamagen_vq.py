"""LlamaGen's VQ tokenizers, VQ-16 and VQ-8, in code of our own.

They compute what the original does (FoundationVision/LlamaGen at ce98ec4,
tokenizer/tokenizer_image/vq_model.py) under its tensor names, and read its .pt files.
The adversarial and quantiser losses are left out: the tokenizer is frozen.
Shapes: B batch, H W pixels, h w code grid, T = h * w, C code width, V codebook size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as functional
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from mmtensorar.checkpoints.released import (
    ReleasedWeights,
    fill,
    locate,
    parse_config,
    read_config,
    weight_hash,
)
from mmtensorar.image_tokenizers import FrozenWithConfig, full_precision
from mmtensorar.model.protocols import Backbone
from mmtensorar.recipe import NamedSection

SIGNATURES = ("encoder.conv_blocks.0.res.0.conv1.weight",)
MODEL_TYPES = ("llamagen_vq",)
ORIGINAL_KEY = "model"
# The order of the original's reconstruction and demo scripts; its sampling scripts read
# `model` only.
WRAPPERS = ("ema", "model", "state_dict")
# Only an official file's name says for which backbones it was trained.
OFFICIAL_FILE = re.compile(r"vq_ds\d+_(c2i|t2i)\.\w+")
# A record of the codes that training used; no result depends on it.
USAGE = "quantize.codebook_used"


class Config(NamedSection):
    """The recipe's `image_tokenizer` section."""

    name: Literal["llamagen_vq"]
    path: str = Field(
        min_length=1,
        description=".pt or .safetensors file with official names, or folder or Hugging Face id with "
        "config.json",
    )
    image_size: int | None = Field(
        default=None,
        ge=1,
        description="pixels a side; required for a file without config.json, otherwise checked",
    )


class Architecture(BaseModel):
    """The sizes in config.json.

    *_ch_mult: width of each level in units of ch, from the pixels down.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    codebook_size: int = Field(default=16384, ge=1)
    code_dim: int = Field(default=8, ge=1)
    ch: int = Field(default=128, ge=1)
    encoder_ch_mult: list[int] = Field(default=[1, 1, 2, 2, 4], min_length=1)
    decoder_ch_mult: list[int] = Field(default=[1, 1, 2, 2, 4], min_length=1)
    num_res_blocks: int = Field(default=2, ge=1)
    z_channels: int = Field(default=256, ge=1)
    l2_norm: bool = True

    @property
    def downsample(self) -> int:
        """Pixels a side of one code."""
        return 2 ** (len(self.encoder_ch_mult) - 1)


# ---- layers --------------------------------------------------------------------------------------


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1 = _norm(inputs)
        self.conv1 = _conv(inputs, outputs)
        self.norm2 = _norm(outputs)
        self.conv2 = _conv(outputs, outputs)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        update = self.conv1(functional.silu(self.norm1(x)))
        update = self.conv2(functional.silu(self.norm2(update)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + update


class AttnBlock(nn.Module):
    """One head over all positions of the grid."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (conv(normed).flatten(2).mT[:, None] for conv in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(query, key, value)[:, 0]
        return x + self.proj_out(mixed.mT.unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # Zeros on the right and at the bottom only.
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if attend is set,
    then the resampling.
    """

    def __init__(self, inputs: int, outputs: int, num_blocks: int, *, attend: bool):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(inputs if i == 0 else outputs, outputs) for i in range(num_blocks))
        self.attn = nn.ModuleList(AttnBlock(outputs) for _ in range(num_blocks if attend else 0))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList([ResBlock(channels, channels), AttnBlock(channels), ResBlock(channels, channels)])


class Encoder(nn.Module):
    """[B, 3, H, W] -> [B, z_channels, h, w]."""

    def __init__(self, config: Architecture):
        super().__init__()
        widths = [config.ch * factor for factor in config.encoder_ch_mult]
        self.conv_in = _conv(3, config.ch)
        self.conv_blocks = nn.ModuleList()
        for index, (inputs, outputs) in enumerate(zip([config.ch, *widths], widths, strict=False)):
            last = index == len(widths) - 1
            level = Level(inputs, outputs, config.num_res_blocks, attend=last)
            if not last:
                level.downsample = Downsample(outputs)
            self.conv_blocks.append(level)
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv(widths[-1], config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for part in (*self.conv_blocks, *self.mid):
            x = part(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """[B, z_channels, h, w] -> [B, 3, H, W]. conv_blocks.0 has the lowest resolution,
    and attention.
    """

    def __init__(self, config: Architecture):
        super().__init__()
        widths = [config.ch * factor for factor in reversed(config.decoder_ch_mult)]
        self.conv_in = _conv(config.z_channels, widths[0])
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        for index, (inputs, outputs) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            level = Level(inputs, outputs, config.num_res_blocks + 1, attend=index == 0)
            if index < len(widths) - 1:
                level.upsample = Upsample(outputs)
            self.conv_blocks.append(level)
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for part in (*self.mid, *self.conv_blocks):
            x = part(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class Codebook(nn.Module):
    """V rows. With l2_norm, rows and features are scaled to unit length before use."""

    def __init__(self, config: Architecture):
        super().__init__()
        self.l2_norm = config.l2_norm
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)

    def _unit(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=-1) if self.l2_norm else x

    def nearest(self, features: Tensor) -> Tensor:
        """[B, C, h, w] -> codes [B, h * w] int64, by squared distance."""
        with full_precision(features):
            features = self._unit(features.float().flatten(2).mT)  # [B, T, C]
            rows = self._unit(self.embedding.weight)
            # |f - r|^2 without |f|^2, which is equal for all rows.
            return (rows.square().sum(-1) - 2 * features @ rows.T).argmin(-1)

    def forward(self, codes: Tensor) -> Tensor:
        """[B, h, w] -> [B, C, h, w]."""
        return self._unit(self.embedding(codes)).permute(0, 3, 1, 2)


class VQModel(nn.Module):
    """Images of any size that the downsampling divides."""

    def __init__(self, config: Architecture):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.quantize = Codebook(config)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> codes [B, h * w]."""
        return self.quantize.nearest(self.quant_conv(self.encoder(pixels)))

    def decode(self, codes: Tensor) -> Tensor:
        """[B, h, w] -> [B, 3, H, W]."""
        return self.decoder(self.post_quant_conv(self.quantize(codes)))


# ---- the tokenizer -------------------------------------------------------------------------------


class LlamaGenVQ(FrozenWithConfig):
    """See mmtensorar.model.protocols.ImageTokenizer.

    condition: for which LlamaGen backbones it was trained, class or text; None where no
    file says it.
    """

    name = "llamagen_vq"

    def __init__(self, model: VQModel, image_size: int, condition: Literal["class", "text"] | None = None):
        super().__init__()
        self.condition = condition
        side = image_size // model.config.downsample
        self.model = model
        self.freeze()
        self.image_size = image_size
        self.grid = (side, side)
        self.factor_sizes = (model.config.codebook_size,)
        self.weight_hash = weight_hash(model.state_dict())

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> codes [B, T, 1] int64."""
        self.check_size(pixels)
        return self.model.encode(pixels)[..., None]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, T, 1] -> [B, 3, H, W]."""
        return self.model.decode(codes[..., 0].unflatten(1, self.grid))

    @torch.no_grad()
    def vectors(self, codes: Tensor) -> Tensor:
        """Codes [B, T, 1] -> [B, T, C], of unit length where the released model has
        l2_norm.
        """
        return self.model.quantize(codes[..., 0].unflatten(1, self.grid)).flatten(2).mT

    def misfit(self, backbone: Backbone) -> str | None:
        """LlamaGen's codebooks for both conditions have one shape, and are not the
        same.
        """
        if self.condition is None or backbone.name != "llamagen":
            return None
        condition = "class" if backbone.condition == "class" else "text"
        if condition == self.condition:
            return None
        return (
            f"it was trained for {self.condition}-conditional models, the backbone is {condition}-conditional"
        )

    def official_tensors(self) -> dict[str, Tensor]:
        """See ImageTokenizer."""
        return self.model.state_dict()

    def config_settings(self) -> dict[str, Any]:
        """See FrozenWithConfig."""
        condition = {"condition": self.condition} if self.condition else {}
        return {"image_size": self.image_size, **condition, **self.model.config.model_dump()}


# ---- files ---------------------------------------------------------------------------------------


def load(section: Config) -> LlamaGenVQ:
    """See mmtensorar.image_tokenizers.load."""
    path = locate(section.path, key="image_tokenizer.path")
    image_size: int | None = section.image_size
    condition: Any = None  # "class", "text" or None
    if path.is_dir():
        settings = read_config(path, *MODEL_TYPES, key="image_tokenizer.path")
        saved_size, condition = settings.pop("image_size", None), settings.pop("condition", None)
        if image_size is None:
            image_size = saved_size
        elif saved_size not in (None, image_size):
            raise ValueError(
                f"image_tokenizer.image_size is {image_size}, but {path} is for {saved_size} pixels"
            )
        source, config = ReleasedWeights(path), parse_config(Architecture, settings, path)
    else:
        source = ReleasedWeights(path, WRAPPERS)
        config = inferred(source.shapes, path)
        if official := OFFICIAL_FILE.fullmatch(path.name):
            condition = {"c2i": "class", "t2i": "text"}[official[1]]
    if image_size is None:
        raise ValueError(
            f"image_tokenizer.image_size: {path} does not say its image size; expected pixels a side"
        )
    if image_size % config.downsample:
        raise ValueError(
            f"image_tokenizer.image_size is {image_size}; expected a multiple of {config.downsample}"
        )
    model = VQModel(config)
    fill(model.state_dict(), source, ignore=lambda name: name == USAGE)
    return LlamaGenVQ(model, image_size, condition)


def inferred(shapes: Mapping[str, Sequence[int]], path: Path) -> Architecture:
    """The architecture that the shapes of official tensors imply.

    Official codebooks are all normalised.

    Raises ValueError naming path and the tensors that are missing.
    """
    needed = [
        "quantize.embedding.weight",
        "encoder.conv_in.weight",
        "quant_conv.weight",
        "decoder.conv_in.weight",
    ]
    if missing := [name for name in needed if len(shapes.get(name, ())) < 2]:
        raise ValueError(
            f"{path}: not a LlamaGen tokenizer: {', '.join(missing)} is missing; it has "
            f"{', '.join(sorted(shapes)[:10])}"
        )
    codebook_size, code_dim = shapes["quantize.embedding.weight"]
    ch = shapes["encoder.conv_in.weight"][0]

    def widths(part: str) -> list[int]:
        """Output channels of each level, in the order of conv_blocks."""
        first = re.compile(rf"{part}\.conv_blocks\.(\d+)\.res\.0\.conv1\.weight")
        by_level = {int(match[1]): shapes[name][0] for name in shapes if (match := first.fullmatch(name))}
        return [by_level[level] for level in sorted(by_level)]

    blocks = [
        name for name in shapes if re.fullmatch(r"encoder\.conv_blocks\.0\.res\.\d+\.conv1\.weight", name)
    ]
    return Architecture(
        codebook_size=codebook_size,
        code_dim=code_dim,
        ch=ch,
        encoder_ch_mult=[width // ch for width in widths("encoder")],
        decoder_ch_mult=[width // ch for width in reversed(widths("decoder"))],
        num_res_blocks=len(blocks),
        z_channels=shapes["quant_conv.weight"][1],
    )
