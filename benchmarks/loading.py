"""Host memory while released weights are loaded under ZeRO-3 on two ranks.

    python benchmarks/loading.py [--gib 1] [--ranks 2]

It writes a random LlamaGen of --gib GiB (bfloat16, safetensors in four files) to a
temporary folder, starts the ranks and measures how far the resident memory of each rank
rises, from before it opens the files until its share of the weights is complete. The
bound is 1.3 times its share plus one of the files. For comparison, the same run
measures one process that loads the complete model.
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
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

MIB = 2**20
WIDTH, LAYERS_PER_GIB = 2048, 10


def write(folder: Path, gib: float) -> int:
    """Write weights of about that size; returns their bytes."""
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


def memory_of_process(key: str) -> int:
    """Bytes of this process: VmRSS, its resident memory now, or VmHWM, the peak of
    it.
    """
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def rank(folder: Path) -> None:
    """The work of one rank: join, then load."""
    from mmtensorar.checkpoints import model_folder
    from mmtensorar.training import distributed
    from mmtensorar.training import engine as engines

    number, world_size, device = distributed.start_process_group(0)
    settings = recipe(folder)
    config = engines.settings(settings, world_size)
    model_folder.skeleton(settings)  # imports what loading imports
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory_of_process("VmRSS")
    model = engines.partitioned_model(settings, config, device)
    share = sum(parameter.ds_tensor.nbytes for parameter in model.parameters())
    result = {
        "rank": number,
        "peak": memory_of_process("VmHWM") - before,
        "after": memory_of_process("VmRSS") - before,
        "share": share,
    }
    (folder / f"result_{number}.json").write_text(json.dumps(result))
    distributed.stop_process_group()


def whole(folder: Path) -> None:
    from mmtensorar.checkpoints import model_folder

    Path("/proc/self/clear_refs").write_text("5")
    before = memory_of_process("VmRSS")
    model_folder.initial_model(recipe(folder))
    (folder / "result_whole.json").write_text(json.dumps({"peak": memory_of_process("VmHWM") - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
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
            f"weights of {size / MIB:,.0f} MiB in bfloat16, the largest file {part / MIB:,.0f} MiB, "
            f"{options.ranks} ranks"
        )
        print(f"{'':8} {'share':>8} {'after':>8} {'peak':>8} {'bound':>8}  peak / bound   (MiB)")
        for number in range(options.ranks):
            result = json.loads((folder / f"result_{number}.json").read_text())
            bound = 1.3 * result["share"] + part
            cells = "".join(
                f"{value / MIB:>9,.0f}" for value in (result["share"], result["after"], result["peak"], bound)
            )
            print(f"rank {number:<3}{cells}  {result['peak'] / bound:>12.2f}")
        alone = json.loads((folder / "result_whole.json").read_text())["peak"]
        print(f"complete model in one process, float32: {alone / MIB:,.0f} MiB")


if __name__ == "__main__":
    main()
