"""Score the saved steps of a run while it trains: python -m eval.geneval watch
runs/NAME [options]

Options are those of `python -m eval.geneval`.

It runs next to the training, on the remaining cores or on another GPU
(--device cuda:1). Each new saved step (train.save_every) is exported, its pictures are
generated and scored:

    runs/NAME/scores.jsonl       one line for each scored step
    runs/NAME/tensorboard        curves
    runs/NAME/scores/step_N      pictures and report

It ends when the last saved step of a finished run is scored. After a stopped run it
keeps waiting, since the run may be resumed; Ctrl-C ends it. Started again, it scores
the steps that are newer. If training saves faster than this scores, it skips steps in
between.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from eval import harness, report_table
from eval.geneval.evaluate import evaluate, parse
from mmtensorar import files
from mmtensorar.checkpoints import sharded_state
from mmtensorar.checkpoints.export import export
from mmtensorar.checkpoints.model_folder import INDEX, read_index
from mmtensorar.checkpoints.sharded_state import step_of
from mmtensorar.cli import Parser, command
from mmtensorar.processes import RunFolderLock
from mmtensorar.recipe import Recipe
from mmtensorar.training.run_log import read_log

SCORES = "scores.jsonl"


def newest(run: Path) -> Path | None:
    """The last saved step of a run, unless it or a later one has a line in
    scores.jsonl.
    """
    last_scored = max((row["step"] for row in read_log(run / SCORES)), default=-1)
    saved = [path.parent for path in run.glob(f"checkpoints/step_*/{sharded_state.STATE}")]
    return max((folder for folder in saved if step_of(folder) > last_scored), key=step_of, default=None)


def score(run: Path, step: int, arguments: list[str], *, average: bool) -> dict:
    """Score one saved step and append its line to scores.jsonl; returns the line.

    Args:
        run: run folder.
        step: the saved step.
        arguments: options of eval.geneval.
        average: whether to score the moving average of the weights.

    Raises ValueError when the step was deleted or cannot be scored.
    """
    out = run / "scores" / f"step_{step:06d}"
    model = out.with_name(out.name + ".model")
    try:
        export(run, str(step), model, average=average)
        with harness.locks():
            evaluate(parse(["--ckpt", str(model), "--out", str(out), *arguments]))
    finally:
        shutil.rmtree(model, ignore_errors=True)
    summary = files.read_json(out / "summary.json")
    row = {
        "step": step,
        "suite": summary["suite"],
        "average": average,
        "num_images": summary["num_images"],
        "partial": bool(report_table.missing(summary)),
        "overall": summary["overall"]["accuracy"],
        "interval": summary["overall"]["interval"],
        "skills": {name: skill["accuracy"] for name, skill in summary["skills"].items()},
    }
    with (run / SCORES).open("a+b") as file:
        files.end_last_line(file, run / SCORES, "step")
        file.write(json.dumps(row).encode() + b"\n")
    _add_to_curves(run, row)
    return row


def _add_to_curves(run: Path, row: dict) -> None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return
    with SummaryWriter(run / "tensorboard") as curves:
        for name, value in {"overall": row["overall"], **row["skills"]}.items():
            curves.add_scalar(f"score/{name}", value, row["step"])


def _is_finished(run: Path) -> bool:
    """Whether the run has reached its last step.

    A run that was extended still has its earlier model.
    """
    steps = Recipe.load(run / "recipe.yaml").train.steps
    return (run / "model" / INDEX).is_file() and read_index(run / "model")["step"] >= (steps or 0)


def watch(run: Path, arguments: list[str], *, average: bool, once: bool, pause_s: float) -> None:
    """Score saved steps until the run is finished; once: only the newest.

    Other arguments: see `score`.

    Raises ValueError for a step that cannot be scored.
    """
    is_waiting = False
    while True:
        finished = _is_finished(run)  # before `newest`, which then sees all that the run saved
        folder = newest(run)
        if folder is not None:
            step = step_of(folder)
            try:
                row = score(run, step, arguments, average=average)
            except ValueError as error:
                if folder.is_dir():
                    raise ValueError(f"step {step} could not be scored: {error}") from None
                print(f"step {step} was deleted while it was read ({error})", flush=True)
                continue
            where = f"in {run / SCORES}; pictures in {run / 'scores' / folder.name}"
            mark = " (PARTIAL)" if row["partial"] else ""
            print(f"step {step}: {row['overall']:.1%}{mark} ({where})", flush=True)
        elif once or finished or not is_waiting:
            news = "nothing new" if (run / SCORES).is_file() else "no saved step yet (train.save_every)"
            waits = "" if once or finished else f"; looking every {pause_s:g} s, Ctrl-C ends it"
            print(f"{run}: {news}{waits}", flush=True)
        is_waiting = folder is None
        if finished or once:
            return
        if folder is None:
            time.sleep(pause_s)


@command
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m eval.geneval watch",
        description="Score the saved steps of a run while it trains. Other options: those of eval.geneval.",
        example="runs/NAME --suite shapes --device cuda:1",
        passes_on=True,
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--average", action="store_true", help="score the moving average of the weights (train.ema_decay)"
    )
    parser.add_argument("--once", action="store_true", help="score the newest saved step, then end")
    parser.add_argument(
        "--pause",
        type=float,
        default=30,
        metavar="SECONDS",
        help="between two checks for a new step (default 30)",
    )
    options, of_geneval = parser.parse_known_args(arguments)
    if not (options.run / "recipe.yaml").is_file():
        raise ValueError(f"{options.run} is not a run folder: it has no recipe.yaml")
    with RunFolderLock(options.run / "scores", otherwise="let it score this run", leaves_nothing=True):
        watch(options.run, of_geneval, average=options.average, once=options.once, pause_s=options.pause)
    return 0
