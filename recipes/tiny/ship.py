"""Write a finished run's model as shipped weights.

    python -m recipes.tiny.ship runs/tiny_base/model recipes/tiny/weights/base

The result is the same model folder with weights rounded to float16, so that it stays
small. The best sampling settings are known after training only; they can be given here:
`sampler.cfg_scale=2`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mmtensorar.checkpoints import model_folder
from mmtensorar.cli import Parser, command
from mmtensorar.recipe import Recipe


@command
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m recipes.tiny.ship",
        description="Write a finished run's model as shipped weights.",
        example="runs/tiny_base/model recipes/tiny/weights/base",
    )
    parser.add_argument("source", type=Path, help="model folder, such as runs/NAME/model")
    parser.add_argument("out", type=Path, help="model folder to write")
    parser.add_argument(
        "overrides", nargs="*", metavar="sampler.key=value", help="sampling settings to change"
    )
    options = parser.parse_args(arguments)
    if others := [override for override in options.overrides if not override.startswith("sampler.")]:
        parser.error(f"{others[0]}: only settings of the sampler can change after training")
    loaded = model_folder.load(options.source, dtype=torch.float16)
    sampler = Recipe.load(options.source / "recipe.yaml", options.overrides).sampler
    recipe = loaded.recipe.model_copy(update={"sampler": sampler})
    step = model_folder.read_index(options.source)["step"]
    model_folder.save(options.out, loaded.model, recipe, step=step)
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{options.out}: {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
