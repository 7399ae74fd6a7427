"""A run that cannot be resumed: the message names how a new one starts from its
weights.
"""

import pytest

from mmtensorar.recipe import Recipe
from mmtensorar.training import resume, run_state


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Recipe:
    """A recipe whose run folder exists."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "run: {name: old}\nbackbone: {name: janus, path: models/janus}\n"
        "image_tokenizer: {name: janus_vq, path: models/janus}\n"
        "data: {shards: data/train, batch_size: 4}\ntrain: {steps: 3}\n"
    )
    recipe = Recipe.load(path)
    recipe.run_dir.mkdir(parents=True)
    recipe.save(recipe.run_dir / "recipe.yaml")
    return recipe


@pytest.mark.parametrize(
    "changes",
    [{"tensorar": {"window": 4}}, {"run": {"seed": 1}}, {"optim": {"eps": 1e-6}, "data": {"shuffle": 1}}],
)
@pytest.mark.parametrize("finished", [False, True])
def test_a_changed_recipe_names_init_from(recipe, monkeypatch, changes, finished):
    """`cannot resume: the recipe changed` left people to train from nothing again."""
    monkeypatch.setattr(run_state, "latest_step", lambda folder: 2)
    if finished:
        (recipe.run_dir / "model").mkdir()
    update = {
        section: getattr(recipe, section).model_copy(update=settings) for section, settings in changes.items()
    }
    with pytest.raises(ValueError, match="the recipe changed") as caught:
        resume.find_progress(recipe.model_copy(update=update), resume=True)
    advice = "train.init_from=runs/old/model" if finished else "mmtensorar export runs/old --out FOLDER"
    assert advice in str(caught.value) and "train.init_from=" in str(caught.value)


def test_a_model_without_checkpoints_names_init_from(recipe):
    (recipe.run_dir / "model").mkdir()
    (recipe.run_dir / "model" / "checkpoint.json").write_text("{}")
    with pytest.raises(ValueError, match="no checkpoints/.*train.init_from=runs/old/model"):
        resume.find_progress(recipe, resume=True)


@pytest.mark.parametrize(
    "key, update, named",
    [
        ("start", {}, "backbone.path: models/janus"),
        ("start", {"train": {"init_from": "runs/first/model"}}, "train.init_from: runs/first/model"),
        ("shards", {}, "data.shards: data/train"),
        ("shards", {"data": {"shards": {"data/a": 1.0, "data/b": 2.0}}}, "data.shards: data/a, data/b"),
    ],
)
def test_other_inputs_are_named_with_their_folders(recipe, monkeypatch, key, update, named):
    """After shards were made again, `saved with shards 3f0a..., this run has 91bc...`
    named two hashes and no folder.
    """
    changed = {
        section: getattr(recipe, section).model_copy(update=settings) for section, settings in update.items()
    }
    monkeypatch.setattr(
        run_state.sharded_state, "latest", lambda folder: {"step": 2, "start": "a", "shards": "b"}
    )
    expected = {"start": "a", "shards": "b"} | {key: "c"}
    with pytest.raises(ValueError, match="train.init_from=") as caught:
        resume.check_inputs(recipe.model_copy(update=changed), 2, expected)
    assert f"({named}) changed since step 2" in str(caught.value)
