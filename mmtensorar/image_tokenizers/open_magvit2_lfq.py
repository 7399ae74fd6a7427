"""The lookup-free tokenizer of Open-MAGVIT2: every latent channel is one bit, 18 bits
are a code.

Written from the published description and the tensors of TencentARC/SEED-Voken (at
b9a17ea). The parameters have the released names.
Shapes: B batch, H W pixels, T image tokens, F factors, Z latent channels (bits), h w
latent grid.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as functional
from pydantic import Field
from torch import Tensor, nn

from mmtensorar.checkpoints.released import ReleasedWeights, fill, locate, saved_config, weight_hash
from mmtensorar.image_tokenizers import FrozenWithConfig
from mmtensorar.recipe import NamedSection, Section

MODEL_TYPE = "open_magvit2_lfq"
SIGNATURES = ("decoder.adaptive.0.gamma.weight",)
MODEL_TYPES = (MODEL_TYPE,)
ORIGINAL_KEY = "state_dict"
# Prefix of the tokenizer's tensors in a file of the AR model.
INSIDE_AR = "first_stage_model."
# Prefix of the exponential averages in a file of the tokenizer. The names after it have
# lost their dots.
EMA = "model_ema."
WRAPPERS = ("state_dict",)  # where Lightning puts the tensors
NUM_GROUPS, NORM_EPS = 32, 1e-6


class Config(NamedSection):
    """The recipe's `image_tokenizer` section.

    Published reconstruction scores use the averaged weights. The AR models were trained
    on the raw ones, and their files hold those.
    """

    name: Literal["open_magvit2_lfq"]
    path: str = Field(
        min_length=1,
        description="folder that we saved, or official file of the tokenizer or of an AR model (inside it)",
    )
    ema: bool | None = Field(
        default=None,
        description="averaged weights (true) or raw ones (false); null: averaged if the file has them",
    )


class Architecture(Section):
    """Sizes of a tokenizer; its config.json.

    ema: whether the saved weights are averaged ones.
    """

    ch: int = Field(default=128, ge=1)
    ch_mult: tuple[int, ...]
    num_res_blocks: int = Field(default=4, ge=1)
    factorized_bits: tuple[int, ...] = (6, 12)
    image_size: int = Field(ge=1)
    ema: bool = False

    @property
    def z_channels(self) -> int:
        return sum(self.factorized_bits)

    @property
    def stride(self) -> int:
        """Pixels a side of one code."""
        return 2 ** (len(self.ch_mult) - 1)


# The official files hold no sizes. Their number of levels distinguishes the two
# released models.
RELEASED = {
    5: Architecture(
        ch_mult=(1, 1, 2, 2, 4), image_size=256
    ),  # imagenet_256_L, pretrain256_262144, all AR models
    4: Architecture(ch_mult=(1, 2, 2, 4), image_size=128),  # imagenet_128_L
}


class ResBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(NUM_GROUPS, channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(NUM_GROUPS, out_channels, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.nin_shortcut = (
            None if channels == out_channels else nn.Conv2d(channels, out_channels, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.nin_shortcut is None else self.nin_shortcut(x)
        x = self.conv1(functional.silu(self.norm1(x)))
        return shortcut + self.conv2(functional.silu(self.norm2(x)))


class EncoderLevel(nn.Module):
    def __init__(self, channels: int, out_channels: int, num_res_blocks: int, *, last: bool):
        super().__init__()
        self.block = _blocks(channels, out_channels, num_res_blocks)
        # Padded on all sides; other encoders of this family pad right and below only.
        self.downsample = None if last else nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] -> latents [B, Z, h, w], whose signs are the bits."""

    def __init__(self, config: Architecture):
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            EncoderLevel(before, width, config.num_res_blocks, last=level == len(widths) - 1)
            for level, (before, width) in enumerate(zip([config.ch, *widths], widths, strict=False))
        )
        self.mid_block = _blocks(widths[-1], widths[-1], config.num_res_blocks)
        self.norm_out = nn.GroupNorm(NUM_GROUPS, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(pixels)
        for part in (*self.down, *self.mid_block):
            x = part(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class AdaptiveGroupNorm(nn.Module):
    """A group norm whose scale and bias per channel come from statistics of the whole
    latent.

    So the decoder is not local: one changed code moves every pixel.
    """

    def __init__(self, z_channels: int, channels: int):
        super().__init__()
        self.gamma = nn.Linear(z_channels, channels)
        self.beta = nn.Linear(z_channels, channels)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        spread = (latents.flatten(2).var(-1) + NORM_EPS).sqrt()  # [B, Z], unbiased
        scale, bias = self.gamma(spread), self.beta(latents.flatten(2).mean(-1))
        return (
            functional.group_norm(x, NUM_GROUPS, eps=NORM_EPS) * scale[..., None, None]
            + bias[..., None, None]
        )


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, 2h, 2w]."""
        # The position in the 2 x 2 square is the slow part of the channel number. In
        # pixel_shuffle it is the fast part, which would give plausible wrong images.
        x = self.conv1(x).unflatten(1, (2, 2, -1))  # [B, row, column, C, h, w]
        return x.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)


class DecoderLevel(nn.Module):
    def __init__(self, channels: int, out_channels: int, num_res_blocks: int, *, last: bool):
        super().__init__()
        self.block = _blocks(channels, out_channels, num_res_blocks)
        self.upsample = None if last else Upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.upsample is None else self.upsample(x)


class Decoder(nn.Module):
    """Latents [B, Z, h, w] of -1 and 1 -> pixels [B, 3, H, W].

    Levels are numbered from the highest resolution down, and run backwards.
    """

    def __init__(self, config: Architecture):
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        before = [
            *widths[1:],
            widths[-1],
        ]  # input width of a level: the width of the level that runs before it
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid_block = _blocks(widths[-1], widths[-1], config.num_res_blocks)
        self.adaptive = nn.ModuleList(AdaptiveGroupNorm(config.z_channels, width) for width in before)
        self.up = nn.ModuleList(
            DecoderLevel(before[level], width, config.num_res_blocks, last=level == 0)
            for level, width in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(NUM_GROUPS, widths[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.conv_in(latents)
        for block in self.mid_block:
            x = block(x)
        for level in reversed(range(len(self.up))):
            x = self.up[level](self.adaptive[level](x, latents))
        return self.conv_out(functional.silu(self.norm_out(x)))


def _blocks(channels: int, out_channels: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(ResBlock(out_channels if i else channels, out_channels) for i in range(count))


# ---- bits ----------------------------------------------------------------------------------------


def latents_to_codes(latents: Tensor, factorized_bits: Sequence[int]) -> Tensor:
    """Latents [B, Z, h, w] -> codes [B, T, F] int64.

    A channel above 0 is a 1 bit, and 0 itself is a 0 bit. The lowest bit comes first.
    """
    bits = (latents > 0).flatten(2).transpose(1, 2).long()  # [B, T, Z]
    parts = bits.split(list(factorized_bits), dim=-1)
    return torch.stack(
        [(part << torch.arange(part.shape[-1], device=part.device)).sum(-1) for part in parts], dim=-1
    )


def codes_to_latents(codes: Tensor, factorized_bits: Sequence[int], grid: tuple[int, int]) -> Tensor:
    """Codes [B, T, F] -> latents [B, Z, h, w] float32, exactly -1 or 1.

    grid: (h, w), with h * w = T.
    """
    bits = [
        (codes[..., factor, None] >> torch.arange(count, device=codes.device)) & 1
        for factor, count in enumerate(factorized_bits)
    ]
    signs = 2 * torch.cat(bits, dim=-1).float() - 1  # [B, T, Z]
    return signs.transpose(1, 2).unflatten(2, grid)


# ---- the tokenizer -------------------------------------------------------------------------------


class LFQ(FrozenWithConfig):
    """See mmtensorar.model.protocols.ImageTokenizer."""

    name = "open_magvit2_lfq"

    def __init__(self, config: Architecture):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.freeze()
        self.image_size = config.image_size
        side = config.image_size // config.stride
        self.grid = (side, side)
        self.factor_sizes = tuple(2**bits for bits in config.factorized_bits)

    @cached_property
    def weight_hash(self) -> str:
        return weight_hash({name: value.cpu() for name, value in self.state_dict().items()})

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> codes [B, T, F] int64."""
        self.check_size(pixels)
        return latents_to_codes(self.encoder(pixels), self.config.factorized_bits)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, T, F] -> [B, 3, H, W]."""
        return self.decoder(codes_to_latents(codes, self.config.factorized_bits, self.grid))

    def vectors(self, codes: Tensor) -> Tensor:
        """Codes [B, T, F] -> [B, T, C], exactly -1 or 1."""
        return codes_to_latents(codes, self.config.factorized_bits, self.grid).flatten(2).mT

    def official_tensors(self) -> dict[str, Tensor]:
        """Those in use, raw or averaged, under the names of the raw ones."""
        return self.state_dict()

    def config_settings(self) -> dict[str, Any]:
        """See FrozenWithConfig."""
        return self.config.model_dump()


def load(section: Config) -> LFQ:
    """See mmtensorar.image_tokenizers.load."""
    source = locate(section.path, key="image_tokenizer.path")
    weights = ReleasedWeights(source, WRAPPERS)
    inside = INSIDE_AR if any(name.startswith(INSIDE_AR) for name in weights.shapes) else ""
    config = saved_config(Architecture, source, MODEL_TYPE) or _released(weights, inside)
    has_ema = any(name.startswith(inside + EMA) for name in weights.shapes)
    if section.ema is False and config.ema:
        raise ValueError(f"image_tokenizer.ema is false, but {source} holds only the averaged weights")
    if section.ema and not (has_ema or config.ema):
        raise ValueError(
            f"image_tokenizer.ema is true, but {source} has no averaged weights ({inside}{EMA}*)"
        )

    read_ema = has_ema and section.ema is not False
    with torch.device("meta"):  # every tensor is filled below, so none needs random values
        image_tokenizer = LFQ(config.model_copy(update={"ema": read_ema or config.ema}))
    image_tokenizer.to_empty(device="cpu")

    def official_name(name: str) -> str:
        return inside + (EMA + name.replace(".", "") if read_ema else name)

    others = "model_ema|loss" + ("|encoder|decoder" if read_ema else "")
    ignore = re.compile(rf"{re.escape(inside)}({others})\." + (r"|transformer\." if inside else ""))
    fill(image_tokenizer.state_dict(), weights, official_name, ignore=ignore.match)
    return image_tokenizer


def _released(weights: ReleasedWeights, inside: str) -> Architecture:
    """The released model with as many levels as the weights have.

    Raises ValueError when there is none.
    """
    start = f"{inside}encoder.down."
    levels = len(
        {name.removeprefix(start).split(".")[0] for name in weights.shapes if name.startswith(start)}
    )
    if levels not in RELEASED:
        raise ValueError(
            f"image_tokenizer.path: {weights.path} is not a released Open-MAGVIT2 tokenizer "
            f"(it has {levels} levels {start}*, expected {' or '.join(map(str, RELEASED))}), "
            f"and has no config.json of model_type {MODEL_TYPE!r}"
        )
    return RELEASED[levels]
