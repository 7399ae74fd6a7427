"""Step times of our decoding compared with a reference's, on the same random
weights.

    python benchmarks/decode.py janus                            the reference is transformers' own generate
    python benchmarks/decode.py llamagen --reference CHECKOUT    of github.com/FoundationVision/LlamaGen

Ours and the reference take turns in one run, one batch of images each, so that a busy
machine slows both. Decoding is greedy, so that equal tokens show that both do the same
work. A step is the time from one call of the transformer to the next: the transformer
on one position per row, the head, guidance, and the choice of a token. The first step,
which includes the prompt, is left out.
Shapes: B batch, T image tokens.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmtensorar import backbones
from mmtensorar.backbones import janus, llamagen
from mmtensorar.cli import command
from mmtensorar.model import layers
from mmtensorar.model.codec import WindowDecoder, WindowEncoder
from mmtensorar.model.conditions import Condition
from mmtensorar.model.drafts import FixedSchedule
from mmtensorar.model.protocols import Backbone
from mmtensorar.model.tensorar import TensorAR
from mmtensorar.recipe import SamplerSettings
from mmtensorar.sampling.decode import decode
from mmtensorar.sampling.noise import greedy

PROMPT_LEN, NUM_WORDS, PAD, BOS, EOS, BEGIN_OF_IMAGE = 16, 64, 0, 1, 2, 3  # of the Janus prompts
NUM_CLASSES = 1000
REFERENCE_FILES = ("autoregressive/models/gpt.py", "autoregressive/models/generate.py")
WINDOW = 4


class Sizes(NamedTuple):
    """Sizes of the random model: width, layers, heads, codebook, image tokens T."""

    dim: int
    layers: int
    heads: int
    codes: int
    tokens: int

    def check(self) -> None:
        """Raise ValueError for sizes that no backbone can have."""
        if math.isqrt(self.tokens) ** 2 != self.tokens or self.tokens < WINDOW:
            raise ValueError(f"--tokens is {self.tokens}; expected a square of {WINDOW} or more")
        if self.dim % 8 or self.dim % (4 * self.heads):
            raise ValueError(
                f"--dim is {self.dim}; expected a multiple of 8 and of 4 times --heads, {4 * self.heads}"
            )


class Side(NamedTuple):
    """One of the implementations that are compared."""

    transformer: nn.Module  # called once per step while `generate` runs
    generate: Callable[[Condition, float], Tensor]  # (condition, cfg_scale) -> codes [B, T]


class Pair(NamedTuple):
    """Our backbone and the reference, with the same weights."""

    backbone: Backbone
    reference: Side
    conditions: Callable[[int], Condition]  # B -> random prompts of B rows
    cases: list[tuple[int, float]]  # (B, cfg_scale) to measure


# ---- the references ------------------------------------------------------------------------------


@torch.no_grad()
def randomise(model: nn.Module, dim: int) -> None:
    """Random matrices that keep activations at about their size."""
    for parameter in model.parameters():
        if parameter.ndim > 1:  # norms stay at one
            parameter.normal_(std=dim**-0.5)


def random_janus(sizes: Sizes) -> nn.Module:
    """transformers' Janus with random weights, small where they make no codes."""
    from transformers import JanusConfig, JanusForConditionalGeneration

    config = JanusConfig(
        text_config=dict(
            model_type="llama",
            vocab_size=NUM_WORDS,
            hidden_size=sizes.dim,
            intermediate_size=layers.ffn_width(sizes.dim),
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.heads,
            pad_token_id=PAD,
        ),
        vision_config=dict(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=16 * math.isqrt(sizes.tokens),
            patch_size=16,
            num_image_tokens=sizes.tokens,
            projection_dim=sizes.dim,
        ),
        vq_config=dict(
            embed_dim=8,
            num_embeddings=sizes.codes,
            latent_channels=8,
            base_channels=32,
            channel_multiplier=[1],
            num_res_blocks=1,
            image_token_embed_dim=sizes.dim,
            projection_dim=sizes.dim,
        ),
    )
    reference = JanusForConditionalGeneration(config).eval()
    randomise(reference, sizes.dim)
    return reference


def janus_pair(sizes: Sizes) -> Pair:
    """transformers' Janus. Our backbone loads the weights that it saves."""
    from transformers import GenerationConfig

    reference = random_janus(sizes)
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        backbone = backbones.load(janus.Config(name="janus", path=folder))
    reference.generation_config = GenerationConfig(
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        max_length=PROMPT_LEN + sizes.tokens,
        do_sample=False,
        generation_kwargs={"boi_token_id": BEGIN_OF_IMAGE},
    )

    def conditions(batch: int) -> Condition:
        words = torch.randint(BEGIN_OF_IMAGE + 1, NUM_WORDS, (batch, PROMPT_LEN))
        words[:, 0], words[:, -1] = BOS, BEGIN_OF_IMAGE
        return Condition(words, torch.ones_like(words, dtype=torch.bool))

    def generate(condition: Condition, cfg_scale: float) -> Tensor:
        mask = condition.mask.long()
        options = {"generation_mode": "image", "guidance_scale": cfg_scale}
        return reference.generate(condition.values, attention_mask=mask, **options)

    # Its generate always computes the unconditional rows. Ours does when the scale is
    # not 1.
    side = Side(reference.model.language_model, generate)
    return Pair(backbone, side, conditions, [(1, 5.0), (8, 5.0)])


def llamagen_pair(sizes: Sizes, checkout: Path) -> Pair:
    """The authors' class-conditional GPT and sampling function, from their repository.

    Raises ValueError when `checkout` is not a checkout of it.
    """
    for name in REFERENCE_FILES:
        if not (checkout / name).is_file():
            raise ValueError(
                f"--reference {checkout} has no {name}; expected a checkout of FoundationVision/LlamaGen"
            )
    backbone = llamagen.LlamaGenBackbone(
        llamagen.Architecture(
            condition="class",
            dim=sizes.dim,
            num_layers=sizes.layers,
            num_heads=sizes.heads,
            num_kv_heads=sizes.heads,
            ffn_dim=layers.ffn_width(sizes.dim),
            vocab_size=sizes.codes,
            num_tokens=sizes.tokens,
            num_classes=NUM_CLASSES,
        )
    )
    randomise(backbone, sizes.dim)
    sys.path.insert(0, str(checkout))
    try:
        gpt, sampling = (
            importlib.import_module(name.removesuffix(".py").replace("/", ".")) for name in REFERENCE_FILES
        )
    finally:
        sys.path.remove(str(checkout))
    reference = gpt.Transformer(
        gpt.ModelArgs(
            dim=sizes.dim,
            n_layer=sizes.layers,
            n_head=sizes.heads,
            vocab_size=sizes.codes,
            block_size=sizes.tokens,
            num_classes=NUM_CLASSES,
        )
    ).eval()
    reference.load_state_dict(
        {llamagen.official_name(name): value for name, value in backbone.state_dict().items()}
    )

    def conditions(batch: int) -> Condition:
        return Condition(torch.randint(NUM_CLASSES, (batch, 1)), torch.ones(batch, 1, dtype=torch.bool))

    def generate(condition: Condition, cfg_scale: float) -> Tensor:
        options = {
            "cfg_scale": cfg_scale,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "sample_logits": False,
        }
        with warnings.catch_warnings():
            # It chooses the attention kernel through a function that torch has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            return sampling.generate(reference, condition.values[:, 0], sizes.tokens, **options)

    return Pair(backbone, Side(reference, generate), conditions, [(1, 1.0), (8, 4.0)])


# ---- measuring -----------------------------------------------------------------------------------


def ours(backbone: Backbone, window: int) -> Side:
    encoder = WindowEncoder(backbone.dim, window) if window > 1 else None
    decoder = WindowDecoder(backbone.dim, window) if window > 1 else None
    schedule, weights = FixedSchedule("none"), [1.0] * window
    model = TensorAR(backbone, encoder, decoder, schedule, offset_weights=weights).eval()

    def generate(condition: Condition, cfg_scale: float) -> Tensor:
        settings = SamplerSettings(cfg_scale=cfg_scale, lookahead=1)
        return decode(model, condition, settings, draw=greedy).codes[..., 0]

    return Side(backbone, generate)


def timed(side: Side, condition: Condition, cfg_scale: float) -> tuple[Tensor, Tensor]:
    """Generate once: codes [B, T], and the seconds of T - 2 steps, float64."""
    calls = []
    hook = side.transformer.register_forward_pre_hook(lambda *_: calls.append(time.perf_counter()))
    try:
        codes = side.generate(condition, cfg_scale)
    finally:
        hook.remove()
    return codes, torch.tensor(calls, dtype=torch.float64).diff()[1:]


def fastest_decile(steps: list[Tensor]) -> float:
    """Mean of the fastest tenth of the steps, in milliseconds."""
    seconds = torch.cat(steps).sort().values
    return 1000 * seconds[: math.ceil(len(seconds) / 10)].mean().item()


def bandwidth() -> float:
    """Bytes per second read from memory: the best of several sums over half a GiB."""
    numbers, best = torch.ones(2**27), 0.0
    for _ in range(8):
        start = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (time.perf_counter() - start))
    return best


def weight_bytes(backbone: nn.Module) -> int:
    """Bytes that every step reads: parameters, except those of embedding tables."""
    tables = {id(module.weight) for module in backbone.modules() if isinstance(module, nn.Embedding)}
    return sum(parameter.nbytes for parameter in backbone.parameters() if id(parameter) not in tables)


def table(pair: Pair, runs: int) -> list[str]:
    """Measure all cases: the lines of a Markdown table, one row per case."""
    sides = {
        "ours": ours(pair.backbone, 1),
        "reference": pair.reference,
        "window": ours(pair.backbone, WINDOW),
    }
    lines = [
        "| batch | cfg_scale | ours, ms a step | reference | times as fast | by the median | "
        f"K={WINDOW} over K=1 | share of the floor | equal tokens |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    progress = tqdm(total=len(pair.cases) * runs * len(sides), unit="batch", disable=None)
    for batch, cfg_scale in pair.cases:
        steps, equal = {name: [] for name in sides}, []
        for _ in range(runs):
            condition, codes = pair.conditions(batch), {}
            for name, side in sides.items():
                codes[name], seconds = timed(side, condition, cfg_scale)
                steps[name].append(seconds)
                progress.update()
            equal.append((codes["ours"] == codes["reference"]).float().mean().item())
        ours_ms, reference_ms, window_ms = (fastest_decile(steps[name]) for name in sides)
        medians = [torch.cat(steps[name]).median() for name in sides]
        # The milliseconds that reading the weights once takes.
        floor = 1000 * weight_bytes(pair.backbone) / bandwidth()
        faster, by_median = reference_ms / ours_ms, medians[1] / medians[0]
        lines.append(
            f"| {batch} | {cfg_scale} | {ours_ms:.1f} | {reference_ms:.1f} | {faster:.2f} | {by_median:.2f} "
            f"| {window_ms / ours_ms:.2f} | {floor / ours_ms:.0%} | {sum(equal) / runs:.2%} |"
        )
    progress.close()
    return lines


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Time our decoding compared with a reference's, on the same random weights.",
        epilog="example:\n  python benchmarks/decode.py janus --runs 1\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("backbone", choices=["janus", "llamagen"])
    parser.add_argument(
        "--reference", type=Path, metavar="CHECKOUT", help="for llamagen: the authors' repository"
    )
    for name, default in Sizes(dim=768, layers=12, heads=12, codes=16384, tokens=256)._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument(
        "--runs", type=int, default=3, help="batches of images per implementation (default 3)"
    )
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    options = parser.parse_args(arguments)
    sizes = Sizes(*(getattr(options, name) for name in Sizes._fields))
    for name in ("codes", "layers", "heads", "runs", "threads"):
        if (number := getattr(options, name)) < 1:
            raise ValueError(f"--{name} is {number}; expected 1 or more")
    sizes.check()
    if options.backbone == "llamagen" and options.reference is None:
        raise ValueError("llamagen needs --reference, a checkout of FoundationVision/LlamaGen")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    pair = llamagen_pair(sizes, options.reference) if options.backbone == "llamagen" else janus_pair(sizes)
    print(
        f"{options.backbone}: width {sizes.dim}, {sizes.layers} layers, {sizes.codes} codes, "
        f"{sizes.tokens} tokens, fp32, {options.threads} threads, torch {torch.__version__}, "
        f"load {os.getloadavg()[0]:.1f}\n"
    )
    print("\n".join(table(pair, options.runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
