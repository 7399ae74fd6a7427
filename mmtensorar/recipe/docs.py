"""docs/recipe.md, made from the schema:
`python -m mmtensorar.recipe --docs > docs/recipe.md`.
"""

from __future__ import annotations

import inspect
import json
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mmtensorar.recipe.names import PACKAGES, config_class, known_names
from mmtensorar.recipe.recipe import Recipe
from mmtensorar.recipe.section import Section, may_change_on_resume, type_in_words

HEADER = """\
# Recipe settings

<!-- Made by `python -m mmtensorar.recipe --docs > docs/recipe.md`; edit mmtensorar/recipe/schema.py. -->

One YAML file, a *recipe*, holds every setting of a run. On the command line, `key=value` overrides one
of them: `train.steps=100`, `'sampler.cfg_scale=[1.9, 2]'`. Of two for one setting the last one wins,
and a note names the other.

```
mmtensorar recipe recipes/janus_pro_7b.yaml   # check a recipe and print it resolved
mmtensorar plan recipes/janus_pro_7b.yaml     # parameters, memory, FLOPs; no weights
deepspeed mmtensorar/train.py recipes/janus_pro_7b.yaml train.steps=100
```

- A recipe may start from another one: `extends: other.yaml`, a path relative to the file. Sections are
  merged key by key; lists are replaced, and so is a backbone or image_tokenizer that changes its name.
- Values are YAML 1.2: `0042` is 42 and `2e-5` a number; `1:30` and `2024-01-31` are text. What some
  programs read as a number and others as text (`0o17`, `0b11`, `1_000`) is refused.
- Relative paths in settings are relative to the working directory.
- An unknown key is an error. All problems are printed at once, each with the nearest known key.
- The run folder keeps the resolved recipe in `recipe.yaml`. A resumed run must have the same settings,
  except those marked *yes* under *on resume*.
"""


def page(recipe: type[Section] = Recipe) -> str:
    """The whole page, Markdown. recipe: the class whose fields are the sections."""
    parts = [HEADER]
    for key, field in recipe.model_fields.items():
        if key in PACKAGES:
            parts += [f"## {key}\n\n{_sentence(field)}\n"]
            for name in known_names(key):
                parts += [f"### {key}: {name}\n\n{_section(key, config_class(key, name))}"]
        else:
            kind = field.annotation
            assert isinstance(kind, type) and issubclass(kind, Section)
            parts += [f"## {key}\n\n{_section(key, kind)}"]
    return "\n".join(parts)


def _section(key: str, section: type[Section]) -> str:
    """A section's docstring, and a table of its settings."""
    rows = ["| key | type | default | on resume | what it does |", "|---|---|---|---|---|"]
    for name, field in section.model_fields.items():
        cells = (
            f"`{key}.{name}`",
            type_in_words(field.annotation, field.metadata),
            _default(field),
            "yes" if may_change_on_resume(field) else "no",
            field.description or "",
        )
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n\n".join([inspect.getdoc(section) or "", "\n".join(rows)]).strip() + "\n"


def _default(field: FieldInfo) -> str:
    default: Any = field.default
    if default is PydanticUndefined:
        return "required"
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def _sentence(field: FieldInfo) -> str:
    text = field.description or ""
    return f"{text[:1].upper()}{text[1:]}."
