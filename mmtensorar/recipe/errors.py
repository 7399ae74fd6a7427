"""Error messages for recipes: all problems at once, each with its key and the nearest
known key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from mmtensorar.recipe.section import Section, type_in_words

MAX_KEY, WIDEST = 120, 48  # characters of a key that are printed, and to which keys are padded

Problem = tuple[str, str]
"""(key path such as `train.steps`, what is wrong with it)."""


class RecipeError(ValueError):
    """All problems of a recipe, one per line."""


class Problems(ValueError):
    """Raised by a validator that checks several settings at once; holds a list of
    Problem.
    """

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(problems)
        super().__init__("; ".join(f"{key}: {text}" if key else text for key, text in self.problems))


def report(source: str, problems: list[Problem]) -> str:
    """The text of a RecipeError: the file and the number of problems, then a line for
    each.
    """
    # A key that someone mistyped may have thousands of characters.
    problems = [(key if len(key) <= MAX_KEY else f"{key[:MAX_KEY]}...", text) for key, text in problems]
    width = min(WIDEST, max(len(key) for key, _ in problems))
    lines = [f"  {key.ljust(width)}  {text}" if key else f"  {text}" for key, text in problems]
    return "\n".join([f"{source}: {len(problems)} problem{'s' * (len(problems) > 1)}", *lines])


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that most resembles a word; None when none does."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.6)), None)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`; did you mean WORD?`, or nothing when no known word resembles this one."""
    near = nearest(word, known)
    return f"; did you mean {near}?" if near else ""


def problems_of(
    error: ValidationError, model: type[BaseModel], settings: Any, prefix: tuple[str, ...] = ()
) -> list[Problem]:
    """The problems in a pydantic error.

    pydantic reports several errors for one setting that is a list or has a choice of
    types; here they are one problem.

    Args:
        error: what `model.model_validate(settings)` raised.
        model: the section that was validated.
        settings: the values, to print the wrong one.
        prefix: put in front of every key path.
    """
    problems: list[Problem] = []
    for item in error.errors():
        location = item["loc"]
        section, field, keys = _locate(model, location)
        path = ".".join([*prefix, *(keys if field else map(str, location))])
        raised = item.get("ctx", {}).get("error")  # by a validator of ours
        if item["type"] == "extra_forbidden":
            problems.append((path, _unknown_key(path, prefix, model, section, settings)))
        elif item["type"] == "missing" and len(keys) == len(location):
            problems.append((path, "missing; this setting has no default"))
        elif isinstance(raised, ValueError):
            problems += _of_validator(raised, path)
        else:
            assert field is not None
            value = settings
            for key in keys:
                value = value[key]
            hint = ""
            if field.annotation in (str, str | None) and isinstance(value, (bool, int, float)):
                hint = "; text that looks like this is written in quotes, such as '\"0042\"' in a shell"
            words = type_in_words(field.annotation, field.metadata)
            problems.append((path, f"expected {words}, got {value!r}{hint}"))
    return list(dict.fromkeys(problems))


def first_problem(error: ValidationError) -> str:
    """The first problem in a pydantic error, in our words: `shards.0.name: missing`.

    For files that programs write; `problems_of` reports a recipe's.
    """
    item = error.errors()[0]
    key = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        text = "unknown key"
    elif item["type"] == "missing":
        text = "missing"
    elif isinstance(raised := item.get("ctx", {}).get("error"), ValueError):
        text = str(raised)
    else:
        found = repr(item["input"])
        found = found if len(found) <= MAX_KEY else f"{found[:MAX_KEY]}..."
        text = f"{re.sub('^Input should be', 'expected', item['msg'])}, got {found}"
    return f"{key}: {text}" if key else text


def _of_validator(error: ValueError, path: str) -> list[Problem]:
    """The problems in an error that one of our validators raised for the setting at
    `path`.
    """
    if isinstance(error, Problems):
        return [(".".join(filter(None, (path, key))), text) for key, text in error.problems]
    return [(path, str(text)) for text in error.args]


def _locate(
    model: type[BaseModel], location: tuple[str | int, ...]
) -> tuple[type[BaseModel], FieldInfo | None, list[str]]:
    """(section, setting, key path) of a pydantic error location.

    For an unknown key the setting is None, and the section is the one that lacks the
    key.
    """
    field, keys, is_name = None, [], False
    for part in location:
        if is_name:  # a user-chosen key of a dictionary of sections
            keys.append(str(part))
            is_name = False
            continue
        if part not in model.model_fields:
            return model, None, keys
        field = model.model_fields[str(part)]
        keys.append(str(part))
        is_name = get_origin(field.annotation) is dict
        sections = _sections_in(field.annotation)
        if not sections:
            break
        model = sections[0]
    return model, field, keys


def _unknown_key(
    path: str, prefix: tuple[str, ...], model: type[BaseModel], section: type[BaseModel], settings: Any
) -> str:
    """The message for an unknown key: why it was removed, or the nearest known key."""
    if issubclass(section, Section) and (old := section.removed_settings.get(path.rpartition(".")[2])):
        return f"this setting was removed, since {old.reason}"
    known = [".".join([*prefix, *keys]) for keys in _keys(model)]
    # Sections that are chosen by name are not in the model, but here they are
    # validated.
    chosen = [
        f"{key}.{name}"
        for key, value in settings.items()
        if isinstance(value, Section)
        for name in type(value).model_fields
    ]
    leaf = path.rpartition(".")[2]
    # The right name in no section, or in another one: lr=3 for optim.lr=3.
    if elsewhere := [key for key in [*known, *chosen] if "." in key and key.rpartition(".")[2] == leaf]:
        return f"unknown key; did you mean {' or '.join(dict.fromkeys(elsewhere))}?"
    siblings = [key for key in known if key.rpartition(".")[0] == path.rpartition(".")[0]]
    # Only the last part is compared: with the section's name in front, all its keys
    # look alike.
    near = _nearest_leaf(path, siblings) or _nearest_leaf(path, known)
    if near and not siblings:  # the key is in a dictionary of sections
        near = f"{path.rpartition('.')[0]}.{near.rpartition('.')[2]}"
    return f"unknown key; did you mean {near}?" if near else f"unknown key; known here: {', '.join(siblings)}"


def _keys(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """Every key path of a model, sections included."""
    for name, field in model.model_fields.items():
        yield (name,)
        for section in _sections_in(field.annotation):
            for rest in _keys(section):
                yield (name, *rest)


def _sections_in(kind: Any) -> list[type[Section]]:
    """The sections in a type: itself, or that in `Section | None` or
    `dict[str, Section]`.
    """
    kinds = (kind, *get_args(kind))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]


def _nearest_leaf(path: str, known: Sequence[str]) -> str | None:
    """The known key whose last part equals or resembles that of path."""
    leaves = {key.rpartition(".")[2]: key for key in known}
    near = nearest(path.rpartition(".")[2], list(leaves))
    return leaves[near] if near else None
