"""Sections: strict groups of settings, each declared once.

One `setting(...)` declares bounds, default, description, and whether the setting may
change on resume. The reader (files.py), the error messages (errors.py), the resume
check (recipe.py) and docs/recipe.md (docs.py) read this declaration.
"""

from __future__ import annotations

from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Self,
    Union,
    get_args,
    get_origin,
)

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from mmtensorar.recipe import strict_yaml


def setting(default: Any = ..., *, description: str, on_resume: bool = False, **bounds: Any) -> Any:
    """Declare one setting of a section.

    Args:
        default: the value when a recipe leaves it out; without one the setting is
            required.
        description: what it does, for docs/recipe.md and for the help of command
            options.
        on_resume: whether a resumed run may have another value than the run it resumes.
        bounds: as for pydantic.Field: ge, gt, le, lt, min_length, pattern.
    """
    return Field(default, description=description, json_schema_extra={"on_resume": on_resume}, **bounds)


def may_change_on_resume(field: FieldInfo) -> bool:
    """Whether the field was declared with `setting(on_resume=True)`."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and extra.get("on_resume") is True


class Removed(NamedTuple):
    """A setting of earlier versions.

    A saved recipe that has it at its neutral value still loads.
    """

    neutral: Any
    reason: str


class Section(BaseModel):
    """A group of settings.

    Unknown keys are errors, and values do not change after validation.

    `removed_settings` lists settings of earlier versions; at their neutral value they
    are dropped.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    removed_settings: ClassVar[dict[str, Removed]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_removed_settings(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        dropped = {key for key, old in cls.removed_settings.items() if settings.get(key, old) == old.neutral}
        return {key: value for key, value in settings.items() if key not in dropped}

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers_of_64_bits(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        kind = cls.model_fields[info.field_name].annotation
        items = value if isinstance(value, (list, tuple)) else [value]
        # pydantic takes true for 1.
        if bool not in (kind, *get_args(kind)) and any(isinstance(item, bool) for item in items):
            raise PydanticCustomError("boolean", "expected a number, got a boolean")
        # pydantic takes any number of digits; torch and numpy do not.
        if any(isinstance(item, int) and abs(item) >= 2**63 for item in items):
            raise ValueError("expected a number less than 2^63")
        return value

    def dump(self) -> str:
        """The settings as YAML, which loads again unchanged."""
        return strict_yaml.dump(self.model_dump(mode="json"))


class NamedSection(Section):
    """Base of the sections that name a module: `backbone` and `image_tokenizer`.

    A subclass declares the settings below itself, each with its own type and
    description.
    """

    if TYPE_CHECKING:
        name: str  # the module
        path: str  # of the weights


class BackboneConfig(NamedSection):
    """Base of the `backbone` sections."""

    if TYPE_CHECKING:
        attn_implementation: str  # one of model.attention.Implementation

    def at(self, path: str) -> Self:
        """The section of the same backbone, saved in the folder `path`."""
        return self.model_copy(update={"path": path})

    def has_sizes(self) -> bool:
        """Whether the model's sizes are known without a download.

        They come from files on this machine, or from the section and our table of
        released models.
        """
        return Path(self.path).exists()


# ---- types in words ------------------------------------------------------------------------------

_WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
_SETTINGS = "settings (key: value)"
_SIGNS = {Ge: ">=", Gt: ">", Le: "<=", Lt: "<"}


def type_in_words(kind: Any, bounds: Any = ()) -> str:
    """A type with its bounds in words, such as `an integer >= 1`.

    Args:
        kind: the annotation of a setting, or a part of one.
        bounds: the constraints on it, as in the metadata of a pydantic field.
    """
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is Annotated:
        return type_in_words(arguments[0], arguments[1:])
    if origin in (Union, UnionType):
        # A bound on the whole choice limits each alternative but null.
        inner = [type_in_words(kind, () if kind is NoneType else bounds) for kind in arguments]
        return " or ".join(inner)
    if origin is Literal:
        words = " or ".join(map(repr, arguments))
    elif origin is list and get_origin(arguments[0]) is Literal:
        words = f"a list of any of {', '.join(map(repr, get_args(arguments[0])))}"
    elif origin in (list, tuple):
        count = f"{len(arguments)} " if origin is tuple else ""
        noun, *rest = type_in_words(arguments[0]).removeprefix("a ").removeprefix("an ").split(" ")
        words = " ".join([f"a list of {count}{noun}s", *rest])
    elif origin is dict:
        value = type_in_words(arguments[-1])
        words = value if value == _SETTINGS else f"settings (key: {value})"
    else:
        words = _WORDS.get(origin, _SETTINGS)
    return words + _bounds_in_words(bounds)


def _bounds_in_words(bounds: Any) -> str:
    words, limits = "", []
    for bound in bounds:
        if type(bound) in _SIGNS:
            limits.append(f"{_SIGNS[type(bound)]} {getattr(bound, type(bound).__name__.lower())}")
        elif isinstance(bound, MultipleOf):
            limits.append(f"a multiple of {bound.multiple_of}")
        elif isinstance(bound, MinLen):
            words += ", not empty"
        elif pattern := getattr(bound, "pattern", None):
            words += f" like {pattern}"
    return words + (f" {' and '.join(limits)}" if limits else "")
