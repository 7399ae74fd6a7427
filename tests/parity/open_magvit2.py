"""Open-MAGVIT2: rebuilds the model of a fixture through the loaders of the package, and
runs its calls.

The weights go through a file in the official format, so that the loaders' renaming is
tested too.

Shapes: B batch, T tokens, F factors, V codebook size, Z bits, h w latent grid.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as functional
from torch import Tensor

from mmtensorar import backbones, image_tokenizers
from mmtensorar.backbones import open_magvit2
from mmtensorar.image_tokenizers import open_magvit2_lfq
from mmtensorar.image_tokenizers.open_magvit2_lfq import codes_to_latents, latents_to_codes
from mmtensorar.model import layers
from mmtensorar.model.conditions import Condition
from mmtensorar.model.drafts import FixedSchedule
from mmtensorar.model.tensorar import TensorAR
from mmtensorar.recipe import SamplerSettings
from mmtensorar.sampling import filters
from mmtensorar.sampling.decode import decode
from mmtensorar.sampling.noise import draw_tokens
from tests.helpers.models import window_logits
from tests.parity import Unsupported


@dataclass
class Subject:
    """The models built from a fixture's weights.

    lfq: one tokenizer per kind of weights, raw and ema.
    """

    bits: tuple[int, ...]
    model: TensorAR | None = None
    lfq: dict[str, open_magvit2_lfq.LFQ] | None = None


def load(manifest: dict, weights: dict[str, Tensor]) -> Subject:
    """weights: under their official names, float32."""
    config = manifest["config"]
    if "transformer" in config:
        settings = config["transformer"]
        subject = Subject(tuple(settings["factorized_bits"]))
        grid = config.get("token_grid") or round(settings["block_size"] ** 0.5)
        if "first_stage_ddconfig" in config:
            lfq_settings = _lfq_settings(config["first_stage_ddconfig"], subject.bits, grid)
            subject.lfq = {"raw": _load_lfq(weights, lfq_settings, ema=False)}
        subject.model = _load_ar(weights, settings, grid, config.get("ffn_hidden"))
        return subject
    if "ddconfig" in config:
        bits = tuple(config["factorized_bits"])
        # Pictures of any size are encoded below, and their size can differ from the
        # configuration's resolution.
        lfq_settings = _lfq_settings(config["ddconfig"], bits, 1)
        return Subject(
            bits, lfq={kind: _load_lfq(weights, lfq_settings, ema=kind == "ema") for kind in ("raw", "ema")}
        )
    return Subject(tuple(config.get("factorized_bits", ())))


def run(subject: Subject, call: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """All outputs of a call, under their full names.

    Raises Unsupported for an unknown call.
    """
    args = call.get("args", {})
    inputs = {name.removeprefix("inputs/"): value for name, value in inputs.items()}
    if "cfg_scale" in args:
        return _named(call, _generate(subject, args, inputs["class_ids"]))
    if "logits" in inputs:
        (name,) = call["outputs"]
        return {name: _filtered(args, inputs["logits"])}
    if call["id"] == "lfq":
        return {f"outputs/{name}": value for name, value in _quantised(inputs["z"], subject.bits).items()}
    if call["id"] in ("raw", "ema"):
        return _named(call, _tokenizer(subject.lfq[call["id"]], inputs["pixels"]))
    if call["id"] not in CALLS:
        raise Unsupported(call["id"])
    return _named(call, CALLS[call["id"]](subject, inputs))


def _named(call: dict, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"outputs/{call['id']}/{name}": value.detach() for name, value in outputs.items()}


# ---- loading -------------------------------------------------------------------------------------


def _load_ar(weights: dict[str, Tensor], settings: dict, grid: int, ffn_width: int | None) -> TensorAR:
    config = open_magvit2.Architecture(
        dim=settings["dim"],
        num_heads=settings["n_head"],
        spatial_layers=settings["spatial_n_layer"],
        factorized_layers=settings["factorized_n_layer"],
        factorized_bits=settings["factorized_bits"],
        num_classes=settings["class_num"],
        grid=grid,
        ffn_width=ffn_width
        or layers.ffn_width(settings["dim"], multiple_of=settings.get("multiple_of", 256)),
    )
    with _checkpoint(weights, open_magvit2.MODEL_TYPE, config) as path:
        backbone = backbones.load(open_magvit2.Config(name="open_magvit2", path=path))
    return TensorAR(backbone, None, None, FixedSchedule("none"), offset_weights=[1.0]).eval()


def _lfq_settings(ddconfig: dict, bits: tuple[int, ...], grid: int) -> open_magvit2_lfq.Architecture:
    if (ddconfig["z_channels"], ddconfig["in_channels"], ddconfig["out_ch"]) != (sum(bits), 3, 3):
        raise ValueError(f"z_channels, in_channels and out_ch of {ddconfig} are not {sum(bits)}, 3 and 3")
    config = open_magvit2_lfq.Architecture(
        ch=ddconfig["ch"],
        ch_mult=ddconfig["ch_mult"],
        num_res_blocks=ddconfig["num_res_blocks"],
        factorized_bits=bits,
        image_size=1,
    )
    return config.model_copy(update={"image_size": grid * config.stride})


def _load_lfq(
    weights: dict[str, Tensor], config: open_magvit2_lfq.Architecture, *, ema: bool
) -> open_magvit2_lfq.LFQ:
    with _checkpoint(weights, open_magvit2_lfq.MODEL_TYPE, config) as path:
        section = open_magvit2_lfq.Config(name="open_magvit2_lfq", path=path, ema=ema)
        return image_tokenizers.load(section)


class _checkpoint(TemporaryDirectory):
    """A temporary folder with the weights as Lightning pickles them and the sizes as
    our config.json.
    """

    def __init__(self, weights: dict[str, Tensor], model_type: str, config):
        super().__init__()
        torch.save({"state_dict": weights}, Path(self.name) / "model.ckpt")
        (Path(self.name) / "config.json").write_text(
            json.dumps({"model_type": model_type} | config.model_dump())
        )


# ---- the AR model --------------------------------------------------------------------------------


def _codes(inputs: dict[str, Tensor]) -> Tensor:
    return torch.stack([inputs["tokens_pre"], inputs["tokens_post"]], dim=-1)  # [B, T, 2]


def _condition(class_ids: Tensor) -> Condition:
    values = class_ids.reshape(-1, 1)
    return Condition(values, torch.ones_like(values, dtype=torch.bool))


def _logits(model: TensorAR, codes: Tensor, class_ids: Tensor, *, uncond: bool) -> list[Tensor]:
    """Both streams [B, T, V_f], teacher-forced."""
    valid = torch.ones(codes.shape[1] - 1, 1, dtype=torch.bool)
    hidden = model.hidden(
        codes[:, :-1, None], valid, _condition(class_ids), torch.full((len(codes),), uncond)
    )
    return [window_logits(model, hidden, codes[:, :, None, :factor])[:, :, 0] for factor in range(2)]


@torch.no_grad()
def _teacher_forced(subject: Subject, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    outputs = {}
    for stream in ("cond", "uncond"):
        logits = _logits(subject.model, _codes(inputs), inputs["class_ids"], uncond=stream == "uncond")
        outputs |= {
            f"logits_{factor}_{stream}": value for factor, value in zip(("pre", "post"), logits, strict=True)
        }
    return outputs


def _train(subject: Subject, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss and gradients of TensorAR's own forward pass at window 1."""
    model, codes = subject.model, _codes(inputs)
    model.zero_grad()
    loss = model(codes, _condition(inputs["class_ids"]), torch.zeros(len(codes), dtype=torch.bool)).loss
    loss.backward()
    gradients = {
        f"grad/{open_magvit2.OpenMagvit2Backbone.official_name(name)}": parameter.grad.clone()
        for name, parameter in model.backbone.named_parameters()
    }
    with torch.no_grad():
        logits = _logits(model, codes, inputs["class_ids"], uncond=False)
    pre, post = (
        functional.cross_entropy(part.flatten(0, 1), codes[..., factor].flatten())
        for factor, part in enumerate(logits)
    )
    return {"loss": loss, "loss_pre": pre, "loss_post": post, **gradients}


class _Recorder:
    """Draws tokens, and keeps the guided logits of every factor."""

    def __init__(self, settings: SamplerSettings, num_factors: int):
        self.settings = settings.per_factor(num_factors)
        self.seen: list[list[Tensor]] = [[] for _ in self.settings]
        self.calls = 0

    def __call__(self, logits: Tensor, keys: Tensor) -> Tensor:
        factor = self.calls % len(self.settings)
        self.calls += 1
        self.seen[factor].append(logits[:, 0])
        return draw_tokens(logits, keys, self.settings[factor])


def _generate(subject: Subject, args: dict, class_ids: Tensor) -> dict[str, Tensor]:
    backbone = subject.model.backbone
    scales = args["cfg_scale"]
    # In the original a scale below 1 switches guidance off; here 0 would give the
    # unconditional picture.
    if scales is None or max(scales if isinstance(scales, list) else [scales]) <= 1:
        scales = 1.0
    settings = SamplerSettings(cfg_scale=scales, lookahead=1, **_filters(args))
    recorder = _Recorder(settings, len(backbone.factor_sizes))
    codes = decode(subject.model, _condition(class_ids), settings, draw=recorder).codes
    steps = args.get("steps", backbone.num_tokens)
    outputs = {}
    for factor, name in enumerate(("pre", "post")):
        outputs[f"tokens_{name}"] = codes[:, :steps, factor]
        outputs[f"step_logits_{name}"] = torch.stack(recorder.seen[factor][:steps], dim=1)
    if subject.lfq is not None:
        outputs["image"] = subject.lfq["raw"].decode(codes)
        # Truncated, as in the original.
        outputs["image_uint8"] = (255 * (outputs["image"] + 1) / 2).clamp(0, 255).byte().permute(0, 2, 3, 1)
    return outputs


def _filters(args: dict) -> dict:
    return {name: args[name] for name in ("temperature", "top_k", "top_p") if name in args}


def _filtered(args: dict, logits: Tensor) -> Tensor:
    return filters.filtered(logits, **_filters(args)).softmax(-1)


# ---- the tokenizer -------------------------------------------------------------------------------


def _quantised(latents: Tensor, bits: tuple[int, ...]) -> dict[str, Tensor]:
    codes = latents_to_codes(latents, bits)
    signs = codes_to_latents(codes, bits, tuple(latents.shape[-2:]))
    return {
        # Straight-through values are equal to these up to rounding.
        "quantized": signs,
        "codes": signs,
        "index_pre": codes[..., 0],
        "index_post": codes[..., 1],
        "index_full": latents_to_codes(latents, [sum(bits)])[..., 0],
    }


@torch.no_grad()
def _tokenizer(lfq: open_magvit2_lfq.LFQ, pixels: Tensor) -> dict[str, Tensor]:
    latents = lfq.encoder(pixels)
    outputs = _quantised(latents, lfq.config.factorized_bits)
    image = lfq.decoder(outputs["codes"])
    return {"pre_quant": latents, **outputs, "reconstruction": image, "decode_from_indices": image}


@torch.no_grad()
def _encode(subject: Subject, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    lfq = subject.lfq["raw"]
    latents = lfq.encoder(inputs["pixels"])
    codes = latents_to_codes(latents, subject.bits)
    return {"pre_quant": latents, "tokens_pre": codes[..., 0], "tokens_post": codes[..., 1]}


def _decode(subject: Subject, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    lfq, codes = subject.lfq["raw"], _codes(inputs)
    return {"codes": codes_to_latents(codes, subject.bits, lfq.grid), "image": lfq.decode(codes)}


CALLS = {"teacher_forced": _teacher_forced, "train": _train, "encode": _encode, "decode": _decode}
