"""`mmtensorar VERB`: all commands under one name, and the handling of their errors.

    mmtensorar generate --ckpt recipes/tiny/weights/base --prompt "a red circle" --out out/
    mmtensorar VERB --help

A verb is a function `main(arguments) -> exit code` of a module; most also run as `python -m MODULE`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import NamedTuple, Protocol


class Main(Protocol):
    """A command: takes arguments (None: sys.argv) and returns the exit code."""

    def __call__(self, arguments: list[str] | None = None) -> int: ...


class Verb(NamedTuple):
    """A command's module and function, and one line of help."""

    module: str
    about: str
    function: str = "main"


# A verb may have two words.
VERBS: dict[str, Verb] = {
    "train": Verb("mmtensorar.train", "train from a recipe (several GPUs: deepspeed mmtensorar/train.py)"),
    "generate": Verb("mmtensorar.generate", "prompts or class numbers to pictures"),
    "recipe": Verb("mmtensorar.recipe.__main__", "check a recipe and print it resolved"),
    "plan": Verb(
        "mmtensorar.recipe.__main__", "parameters, memory and FLOPs of a recipe; loads no weights", "plan"
    ),
    "convert": Verb("mmtensorar.convert", "released weights to a model folder, and back"),
    "export": Verb("mmtensorar.export", "a run state to a model folder"),
    "merge": Verb("mmtensorar.merge", "fold adapters into the backbone's weights"),
    "image-tokenizer": Verb(
        "mmtensorar.image_tokenizers.__main__", "round trip of a picture through an image tokenizer"
    ),
    "shards make": Verb("data_tools.make_shards", "pictures and captions to shards"),
    "shards encode-codes": Verb("data_tools.encode_codes", "add image codes to shards"),
    "shards encode-text": Verb("data_tools.encode_text", "add text features to shards"),
    "shards check": Verb("data_tools.check_shards", "read every sample and name what is damaged"),
    "shards inspect": Verb("data_tools.inspect_shards", "counts, histograms and pictures of shards"),
    "eval geneval": Verb("eval.geneval.__main__", "GenEval, or the embedded suite"),
    "eval dpg": Verb("eval.dpg_bench.__main__", "DPG-Bench"),
    "eval fid": Verb("eval.fid.__main__", "FID, Inception score, precision and recall"),
    "study": Verb("study.__main__", "grids of small runs"),
}
CHECKOUT_ONLY = ("data_tools", "eval", "study")  # not installed: their names are too general


def command(main: Main) -> Main:
    """Decorate a command's `main`, so that errors are printed as one sentence.

    ValueError and OSError give exit code 2, Ctrl-C gives 130. Any other exception is a bug of ours, and
    keeps its traceback.
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
    """The text of `mmtensorar --help`."""
    width = max(map(len, VERBS))
    lines = [f"  {name.ljust(width)}  {verb.about}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: mmtensorar VERB [options]",
            "",
            *lines,
            "",
            "mmtensorar VERB --help explains a verb; mmtensorar --version prints the version.",
            "",
            "example:",
            '  mmtensorar generate --ckpt recipes/tiny/weights/base --prompt "a red circle" --out out/',
        ]
    )


def version() -> str:
    """The installed version, or `unknown` in a checkout that is not installed."""
    try:
        return importlib.metadata.version("mmtensorar")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def load(name: str) -> Main:
    """The function of a verb. Raises ValueError when it needs the checkout and this is an installed copy."""
    verb = VERBS[name]
    package = verb.module.split(".")[0]
    if package in CHECKOUT_ONLY:
        checkout = Path(__file__).resolve().parents[1]
        if not (checkout / package).is_dir():
            raise ValueError(
                f"mmtensorar {name} runs from a checkout of the repository: pip install -e . there"
            )
        if str(checkout) not in sys.path:
            sys.path.insert(0, str(checkout))
    return getattr(importlib.import_module(verb.module), verb.function)


def unknown_verb(words: list[str]) -> str:
    """The message for words that do not start with a verb: the nearest verb, or a list of all."""
    given = " ".join(word for word in words[:2] if not word.startswith("-"))
    known = [name for name in VERBS if name.split()[0] == words[0]]
    if given == words[0] and known:  # "shards" alone
        return f"incomplete command {given!r}; expected one of {', '.join(known)}"
    near = nearest_verb(given) or nearest_verb(words[0])
    known = known or sorted({name.split()[0] for name in VERBS})
    hint = f"did you mean {near}?" if near else f"expected one of {', '.join(known)}"
    return f"unknown command {given!r}; {hint}"


def nearest_verb(given: str) -> str | None:
    """The verb that most resembles some words; None when none does."""
    names = [*VERBS, *{name.split()[0] for name in VERBS}]
    return next(iter(difflib.get_close_matches(given, names, n=1)), None)


@command
def main(arguments: list[str] | None = None) -> int:
    """Run the verb that the arguments start with."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(f"mmtensorar {version()}")
        return 0
    for count in (2, 1):
        name = " ".join(words[:count])
        if name in VERBS:
            return load(name)(words[count:])
    raise ValueError(unknown_verb(words))


if __name__ == "__main__":
    sys.exit(main())
