"""`python -m mmtensorar.recipe` and `mmtensorar plan`."""

from pathlib import Path

import pytest
import yaml

from mmtensorar.data.shards import Manifest
from mmtensorar.recipe import Recipe, RecipeError, __main__, docs
from mmtensorar.training import plan
from tests.helpers.loading import write_set

IMAGE_TOKENIZER = Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "image_tokenizer.yaml"


def test_main_prints_the_resolved_recipe(path, capsys):
    assert __main__.main([str(path), "train.steps=9"]) == 0
    out, err = capsys.readouterr()
    assert yaml.safe_load(out)["train"]["steps"] == 9
    assert all(line.startswith("note: ") for line in err.splitlines())


ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "recipes/tiny/weights/base"


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["data.shards=nowhere"], "note: data.shards: nowhere does not exist here"),
        (["data.shards={here: 1, gone: 2}"], "error: here has no manifest.json"),
        (["data.validation=gone", "train.validate_every=1"], "note: data.validation: gone does not exist"),
        (["data.shards=uncoded"], "error: uncoded has no image codes"),
        (["train.init_from=gone"], "note: train.init_from: gone does not exist here"),
        (["train.init_from=here"], "error: no model folder at here"),
        (["image_tokenizer.path=./gone"], "note: image_tokenizer.path: ./gone does not exist here"),
        (["backbone.path=models/janus"], "it is taken for a model of the Hugging Face Hub"),
        (["backbone.path=models/janus"], "note: tensorar.window: not compared with the backbone"),
        (["backbone.path=here", "tensorar.window=1"], "error: backbone.path: here has no config.json"),
        (
            ["backbone.max_prompt_tokens=100000", "tensorar.window=1"],
            "error: backbone.max_prompt_tokens is 100000, but the model has 256 positions",
        ),
        (
            ["backbone.max_prompt_tokens=5", "tensorar.window=1"],
            "error: backbone.max_prompt_tokens is 5, but a prompt without a caption has 8 tokens",
        ),
        (["backbone.max_prompt_tokens=5"], "error: backbone.max_prompt_tokens is 5, but a prompt"),
        (["backbone.text_tokenizer=here"], "error: here: there is no tokenizer.json"),
        (
            ["backbone.text_tokenizer=./gone", "tensorar.window=1"],
            "note: backbone.text_tokenizer: ./gone does not exist here",
        ),
        (["image_tokenizer.path=here"], "error: here/model.safetensors is missing"),
        (["image_tokenizer.path=recipe.yaml"], "error: recipe.yaml: cannot be read as"),
        (["tensorar.window=65"], "error: tensorar.window is 65; expected 1 to 64"),
        (["tensorar.num_heads=7"], "error: tensorar.num_heads is 7; expected a divisor"),
        (
            ["backbone={name: llamagen, path: gone.pt, size: B, condition: class, image_size: 64}"]
            + ["tensorar.window=17"],
            "error: tensorar.window is 17; expected 1 to 16",
        ),
    ],
)
def test_what_can_be_checked_without_weights_is_checked(tmp_path, monkeypatch, capsys, overrides, sentence):
    """A wrong folder or a too large window was found only when training had loaded the
    model.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    write_set(tmp_path / "uncoded", [1])
    Manifest.read(tmp_path / "uncoded").model_copy(update={"codes": None}).write(tmp_path / "uncoded")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "run: {name: test}\ntensorar: {window: 4, num_heads: 6}\ntrain: {steps: 3}\n"
        f"backbone: {{name: janus, path: '{BASE}/backbone'}}\n"
        f"image_tokenizer: {{name: janus_vq, path: '{BASE}/image_tokenizer'}}\n"
        "data: {shards: data/train, batch_size: 4}\n"
    )
    assert __main__.main([str(path), *overrides]) == (2 if sentence.startswith("error") else 0)
    out, err = capsys.readouterr()
    assert sentence in err and bool(out) == ("error" not in err)


@pytest.mark.parametrize("main", [__main__.main, __main__.plan], ids=["recipe", "plan"])
def test_a_setting_given_twice_is_noted(path, monkeypatch, capsys, main):
    monkeypatch.setattr(plan, "report", lambda recipe: f"steps: {recipe.train.steps}")
    assert main([str(path), "train.steps=3", "train.steps=9"]) == 0
    out, err = capsys.readouterr()
    assert "note: train.steps=3 is replaced by train.steps=9" in err and "steps: 9" in out


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
    """It used to be refused, with a list of the keys that a recipe of the other kind
    has.
    """
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
