"""Speed and memory of this code on a CUDA card: python benchmarks/gpu.py [--size 1b]

Weights are random, of the released models' shapes. Times are measured by CUDA events,
memory is PyTorch's peak of allocated bytes, MFU is relative to a bfloat16 matrix
product measured first. A part that fails (for example for lack of memory) prints a line
with its error. Parts that have not started after --minutes are skipped and listed. On a
machine without a GPU only `--size tiny` runs. Its times mean nothing; it shows that the
script works.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers import JanusConfig

from benchmarks import loss_memory
from mmtensorar.backbones import janus
from mmtensorar.image_tokenizers import janus_vq
from mmtensorar.model import tensorar
from mmtensorar.model.codec import WindowDecoder
from mmtensorar.model.conditions import Condition
from mmtensorar.recipe import Recipe, SamplerSettings
from mmtensorar.sampling.decode import decode
from mmtensorar.training import plan
from mmtensorar.training.stopwatch import Stopwatch, matmul_rate

MIB = 2**20
PROMPT_LEN = 32
TINY = {
    "text_config": {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
    },
    "vision_config": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 64,
        "patch_size": 16,
        "projection_dim": 64,
    },
    "vq_config": {
        "embed_dim": 8,
        "num_embeddings": 128,
        "latent_channels": 8,
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
        "image_token_embed_dim": 64,
        "projection_dim": 64,
    },
}


class Bench(NamedTuple):
    device: torch.device
    config: JanusConfig
    rate: float  # FLOPs a second of a bfloat16 matrix product
    batch: int

    def peak(self) -> str:
        """The most memory since `reset`, as text."""
        return (
            f"{torch.cuda.max_memory_allocated() / MIB:,.0f} MiB"
            if self.device.type == "cuda"
            else "memory not measured"
        )

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def milliseconds(self, work: Callable[[], object], times: int) -> float:
        """The fastest of some runs, after a warm-up run."""
        laps = []
        for _ in range(times + 1):
            watch = Stopwatch(self.device)
            work()
            watch.lap("work")
            laps.append(1000 * watch.seconds()["work"])
        return min(laps[1:])

    def backbone(self, attention: str) -> janus.JanusBackbone:
        torch.manual_seed(0)
        config = copy.deepcopy(self.config)
        config.text_config._attn_implementation = attention
        return janus.build(config, device=self.device)

    def inputs(self, rows: int) -> tuple[torch.Tensor, Condition, torch.Tensor]:
        """Codes, prompts of several lengths and which of them are dropped."""
        generator = torch.Generator().manual_seed(0)
        vq, words = self.config.vq_config, self.config.text_config.vocab_size
        codes = torch.randint(vq.num_embeddings, (rows, vq.num_patches**2, 1), generator=generator)
        ids = torch.randint(1, min(60, words), (rows, PROMPT_LEN), generator=generator)
        mask = torch.arange(PROMPT_LEN) >= torch.arange(rows)[:, None] % PROMPT_LEN
        condition = Condition(ids, mask).to(self.device)
        return codes.to(self.device), condition, torch.zeros(rows, dtype=torch.bool, device=self.device)

    def recipe(self, folder: Path, window: int, attention: str) -> Recipe:
        return Recipe.model_validate(
            {
                "run": {"name": "gpu"},
                "backbone": janus.Config(name="janus", path=str(folder), attn_implementation=attention),
                "image_tokenizer": janus_vq.Config(name="janus_vq", path=str(folder)),
                "tensorar": {"window": window, "num_heads": 4},
                "data": {"shards": "none", "batch_size": self.batch},
                "train": {"steps": 1000, "activation_checkpointing": True},
            }
        )


def parity(bench: Bench, attention: str) -> str:
    """Hidden states of a few layers in bfloat16, compared with float32 on the CPU."""
    config = copy.deepcopy(bench.config)
    config.text_config.num_hidden_layers = 2
    small = bench._replace(config=config, device=torch.device("cpu"))
    exact = small.backbone("sdpa").eval()
    codes, condition, uncond = small.inputs(2)

    @torch.no_grad()
    def states(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        prefix = model.prefix(condition.to(device), uncond.to(device))
        embeds = torch.cat([prefix.embeds, model.embed(codes.to(device))], dim=1).to(dtype)
        mask = torch.cat([prefix.mask, prefix.mask.new_ones(codes.shape[:2])], dim=1)
        return model(embeds, mask)[:, PROMPT_LEN:].float().cpu()

    expected = states(exact, torch.device("cpu"), torch.float32)
    model = small.backbone(attention).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    rounded = states(model.to(bench.device), bench.device, torch.bfloat16)
    difference = ((rounded - expected).norm() / expected.norm()).item()
    verdict = " (too large: expected below 0.02)" if difference > 0.02 else ""
    return f"relative difference {difference:.4f}{verdict}"


def loss(bench: Bench, window: int) -> str:
    vq = bench.config.vq_config
    sizes = loss_memory.Sizes(
        bench.batch, vq.num_patches**2, bench.config.text_config.hidden_size, vq.num_embeddings
    )
    torch.manual_seed(0)
    with torch.device(bench.device):
        decoder = WindowDecoder(sizes.dim, window, num_heads=4) if window > 1 else None
        model = tensorar.TensorAR(
            loss_memory.HeadOnly(sizes),
            torch.nn.Identity() if window > 1 else None,
            decoder,
            lambda *_: None,
            offset_weights=[1.0] * window,
        ).bfloat16()
        hidden = torch.randn(sizes.batch, sizes.tokens, sizes.dim, dtype=torch.bfloat16, requires_grad=True)
        targets, valid = loss_memory.slide(torch.randint(sizes.codes, (sizes.batch, sizes.tokens, 1)), window)
    cells = []
    for name, work in (("ours", loss_memory.ours), ("all logits", loss_memory.naive)):
        bench.reset()
        try:
            spent = bench.milliseconds(
                lambda work=work: work(model, hidden, targets, valid).sum().backward(), 3
            )
            cells.append(f"{name} {spent:.1f} ms, {bench.peak()}")
        except torch.OutOfMemoryError:
            cells.append(f"{name}: out of memory")
    return "; ".join(cells)


def train(bench: Bench, folder: Path, window: int, attention: str) -> str:
    from mmtensorar.training import engine as engines

    recipe = bench.recipe(folder, window, attention)
    engine = engines.start(recipe, 1, bench.device)
    codes, condition, uncond = bench.inputs(bench.batch)

    def step() -> None:
        engine.backward(engine(codes, condition, uncond).loss)
        engine.step()

    bench.reset()
    spent = bench.milliseconds(step, 4)
    tokens, flops = plan.flops_per_step(recipe, prompt_len=PROMPT_LEN, recomputed=False)
    engine.destroy()
    rate, mfu = 1000 * tokens / spent, 1000 * flops / spent / bench.rate
    return f"{spent:.0f} ms, {rate:,.0f} tokens/s, MFU {mfu:.0%}, {bench.peak()}"


def sample(bench: Bench, folder: Path, window: int, attention: str, *, compiled: bool = False) -> str:
    model = (
        tensorar.build(bench.backbone(attention), bench.recipe(folder, window, attention).tensorar)
        .to(bench.device)
        .eval()
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    _, condition, _ = bench.inputs(bench.batch)
    bench.reset()
    settings = SamplerSettings(cfg_scale=5.0, lookahead=1)
    spent = bench.milliseconds(lambda: decode(model, condition, settings, compile_passes=compiled), 1)
    per_pass = spent / model.backbone.num_tokens
    return f"{spent / 1000:.1f} s for {bench.batch} guided images, {per_pass:.1f} ms a pass, {bench.peak()}"


def all_parts(bench: Bench, folder: Path, attentions: list[str]) -> list[tuple[str, Callable[[], str]]]:
    """(title, work) of each line of the table. folder: of the backbone's weights."""
    parts: list[tuple[str, Callable[[], str]]] = []
    for attention in attentions:
        parts.append((f"parity, {attention}", partial(parity, bench, attention)))
    for window in (1, 4, 8):
        parts.append((f"loss, K={window}", partial(loss, bench, window)))
    for title, work in (("training step", train), ("decoding", sample)):
        for attention in attentions:
            for window in (1, 4):
                name = f"{title}, K={window}, {attention}"
                parts.append((name, partial(work, bench, folder, window, attention)))
    for window in (1, 4):
        name = f"decoding, K={window}, sdpa, compiled"
        parts.append((name, partial(sample, bench, folder, window, "sdpa", compiled=True)))
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--size", choices=("1b", "7b", "tiny"), default="1b")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=8)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and options.size != "tiny":
        print(
            f"error: no CUDA card is visible; --size {options.size} needs one (--size tiny runs anywhere)",
            file=sys.stderr,
        )
        return 2
    began = time.monotonic()
    from mmtensorar.training import distributed

    distributed.start_process_group(0)
    settings = (
        TINY
        if options.size == "tiny"
        else janus.RELEASED[f"deepseek-community/Janus-Pro-{options.size.upper()}"]
    )
    bench = Bench(device, JanusConfig(**settings), matmul_rate(device, torch.bfloat16), options.batch_size)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU (figures mean nothing)"
    print(f"{name}, torch {torch.__version__}, Janus-Pro {options.size}, batch {bench.batch}, bfloat16")
    print(f"a matrix product runs at {bench.rate / 1e12:.3g} TFLOP/s\n\n| | |\n|---|---|", flush=True)
    attentions = ["sdpa"]
    if device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        attentions.append("flash_attention_2")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bench.backbone("sdpa").bfloat16().save_pretrained(folder)
        parts = all_parts(bench, folder, attentions)
        failed = 0
        for title, part in parts:
            if time.monotonic() - began > 60 * options.minutes:
                print(f"| {title} | skipped: {options.minutes:g} minutes have passed |", flush=True)
                continue
            try:
                result = part()
            except Exception as error:  # any: one line of the table, and the others follow
                if os.environ.get("MMTENSORAR_DEBUG"):
                    raise
                failed += 1
                result = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            bench.reset()
            print(f"| {title} | {result} |", flush=True)
    distributed.stop_process_group()
    if failed:
        print(f"error: {failed} parts failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
