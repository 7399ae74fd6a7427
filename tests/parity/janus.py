"""Janus, text to image, in the layouts of transformers (weight_layout hf) and of
DeepSeek (deepseek).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as functional
from safetensors.torch import save_file
from torch import Tensor

from mmtensorar import backbones, image_tokenizers
from mmtensorar.backbones import janus
from mmtensorar.checkpoints import janus_deepseek
from mmtensorar.image_tokenizers import janus_vq, to_images
from mmtensorar.model.conditions import Condition
from mmtensorar.model.drafts import FixedSchedule
from mmtensorar.model.tensorar import TensorAR
from mmtensorar.recipe import SamplerSettings
from mmtensorar.sampling.decode import decode
from mmtensorar.sampling.noise import greedy
from tests.helpers.models import window_logits
from tests.parity import Unsupported, by_last_name


class Subject(NamedTuple):
    model: TensorAR
    vq: janus_vq.JanusVQ
    pad_id: int


def load(manifest: dict, weights: dict[str, Tensor]) -> Subject:
    """Loads from the files that a user would have: .bin in DeepSeek's layout,
    safetensors in transformers' layout.
    """
    layout, pad_id = manifest["weight_layout"], manifest["special_ids"]["pad"]
    if layout not in ("hf", "deepseek"):
        raise ValueError(f"weight_layout is {layout!r}, expected hf or deepseek")
    settings = json.loads(json.dumps(manifest["config"][layout]))
    # The text tokenizer determines it where there is a text tokenizer.
    settings["text_config" if layout == "hf" else "language_config"].setdefault("pad_token_id", pad_id)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(settings))
        if layout == "hf":
            save_file(weights, Path(folder) / "model.safetensors")
        else:
            torch.save(weights, Path(folder) / "pytorch_model.bin")
        backbone = backbones.load(janus.Config(name="janus", path=folder))
        vq = image_tokenizers.load(janus_vq.Config(name="janus_vq", path=folder))
    model = TensorAR(backbone, None, None, FixedSchedule("none"), offset_weights=[1.0]).eval()
    return Subject(model, vq, pad_id)


def run(subject: Subject, call: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    name = call["id"]
    given = [inputs[key] for key in call["inputs"]]
    with torch.set_grad_enabled(name == "train"):
        if name == "train":
            return gradients(subject.model, *given)
        if name == "gen_image_embeds":
            found = {"image_token_embeds": subject.model.backbone.embed(given[0][..., None])}
        elif name == "teacher_forced":
            found = teacher_forced(subject, *given)
        elif name == "uncond_prompt":
            found = {"uncond_ids": uncond_ids(subject, given[0])}
        elif name.startswith("greedy_"):
            found = generated(subject, list(given[0]), call["args"])
            pixels = subject.vq.decode(found["tokens"][..., None])
            pictures = np.stack([np.array(picture) for picture in to_images(pixels)])
            found |= {"image": pixels, "image_uint8": torch.from_numpy(pictures)}
        elif name.startswith("ragged_"):
            batch = generated(subject, given, call["args"])
            found = {f"{key}_{row}": value[row] for key, value in batch.items() for row in range(len(given))}
        elif name == "vq_decode":
            entries = subject.vq.model.quantize.get_codebook_entry(given[0])
            found = {"codebook_entry": entries, "decode_image": subject.vq.decode(given[0][..., None])}
        elif name == "vq_encode":
            found = encoded(subject.vq, given[0])
        else:
            raise Unsupported(f"a call {name}: only the text-to-image path is built")
    return by_last_name(call, found)


def condition_of(subject: Subject, prompts: list[Tensor]) -> Condition:
    """Prompts of any lengths as one batch, padded on the left."""
    P = max(map(len, prompts))
    values = torch.stack([functional.pad(row, (P - len(row), 0), value=subject.pad_id) for row in prompts])
    mask = torch.stack([torch.arange(P) >= P - len(row) for row in prompts])
    return Condition(values, mask)


def teacher_forced(subject: Subject, prompts: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    model, codes, found = subject.model, tokens[..., None], {}
    valid = torch.ones(codes.shape[1] - 1, 1, dtype=torch.bool)
    for stream in ("cond", "uncond"):
        dropped = torch.full((len(codes),), stream == "uncond")
        hidden = model.hidden(codes[:, :-1, None], valid, condition_of(subject, list(prompts)), dropped)
        found[f"hidden_{stream}"] = hidden
        found[f"logits_{stream}"] = window_logits(model, hidden, codes[:, :, None, :0])[:, :, 0]
    return found


def uncond_ids(subject: Subject, prompts: Tensor) -> Tensor:
    """The ids that the prefix module looks up for unconditional rows."""
    prefix, seen = subject.model.backbone.prefix, []
    hook = prefix.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    prefix(condition_of(subject, list(prompts)), torch.ones(len(prompts), dtype=torch.bool))
    hook.remove()
    return seen[0]


def gradients(model: TensorAR, prompts: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """The loss, and the gradient of every parameter under DeepSeek's name, which the
    records of both layouts use.
    """
    model.zero_grad()
    mask = torch.ones(prompts.shape, dtype=torch.bool)
    loss = model(tokens[..., None], Condition(prompts, mask), torch.zeros(len(tokens), dtype=torch.bool)).loss
    loss.backward()
    found = {
        f"outputs/train/grad/{janus_deepseek.backbone_name(name)}": parameter.grad.clone()
        for name, parameter in model.backbone.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    return found | {"outputs/train/ce_loss": loss.detach()}


def generated(subject: Subject, prompts: list[Tensor], args: dict) -> dict[str, Tensor]:
    if not args["greedy"]:
        raise Unsupported("random draws, whose generator is the original's")
    seen = []

    def recorder(logits: Tensor, keys: Tensor) -> Tensor:
        seen.append(logits[:, 0])
        return greedy(logits, keys)

    settings = SamplerSettings(cfg_scale=args["cfg_weight"], lookahead=1)
    codes = decode(subject.model, condition_of(subject, prompts), settings, draw=recorder).codes
    count = args["n_image_tokens"]
    return {"tokens": codes[:, :count, 0], "step_logits": torch.stack(seen, dim=1)[:, :count]}


def encoded(vq: janus_vq.JanusVQ, pixels: Tensor) -> dict[str, Tensor]:
    codes = vq.encode(pixels)
    return {
        "encode_pre_quant": vq.model.quant_conv(vq.model.encoder(pixels)),
        "encode_indices": codes[..., 0],
        "encode_quantized": vq.model.quantize.get_codebook_entry(codes[..., 0]),
        "reconstruction": vq.decode(codes),
    }
