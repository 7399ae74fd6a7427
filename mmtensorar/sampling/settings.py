"""Command options and merging of the sampling settings.

`mmtensorar.recipe.SamplerSettings` declares each setting once: name, type, bounds,
default and description. Everything here reads its fields, so a new setting is one new
field there, and the code that uses it. This module imports no torch, so that commands
report a mistyped option at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from mmtensorar.recipe import Problems, SamplerSettings, problems_of
from mmtensorar.words import any_number, whole_number

SAMPLING = tuple(SamplerSettings.model_fields)
LOADING = ("device", "precision", "attn_implementation", "compile")

# Settings of earlier versions, at the value that has no effect.
REMOVED = {"greedy": False, **{name: old.neutral for name, old in SamplerSettings.removed_settings.items()}}


# ---- values --------------------------------------------------------------------------------------


def merge(settings: SamplerSettings, given: Mapping[str, Any]) -> SamplerSettings:
    """The settings, replaced by those given that are not None.

    Raises ValueError for an invalid setting.
    """
    return _validated(settings.model_dump() | {k: value for k, value in given.items() if value is not None})


def _validated(given: Mapping[str, Any]) -> SamplerSettings:
    """The settings.

    Raises ValueError naming each invalid one, in the words of a recipe's errors.
    """
    try:
        return SamplerSettings.model_validate(dict(given))
    except ValidationError as error:
        raise Problems(problems_of(error, SamplerSettings, given)) from None


def without_removed(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings without removed ones, for a comparison with current
    settings.
    """
    return {name: value for name, value in recorded.items() if (name, value) not in REMOVED.items()}


# ---- command options -----------------------------------------------------------------------------


def add_generation(parser: argparse.ArgumentParser, *, needs: str = "") -> None:
    """Add an option for each sampling setting, those of LOADING, and --batch-size.

    A sampling option that is not given is None, which means the recipe's setting: see
    `given_settings` and `merge`.

    Args:
        needs: text after the groups' titles, such as ", with --ckpt".
    """
    group = parser.add_argument_group(
        f"sampling{needs}",
        "defaults come from the model folder's recipe; A,B gives each factor of a code its own number",
    )
    for name, field in SamplerSettings.model_fields.items():
        option, about = "--" + name.replace("_", "-"), (field.description or "").replace("%", "%%")
        if field.annotation is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=about)
        else:
            group.add_argument(option, type=_option_type(name, field), help=about)
    group = parser.add_argument_group(f"computing{needs}")
    group.add_argument("--batch-size", type=at_least_1, default=16, help="images at a time (default 16)")
    group.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU if there is one")
    group.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    group.add_argument(
        "--attn-implementation",
        choices=("sdpa", "flash_attention_2", "eager"),
        help="default: sdpa; flash_attention_2 needs bf16 on a GPU",
    )
    group.add_argument(
        "--compile",
        action="store_const",
        const=True,
        help="make a pass of the model one CUDA graph; compiling takes minutes, so it is for many images",
    )


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings among a command's options; None for those not given."""
    return {name: getattr(options, name) for name in SAMPLING}


def at_least_1(text: str) -> int:
    """The type of an option that is a count."""
    try:
        number = whole_number(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def _option_type(name: str, field: FieldInfo) -> Callable[[str], Any]:
    """The type of a setting's option: a number, or a list with one per factor."""
    kinds = set(_parts(field.annotation))
    kind = next(kind for kind in (float, int, str) if kind in kinds)
    read = {int: whole_number, float: any_number, str: str}[kind]
    named = [kind for kind in kinds if isinstance(kind, str)]  # of a Literal

    def parse(text: str) -> Any:
        if text in named:
            return text
        values = [read(part) for part in text.split(",")] if list in kinds else [read(text)]
        value = values if len(values) > 1 else values[0]
        try:
            _validated({name: value})
        except Problems as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return value

    # The message is "expected NAME, got TEXT".
    words = " or ".join([*named, {int: "a whole number", float: "a number", str: "text"}[kind]])
    parse.__name__ = words + (", or one per factor, separated by commas" if list in kinds else "")
    return parse


def _parts(annotation: Any) -> Iterator[Any]:
    """The plain types in an annotation such as `float | list[float]`."""
    yield get_origin(annotation) or annotation
    for part in get_args(annotation):
        yield from _parts(part)
