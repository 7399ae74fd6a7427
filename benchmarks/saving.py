"""How long training waits while a run state is saved:
python benchmarks/saving.py [--gib 0.3]

One rank trains a random LlamaGen under ZeRO-2. --gib is the size of its bfloat16
weights; the state is six times as large. It saves in turns: ours in the foreground,
ours in the background, and DeepSpeed's own save_checkpoint with the SHA-256 of its
files, which ours also computes. The fastest of a few rounds is printed for each. For
the background it also prints the time until the run state was complete, while steps
continued.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import loading
from mmtensorar.files import sha256
from mmtensorar.training import plan

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--gib", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    from mmtensorar.training import distributed, run_state
    from mmtensorar.training import engine as engines

    distributed.start_process_group(0)
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
        engine = engines.start(recipe, 1, cpu)
        inputs = plan.example_inputs(engine.module, 1)

        def step() -> float:
            began = time.perf_counter()
            engine.backward(engine(*inputs).loss)
            engine.step()
            return time.perf_counter() - began

        alone = min(step() for _ in range(3))
        waits: dict[str, list[float]] = {"ours": [], "ours, background": [], "DeepSpeed's, hashed": []}
        complete_after, steps_meanwhile, size = [], [], 0
        savers = {
            background: run_state.Saver(
                engine, folder / f"ours_{background}", {}, keep_last=1, keep_best=False, background=background
            )
            for background in (False, True)
        }
        for number in range(1, options.rounds + 1):
            began = time.perf_counter()
            savers[False].save(number, {}, None, cpu)
            waits["ours"].append(time.perf_counter() - began)
            size = sum(path.stat().st_size for path in (folder / "ours_False").rglob("*") if path.is_file())
            shutil.rmtree(folder / "ours_False")

            began = time.perf_counter()
            savers[True].save(number, {}, None, cpu)
            waits["ours, background"].append(time.perf_counter() - began)
            while savers[True].thread.is_alive():
                steps_meanwhile.append(step())
            savers[True].finish(cpu)
            complete_after.append(time.perf_counter() - began)
            shutil.rmtree(folder / "ours_True")

            began = time.perf_counter()
            engine.save_checkpoint(str(folder / "theirs"), tag="it", save_latest=False)
            for path in (folder / "theirs" / "it").iterdir():
                sha256(path)
            waits["DeepSpeed's, hashed"].append(time.perf_counter() - began)
            shutil.rmtree(folder / "theirs")
        print(
            f"state of {size / MIB:,.0f} MiB, a step takes {alone:.1f} s\n\n"
            "| | training waits, s | divided by ours |\n|---|---:|---:|"
        )
        for name, seconds in waits.items():
            print(f"| {name} | {min(seconds):.2f} | {min(seconds) / min(waits['ours']):.2f} |")
        print(
            f"\nin the background it was complete after {min(complete_after):.1f} s, and a step meanwhile "
            f"took {min(steps_meanwhile):.1f} to {max(steps_meanwhile):.1f} s"
        )
    distributed.stop_process_group()


if __name__ == "__main__":
    main()
