"""How long training stands still for a checkpoint: python benchmarks/saving.py [--gib 0.3]

One rank trains a random LlamaGen of that size (bfloat16 weights, so six times as much state) under ZeRO-2 and saves in turns: ours
in the foreground, ours in the background, and DeepSpeed's own save_checkpoint with the SHA-256 of its files, which ours include. The
fastest of a few rounds each; for the background also how long until it stood, while steps went on.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch  # noqa: E402

from benchmarks import loading  # noqa: E402
from mmtensorar.files import sha256  # noqa: E402
from mmtensorar.training import plan  # noqa: E402

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    from mmtensorar.training import engine as deep
    from mmtensorar.training import run_state

    deep.start_process_group(0)
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        loading.write(folder / "model", options.gib)
        recipe = loading.recipe(folder)
        recipe = recipe.model_copy(
            update={
                "zero": recipe.zero.model_copy(update={"stage": 2}),
                "data": recipe.data.model_copy(update={"batch_size": 1}),
            }
        )
        engine = deep.start(recipe, 1, cpu)
        inputs = plan._inputs(engine.module, 1)

        def step() -> float:
            began = time.perf_counter()
            engine.backward(engine(*inputs).loss)
            engine.step()
            return time.perf_counter() - began

        alone = min(step() for _ in range(3))
        found: dict[str, list[float]] = {"ours": [], "ours, background": [], "DeepSpeed's, hashed": []}
        until, beside, size = [], [], 0
        savers = {
            background: run_state.Saver(
                engine, folder / f"ours_{background}", {}, keep_last=1, keep_best=False, background=background
            )
            for background in (False, True)
        }
        for number in range(1, options.rounds + 1):
            began = time.perf_counter()
            savers[False].save(number, {}, None, cpu)
            found["ours"].append(time.perf_counter() - began)
            size = sum(path.stat().st_size for path in (folder / "ours_False").rglob("*") if path.is_file())
            shutil.rmtree(folder / "ours_False")

            began = time.perf_counter()
            savers[True].save(number, {}, None, cpu)
            found["ours, background"].append(time.perf_counter() - began)
            while savers[True].at_work.is_alive():
                beside.append(step())
            savers[True].finish(cpu)
            until.append(time.perf_counter() - began)
            shutil.rmtree(folder / "ours_True")

            began = time.perf_counter()
            engine.save_checkpoint(str(folder / "theirs"), tag="it", save_latest=False)
            for path in (folder / "theirs" / "it").iterdir():
                sha256(path)
            found["DeepSpeed's, hashed"].append(time.perf_counter() - began)
            shutil.rmtree(folder / "theirs")
        print(
            f"state of {size / MIB:,.0f} MiB, a step takes {alone:.1f} s\n\n| | training stands still, s | of ours |\n|---|---:|---:|"
        )
        for name, seconds in found.items():
            print(f"| {name} | {min(seconds):.2f} | {min(seconds) / min(found['ours']):.2f} |")
        print(
            f"\nin the background it stood after {min(until):.1f} s, and a step meanwhile took {min(beside):.1f} to {max(beside):.1f} s"
        )
    deep.stop_process_group()


if __name__ == "__main__":
    main()
