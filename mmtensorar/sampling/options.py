"""Options shared by the commands that generate images. No torch in here, so that a mistyped option is told at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

SAMPLING = ("cfg_scale", "temperature", "top_k", "top_p", "greedy_drafts", "stride", "lookahead")
LOADING = ("device", "precision", "attn_implementation")


def one_or_several(kind: type) -> Callable[[str], Any]:
    """Text -> a number, or of comma-separated numbers a list with one per factor of a code."""

    def parse(text: str) -> Any:
        numbers = [kind(part) for part in text.split(",")]
        return numbers if len(numbers) > 1 else numbers[0]

    parse.__name__ = (
        f"{kind.__name__} or comma-separated list of one per factor"  # argparse: invalid ... value
    )
    return parse


def at_least_1(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def add_generation(parser: argparse.ArgumentParser, *, needs: str = "") -> None:
    """Add SAMPLING, of which None is the checkpoint's recipe's, then LOADING and --batch-size.

    needs: what the command must be given for them to have an effect.
    """
    group = parser.add_argument_group(
        f"sampling{needs}",
        "defaults come from the checkpoint's recipe; A,B gives each factor of a code its own number",
    )
    number, count = one_or_several(float), one_or_several(int)
    group.add_argument(
        "--cfg-scale", type=number, help="guidance: uncond + scale * (cond - uncond); 1 is off"
    )
    group.add_argument("--temperature", type=number)
    group.add_argument("--top-k", type=count, help="keep the k likeliest tokens; 0 keeps all")
    group.add_argument(
        "--top-p", type=number, help="keep likeliest tokens with this probability together; 1 keeps all"
    )
    group.add_argument(
        "--greedy-drafts",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="likeliest token at offsets above 0",
    )
    group.add_argument(
        "--stride",
        type=at_least_1,
        help="emit so many tokens of each window at once (train with tensorar.max_stride)",
    )
    group.add_argument(
        "--lookahead",
        type=at_least_1,
        help="guess so many steps at once and keep what is confirmed: the same image in fewer passes",
    )
    group = parser.add_argument_group(f"computing{needs}")
    group.add_argument("--batch-size", type=at_least_1, default=16, help="images at a time (default 16)")
    group.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU if there is one")
    group.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    group.add_argument(
        "--attn-implementation",
        choices=("sdpa", "flash_attention_2", "eager"),
        help="default: sdpa; flash is for bf16 on a GPU",
    )
