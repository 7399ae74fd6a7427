"""Write a finished run as shipped weights: `python recipes/tiny/ship.py runs/tiny_base/model recipes/tiny/weights/base`.

The same consolidated checkpoint, with the backbone's weights rounded to float16 so that it stays small. Settings of the
sampler, which are best chosen after training, may follow: `sampler.cfg_scale=2`.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(
    Path(__file__).resolve().parents[2]
)  # run as a script, the folder of this file stands first

import torch

from mmtensorar.checkpoints import model_folder
from mmtensorar.recipe import Recipe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="consolidated checkpoint")
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="sampler.key=value")
    args = parser.parse_args()
    if other := [setting for setting in args.overrides if not setting.startswith("sampler.")]:
        parser.error(f"{other[0]}: only settings of the sampler can change after training")
    try:
        loaded = model_folder.load(args.source, dtype=torch.float16)
        sampler = Recipe.load(args.source / "recipe.yaml", args.overrides).sampler
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    recipe = loaded.recipe.model_copy(update={"sampler": sampler})
    model_folder.save(args.out, loaded.model, recipe, step=model_folder.read_index(args.source)["step"])
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
