"""Convert mmdet's Mask2Former weights: python -m eval.geneval convert-detector FILE
--out FOLDER

The folder is one that --detector takes. GenEval's own detector is mmdet 2.x's
mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco; the weights on the hub are from another
training run. Names and sizes come from the file's tensors. Both transformers are
assumed to have equally many heads, as in mmdet's configurations. Checked against mmdet
2.28.2 itself on random weights of two sizes: its class and mask logits agree to 6e-6.
The released file itself is untested.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from mmtensorar.checkpoints.released import ReleasedWeights
from mmtensorar.cli import Parser, command

NUM_LEVELS, NUM_POINTS = 3, 4  # of the deformable attention
# mmdet's name -> transformers'; \1, \2 are numbers. `_tensors` has the tensors whose
# layout differs.
NAMES = {
    r"backbone\.patch_embed\.projection": "swin.embeddings.patch_embeddings.projection",
    r"backbone\.patch_embed\.norm": "swin.embeddings.norm",
    r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.norm1": r"swin.encoder.layers.\1.blocks.\2.layernorm_before",
    r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.norm2": r"swin.encoder.layers.\1.blocks.\2.layernorm_after",
    r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\.proj": (
        r"swin.encoder.layers.\1.blocks.\2.attention.o_proj"
    ),
    r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.0\.0": r"swin.encoder.layers.\1.blocks.\2.mlp.fc1",
    r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.1": r"swin.encoder.layers.\1.blocks.\2.mlp.fc2",
    r"pixel_decoder\.input_convs\.(\d+)\.conv": r"decoder.input_projections.\1.0",
    r"pixel_decoder\.input_convs\.(\d+)\.gn": r"decoder.input_projections.\1.1",
    r"pixel_decoder\.encoder\.layers\.(\d+)\.attentions\.0": r"decoder.encoder.layers.\1.self_attn",
    r"pixel_decoder\.encoder\.layers\.(\d+)\.norms\.0": r"decoder.encoder.layers.\1.self_attn_layer_norm",
    r"pixel_decoder\.encoder\.layers\.(\d+)\.norms\.1": r"decoder.encoder.layers.\1.final_layer_norm",
    r"pixel_decoder\.encoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0": r"decoder.encoder.layers.\1.fc1",
    r"pixel_decoder\.encoder\.layers\.(\d+)\.ffns\.0\.layers\.1": r"decoder.encoder.layers.\1.fc2",
    r"pixel_decoder\.lateral_convs\.0\.conv": "decoder.adapter_1.0",
    r"pixel_decoder\.lateral_convs\.0\.gn": "decoder.adapter_1.1",
    r"pixel_decoder\.output_convs\.0\.conv": "decoder.layer_1.0",
    r"pixel_decoder\.output_convs\.0\.gn": "decoder.layer_1.1",
    r"pixel_decoder\.mask_feature": "decoder.mask_projection",
    r"transformer_decoder\.layers\.(\d+)\.attentions\.0\.attn": r"decoder.layers.\1.cross_attn",
    r"transformer_decoder\.layers\.(\d+)\.attentions\.1\.attn": r"decoder.layers.\1.self_attn",
    r"transformer_decoder\.layers\.(\d+)\.norms\.0": r"decoder.layers.\1.cross_attn_layer_norm",
    r"transformer_decoder\.layers\.(\d+)\.norms\.1": r"decoder.layers.\1.self_attn_layer_norm",
    r"transformer_decoder\.layers\.(\d+)\.norms\.2": r"decoder.layers.\1.final_layer_norm",
    r"transformer_decoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0": r"decoder.layers.\1.fc1",
    r"transformer_decoder\.layers\.(\d+)\.ffns\.0\.layers\.1": r"decoder.layers.\1.fc2",
    r"transformer_decoder\.post_norm": "decoder.layernorm",
    r"query_embed": "queries_embedder",
    r"query_feat": "queries_features",
    r"level_embed": "level_embed",
    r"cls_embed": "class_predictor",
}
PREFIXES = {  # beginning of mmdet's name -> what goes in front of transformers' name
    "backbone.": "model.pixel_level_module.encoder.",
    "panoptic_head.pixel_decoder.": "model.pixel_level_module.",
    "panoptic_head.cls_embed.": "",
    "panoptic_head.": "model.transformer_module.",
}


def config(shapes: Mapping[str, list[int]]):
    """The transformers configuration of a file's tensors.

    Raises KeyError for a tensor that is missing.
    """
    from transformers import Mask2FormerConfig, SwinConfig

    def count(pattern: str) -> int:
        return len({match[0] for name in shapes if (match := re.match(pattern, name))})

    stages = count(r"backbone\.stages\.\d+\.")
    table = "backbone.stages.{}.blocks.0.attn.w_msa.relative_position_bias_table"
    backbone = SwinConfig(
        embed_dim=shapes["backbone.patch_embed.projection.weight"][0],
        patch_size=shapes["backbone.patch_embed.projection.weight"][2],
        depths=[count(rf"backbone\.stages\.{stage}\.blocks\.\d+\.") for stage in range(stages)],
        num_heads=[shapes[table.format(stage)][1] for stage in range(stages)],
        window_size=(isqrt(shapes[table.format(0)][0]) + 1) // 2,
        out_features=[f"stage{stage + 1}" for stage in range(stages)],
    )
    head, layer = "panoptic_head.", "pixel_decoder.encoder.layers.0."
    heads = shapes[f"{head}{layer}attentions.0.attention_weights.weight"][0] // (NUM_LEVELS * NUM_POINTS)
    decoder_layers = count(r"panoptic_head\.transformer_decoder\.layers\.\d+\.")
    return Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=shapes[f"{head}pixel_decoder.mask_feature.weight"][1],
        mask_feature_size=shapes[f"{head}pixel_decoder.mask_feature.weight"][0],
        hidden_dim=shapes[f"{head}query_feat.weight"][1],
        encoder_feedforward_dim=shapes[f"{head}{layer}ffns.0.layers.0.0.weight"][0],
        encoder_layers=count(r"panoptic_head\.pixel_decoder\.encoder\.layers\.\d+\."),
        decoder_layers=decoder_layers + 1,  # transformers counts the prediction before the first
        num_attention_heads=heads,
        dim_feedforward=shapes[f"{head}transformer_decoder.layers.0.ffns.0.layers.0.0.weight"][0],
        num_queries=shapes[f"{head}query_feat.weight"][0],
        num_labels=shapes[f"{head}cls_embed.weight"][0] - 1,
    )


def _tensors(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One of mmdet's tensors as (name, value) of transformers; nothing for one that
    transformers computes.

    Raises ValueError for an unknown name.
    """
    if name.endswith("relative_position_index"):
        return
    if match := re.fullmatch(r"backbone\.norm(\d)\.(weight|bias)", name):
        yield (
            f"model.pixel_level_module.encoder.hidden_states_norms.stage{int(match[1]) + 1}.{match[2]}",
            value,
        )
    elif match := re.fullmatch(
        r"(backbone\.stages\.(\d+)\.blocks\.(\d+))\.attn\.w_msa\.(qkv\.weight|qkv\.bias|.*_table)", name
    ):
        attention = (
            f"model.pixel_level_module.encoder.swin.encoder.layers.{match[2]}.blocks.{match[3]}.attention"
        )
        if match[4].startswith("qkv"):
            for letter, matrix in zip("qkv", value.chunk(3), strict=True):
                yield f"{attention}.{letter}_proj.{match[4][4:]}", matrix
        else:
            yield f"{attention}.relative_position_bias.{match[4]}", value
    elif match := re.fullmatch(
        r"backbone\.stages\.(\d+)\.downsample\.(norm\.weight|norm\.bias|reduction\.weight)", name
    ):
        yield (
            f"model.pixel_level_module.encoder.swin.encoder.layers.{match[1]}.downsample.{match[2]}",
            _merged(value),
        )
    elif name == "panoptic_head.pixel_decoder.level_encoding.weight":
        yield "model.pixel_level_module.decoder.level_embed", value
    elif match := re.fullmatch(r"panoptic_head\.mask_embed\.([024])\.(weight|bias)", name):
        yield (
            "model.transformer_module.decoder.mask_predictor.mask_embedder."
            f"{int(match[1]) // 2}.0.{match[2]}",
            value,
        )
    elif match := re.fullmatch(
        r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.1\.attn\.in_proj_(weight|bias)", name
    ):
        for letter, matrix in zip("qkv", value.chunk(3), strict=True):
            yield (
                f"model.transformer_module.decoder.layers.{match[1]}.self_attn.{letter}_proj.{match[2]}",
                matrix,
            )
    else:
        yield _renamed(name), value


def _renamed(name: str) -> str:
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    inner = name if prefix == "backbone." else name.removeprefix("panoptic_head.")
    for pattern, replacement in NAMES.items():
        if prefix is not None and (match := re.match(rf"{pattern}(?=[._])", inner)):
            return PREFIXES[prefix] + match.expand(replacement) + inner[match.end() :]
    raise ValueError(f"{name} is not a tensor of mmdet's Mask2Former with a Swin backbone")


def _merged(value: Tensor) -> Tensor:
    """[..., C * 4] of a patch merging in transformers' order.

    mmdet goes channel by channel, then row by row; transformers pixel by pixel, then
    column by column.
    """
    return value.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2)


def convert(file: Path, out: Path) -> None:
    """Write a folder that from_pretrained loads.

    Raises ValueError naming the file when it does not fit.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose another --out")
    source = ReleasedWeights(file, ["state_dict"])
    try:
        settings = config(source.shapes)
        state = {
            ours: value
            for name, theirs in source.read(source.shapes)
            for ours, value in _tensors(name, theirs)
        }
        model = Mask2FormerForUniversalSegmentation(settings)
    except KeyError as error:
        raise ValueError(
            f"{file}: not mmdet's Mask2Former with a Swin backbone, {error.args[0]} is missing"
        ) from None
    except ValueError as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from None
    except (RuntimeError, IndexError, ZeroDivisionError, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{file}: its tensors do not have the shapes of mmdet's Mask2Former ({reason})"
        ) from None
    # empty_weight belongs to the loss, swin.layernorm to an unused output; transformers
    # makes both.
    computed = ("criterion.", "model.pixel_level_module.encoder.swin.layernorm.")
    wanted = {
        name: value.shape for name, value in model.state_dict().items() if not name.startswith(computed)
    }
    different = sorted(wanted.keys() ^ state.keys()) or [
        name for name in wanted if wanted[name] != state[name].shape
    ]
    if different:
        raise ValueError(
            f"{file}: {len(different)} tensors do not fit this version of transformers' Mask2Former, "
            f"among them {', '.join(different[:5])}"
        )
    model.load_state_dict(state, strict=False)
    model.save_pretrained(out)


@command
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m eval.geneval convert-detector",
        description="mmdet's Mask2Former weights to a folder that --detector takes.",
        example="mask2former_swin-s.pth --out detector/",
    )
    parser.add_argument(
        "file", type=Path, help="mmdet's .pth, such as mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_....pth"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args(arguments)
    with torch.no_grad():
        convert(options.file, options.out)
    print(f"{options.out}: use it as --detector {options.out}")
    return 0
