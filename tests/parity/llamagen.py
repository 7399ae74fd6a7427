"""LlamaGen: the GPT (kind gpt), the VQ tokenizers (vq) and the sampler's filters
(sampler).
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmtensorar import backbones
from mmtensorar.backbones import llamagen
from mmtensorar.checkpoints.released import ReleasedWeights, fill, write_config
from mmtensorar.image_tokenizers import llamagen_vq
from mmtensorar.model import layers
from mmtensorar.model.conditions import Condition
from mmtensorar.model.drafts import FixedSchedule
from mmtensorar.model.tensorar import TensorAR
from mmtensorar.recipe import SamplerSettings
from mmtensorar.sampling import filters
from mmtensorar.sampling.decode import decode
from mmtensorar.sampling.noise import greedy
from tests.parity import Unsupported, by_last_name


class Subject(NamedTuple):
    kind: str
    model: Any  # TensorAR, VQModel, or None
    args: dict[str, dict]  # call id -> its args, for calls that say "same as"


def load(manifest: dict, weights: dict[str, Tensor]) -> Subject:
    builders = {"gpt": load_gpt, "vq": load_vq, "sampler": lambda config, weights: None}
    if (kind := manifest.get("kind")) not in builders:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(builders)}")
    model = builders[kind](manifest["config"], weights)
    return Subject(kind, model, {call["id"]: call.get("args", {}) for call in manifest["calls"]})


@torch.no_grad()
def run(subject: Subject, call: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    name = call["id"]
    if subject.kind == "sampler":
        found = filtered(call["args"], inputs)
    elif subject.kind == "vq":
        found = run_vq(subject, name, inputs)
    elif name.startswith("gen_"):
        found = generated(subject.model, call["args"], inputs)
    elif name == "debug":
        found = residual_stream(subject, call["what"], inputs)
    elif name in ("forward", "forward_uncond", "forward_nomask"):
        found = forward(subject, inputs, uncond=name == "forward_uncond", padded=name != "forward_nomask")
    else:
        raise Unsupported(f"a call {name} of the GPT")
    return by_last_name(call, found)


def named(text: str, inputs: dict[str, Tensor]) -> Tensor:
    """The tensor that an argument names, whatever other words the argument has."""
    return inputs[re.search(r"(?:inputs|outputs)/[\w/.]+", text)[0].rstrip(".")]


# ---- GPT -----------------------------------------------------------------------------------------


def load_gpt(config: dict, weights: dict[str, Tensor]) -> TensorAR:
    """Loads from the files that a user would have: config.json and safetensors under
    the official names.
    """
    if (model_type := config["model_type"]) not in ("c2i", "t2i"):
        raise ValueError(f"model_type is {model_type!r}, expected c2i or t2i")
    architecture = llamagen.Architecture(
        condition={"c2i": "class", "t2i": "text"}[model_type],
        dim=config["dim"],
        num_layers=config["n_layer"],
        num_heads=config["n_head"],
        num_kv_heads=config["n_kv_head"] or config["n_head"],
        ffn_dim=layers.ffn_width(
            config["dim"], multiple_of=config["multiple_of"], multiplier=config["ffn_dim_multiplier"]
        ),
        vocab_size=config["vocab_size"],
        num_tokens=config["block_size"],
        prefix_len=config["cls_token_num"],
        num_classes=config["num_classes"],
        caption_dim=config["caption_dim"],
        rope_base=config["rope_base"],
        norm_eps=config["norm_eps"],
    )
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), llamagen.MODEL_TYPE, architecture.model_dump())
        save_file(weights, Path(folder) / "model.safetensors")
        backbone = backbones.load(llamagen.Config(name="llamagen", path=folder))
    return TensorAR(backbone, None, None, FixedSchedule("none"), offset_weights=[1.0]).eval()


def condition_of(values: Tensor, mask: Tensor | None) -> Condition:
    """Class ids [B], or caption features [B, P, C] with the mask of those that are
    real.
    """
    if values.ndim == 1:
        values = values[:, None]
    return Condition(values, torch.ones(values.shape[:2], dtype=torch.bool) if mask is None else mask.bool())


def teacher_forced(subject: Subject, inputs: dict[str, Tensor], *, padded: bool) -> tuple[Tensor, Condition]:
    """Codes [B, T, 1] and condition of the forward call, which the other calls refer
    to.
    """
    args = subject.args["forward"]
    mask, values = None, named(args["cond"], inputs)
    if padded and args.get("attn_mask"):
        # The last image token attends to all real slots of the caption.
        mask = named(args["attn_mask"], inputs)[:, 0, -1, : values.shape[1]]
    return named(args["idx"], inputs)[..., None], condition_of(values, mask)


def forward(subject: Subject, inputs: dict[str, Tensor], *, uncond: bool, padded: bool) -> dict[str, Tensor]:
    model, backbone = subject.model, subject.model.backbone
    codes, condition = teacher_forced(subject, inputs, padded=padded)
    dropped = torch.full((len(codes),), uncond)
    prefix = backbone.prefix(condition, dropped)
    fed = codes[:, :-1]
    mask = torch.cat([prefix.mask, torch.ones(fed.shape[:2], dtype=torch.bool)], dim=1)
    hidden = backbone(torch.cat([prefix.embeds, backbone.embed(fed)], dim=1), mask)
    logits = backbone.head(hidden, codes[..., :0])
    found = {
        "logits": logits[:, prefix.embeds.shape[1] - 1 :],
        "logits_all_positions": logits,
        "loss": model(codes, condition, dropped).loss[None],
    }
    if "inputs/valid" in inputs:
        kept = inputs["inputs/valid"].bool()
        rows = Condition(condition.values[kept], condition.mask[kept])
        found["loss_valid"] = (
            model(codes[kept], rows, dropped[kept]).loss[None] if kept.any() else torch.zeros(1)
        )
    return found


def residual_stream(subject: Subject, what: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fixture says only in a sentence which positions were recorded."""
    span = re.search(r"positions (\d+)\.\.(\d+)", what)
    if span is None and "all positions" not in what:
        raise Unsupported("which positions were recorded")
    places = slice(int(span[1]), int(span[2]) + 1) if span else slice(None)
    backbone, found, hooks = subject.model.backbone, {}, []
    watched = {f"layer_{index}": layer for index, layer in enumerate(backbone.layers)} | {
        "final_norm": backbone.norm
    }
    for key, module in watched.items():

        def keep(_, args, output, key=key) -> None:
            if key == "layer_0":
                found.setdefault("embedded", args[0][:, places])
            # The loss runs the model once more; the first run is kept.
            found.setdefault(key, output[:, places])

        hooks.append(module.register_forward_hook(keep))
    try:
        forward(subject, inputs, uncond=False, padded=True)
    finally:
        for hook in hooks:
            hook.remove()
    config = backbone.config
    table = layers.rotary_table(
        config.prefix_len, config.num_tokens, config.head_dim, config.rope_base, torch.device("cpu")
    )
    return found | {"rope_table": torch.view_as_real(table)}


def generated(model: TensorAR, args: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    if args["sample_logits"]:
        raise Unsupported("random draws, whose generator is the original's")
    mask = named(args["emb_masks"], inputs) if args.get("emb_masks") else None
    # The original treats scales of 1 and less as no guidance.
    settings = SamplerSettings(cfg_scale=max(args["cfg_scale"], 1.0), lookahead=1)
    # It guides token 0 and then the tokens up to the interval, counted from token 1.
    num_guided = None if args["cfg_interval"] < 0 else args["cfg_interval"] + 2
    guided, raw = [], []

    def recorder(logits: Tensor, keys: Tensor) -> Tensor:
        guided.append(logits[:, 0])
        return greedy(logits, keys)

    def keep_raw(_, inputs: tuple, logits: Tensor) -> Tensor | None:
        raw.append(logits[:, 0, 0])
        if settings.cfg_scale == 1 or num_guided is None or len(raw) <= num_guided:
            return None
        # The return value of a hook replaces the output. Equal rows make guidance give
        # the conditional logits.
        return logits[::2].repeat_interleave(2, 0)

    hook = model.backbone.head.register_forward_hook(keep_raw)
    try:
        condition = condition_of(named(args["cond"], inputs), mask)
        codes = decode(model, condition, settings, draw=recorder).codes
    finally:
        hook.remove()
    count = args["max_new_tokens"]
    raw = torch.stack(raw, dim=1)[:, :count]
    found = {"tokens": codes[:, :count, 0], "step_logits": torch.stack(guided, dim=1)[:, :count]}
    if len(raw) > len(codes):
        found["cond_step_logits"], found["uncond_step_logits"] = raw[::2], raw[1::2]
    return found


def filtered(args: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    # The original treats a temperature of 0 as a very small one; ours has greedy
    # decoding for that.
    kept = filters.filtered(
        named(args["logits"], inputs),
        temperature=max(args["temperature"], 1e-5),
        top_k=args["top_k"],
        top_p=args["top_p"],
    )
    probs = kept.softmax(-1)
    return {"probs": probs, "argmax": probs.argmax(-1, keepdim=True)}


# ---- VQ ------------------------------------------------------------------------------------------


def load_vq(config: dict, weights: dict[str, Tensor]) -> llamagen_vq.VQModel:
    """Loads from a .pt file, as the released tokenizers are."""
    names = {"codebook_embed_dim": "code_dim", "codebook_l2_norm": "l2_norm"}
    fields = llamagen_vq.Architecture.model_fields
    known = {names.get(key, key): value for key, value in config.items() if names.get(key, key) in fields}
    model = llamagen_vq.VQModel(llamagen_vq.Architecture(**known))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vq.pt"
        torch.save({"model": weights}, path)
        source = ReleasedWeights(path, llamagen_vq.WRAPPERS)
        fill(model.state_dict(), source, ignore=lambda name: name == llamagen_vq.USAGE)
    return model.eval()


def run_vq(subject: Subject, name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model, args = subject.model, subject.args[name]
    if name == "encode":
        return encoded(model, named(args["image"], inputs))
    if name in ("decode", "decode_codes"):
        return decoded(model, named(args["codes"], inputs), args["shape"])
    if name == "l2_off":
        model.quantize.l2_norm = False
        try:
            found = encoded(model, named(args["image"], inputs))
            pictures = decoded(model, named(args["codes"], inputs), subject.args["decode_codes"]["shape"])[
                "image"
            ]
        finally:
            model.quantize.l2_norm = model.config.l2_norm
        return {"indices": found["indices"], "quant": found["quant"], "decode_codes_image": pictures[:1]}
    # For example train_losses: the tokenizer is frozen, so it has no losses.
    raise Unsupported(f"a call {name} of a tokenizer")


def encoded(model: llamagen_vq.VQModel, pixels: Tensor) -> dict[str, Tensor]:
    features = model.encoder(pixels)
    narrow = model.quant_conv(features)
    codes = model.encode(pixels)
    quant = model.quantize(codes.unflatten(1, narrow.shape[2:]))
    return {"encoder_out": features, "quant_conv_out": narrow, "indices": codes.flatten(), "quant": quant}


def decoded(model: llamagen_vq.VQModel, codes: Tensor, shape: list[int]) -> dict[str, Tensor]:
    """shape: B, C, h, w of the codes' vectors."""
    codes = codes.reshape(shape[0], *shape[2:])
    return {"post_quant_conv": model.post_quant_conv(model.quantize(codes)), "image": model.decode(codes)}
