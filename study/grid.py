"""A grid: which arms there are of a study, read from a YAML file as strictly as a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from mmtensorar.backbones import llamagen
from mmtensorar.recipe import Recipe, RecipeError, SamplerSettings, Section, read_recipe
from study.commands import ROOT
from study.train_image_tokenizer import ImageTokenizerRecipe

BASE = "base"  # the arm that is not trained
USUAL = "as the recipe"  # the sampling of every arm
# Settings of every training: nothing beside the steps, and their log.
ON_ALL = [
    "train.monitors=[]",
    "train.sample_every=0",
    "train.sample_prompts=[]",
    "train.save_every=0",
    "train.log_every=50",
]


class Arm(Section):
    """settings: of the grid's recipe that this arm changes, `key=value`. samplings: beside the recipe's own, by name.

    samplings_once: the same, with the first seed alone. num_seeds: fewer than the grid's. removed: why its setting is in the code
    no more; its stored rows stay on the page, and it is not run.
    """

    about: str
    settings: list[str] = []
    samplings: list[str] = []
    samplings_once: list[str] = []
    num_seeds: int | None = Field(None, ge=1)
    removed: str | None = None

    def samplings_of(self, seed: int) -> list[str]:
        return [USUAL, *self.samplings, *(self.samplings_once if seed == 0 else ())]


class FromNothing(Section):
    """A base to be trained on the world's pictures, from nothing.

    image_tokenizer: settings of study.train_image_tokenizer; shards and out are the study's. backbone: architecture of a LlamaGen.
    settings: of the grid's recipe that its training changes, `key=value`.
    """

    image_tokenizer: ImageTokenizerRecipe
    backbone: llamagen.Architecture
    settings: list[str] = []

    @field_validator("image_tokenizer", mode="before")
    @classmethod
    def _has_places(cls, settings: Any) -> Any:
        return {"shards": "", "out": ""} | settings if isinstance(settings, dict) else settings


class Grid(Section):
    """world: a module of study/worlds. recipe: the settings that arms change. base: the checkpoint folder that
    they start from, or from_nothing: how to make one.

    control: the arm that the others are compared with. equal_time: one that had at least their time, compared with too. samplings: name -> settings of the sampler, and batch_size.
    """

    world: str
    recipe: str
    base: str | None = None
    from_nothing: FromNothing = None  # not `| None`, which would hide which of its settings is wrong
    control: str
    equal_time: str | None = None
    num_seeds: int = Field(3, ge=1)
    num_images: int = Field(2, ge=1)
    samplings: dict[str, dict] = {}
    arms: dict[str, Arm]

    @model_validator(mode="after")
    def _names_are_known(self) -> Grid:
        problems = []
        if self.world not in (worlds := known_worlds()):
            problems.append(f"world is {self.world!r}; expected one of {', '.join(worlds)}")
        if (self.base is None) == (self.from_nothing is None):
            problems.append("expected one of base and from_nothing")
        for needed in filter(None, (BASE, self.control, self.equal_time)):
            if needed not in self.arms:
                problems.append(f"arms has no {needed!r}")
        for name, settings in self.samplings.items():
            given = {key: value for key, value in settings.items() if key != "batch_size"}
            try:
                sampler = SamplerSettings.model_validate(given)
            except ValidationError as error:
                problems += [
                    f"samplings.{name}.{each['loc'][0]} is {each['input']!r}: {each['msg']}"
                    for each in error.errors()
                ]
                continue
            if sampler.stride > 1 and sampler.lookahead > 1:
                problems.append(f"samplings.{name}: stride and lookahead are above 1; expected one of them 1")
            if not isinstance(settings.get("batch_size", 1), int) or settings.get("batch_size", 1) < 1:
                problems.append(
                    f"samplings.{name}: batch_size is {settings['batch_size']!r}; expected 1 or more"
                )
        if BASE in self.arms and self.arms[BASE].settings:
            problems.append(f"arms.{BASE}: settings are given, but it is not trained")
        for name, arm in self.arms.items():
            for key in ("samplings", "samplings_once"):
                if unknown := [each for each in getattr(arm, key) if each not in self.samplings]:
                    problems.append(f"arms.{name}.{key}: unknown {', '.join(unknown)}")
        if problems:
            raise ValueError(*problems)
        return self

    @classmethod
    def load(cls, path: str | Path) -> Grid:
        """Raises RecipeError, naming the file and each key that is wrong, of the arms' recipes too."""
        grid = read_recipe(cls, path)
        if grid.from_nothing is not None:
            try:
                Recipe.load(ROOT / grid.recipe, grid.from_nothing.settings)
            except ValueError as error:
                raise type(error)(f"{path}: from_nothing: {error}") from None
        for name, arm in grid.arms.items():
            if arm.removed:
                continue
            try:
                # The base has no drafts.
                window = 1 if name == BASE else Recipe.load(ROOT / grid.recipe, arm.settings).tensorar.window
            except ValueError as error:
                raise type(error)(f"{path}: arms.{name}: {error}") from None
            for sampling in arm.samplings_of(0)[1:]:
                if (stride := grid.samplings[sampling].get("stride", 1)) > window:
                    raise RecipeError(
                        f"{path}: arms.{name}: {sampling} has stride {stride}, the window is {window}"
                    )
        return grid

    def made_of(self, name: str, sampling: str) -> dict:
        """What a row of results hangs on, beside the base's weights, as JSON has it: settings of training and of sampling."""
        recipe = Recipe.load(ROOT / self.recipe, [*ON_ALL, *self.arms[name].settings])
        sections = (
            {}
            if name == BASE
            else recipe.model_dump(mode="json", include={"tensorar", "optim", "train", "data"})
        )
        for place in ("shards", "validation", "cache", "cache_gb"):
            sections.get("data", {}).pop(place, None)
        sampler = recipe.sampler.model_dump(mode="json") | self.samplings.get(sampling, {})
        start = None if self.from_nothing is None else self.from_nothing.model_dump(mode="json")
        return json.loads(
            json.dumps({**sections, "sampler": sampler, "num_images": self.num_images, "from_nothing": start})
        )

    def runs(self, wanted: Iterable[str], num_seeds: int) -> list[tuple[int, str]]:
        """(seed, arm), seed after seed, so that whenever the time is over all arms have been seen equally often."""
        arms = {name: arm for name, arm in self.arms.items() if name in wanted and not arm.removed}
        return [
            (seed, name)
            for seed in range(num_seeds)
            for name, arm in arms.items()
            if seed < (arm.num_seeds or num_seeds)
        ]


def known_worlds() -> list[str]:
    return sorted(
        path.stem for path in (Path(__file__).parent / "worlds").glob("*.py") if not path.stem.startswith("_")
    )
