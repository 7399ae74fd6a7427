"""`python -m mmtensorar.recipe` and `mmtensorar plan`."""

from pathlib import Path

import pytest
import yaml

from mmtensorar.recipe import Recipe, RecipeError, __main__, docs
from mmtensorar.training import plan

IMAGE_TOKENIZER = Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "image_tokenizer.yaml"


def test_main_prints_the_resolved_recipe(path, capsys):
    assert __main__.main([str(path), "train.steps=9"]) == 0
    out, err = capsys.readouterr()
    assert yaml.safe_load(out)["train"]["steps"] == 9 and not err


@pytest.mark.parametrize("arguments", [["FILE", "tensorar.windw=3"], ["nowhere.yaml"], ["."]])
def test_main_reports_mistakes_in_a_sentence(path, capsys, arguments):
    """Exit code 2 and no traceback: the input is wrong, not the program."""
    assert __main__.main([str(path) if a == "FILE" else a for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and "Traceback" not in err and not out


@pytest.mark.parametrize(
    "main, options", [(__main__.main, ["--plan"]), (__main__.plan, [])], ids=["recipe --plan", "plan"]
)
def test_a_plan_takes_overrides_anywhere(path, monkeypatch, capsys, main, options):
    """Plain argparse refuses positional words after an option."""
    monkeypatch.setattr(plan, "report", lambda recipe: f"steps {recipe.train.steps}")
    assert main([str(path), *options, "train.steps=9"]) == 0
    assert capsys.readouterr().out == "steps 9\n"


def test_main_prints_the_page_of_settings(capsys):
    assert __main__.main(["--docs"]) == 0
    assert capsys.readouterr().out == docs.page()


def test_the_recipe_of_the_image_tokenizer_is_checked_and_printed_too(capsys):
    """It used to be refused, with a list of the keys that a recipe of the other kind has."""
    assert __main__.main([str(IMAGE_TOKENIZER), "steps=700"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["steps"], printed["num_embeddings"], printed["embed_dim"]) == (700, 1024, 8)
    assert __main__.main([str(IMAGE_TOKENIZER), "stepz=7", "lr=fast"]) == 2
    err = capsys.readouterr().err
    assert "2 problems" in err and "did you mean steps?" in err and "expected a number" in err
    assert __main__.main([str(IMAGE_TOKENIZER), "--plan"]) == 2
    assert "study.train_image_tokenizer" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="not a Recipe"):
        Recipe.load(IMAGE_TOKENIZER)
