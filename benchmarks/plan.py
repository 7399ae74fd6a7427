"""The memory that a plan predicts, compared with what training uses:
python benchmarks/plan.py

It trains two sizes of a Janus with random weights in several ways, each in its own
process on the CPU. It prints what `mmtensorar plan RECIPE` computes for one GPU, and
how far the resident memory of the process rises in the third step, above what it was
before the model was built. ZeRO's buckets are small here, because one rank fills little
of them, and memory that is allocated but never touched is not resident on a CPU.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

MIB = 2**20
SIZES = {"38 M": (512, 8), "110 M": (768, 12)}  # width, layers
BUCKETS = {"reduce_bucket_size": 10**6, "stage3_prefetch_bucket_size": 10**6}
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {"train": {"precision": "fp32"}},
    "bf16": {},
    "bf16, K=1": {"tensorar": {"window": 1}},
    "bf16, ZeRO-2": {"zero": {"stage": 2, "extra": BUCKETS}},
    "bf16, ZeRO-2, grad_accum 2": {"zero": {"stage": 2, "extra": BUCKETS}, "train": {"grad_accum": 2}},
    "bf16, ZeRO-3": {"zero": {"stage": 3, "extra": BUCKETS}},
    "bf16, ZeRO-3, all recomputed": {
        "zero": {"stage": 3, "extra": BUCKETS},
        "train": {"activation_checkpointing": True},
    },
    "bf16, ZeRO-2, selective": {
        "zero": {"stage": 2, "extra": BUCKETS},
        "train": {"activation_checkpointing": "selective"},
    },
    "bf16, LoRA": {"train": {"parts": "lora"}},
}
ROWS = 4


def recipe(folder: Path, way: dict[str, Any]):
    from mmtensorar.backbones import janus
    from mmtensorar.image_tokenizers import janus_vq
    from mmtensorar.recipe import Recipe

    grad_accum = way.get("train", {}).get("grad_accum", 1)
    settings = {
        "run": {"name": "plan"},
        "backbone": janus.Config(name="janus", path=str(folder)),
        "image_tokenizer": janus_vq.Config(name="janus_vq", path=str(folder)),
        "data": {"shards": "none", "batch_size": ROWS * grad_accum},
    }
    return Recipe.model_validate(settings | way | {"train": {"steps": 100} | way.get("train", {})})


def measured(folder: Path, way: dict[str, Any]) -> int:
    """Peak bytes of the third step, above the start."""
    import torch

    from benchmarks.loading import memory_of_process
    from mmtensorar.training import distributed, plan
    from mmtensorar.training import engine as engines

    settings = recipe(folder, way)
    distributed.start_process_group(0)
    torch.set_num_threads(os.cpu_count() or 1)
    plan.meta_model(settings)  # so that its imports do not count
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = memory_of_process("VmRSS")
    engine = engines.start(settings, 1, torch.device("cpu"))
    for _ in range(3):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        for _ in range(settings.train.grad_accum):
            inputs = plan.example_inputs(engine.module, ROWS)
            engine.backward(engine(*inputs).loss)
            engine.step()
    peak = memory_of_process("VmHWM") - before
    distributed.stop_process_group()
    return peak


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps({"measured": measured(Path(sys.argv[1]), json.loads(sys.argv[2]))}), flush=True)
        return
    from benchmarks.decode import Sizes, random_janus
    from mmtensorar.training import plan

    # Freed tensors go back to the system, so that resident memory is that of tensors.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "TQDM_DISABLE": "1"}
    print("| model | trained | planned, MiB | measured, MiB | planned / measured |\n|---|---|---:|---:|---:|")
    worst = 1.0
    for name, (dim, layers) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            random_janus(
                Sizes(dim=dim, layers=layers, heads=dim // 64, codes=16384, tokens=256)
            ).save_pretrained(folder)
            for title, way in WAYS.items():
                settings = recipe(Path(folder), way)
                model = plan.meta_model(settings)
                largest = max(parameter.numel() for parameter in model.parameters())
                active = plan.activation_bytes(settings, [ROWS])[ROWS]
                planned = plan.memory(settings, plan.parameters(model), largest, active, 1).peak
                command = [sys.executable, str(Path(__file__).resolve()), folder, json.dumps(way)]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
                used = json.loads(done.stdout.splitlines()[-1])["measured"]
                ratio = planned / used
                worst = max(worst, ratio, 1 / ratio)
                print(
                    f"| {name} | {title} | {planned / MIB:,.0f} | {used / MIB:,.0f} | {ratio:.2f} |",
                    flush=True,
                )
    print(f"\nworst: {worst - 1:.0%} apart")


if __name__ == "__main__":
    main()
