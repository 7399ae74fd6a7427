"""Host memory while a checkpoint goes into ZeRO-3 on two ranks.

    python benchmarks/loading.py [--gib 1] [--ranks 2]

Writes a random LlamaGen of that size (bfloat16, safetensors in four parts) to a temporary folder, starts the ranks and
measures for each how far its resident memory rises above what it was before, from the first look at the files until its
share of the weights stands. Bound: 1.3 times its share plus one part of the checkpoint. Beside it, in the same run, the
plain way: one process that loads the model whole.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MIB = 2**20
WIDTH, LAYERS_PER_GIB = 2048, 10


def write(folder: Path, gib: float) -> int:
    """A checkpoint of about gib; returns its bytes."""
    import torch
    from huggingface_hub import save_torch_state_dict

    from mmtensorar.backbones import llamagen

    config = llamagen.Architecture(
        condition="class",
        dim=WIDTH,
        num_layers=round(gib * LAYERS_PER_GIB),
        num_heads=16,
        num_kv_heads=16,
        ffn_dim=5632,
        vocab_size=16384,
        num_tokens=256,
        num_classes=1000,
    )
    with torch.device("meta"):
        backbone = llamagen.LlamaGenBackbone(config)
    state = {
        name: torch.zeros(value.shape, dtype=torch.bfloat16).normal_(std=0.02)
        for name, value in backbone.state_dict().items()
    }
    size = sum(value.numel() * 2 for value in state.values())
    folder.mkdir(parents=True)
    backbone.save_config(folder)
    save_torch_state_dict(
        {llamagen.official_name(name): value for name, value in state.items()},
        folder,
        max_shard_size=size // 4,
    )
    return size


def recipe(folder: Path):
    from mmtensorar.backbones.llamagen import Config
    from mmtensorar.recipe import Data, Recipe, Run, Section, TensorARSettings, Train, Zero

    return Recipe(
        run=Run(name="loading", out=str(folder)),
        backbone=Config(name="llamagen", path=str(folder / "model")),
        image_tokenizer=Section(),
        tensorar=TensorARSettings(window=4),
        data=Data(shards="none", batch_size=8),
        train=Train(steps=1),
        zero=Zero(stage=3),
    )


def resident() -> int:
    return (
        int(
            next(
                line
                for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmRSS")
            ).split()[1]
        )
        * 1024
    )


def peak() -> int:
    return (
        int(
            next(
                line
                for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmHWM")
            ).split()[1]
        )
        * 1024
    )


def rank(folder: Path) -> None:
    """What one rank does: join, then load."""
    from mmtensorar.checkpoints import model_folder
    from mmtensorar.training import engine

    number, world_size, device = engine.start_process_group(0)
    plan = recipe(folder)
    config = engine.settings(plan, world_size)
    model_folder.skeleton(plan)  # imports what loading imports
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident()
    model = engine._partitioned_model(plan, config, device)
    share = sum(
        parameter.ds_tensor.numel() * parameter.ds_tensor.element_size() for parameter in model.parameters()
    )
    result = {"rank": number, "peak": peak() - before, "after": resident() - before, "share": share}
    (folder / f"result_{number}.json").write_text(json.dumps(result))
    engine.stop_process_group()


def whole(folder: Path) -> None:
    from mmtensorar.checkpoints import model_folder

    Path("/proc/self/clear_refs").write_text("5")
    before = resident()
    model_folder.initial_model(recipe(folder))
    (folder / "result_whole.json").write_text(json.dumps({"peak": peak() - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--whole-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_in or options.whole_in:
        rank(options.rank_in) if options.rank_in else whole(options.whole_in)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write(folder / "model", options.gib)
        part = max(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(options.ranks),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [*launch, str(Path(__file__).resolve()), "--rank-in", name], check=True, env=environment
        )
        subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), "--whole-in", name], check=True, env=environment
        )
        print(
            f"checkpoint {size / MIB:,.0f} MiB in bfloat16, its largest part {part / MIB:,.0f} MiB, {options.ranks} ranks"
        )
        print(f"{'':8} {'share':>8} {'after':>8} {'peak':>8} {'bound':>8}  peak / bound   (MiB)")
        for number in range(options.ranks):
            found = json.loads((folder / f"result_{number}.json").read_text())
            bound = 1.3 * found["share"] + part
            cells = "".join(
                f"{value / MIB:>9,.0f}" for value in (found["share"], found["after"], found["peak"], bound)
            )
            print(f"rank {number:<3}{cells}  {found['peak'] / bound:>12.2f}")
        alone = json.loads((folder / "result_whole.json").read_text())["peak"]
        print(f"loaded whole by one process, float32: {alone / MIB:,.0f} MiB")


if __name__ == "__main__":
    main()
