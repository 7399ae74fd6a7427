"""Make a model folder of a run's checkpoint, the average of its weights too, without ranks or DeepSpeed.

    python -m mmtensorar.export runs/NAME [--step 2000 | latest | best] [--average] --out FOLDER

A finished run has written runs/NAME/model itself; this is for the steps before, and for runs that go on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmtensorar.checkpoints import model_folder, sharded_state
from mmtensorar.checkpoints.sharded_state import Piece
from mmtensorar.files import sha256
from mmtensorar.model import adapters
from mmtensorar.recipe import Recipe


def find(run: Path, step: str) -> Path:
    """The checkpoint of a run that a step's number, `latest` or `best` means. Raises ValueError when there is none."""
    folder = run / "checkpoints"
    there = sorted(path.parent for path in folder.glob(f"step_*/{sharded_state.STATE}"))
    if not there:
        raise ValueError(f"{run}: no checkpoint in it")
    if step == "latest":
        return folder / f"step_{sharded_state.latest(folder)['step']:06d}"
    if step == "best":
        if not (folder / "best").is_file():
            raise ValueError(
                f"{folder}: no checkpoint of a step whose validation loss was measured is kept, so none is the best"
            )
        named = folder / (folder / "best").read_text(encoding="utf-8").strip()
        if named not in there:
            raise ValueError(f"{folder / 'best'} names {named.name}, which is not there")
        return named
    wanted = folder / f"step_{int(step):06d}" if step.isdigit() else None
    if wanted not in there:
        raise ValueError(
            f"{run}: no checkpoint of step {step}; there are latest, {', '.join(str(sharded_state.step_of(path)) for path in there)}"
        )
    return wanted


def export(run: Path, step: str, out: Path, *, average: bool = False) -> int:
    """Write the model folder; returns the step. Raises ValueError when the checkpoint is damaged, or has no average."""
    recipe = Recipe.load(run / "recipe.yaml", [])
    if average and recipe.train.ema_decay is None:
        raise ValueError(f"{run}: it keeps no average of the weights (train.ema_decay)")
    folder = find(run, step)
    recorded = sharded_state.recorded(folder)
    for name, expected in recorded["sha256"].items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise ValueError(f"{folder}: {name} is not the file that was written, the checkpoint is damaged")
    model = model_folder.skeleton(recipe)
    trained = [
        (name, parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
    layout = [Piece(name, 0, flat, 0, shape.numel()) for flat, (name, shape) in enumerate(trained)]
    key = "average" if average else "master"
    found = sharded_state.read(
        folder, 0, 1, recorded["num_files"], layout, [shape for _, shape in trained], only=key
    )
    state_dict = {name: values[key] for (name, _), values in zip(trained, found, strict=True)}
    if recipe.train.parts in adapters.WITH_ADAPTERS:
        model_folder.save_adapters(out, recipe, state_dict, step=recorded["step"])
    else:
        if state_dict.keys() != model.state_dict().keys():  # some are frozen: they are as training sees them
            initial = model_folder.initial_model(recipe)
            if recipe.train.precision == "bf16":
                for parameter in initial.parameters():
                    parameter.data = parameter.data.bfloat16().float()
            state_dict = initial.state_dict() | state_dict
        model_folder.save(out, None, recipe, state_dict=state_dict, step=recorded["step"])
    return recorded["step"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make a model folder of a run's checkpoint.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--step", default="latest", help="a step that has a checkpoint, latest (the default), or best"
    )
    parser.add_argument(
        "--average", action="store_true", help="the moving average of the weights (train.ema_decay)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    try:
        step = export(options.run, options.step, options.out, average=options.average)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{'the average at' if options.average else 'the model of'} step {step} is in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
