"""Time of a training step, compared with a plain PyTorch loop and transformers'
Trainer.

    python benchmarks/train_step.py

Each trains one small Janus with random weights, in float32, on the same batch (prompts
of several lengths), in turns in one process; the fastest of a few rounds of each is
compared. Ours is the complete step of train.py (DeepSpeed's engine, without ZeRO,
clipping included), at K=1 and K=4. At K=1 all compute the same loss, which is checked.
Ours and Trainer use torch's fused AdamW. The plain loop is measured twice: with the
AdamW that torch chooses by default, and with the fused one. Also measured: ours with
train.compile, ours with selective activation checkpointing, and reading a batch of
cached codes from shards.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import copy
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from benchmarks import data
from benchmarks.decode import NUM_WORDS, PAD, PROMPT_LEN, Sizes, random_janus
from mmtensorar.backbones import janus
from mmtensorar.data.loader import stream
from mmtensorar.image_tokenizers import janus_vq
from mmtensorar.model.conditions import Condition
from mmtensorar.recipe import Data, Recipe, Run, Train

LR, CLIP = 1e-4, 1.0


class Plain(nn.Module):
    """transformers' Janus with the loss of the next image token."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.model
        self.prepare = model.prepare_embeddings_for_image_generation
        # Parts that do not predict image codes get no gradient, and are not trained.
        for name, part in self.model.named_children():
            if name in ("vision_model", "aligner", "vqmodel"):
                part.requires_grad_(False)

    def forward(self, ids: Tensor, mask: Tensor, codes: Tensor) -> dict[str, Tensor]:
        prompt = self.model.language_model.get_input_embeddings()(ids)
        embeds = torch.cat([prompt, self.prepare(codes[:, :-1])], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(codes), codes.shape[1] - 1)], dim=1)
        hidden = self.model.language_model(
            inputs_embeds=embeds, attention_mask=mask.long(), use_cache=False
        ).last_hidden_state
        logits = self.model.generation_head(hidden[:, ids.shape[1] - 1 :])
        return {"loss": functional.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())}


def plain_steps(model: Plain, batch: dict[str, Tensor], **adamw) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0, **adamw
    )

    def step() -> float:
        loss = model(**batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def trainer_seconds(model: Plain, batch: dict[str, Tensor], steps: int) -> float:
    """A step of transformers' Trainer: the shortest between two of its step ends."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments, **others) -> None:
            ends.append(time.perf_counter())

    rows = [{name: value[row] for name, value in batch.items()} for row in range(len(batch["ids"]))] * (
        steps + 1
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=steps + 1,
            per_device_train_batch_size=len(batch["ids"]),
            learning_rate=LR,
            max_grad_norm=CLIP,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        Trainer(model, settings, train_dataset=rows, callbacks=[Clock()]).train()
    return min(later - earlier for earlier, later in zip(ends, ends[1:], strict=False))


def data_seconds(folder: Path, batch_size: int, num: int = 200) -> float:
    """Mean time of a batch of codes and captions, streamed in this process."""
    data.write_ours(folder, list(data.small_samples(2000)), 500)
    settings = Data(shards=str(folder), batch_size=batch_size, shuffle=1000)
    recipe = SimpleNamespace(run=Run(name="benchmark"), data=settings, train=Train(steps=1))
    batches = stream(recipe, data.captions_only, rank=0, world_size=1)
    next(batches)
    began = time.perf_counter()
    for _ in range(num):
        next(batches)
    return (time.perf_counter() - began) / num


def our_steps(folder: Path, window: int, batch: dict[str, Tensor], **train) -> Callable[[], float]:
    from mmtensorar.training import engine as engines

    recipe = Recipe.model_validate(
        {
            "run": {"name": "benchmark"},
            "backbone": janus.Config(name="janus", path=str(folder)),
            "image_tokenizer": janus_vq.Config(name="janus_vq", path=str(folder)),
            "tensorar": {"window": window},
            "data": {"shards": "none", "batch_size": len(batch["ids"])},
            "optim": {"lr": LR, "weight_decay": 0.0, "grad_clip": CLIP},
            "train": {"steps": 1000, "precision": "fp32", **train},
        }
    )
    engine = engines.start(recipe, 1, torch.device("cpu"))
    condition = Condition(batch["ids"], batch["mask"])
    uncond = torch.zeros(len(batch["ids"]), dtype=torch.bool)

    def step() -> float:
        output = engine(batch["codes"][..., None], condition, uncond, torch.Generator().manual_seed(0))
        engine.backward(output.loss)
        engine.step()
        return output.loss_per_offset[0].item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--codes", type=int, default=16_384)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="of each, in each round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    # Otherwise start_process_group would divide the cores among ranks.
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    from mmtensorar.training import distributed

    distributed.start_process_group(0)
    sizes = Sizes(
        dim=options.dim,
        layers=options.layers,
        heads=options.dim // 64,
        tokens=options.tokens,
        codes=options.codes,
    )
    reference = random_janus(sizes)
    torch.manual_seed(0)
    batch = {
        "ids": torch.randint(4, NUM_WORDS, (options.batch_size, PROMPT_LEN)),
        # Prompts of several lengths.
        "mask": torch.arange(PROMPT_LEN) >= torch.arange(options.batch_size)[:, None],
        "codes": torch.randint(options.codes, (options.batch_size, options.tokens)),
    }
    batch["ids"][~batch["mask"]] = PAD
    with tempfile.TemporaryDirectory() as temporary:
        reference.save_pretrained(temporary)
        folder = Path(temporary)
        steps = {f"ours, K={window}": our_steps(folder, window, batch) for window in (1, 4)}
        steps["ours, K=1, train.compile"] = our_steps(folder, 1, batch, compile=True)
        steps["ours, K=1, selective"] = our_steps(folder, 1, batch, activation_checkpointing="selective")
        waiting = data_seconds(folder / "shards", options.batch_size)
    # With these Trainer would believe that it is one of several ranks, and do more.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    trainer_model = Plain(reference).train()
    steps["plain loop"] = plain_steps(copy.deepcopy(trainer_model), batch)
    steps["plain loop, fused AdamW"] = plain_steps(copy.deepcopy(trainer_model), batch, fused=True)
    losses = {name: step() for name, step in steps.items()}  # the first step also makes what later ones reuse
    print({name: round(loss, 5) for name, loss in losses.items()})
    assert abs(losses["ours, K=1"] - losses["plain loop"]) < 1e-3, losses
    best = dict.fromkeys([*steps, "Trainer"], float("inf"))
    for _ in range(options.rounds):
        for name, step in steps.items():
            for _ in range(options.steps):
                began = time.perf_counter()
                step()
                best[name] = min(best[name], time.perf_counter() - began)
        best["Trainer"] = min(best["Trainer"], trainer_seconds(trainer_model, batch, options.steps))
    ours = best["ours, K=1"]
    print("\n| | s a step | divided by ours, K=1 |\n|---|---:|---:|")
    for name, seconds in best.items():
        print(f"| {name} | {seconds:.2f} | {seconds / ours:.2f} |")
    share = waiting / (waiting + ours)
    print(
        f"\na batch of cached codes (576 a picture) takes {1000 * waiting:.1f} ms: {share:.2%} of a step "
        "at K=1"
    )
    distributed.stop_process_group()


if __name__ == "__main__":
    main()
