"""`mmtensorar VERB`: every command under one name, and the one place where errors become a sentence.

    mmtensorar generate --ckpt recipes/tiny/weights/base --prompt "a red circle" --out out/
    mmtensorar VERB --help

A verb is a module with a `main(arguments) -> exit code`; the module also runs as `python -m MODULE`.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

Main = Callable[[list[str] | None], int]

# verb -> (module, what it does). "eval geneval" and "shards make" have two words.
VERBS: dict[str, tuple[str, str]] = {
    "train": ("mmtensorar.train", "train from a recipe (several GPUs: deepspeed mmtensorar/train.py)"),
    "generate": ("mmtensorar.generate", "prompts or class numbers to pictures"),
    "recipe": ("mmtensorar.recipe.__main__", "check a recipe and print it resolved"),
    "plan": ("mmtensorar.training.plan", "parameters, memory and FLOPs of a recipe; loads no weights"),
    "convert": ("mmtensorar.convert", "released weights to a model folder, and back"),
    "export": ("mmtensorar.export", "a run's saved state to a model folder"),
    "merge": ("mmtensorar.merge", "fold adapters into the backbone's weights"),
    "image-tokenizer": (
        "mmtensorar.image_tokenizers.__main__",
        "round trip of a picture through an image tokenizer",
    ),
    "shards make": ("data_tools.make_shards", "pictures and captions to shards"),
    "shards encode-codes": ("data_tools.encode_codes", "add image codes to shards"),
    "shards encode-text": ("data_tools.encode_text", "add text features to shards"),
    "shards check": ("data_tools.check_shards", "read every sample and name what is damaged"),
    "shards inspect": ("data_tools.inspect_shards", "counts, histograms and pictures of shards"),
    "eval geneval": ("eval.geneval.__main__", "GenEval, or the embedded suite"),
    "eval dpg": ("eval.dpg_bench.__main__", "DPG-Bench"),
    "eval fid": ("eval.fid.__main__", "FID, Inception score, precision and recall"),
    "study": ("study.__main__", "grids of small runs"),
}
CHECKOUT_ONLY = ("data_tools", "eval", "study")  # not installed: poor names in site-packages


def command(main: Main) -> Main:
    """Make a command's `main` end in a sentence: ValueError and OSError exit with 2, Ctrl-C with 130.

    Anything else is a bug of ours, and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(arguments: list[str] | None = None) -> int:
        try:
            return main(arguments)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130

    return wrapped


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb.ljust(width)}  {about}" for verb, (_, about) in VERBS.items()]
    return "\n".join(
        [
            "usage: mmtensorar VERB [options]",
            "",
            *lines,
            "",
            "mmtensorar VERB --help explains a verb. Example:",
            '  mmtensorar generate --ckpt recipes/tiny/weights/base --prompt "a red circle" --out out/',
        ]
    )


def load(verb: str) -> Main:
    """The `main` of a verb. Raises ValueError when it needs the checkout and this is an installed copy."""
    module = VERBS[verb][0]
    if module.split(".")[0] in CHECKOUT_ONLY:
        checkout = Path(__file__).resolve().parents[1]
        if not (checkout / module.split(".")[0]).is_dir():
            raise ValueError(
                f"mmtensorar {verb} runs from a checkout of the repository: pip install -e . there"
            )
        if str(checkout) not in sys.path:
            sys.path.insert(0, str(checkout))
    return importlib.import_module(module).main


@command
def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    for count in (2, 1):
        verb = " ".join(words[:count])
        if verb in VERBS:
            return load(verb)(words[count:])
    known = [verb for verb in VERBS if verb.split()[0] == words[0]]
    expected = ", ".join(known or sorted({verb.split()[0] for verb in VERBS}))
    raise ValueError(f"unknown command {' '.join(words[:2])!r}; expected one of {expected}")


if __name__ == "__main__":
    sys.exit(main())
