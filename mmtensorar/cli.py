"""`mmtensorar VERB`: all commands under one name, and the handling of their errors.

    mmtensorar generate --ckpt recipes/tiny/weights/base --prompt "a red circle" --out out/
    mmtensorar VERB --help

A verb is a function `main(arguments) -> exit code` of a module; most also run as
`python -m MODULE`. Every command reads its options with `Parser`, and is decorated with
`command`.
"""

from __future__ import annotations

import argparse
import contextvars
import difflib
import functools
import importlib
import importlib.metadata
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

from mmtensorar import ranks
from mmtensorar.words import any_number, sentence_of, whole_number


class Main(Protocol):
    """A command: takes arguments (None: sys.argv) and returns the exit code."""

    def __call__(self, arguments: list[str] | None = None) -> int: ...


class Verb(NamedTuple):
    """A command's module and function, and one line of help.

    checks: a module whose `check(arguments)` is called before the command's, which is
    slow, is imported.
    """

    module: str
    about: str
    function: str = "main"
    checks: str | None = None


# A verb may have two words.
VERBS: dict[str, Verb] = {
    "train": Verb(
        "mmtensorar.train",
        "train from a recipe (several GPUs: deepspeed mmtensorar/train.py)",
        checks="mmtensorar.train_options",
    ),
    "generate": Verb("mmtensorar.generate", "prompts or class numbers to pictures"),
    "recipe": Verb("mmtensorar.recipe.__main__", "check a recipe and print it resolved"),
    "plan": Verb(
        "mmtensorar.recipe.__main__", "parameters, memory and FLOPs of a recipe; loads no weights", "plan"
    ),
    "convert": Verb("mmtensorar.convert", "released weights to a model folder, and back"),
    "export": Verb("mmtensorar.export", "a run state to a model folder"),
    "merge": Verb("mmtensorar.merge", "fold adapters into the backbone's weights"),
    "image-tokenizer": Verb("mmtensorar.roundtrip", "round trip of a picture through an image tokenizer"),
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

_verb: contextvars.ContextVar[str | None] = contextvars.ContextVar("verb", default=None)
"""The verb that this process was started with; None in `python -m MODULE`."""


# ---- errors --------------------------------------------------------------------------------------


def command(main: Main) -> Main:
    """Decorate a command's `main`, so that errors are printed as one sentence.

    ValueError and OSError give exit code 2, Ctrl-C gives 130. Any other exception is a
    bug of ours, and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(arguments: list[str] | None = None) -> int:
        print_any_text()
        try:
            return main(arguments)
        except (ValueError, OSError) as error:
            print_error(error)
            return 2
        except RuntimeError as error:
            if not str(error).startswith("Symlink loop"):  # Path.resolve's, before Python 3.13
                raise
            print_error(f"{str(error).partition(' from ')[2]}: a link that leads to itself")
            return 2
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130

    return wrapped


def print_any_text() -> None:
    """Let the output print any text: what a terminal cannot show, and half characters,
    as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="backslashreplace")


def print_error(error: Exception | str) -> None:
    """Print `error: ...` on stderr.

    Control characters are shown as escapes, endless names are cut.
    """
    text = error if isinstance(error, str) else sentence_of(error)
    text = re.sub(r"[^\s:;,'\"]{300,}", lambda found: shortened(found[0]), text)
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", lambda found: ascii(found[0])[1:-1], text)
    print(f"error: {text}", file=sys.stderr, flush=True)


def shortened(text: str) -> str:
    """The first 200 characters of a text."""
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


# ---- options -------------------------------------------------------------------------------------

# What argparse says -> what we say. \1 is the option.
_SENTENCES = (
    (
        r"argument (.+): expected one argument",
        r"\1 needs a value; one that starts with - is written \1=VALUE",
    ),
    (r"argument (.+): expected at least one argument", r"\1 needs a value"),
    (r"argument (.+): not allowed with argument (.+)", r"\1 cannot be combined with \2"),
    (r"argument (.+): ignored explicit argument (.+)", r"\1 takes no value, got \2"),
    (r"argument (.+): invalid int value: (.*)", r"\1: expected a whole number, got \2"),
    (r"argument (.+): invalid float value: (.*)", r"\1: expected a number, got \2"),
    (r"argument (.+): invalid (.+) value: (.*)", r"\1: expected \2, got \3"),
    (r"argument (.+?): (.*)", r"\1: \2"),
    (r"ambiguous option: (.+) could match (.+)", r"\1 could be any of \2"),
)


def not_empty(text: str) -> str:
    """Text that names something. An option that may be empty has the type str."""
    if not text:
        raise argparse.ArgumentTypeError("expected a value, got ''")
    return text


def _path(text: str) -> Path:
    return Path(not_empty(text))  # Path("") is the working directory


def folder_to_write(text: str) -> Path:
    """A folder that may be missing (an argparse type)."""
    path = _path(text)
    there = next((place for place in (path, *path.parents) if os.path.lexists(place)), path)
    if there.exists() and not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is a file; expected a folder")
    return path


class Parser(argparse.ArgumentParser):
    """The options of a command.

    A mistake is one sentence, with the nearest option or value.

    Like argparse's own class, with three differences: prog, such as
    `python -m mmtensorar.generate`, is replaced by `mmtensorar VERB` when the command
    was started so; the help keeps the line breaks of its texts; and the help ends with
    `example`, the arguments of one call.
    """

    def __init__(
        self,
        *,
        prog: str,
        example: str | None = None,
        epilog: str | None = None,
        passes_on: bool = False,
        **settings: Any,
    ):
        """As argparse.ArgumentParser, and:

        example: given instead of epilog.
        passes_on: whether another parser reads the options that this one does not know.
        """
        prog = as_started(prog)
        if example is not None:
            epilog = f"example:\n  {prog} {example}"
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog=prog, epilog=epilog, **settings)
        self.passes_on = passes_on
        self.register("type", int, whole_number)
        self.register("type", float, any_number)
        self.register("type", Path, _path)
        self.register("type", None, not_empty)
        self._words: list[str] = []

    def parse_known_args(self, args=None, namespace=None):  # argparse's names
        """As argparse's; remembers the words, for `error`."""
        self._words = list(sys.argv[1:] if args is None else args)
        for word in self._words:
            if re.search("[\0\ud800-\udfff]", word):
                what = "a zero character" if "\0" in word else "bytes that are not UTF-8"
                self.error(f"{ascii(word)} holds {what}; expected UTF-8 text")
        return super().parse_known_args(args, namespace)

    def parse_args(self, args=None, namespace=None):
        """As argparse's; an argument that is left over is reported with the nearest
        option.
        """
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(self._left_over(rest))
        return options

    def parse_intermixed_args(self, args=None, namespace=None):
        """As argparse's; an argument that is left over is reported with the nearest
        option.
        """
        options, rest = self.parse_known_intermixed_args(args, namespace)
        if rest:
            self.error(self._left_over(rest))
        return options

    def error(self, message: str) -> NoReturn:
        """Print one sentence and where the options are explained, on the first rank;
        exit code 2.
        """
        if ranks.is_first():
            print_error(self._sentence(message))
            print(f"{self.prog} --help shows the options", file=sys.stderr, flush=True)
        raise SystemExit(2)

    def _sentence(self, message: str) -> str:
        """A message of argparse, or of a command, in our words."""
        # A mistyped --ckpt is reported as such, not as a missing --ckpt.
        unknown = [word for word in self._words if word.startswith("--") and not self._is_known(word)]
        if unknown and not self.passes_on and "--" not in self._words:
            return self._left_over(unknown)
        if missing := re.fullmatch(r"the following arguments are required: (.+)", message, re.S):
            return f"{missing[1]} {'are' if ',' in missing[1] else 'is'} missing"
        if one_of := re.fullmatch(r"one of the arguments (.+) is required", message):
            return f"expected one of {', '.join(one_of[1].split())}"
        if choice := re.fullmatch(
            r"argument (.+?): invalid choice: (.*) \(choose from (.*)\)", message, re.S
        ):
            known = [word.strip("' ") for word in choice[3].split(",")]
            expected = f"{choice[1]}: expected one of {', '.join(known)}, got {choice[2]}"
            return expected + nearest_of(choice[2].strip("'"), known)
        for pattern, ours in _SENTENCES:
            if found := re.fullmatch(pattern, message, re.S):
                return found.expand(ours)
        return message

    def _left_over(self, rest: Sequence[str]) -> str:
        """The sentence about arguments that no option takes."""
        word = next((word for word in rest if word.startswith("-") and word != "--"), None)
        if word is None:
            return f"unexpected argument {rest[0]!r}"
        name = word.partition("=")[0]
        if "." in name:
            return f"unknown option {name}; a setting of the recipe is written {name.lstrip('-')}=VALUE"
        return f"unknown option {name}{nearest_of(name, list(self._known()))}"

    def _is_known(self, word: str) -> bool:
        name = word.partition("=")[0]
        return any(known == name or (self.allow_abbrev and known.startswith(name)) for known in self._known())

    def _known(self) -> Iterator[str]:
        """The names of all options, those of sub-commands included."""
        yield from self._option_string_actions
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._option_string_actions


def as_started(prog: str) -> str:
    """`python -m MODULE ...`, or `mmtensorar VERB ...` when the command was started
    so.
    """
    verb = _verb.get()
    if verb is None:
        return prog
    return re.sub(r"^python -m \S+", f"mmtensorar {verb}", prog)


def nearest_of(word: str, known: Iterable[str]) -> str:
    """`; did you mean WORD?`, or nothing when no known word resembles this one."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


# ---- verbs ---------------------------------------------------------------------------------------


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
    """The function of a verb.

    Raises ValueError when it needs the checkout and this is an installed copy.
    """
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
    if (checks := verb.checks) is None:
        return getattr(importlib.import_module(verb.module), verb.function)

    def checked(arguments: list[str] | None = None) -> int:
        importlib.import_module(checks).check(arguments)
        return getattr(importlib.import_module(verb.module), verb.function)(arguments)

    return checked


def unknown_verb(words: list[str]) -> str:
    """The message for words that do not start with a verb: the nearest verb, or a list
    of all.
    """
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
            started = _verb.set(name)
            try:
                return load(name)(words[count:])
            finally:
                _verb.reset(started)
    raise ValueError(unknown_verb(words))


if __name__ == "__main__":
    sys.exit(main())
