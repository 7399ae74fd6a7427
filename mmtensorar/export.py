"""Make a model folder of a run's saved state, or of the average of its weights, without
ranks or DeepSpeed.

    mmtensorar export runs/NAME [--step 2000 | latest | best] [--average] --out FOLDER

A finished run has already written runs/NAME/model. Use this for earlier steps and for
unfinished runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mmtensorar.cli import Parser, command, folder_to_write


@command
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m mmtensorar.export",
        description="Make a model folder of a run's saved state.",
        example="runs/NAME --step best --out best_model/",
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--step", default="latest", help="a saved step, latest (the default), or best")
    parser.add_argument(
        "--average", action="store_true", help="the moving average of the weights (train.ema_decay)"
    )
    parser.add_argument("--out", type=folder_to_write, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    if not (options.run / "recipe.yaml").is_file():
        raise ValueError(f"{options.run} is not a run folder: it has no recipe.yaml")
    # Imported after the checks, since torch takes seconds.
    from mmtensorar.checkpoints.export import export

    step = export(options.run, options.step, options.out, average=options.average)
    what = "the average at" if options.average else "the model of"
    print(f"{what} step {step} is in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
