"""The options of `mmtensorar train`, read before torch and DeepSpeed are imported,
which takes seconds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmtensorar import ranks
from mmtensorar.cli import Parser, print_error
from mmtensorar.recipe import given_twice, read_settings


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """recipe, overrides, plain, resume and local_rank."""
    parser = Parser(
        prog="python -m mmtensorar.train",
        description="Train a model from a recipe.",
        epilog="examples:\n"
        "  mmtensorar train recipes/tiny/tensorar.yaml train.precision=fp32 train.steps=20\n"
        "  deepspeed mmtensorar/train.py recipes/janus_pro_7b.yaml --resume",
    )
    parser.add_argument("recipe", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=100")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="train the control: the same without TensorAR (window 1), as run NAME_plain",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in the run folder, if there is one"
    )
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    return parser.parse_intermixed_args(arguments)


def check(arguments: list[str] | None = None) -> None:
    """End this process with one sentence, on the first rank, when an option or the
    recipe file is wrong.

    Prints a note for each setting that is given twice.
    """
    options = read_options(arguments)
    if ranks.is_first():
        for note in given_twice(options.overrides):
            print(f"note: {note}", file=sys.stderr, flush=True)
    try:
        read_settings(options.recipe)
    except ValueError as error:
        if ranks.is_first():
            print_error(error)
        raise SystemExit(2) from None
