"""Fold the adapters of a model folder into its weights.

mmtensorar merge runs/NAME/model OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from mmtensorar.checkpoints.index import read_index
from mmtensorar.cli import Parser, command, folder_to_write


def merge(source: Path, target: Path) -> None:
    """Write a model folder of adapters as one with all weights.

    Raises ValueError when it has no adapters.
    """
    index = read_index(source)
    # Imported after the check, since torch takes seconds.
    from mmtensorar.checkpoints import model_folder

    if not (source / model_folder.ADAPTERS).is_file():
        raise ValueError(f"{source} has no {model_folder.ADAPTERS}: it holds all weights already")
    loaded = model_folder.load(source)
    # The merged model has no adapters, so its recipe must not name any.
    train = loaded.recipe.train.model_copy(update={"parts": "all", "freeze": []})
    recipe = loaded.recipe.model_copy(update={"train": train})
    model_folder.save(target, loaded.model, recipe, step=index["step"])


@command
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m mmtensorar.merge",
        description="Fold the adapters of a model folder into its weights.",
        example="runs/NAME/model merged/",
    )
    parser.add_argument("source", type=Path, help="model folder of adapters, such as runs/NAME/model")
    parser.add_argument("target", type=folder_to_write, help="folder to write")
    options = parser.parse_args(arguments)
    merge(options.source, options.target)
    print(f"{options.target}: all weights, for generate, eval and train.init_from")
    return 0


if __name__ == "__main__":
    sys.exit(main())
