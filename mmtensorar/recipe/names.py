"""Names of backbones, image tokenizers and noise schedules, looked up where they are
defined.

A backbone or an image tokenizer is a file in its folder, with a `Config` for its
section. A noise schedule is an entry of `SCHEDULES` in mmtensorar/model/drafts.py. So
adding one changes nothing here. Their modules (and with them torch) are imported only
when a name is checked.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmtensorar.recipe.errors import Problem, did_you_mean, problems_of
from mmtensorar.recipe.section import NamedSection

# Section -> the package whose modules it chooses from by `name`.
PACKAGES = {"backbone": "mmtensorar.backbones", "image_tokenizer": "mmtensorar.image_tokenizers"}


def known_names(key: str) -> list[str]:
    """Valid names in `KEY: {name: ...}`: the modules in its package.

    key: one of PACKAGES.
    """
    folder = Path(__file__).parents[1] / PACKAGES[key].rpartition(".")[2]
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def known_schedules() -> list[str]:
    """Valid names for tensorar.schedule."""
    return list(importlib.import_module("mmtensorar.model.drafts").SCHEDULES)


def config_class(key: str, name: str) -> type[NamedSection]:
    """The class that validates `KEY: {name: NAME, ...}`.

    name: one of known_names(key).
    """
    return importlib.import_module(f"{PACKAGES[key]}.{name}").Config


def named_section(key: str, settings: Any) -> tuple[NamedSection | None, list[Problem]]:
    """A backbone or image_tokenizer section, validated by the Config of the module that
    it names.

    Returns the section, or None, and the problems.
    """
    known = known_names(key)
    if not isinstance(settings, dict):
        return None, [(key, f"expected settings with a name ({', '.join(known)}), got {settings!r}")]
    name = settings.get("name")
    if name not in known:
        expected = f"expected one of {', '.join(known)}, got {name!r}"
        return None, [(f"{key}.name", expected + did_you_mean(str(name), known))]
    config = config_class(key, name)
    try:
        return config.model_validate(settings), []
    except ValidationError as error:
        return None, problems_of(error, config, settings, prefix=(key,))
