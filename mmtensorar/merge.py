"""Fold a checkpoint's adapters into its weights: `python -m mmtensorar.merge runs/NAME/model OUT`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmtensorar.checkpoints import model_folder


def merge(source: Path, target: Path) -> None:
    """Write the checkpoint of adapters at source as one with all weights. Raises ValueError when it has no adapters."""
    index = model_folder.read_index(source)
    if not (source / model_folder.ADAPTERS).is_file():
        raise ValueError(f"{source} has no {model_folder.ADAPTERS}: its weights are whole already")
    loaded = model_folder.load(source)
    # What was trained how is told by the run; the weights are like those of any other now.
    train = loaded.recipe.train.model_copy(update={"parts": "all", "freeze": []})
    model_folder.save(
        target, loaded.model, loaded.recipe.model_copy(update={"train": train}), step=index["step"]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mmtensorar.merge", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="checkpoint of adapters, such as runs/NAME/model")
    parser.add_argument("target", type=Path, help="folder to write")
    options = parser.parse_args(arguments)
    try:
        merge(options.source, options.target)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.target}: whole weights, for generate, eval and train.init_from")
    return 0


if __name__ == "__main__":
    sys.exit(main())
