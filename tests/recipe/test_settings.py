"""A setting is declared once: bounds, default, description and whether it may change on
resume.
"""

from pathlib import Path

import pytest

from mmtensorar.recipe import (
    PACKAGES,
    Recipe,
    RecipeError,
    Section,
    Train,
    docs,
    fixed_on_resume,
    may_change_on_resume,
    read_recipe,
    setting,
)

DOCS = Path(__file__).resolve().parents[2] / "docs" / "recipe.md"


class TrainWithOneMore(Train):
    """Train as it would be with two more lines in schema.py."""

    patience: int = setting(5, ge=1, description="steps without gain before a run ends", on_resume=True)
    dither: float = setting(0.0, le=1, description="noise on the pictures")


class RecipeWithOneMore(Recipe):
    train: TrainWithOneMore = setting(description="the loop")


def test_adding_a_setting_touches_one_place(path):
    """The setting is read, bounded, suggested, documented and compared on resume, from
    its declaration alone.
    """
    recipe = read_recipe(RecipeWithOneMore, path, ["train.patience=2", "train.dither=0.5"])
    assert (recipe.train.patience, recipe.train.dither) == (2, 0.5)
    with pytest.raises(RecipeError, match="expected an integer >= 1, got 0"):
        read_recipe(RecipeWithOneMore, path, ["train.patience=0"])
    with pytest.raises(RecipeError, match="did you mean train.patience?"):
        read_recipe(RecipeWithOneMore, path, ["train.patiense=1"])
    fixed = fixed_on_resume(recipe)["train"]
    assert fixed["dither"] == 0.5 and "patience" not in fixed
    row = "| `train.patience` | an integer >= 1 | `5` | yes | steps without gain before a run ends |"
    assert row in docs.page(RecipeWithOneMore).splitlines()


def test_the_page_of_settings_is_made_from_the_schema():
    """When this fails, run: python -m mmtensorar.recipe --docs > docs/recipe.md"""
    assert DOCS.read_text(encoding="utf-8") == docs.page()


def sections() -> list[tuple[str, type[Section]]]:
    kinds = {key: field.annotation for key, field in Recipe.model_fields.items()}
    return [(key, kind) for key, kind in kinds.items() if isinstance(kind, type) and key not in PACKAGES]


@pytest.mark.parametrize(
    "key, section", sections(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_setting_has_a_description(key, section):
    missing = [name for name, field in section.model_fields.items() if not field.description]
    assert not missing and section.model_fields


def test_what_may_change_on_resume(path):
    """None of these settings alters a step that was already taken."""
    free = {
        f"{key}.{name}"
        for key, section in sections()
        for name, field in section.model_fields.items()
        if may_change_on_resume(field)
    }
    assert {"run.name", "train.steps", "train.grad_accum", "optim.lr", "zero.stage", "sampler.top_k"} <= free
    assert not free & {"run.seed", "tensorar.window", "data.batch_size", "optim.betas", "train.precision"}
    fixed = fixed_on_resume(Recipe.load(path))
    assert fixed["run"] == {"seed": 0} and fixed["sampler"] == fixed["zero"] == {}
    assert fixed["backbone"]["path"] == "models/janus"


def test_settings_are_compared_as_json_on_resume(path):
    """A recipe read back from the run folder has the same fixed part."""
    recipe = Recipe.load(path, ["optim.betas=[0.8, 0.9]"])
    recipe.save(path.with_name("recipe.yaml"))
    assert fixed_on_resume(Recipe.load(path.with_name("recipe.yaml"))) == fixed_on_resume(recipe)


@pytest.mark.parametrize("word", ["a/" * 3000, "x" * 6000 + "=3", "train." + "y" * 6000 + "=3"])
def test_a_key_of_thousands_of_characters_is_shortened(path, word):
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, [word, "train.stepz=3"])
    assert len(str(caught.value)) < 2500 and "did you mean train.steps?" in str(caught.value)


@pytest.mark.parametrize("text", ["0042", "true", "7.5"])
def test_text_that_looks_like_another_value_needs_quotes(path, text):
    with pytest.raises(RecipeError, match="run.name .*is written in quotes"):
        Recipe.load(path, [f"run.name={text}"])
    assert Recipe.load(path, [f'run.name="{text}"']).run.name == text
