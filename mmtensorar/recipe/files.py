"""Recipe files: YAML, `extends`, and `key=value` on top.

A recipe may start from another one, `extends: other.yaml`, a path relative to the file;
the base's settings come first. Sections are merged key by key. Lists are replaced, and
so is a backbone or image_tokenizer section that changes the name. Relative paths in
settings are relative to the working directory.
"""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from mmtensorar.files import decode
from mmtensorar.recipe import strict_yaml
from mmtensorar.recipe.errors import Problem, RecipeError, did_you_mean, problems_of, report
from mmtensorar.recipe.names import PACKAGES, named_section
from mmtensorar.recipe.section import BackboneConfig, Section

AnySection = TypeVar("AnySection", bound=Section)
File = tuple[Path, dict]
"""(path of a recipe file, the settings in that file, without those it extends)."""


def read_recipe(model: type[AnySection], path: str | Path, overrides: Sequence[str] = ()) -> AnySection:
    """A recipe file with overrides on top, validated.

    Args:
        model: the class that validates it; Recipe for a training run.
        path: the YAML file.
        overrides: `key=value`, with dotted keys and YAML values. The last one wins.

    Raises RecipeError with all problems at once: each key, under the file or the
    command line that gives it.
    """
    files = read_files(Path(path))
    settings = merge(files)
    if not settings.keys() & model.model_fields.keys():
        raise RecipeError(
            f"{path}: not a {model.__name__}: expected keys such as {', '.join(model.model_fields)}; "
            f"got {', '.join(settings) or 'none'}"
        )
    given = [problem for override in overrides for problem in _apply_override(settings, override)]
    recipe, invalid = validate(model, settings)
    overridden = tuple(override.partition("=")[0] for override in overrides)
    stated = []
    for key, text in invalid:
        source = _source_of(key, files)
        if _is_about(key, text, overridden, stated=source is not None):
            given.append((key, text))
        else:
            stated.append((key, text + (f" (in {source})" if source not in (None, files[-1][0]) else "")))
    if given or stated or recipe is None:
        blocks = {"the command line": given, str(path): stated}
        raise RecipeError("\n".join(report(source, found) for source, found in blocks.items() if found))
    return recipe


def given_twice(overrides: Sequence[str]) -> Iterator[str]:
    """A note for each `key=value` that a later one replaces."""
    for number, override in enumerate(overrides):
        key = override.partition("=")[0]
        for other in overrides[number + 1 :]:
            if override != other and f"{key}.".startswith(f"{other.partition('=')[0]}."):
                yield f"{override} is replaced by {other}, which comes later"
                break


def _is_about(key: str, text: str, overridden: tuple[str, ...], *, stated: bool) -> bool:
    """Whether a problem comes from a setting of the command line.

    A rule's problem is about several settings; its text names those that are not its
    key.

    stated: whether a file has the key. If none has `Train`, then Train.steps made it.
    """
    if f"{key}.".startswith(tuple(f"{name}." for name in overridden)):
        return True
    if not stated and any(name.startswith(f"{key}.") for name in overridden):
        return True
    if text.startswith("unknown key"):  # it names another key as a hint
        return False
    return any(re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", text) for name in overridden)


def validate(model: type[AnySection], settings: dict) -> tuple[AnySection | None, list[Problem]]:
    """Settings as a model, or None, and the problems.

    Sections that are chosen by name are checked by the Config of the module that they
    name, so that their problems are reported together with all others.
    """
    settings, problems = dict(settings), []
    for key in PACKAGES:
        if key in settings:
            section, invalid = named_section(key, settings[key])
            problems += invalid
            # With an empty section in place of an invalid one (of a type that is valid
            # for every key), the others are still checked.
            settings[key] = section or BackboneConfig.model_construct()
    try:
        recipe = model.model_validate(settings)
    except ValidationError as error:
        return None, problems + problems_of(error, model, settings)
    return recipe, problems


def read_settings(path: str | Path) -> dict:
    """The settings of a recipe file on top of those that it extends, before validation.

    Raises RecipeError for a file that is missing, is not YAML, or extends itself.
    """
    return merge(read_files(Path(path)))


def read_files(path: Path, extended_by: tuple[Path, ...] = ()) -> list[File]:
    """A recipe file and all files that it extends, base first.

    extended_by: the files that led here by `extends`, to detect a file that extends
    itself.
    """
    # Not Path.resolve, which raises RuntimeError for a link that leads to itself.
    if os.path.realpath(path) in map(os.path.realpath, extended_by):
        raise RecipeError(f"{path}: extends itself through {' -> '.join(user.name for user in extended_by)}")
    try:
        settings = strict_yaml.load(decode(path.read_bytes()))
    except FileNotFoundError:
        user = f", which {extended_by[-1]} extends" if extended_by else ""
        raise RecipeError(f"no recipe at {path}{user}{_neighbour(path)}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None
    if not isinstance(settings, dict):
        content = "an empty file" if settings is None else type(settings).__name__
        raise RecipeError(f"{path}: expected settings (key: value), got {content}")
    base = settings.pop("extends", None)
    if base is None:
        return [(path, settings)]
    if not isinstance(base, str):
        raise RecipeError(f"{path}: extends: expected the path of a recipe, got {base!r}")
    return [*read_files(path.parent / base, (*extended_by, path)), (path, settings)]


def merge(files: list[File]) -> dict:
    """The settings of all files, each on top of those before it."""
    # A copy, since overrides change it in place and _source_of reads what the files
    # state.
    return copy.deepcopy(functools.reduce(_merged, (settings for _, settings in files)))


def _merged(base: dict, top: dict) -> dict:
    merged = dict(base)
    for key, value in top.items():
        # The keys of `shards` are folders, not settings, so it is replaced as a whole.
        by_key = isinstance(value, dict) and isinstance(base.get(key), dict) and key != "shards"
        if by_key and key in PACKAGES and value.get("name", base[key].get("name")) != base[key].get("name"):
            by_key = False  # another module has other settings
        merged[key] = _merged(base[key], value) if by_key else value
    return merged


def _neighbour(path: Path) -> str:
    """`; did you mean PATH?` when a recipe with a similar name is in the same
    folder.
    """
    near = did_you_mean(path.name, [other.name for other in path.parent.glob("*.yaml")])
    return near.replace("mean ", f"mean {path.parent}/", 1)


def _source_of(key: str, files: list[File]) -> Path | None:
    """The file that a setting comes from; None when no file has it."""
    absent = object()
    for path, settings in reversed(files):
        value: object = settings
        for part in key.split("."):
            value = value.get(part, absent) if isinstance(value, dict) else absent
        if value is not absent:
            return path
    return None


def _apply_override(settings: dict, override: str) -> list[Problem]:
    """Apply one key=value in place; returns its problems."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return [(override, "expected key=value on the command line, for example train.steps=100")]
    try:
        value = strict_yaml.load(text)
    except ValueError as error:
        return [(key, str(error).removeprefix("line 1: "))]
    if "#" in text and "#" not in str(value):
        return [(key, f"{text!r}: YAML takes what follows # as a comment; put the value in quotes, twice")]
    *parents, leaf = key.split(".")
    for parent in parents:
        child = settings.get(parent)
        if not isinstance(child, dict):
            if child is not None:
                return [(key, f"{parent} is {child!r} and has no keys inside")]
            settings[parent] = child = {}
        settings = child
    settings[leaf] = value
    return []
