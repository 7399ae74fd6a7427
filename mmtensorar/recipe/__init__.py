"""Recipes: one strict YAML file holds every setting of a run.

    schema.py       every setting: type, bounds, default, description, whether it may change on resume
    rules.py        checks across sections, one function per rule
    files.py        YAML, `extends`, `key=value` on top
    names.py        backbones, image tokenizers and noise schedules, listed where they are defined
    recipe.py       Recipe: load, check, save, and the plain control
    errors.py       all problems at once, with the nearest known key
    section.py      the base class of sections, and how a setting is declared
    strict_yaml.py  YAML 1.2, without duplicate keys
    docs.py         docs/recipe.md

This room imports nothing else of the project. `python -m mmtensorar.recipe RECIPE.yaml`
is the command.
"""

from mmtensorar.recipe.errors import Problem, Problems, RecipeError, first_problem, problems_of
from mmtensorar.recipe.files import given_twice, read_recipe, read_settings
from mmtensorar.recipe.names import PACKAGES, known_names, known_schedules, named_section
from mmtensorar.recipe.recipe import Recipe, fixed_on_resume
from mmtensorar.recipe.schema import (
    Data,
    Lora,
    Optim,
    Run,
    SamplerSettings,
    TensorARSettings,
    Train,
    Zero,
)
from mmtensorar.recipe.section import BackboneConfig, NamedSection, Section, may_change_on_resume, setting

__all__ = [
    "PACKAGES",
    "BackboneConfig",
    "Data",
    "Lora",
    "NamedSection",
    "Optim",
    "Problem",
    "Problems",
    "Recipe",
    "RecipeError",
    "Run",
    "SamplerSettings",
    "Section",
    "TensorARSettings",
    "Train",
    "Zero",
    "first_problem",
    "fixed_on_resume",
    "given_twice",
    "known_names",
    "known_schedules",
    "may_change_on_resume",
    "named_section",
    "problems_of",
    "read_recipe",
    "read_settings",
    "setting",
]
