"""The VQ model of Janus and Janus-Pro (LlamaGen's VQ-16), on transformers' JanusVQVAE.

Shapes: B batch, H W pixels, T image tokens, C code width, V codebook size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as functional
from pydantic import Field
from torch import Tensor
from transformers.models.janus.configuration_janus import JanusConfig, JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from mmtensorar.checkpoints import janus_deepseek
from mmtensorar.checkpoints.released import (
    ReleasedWeights,
    building,
    fill,
    hub_config,
    locate,
    read_config,
    weight_hash,
)
from mmtensorar.image_tokenizers import Frozen, full_precision, llamagen_vq, shrink
from mmtensorar.recipe import NamedSection

SIGNATURES = ()  # a separate VQ model always has a config.json
MODEL_TYPES = ("janus_vqgan",)
ORIGINAL_KEY = None  # its authors publish it inside Janus only
# Prefix of the VQ model's tensors in a complete Janus, in transformers' layout.
INSIDE_JANUS = "model.vqmodel."


class Config(NamedSection):
    """The recipe's `image_tokenizer` section."""

    name: Literal["janus_vq"]
    path: str = Field(
        min_length=1,
        description="folder or Hugging Face id, of a complete Janus (in transformers' or DeepSeek's layout) "
        "or of its VQ model",
    )


class JanusVQ(Frozen):
    """See mmtensorar.model.protocols.ImageTokenizer."""

    name = "janus_vq"

    def __init__(self, model: JanusVQVAE):
        super().__init__()
        side = model.config.num_patches
        self.model = model
        self.freeze()
        self.grid = (side, side)
        self.image_size = side * 2 ** (len(model.config.channel_multiplier) - 1)
        self.factor_sizes = (model.config.num_embeddings,)
        self.weight_hash = weight_hash(model.state_dict())

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> codes [B, T, 1] int64: the nearest row by
        angle.

        transformers' `encode` lacks the normalisation that DeepSeek's has, and gives
        other codes wherever the rows differ in length.
        """
        self.check_size(pixels)
        features = self.model.quant_conv(self.model.encoder(pixels)).permute(0, 2, 3, 1)  # [B, h, w, C]
        with full_precision(features):
            rows = functional.normalize(self.model.quantize.embedding.weight, dim=-1)
            # For unit vectors the largest product is the smallest distance.
            similarity = functional.normalize(features.float(), dim=-1).flatten(1, 2) @ rows.T  # [B, T, V]
            return similarity.argmax(-1)[..., None]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, T, 1] -> [B, 3, H, W]; rows are normalised when they are looked
        up.
        """
        rows: Any = codes[..., 0]
        return self.model.decode(rows)

    def vectors(self, codes: Tensor) -> Tensor:
        """Codes [B, T, 1] -> [B, T, C], of unit length."""
        return functional.normalize(self.model.quantize.embedding.weight, dim=-1)[codes[..., 0]]

    def official_tensors(self) -> dict[str, Tensor]:
        """Under transformers' names; see `janus_deepseek.vq_name` for DeepSeek's."""
        return self.model.state_dict()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the VQ model alone, in float16 where that loses nothing."""
        self.model.save_pretrained(folder, state_dict=shrink(self.model.state_dict()))


def load(section: Config) -> JanusVQ:
    """See mmtensorar.image_tokenizers.load."""
    folder = locate(section.path, key="image_tokenizer.path")
    in_janus = ("janus", janus_deepseek.MODEL_TYPE)
    settings = read_config(folder, *in_janus, *MODEL_TYPES, key="image_tokenizer.path")
    source, rename, prefix = ReleasedWeights(folder), str, ""
    if settings["model_type"] == "janus":
        config, rename = hub_config(JanusConfig, settings, folder).vq_config, INSIDE_JANUS.__add__
        prefix = INSIDE_JANUS
    elif settings["model_type"] == janus_deepseek.MODEL_TYPE:
        config, rename = _deepseek_config(settings, source), janus_deepseek.vq_name
        prefix = janus_deepseek.VQ
    else:
        config = hub_config(JanusVQVAEConfig, settings, folder)
    with building(folder):
        model = JanusVQVAE(config)
    # codebook_used is a record of the codes that training used, in the original's
    # files.
    fill(
        model.state_dict(),
        source,
        rename,
        ignore=lambda name: not name.startswith(prefix) or "codebook_used" in name,
    )
    return JanusVQ(model)


def _deepseek_config(settings: dict, source: ReleasedWeights) -> JanusVQVAEConfig:
    """The VQ model's configuration.

    DeepSeek's config.json lacks its sizes, so the tensors give them.
    """
    inside = {
        name.removeprefix(janus_deepseek.VQ): shape
        for name, shape in source.shapes.items()
        if name.startswith(janus_deepseek.VQ)
    }
    sizes = llamagen_vq.inferred(inside, source.path)
    if sizes.encoder_ch_mult != sizes.decoder_ch_mult:
        raise ValueError(
            f"{source.path}: the VQ model's encoder and decoder have different widths; Janus has equal ones"
        )
    config = janus_deepseek.config(
        settings,
        source.shapes,
        source.path,
        base_channels=sizes.ch,
        channel_multiplier=sizes.encoder_ch_mult,
        num_res_blocks=sizes.num_res_blocks,
        latent_channels=sizes.z_channels,
    )
    vq: Any = config.vq_config
    return vq
