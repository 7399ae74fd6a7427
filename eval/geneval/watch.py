"""Score a run's checkpoints as they come: python -m eval.geneval watch runs/NAME [--average] [options of eval.geneval]

Beside the training, on what is left of the machine or on another card (--device cuda:1): each new checkpoint (train.save_every)
is exported, its pictures are made and scored. runs/NAME/scores.jsonl receives a line each, runs/NAME/tensorboard curves, and
runs/NAME/scores/step_N the pictures and the report. Ends when the finished run's last checkpoint is scored (waits on where the run
was stopped, for it may be resumed; Ctrl-C ends it); started again, it goes on with what is newer. Where training saves faster than this scores, checkpoints in between are passed over.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from mmtensorar.checkpoints import sharded_state
from mmtensorar.checkpoints.export import export
from mmtensorar.checkpoints.model_folder import INDEX, read_index
from mmtensorar.checkpoints.sharded_state import step_of
from mmtensorar.recipe import Recipe
from mmtensorar.training.run_log import read_log

SCORES = "scores.jsonl"


def newest(run: Path) -> Path | None:
    """The last checkpoint of a run, unless it or a later one has a line in scores.jsonl."""
    scored = max((row["step"] for row in read_log(run / SCORES)), default=-1)
    found = [path.parent for path in run.glob(f"checkpoints/step_*/{sharded_state.STATE}")]
    return max((folder for folder in found if step_of(folder) > scored), key=step_of, default=None)


def score(run: Path, step: int, arguments: list[str], *, average: bool) -> dict:
    """One line of scores.jsonl. Raises ValueError when the checkpoint is gone or eval.geneval fails, which has said why."""
    from eval.geneval.__main__ import main as evaluate

    out = run / "scores" / f"step_{step:06d}"
    model = out.with_name(out.name + ".model")
    try:
        export(run, str(step), model, average=average)
        if evaluate(["--ckpt", str(model), "--out", str(out), *arguments]):
            raise ValueError(f"the checkpoint of step {step} could not be scored")
    finally:
        shutil.rmtree(model, ignore_errors=True)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    row = {"step": step, "suite": summary["suite"], "average": average, "num_images": summary["num_images"]}
    row |= {"overall": summary["overall"]["accuracy"], "interval": summary["overall"]["interval"]}
    row["skills"] = {skill: found["accuracy"] for skill, found in summary["skills"].items()}
    with (run / SCORES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    _draw(run, row)
    return row


def _draw(run: Path, row: dict) -> None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return
    with SummaryWriter(run / "tensorboard") as curves:
        for name, value in {"overall": row["overall"], **row["skills"]}.items():
            curves.add_scalar(f"score/{name}", value, row["step"])


def _finished(run: Path) -> bool:
    """Whether the run has come to its end; one that is trained on has the model of its first end meanwhile."""
    steps = Recipe.load(run / "recipe.yaml").train.steps
    return (run / "model" / INDEX).is_file() and read_index(run / "model")["step"] >= (steps or 0)


def watch(run: Path, arguments: list[str], *, average: bool, once: bool, pause_s: float) -> None:
    """Raises ValueError when run is no run folder."""
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run}: no run folder (no recipe.yaml in it)")
    said = False
    while True:
        finished = _finished(run)  # asked first: what is saved before is seen below
        folder = newest(run)
        if folder is not None:
            step = step_of(folder)
            try:
                row = score(run, step, arguments, average=average)
            except ValueError as error:
                if folder.is_dir():
                    raise
                print(f"step {step} was deleted while it was read ({error})", flush=True)
                continue
            print(
                f"step {step}: {row['overall']:.1%} (in {run / SCORES}; pictures in {run / 'scores' / folder.name})",
                flush=True,
            )
        if folder is None and (once or finished or not said):
            is_there = "nothing new" if (run / SCORES).is_file() else "no checkpoint yet (train.save_every)"
            print(
                f"{run}: {is_there}{'' if once or finished else f'; looking every {pause_s:g} s, Ctrl-C ends it'}",
                flush=True,
            )
        said = folder is None
        if finished or once:
            return
        if folder is None:
            time.sleep(pause_s)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.geneval watch",
        description=__doc__.splitlines()[0],
        epilog="Other options are those of eval.geneval.",
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--average", action="store_true", help="score the moving average of the weights (train.ema_decay)"
    )
    parser.add_argument("--once", action="store_true", help="score the newest checkpoint, and end")
    parser.add_argument(
        "--pause", type=float, default=30, metavar="SECONDS", help="between two looks (default 30)"
    )
    options, others = parser.parse_known_args(arguments)
    try:
        watch(options.run, others, average=options.average, once=options.once, pause_s=options.pause)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
