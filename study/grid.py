"""A grid: the arms of a study, read from a YAML file as strictly as a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from mmtensorar.backbones import llamagen
from mmtensorar.recipe import Recipe, SamplerSettings, Section, problems_of, read_recipe
from study.commands import ROOT
from study.train_image_tokenizer import ImageTokenizerRecipe

# (section, setting) in stored rows of earlier versions -> the value that equals today's
# behaviour.
REMOVED = {("sampler", "stride"): 1, ("tensorar", "max_stride"): 1}
BASE = "base"  # the arm that is not trained
USUAL = "as the recipe"  # the sampling of every arm
# Settings of every training run: no monitors, samples or run states, only the steps and
# their log.
ON_ALL = [
    "train.monitors=[]",
    "train.sample_every=0",
    "train.sample_prompts=[]",
    "train.save_every=0",
    "train.log_every=50",
]


class Arm(Section):
    """One way to train, as changes of the grid's recipe.

    Args:
        about: the arm in words.
        settings: of the recipe that this arm changes, `key=value`.
        samplings: names of samplings besides the recipe's own.
        samplings_once: the same, for the first seed only.
        num_seeds: instead of the grid's, when fewer are enough.
        removed: why its setting is no longer in the code. Its stored rows stay on the
            page, and it is not run.
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
    """A base that is trained on the world's pictures, from nothing.

    Args:
        image_tokenizer: settings of study.train_image_tokenizer; the study sets shards
            and out.
        backbone: architecture of a LlamaGen.
        settings: of the grid's recipe that its training changes, `key=value`.
    """

    image_tokenizer: ImageTokenizerRecipe
    backbone: llamagen.Architecture
    settings: list[str] = []

    @field_validator("image_tokenizer", mode="before")
    @classmethod
    def _add_paths(cls, settings: Any) -> Any:
        return {"shards": "", "out": ""} | settings if isinstance(settings, dict) else settings


class Grid(Section):
    """The arms of a study on one world.

    Args:
        world: a module of study/worlds.
        recipe: the settings that arms change.
        base: the model folder that all arms start from.
        from_nothing: how to make one, instead of base.
        control: the arm that the others are compared with.
        equal_time: a second arm to compare with: it trains at least as long as the
            others.
        num_seeds: of each arm, unless the arm has fewer.
        num_images: pictures of each prompt.
        samplings: name -> settings of the sampler, and batch_size.
        arms: name -> arm.
    """

    world: str
    recipe: str
    base: str | None = None
    # Optional. With `| None` as its type, the reader of recipes does not name a wrong
    # key inside it.
    from_nothing: FromNothing = None
    control: str
    equal_time: str | None = None
    num_seeds: int = Field(3, ge=1)
    num_images: int = Field(2, ge=1)
    samplings: dict[str, dict] = {}
    arms: dict[str, Arm]

    @model_validator(mode="after")
    def _check_names(self) -> Grid:
        problems = [*self._base_problems(), *self._sampling_problems(), *self._arm_problems()]
        if problems:
            raise ValueError(*problems)
        return self

    def _base_problems(self) -> Iterator[str]:
        if self.world not in (worlds := known_worlds()):
            yield f"world is {self.world!r}; expected one of {', '.join(worlds)}"
        if (self.base is None) == (self.from_nothing is None):
            yield "expected one of base and from_nothing"
        for name in filter(None, (BASE, self.control, self.equal_time)):
            if name not in self.arms:
                yield f"arms has no {name!r}"

    def _sampling_problems(self) -> Iterator[str]:
        for name, settings in self.samplings.items():
            given = {key: value for key, value in settings.items() if key != "batch_size"}
            try:
                SamplerSettings.model_validate(given)
            except ValidationError as invalid:
                for key, problem in problems_of(invalid, SamplerSettings, given, prefix=("samplings", name)):
                    yield f"{key}: {problem}"
            batch_size = settings.get("batch_size", 1)
            if not isinstance(batch_size, int) or batch_size < 1:
                yield f"samplings.{name}: batch_size is {batch_size!r}; expected 1 or more"

    def _arm_problems(self) -> Iterator[str]:
        if BASE in self.arms and self.arms[BASE].settings:
            yield f"arms.{BASE}: settings are given, but it is not trained"
        for name, arm in self.arms.items():
            for key in ("samplings", "samplings_once"):
                if unknown := [sampling for sampling in getattr(arm, key) if sampling not in self.samplings]:
                    yield f"arms.{name}.{key}: unknown {', '.join(unknown)}"

    @classmethod
    def load(cls, path: str | Path) -> Grid:
        """Read a grid.

        Raises RecipeError naming the file and each wrong key, also of the arms'
        recipes.
        """
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
                Recipe.load(ROOT / grid.recipe, arm.settings)
            except ValueError as error:
                raise type(error)(f"{path}: arms.{name}: {error}") from None
        return grid

    def made_of(self, name: str, sampling: str) -> dict:
        """The settings, of training and of sampling, that a row of results depends on,
        as JSON has them.

        A row also depends on the base's weights: see `job.fingerprint`.
        """
        recipe = Recipe.load(ROOT / self.recipe, [*ON_ALL, *self.arms[name].settings])
        sections = {}
        if name != BASE:
            sections = recipe.model_dump(mode="json", include={"tensorar", "optim", "train", "data"})
            for path in ("shards", "validation", "cache", "cache_gb"):
                sections["data"].pop(path, None)
        sampler = recipe.sampler.model_dump(mode="json") | self.samplings.get(sampling, {})
        start = None if self.from_nothing is None else self.from_nothing.model_dump(mode="json")
        return json.loads(
            json.dumps({**sections, "sampler": sampler, "num_images": self.num_images, "from_nothing": start})
        )

    def runs(self, wanted: Iterable[str], num_seeds: int) -> list[tuple[int, str]]:
        """(seed, arm), seed after seed, so that a run that ends early has treated all
        arms alike.
        """
        arms = {name: arm for name, arm in self.arms.items() if name in wanted and not arm.removed}
        return [
            (seed, name)
            for seed in range(num_seeds)
            for name, arm in arms.items()
            if seed < (arm.num_seeds or num_seeds)
        ]


def comparable(made_of: dict) -> dict:
    """What a row was made of (`Grid.made_of`), without settings that only earlier
    versions had, and without lookahead, which changes no picture's distribution.
    """
    return {
        section: {
            name: value
            for name, value in settings.items()
            if REMOVED.get((section, name), object()) != value and (section, name) != ("sampler", "lookahead")
        }
        if isinstance(settings, dict)
        else settings
        for section, settings in made_of.items()
    }


def known_worlds() -> list[str]:
    return sorted(
        path.stem for path in (Path(__file__).parent / "worlds").glob("*.py") if not path.stem.startswith("_")
    )
