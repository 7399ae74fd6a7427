"""Janus as DeepSeek released it: its config.json and tensor names in terms of
transformers' Janus.

Their model_type is multi_modality, and no release of transformers reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.models.janus.configuration_janus import JanusConfig

MODEL_TYPE = "multi_modality"
VQ = "gen_vision_model."  # prefix of the VQ model's tensors

# How names of mmtensorar.backbones.janus begin -> how DeepSeek's begin; the first match
# counts.
BACKBONE_KEYS = {
    "prefix.embed_tokens.": "language_model.model.embed_tokens.",
    "language_model.": "language_model.model.",
    "embed.embeddings.": "gen_embed.",
    "embed.aligner.fc1.": "gen_aligner.layers.0.",
    "head.head.proj_out.": "gen_head.output_mlp_projector.",
    "head.head.vision_head.": "gen_head.vision_head.",
}
# transformers' names inside the VQ model -> DeepSeek's.
VQ_KEYS = [
    (r"(encoder\.)down(\.\d+\.)block\.", r"\1conv_blocks\2res."),
    (r"(decoder\.)up(\.\d+\.)block\.", r"\1conv_blocks\2res."),
    (r"(encoder\.)down\.", r"\1conv_blocks."),
    (r"(decoder\.)up\.", r"\1conv_blocks."),
    (r"\.mid\.block_1\.", ".mid.0."),
    (r"\.mid\.attn_1\.", ".mid.1."),
    (r"\.mid\.block_2\.", ".mid.2."),
]


def backbone_name(name: str) -> str:
    """DeepSeek's name of a tensor of our Janus backbone."""
    if match := re.fullmatch(r"embed\.aligner\.hidden_layers\.(\d+)\.(\w+)", name):
        # Between two layers is an activation, so the layers have even numbers.
        return f"gen_aligner.layers.{2 * (int(match[1]) + 1)}.{match[2]}"
    for ours, theirs in BACKBONE_KEYS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(f"no DeepSeek name for {name}")


def vq_name(name: str) -> str:
    """DeepSeek's name of a tensor of transformers' JanusVQVAE."""
    for pattern, theirs in VQ_KEYS:
        name, num_replaced = re.subn(pattern, theirs, name)
        if num_replaced:
            break
    return VQ + name


def config(settings: dict[str, Any], names: Iterable[str], folder: Path, **vq_sizes) -> JanusConfig:
    """DeepSeek's config.json in transformers' terms.

    Args:
        settings: the content of config.json.
        names: the names of all tensors, if known. The levels of the VQ model, which
            config.json lacks, give the pixels per token; without names it is the
            released VQ-16.
        folder: for error messages.
        vq_sizes: other settings of the VQ model, from its tensors.

    Raises ValueError naming what is missing.
    """
    try:
        language = settings["language_config"]
        vision, vq, aligner, head = (
            settings[f"{part}_config"]["params"]
            for part in ("vision", "gen_vision", "gen_aligner", "gen_head")
        )
        sizes = {
            "num_embeddings": vq["image_token_size"],
            "embed_dim": vq["n_embed"],
            "projection_dim": aligner["n_embed"],
            "num_hidden_layers": aligner["depth"],
            "image_token_embed_dim": head["n_embed"],
        }
        hidden, image_size = head["image_token_embed"], vision["image_size"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error} is missing; DeepSeek's Janus has it") from None
    if hidden != sizes["projection_dim"]:
        raise ValueError(
            f"{folder / 'config.json'}: the generation head is {hidden} wide inside and the aligner "
            f"{sizes['projection_dim']}; transformers' Janus has one width for both"
        )
    levels = {
        match[1]
        for name in names
        if (match := re.match(rf"{re.escape(VQ)}encoder\.conv_blocks\.(\d+)\.", name))
    }
    pixels_per_token = 2 ** (len(levels) - 1) if levels else 16
    return JanusConfig(
        text_config={"model_type": "llama"} | language,
        # transformers derives the code grid from image_size // patch_size.
        vision_config={"image_size": image_size, "patch_size": pixels_per_token},
        vq_config=sizes | vq_sizes,
        tie_word_embeddings=False,
    )
