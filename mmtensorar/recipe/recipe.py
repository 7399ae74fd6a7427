"""Recipe: the settings of one run, read from a file, checked as a whole, and saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import model_validator

from mmtensorar.files import write_text
from mmtensorar.recipe.errors import Problems
from mmtensorar.recipe.files import read_recipe
from mmtensorar.recipe.rules import broken_rules
from mmtensorar.recipe.schema import RecipeSections
from mmtensorar.recipe.section import Section, may_change_on_resume


class Recipe(RecipeSections):
    """The settings of one run.

    The sections backbone and image_tokenizer are validated by the Config class of the
    module that they name: `backbone: {name: janus, ...}` by
    mmtensorar/backbones/janus.py.
    """

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if problems := broken_rules(self):
            raise Problems(problems)
        return self

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.run.out) / self.run.name

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a recipe file and put `key=value` overrides (dotted keys, YAML values)
        on top.

        Raises RecipeError, naming the file and each key, with all problems at once.
        """
        return read_recipe(cls, path, overrides)

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe, atomically. It loads again unchanged."""
        write_text(Path(path), self.dump())

    def plain(self) -> Self:
        """The control for this recipe: the same run without TensorAR (window 1), named
        NAME_plain.
        """
        return self.model_copy(
            update={
                "run": self.run.model_copy(update={"name": f"{self.run.name}_plain"}),
                "tensorar": self.tensorar.model_copy(update={"window": 1, "offset_weights": None}),
            }
        )


def fixed_on_resume(recipe: Section) -> dict:
    """The settings that a resumed run must share with the run it resumes, nested as in
    the recipe.

    Settings declared with `on_resume=True` are left out: they do not affect finished
    steps.
    """
    values, fixed = recipe.model_dump(mode="json"), {}
    for name, field in type(recipe).model_fields.items():
        section = getattr(recipe, name)
        if isinstance(section, Section):
            fixed[name] = fixed_on_resume(section)
        elif not may_change_on_resume(field):
            fixed[name] = values[name]
    return fixed
