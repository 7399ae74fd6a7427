"""Recipe files: what they extend, what the command line changes, and a saved recipe
loads again.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from mmtensorar.recipe import Recipe, RecipeError, given_twice

ROOT = Path(__file__).resolve().parents[2]


def problems(path: Path, *overrides: str) -> list[str]:
    """The lines of the report, of which the first names the file."""
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    "text, problem",
    [
        ("train: {steps: 1}\ntrain: {steps: 2}\n", "line 2: the key 'train' is given twice"),
        ("train:\n  steps: 1\n  steps: 2\n", "line 3: the key 'steps' is given twice"),
        ("a: [1\n", "line 2:"),
        ("? [1, 2]\n: 3\n", "line 1:"),
        ("true: 1\n", "line 1: .*'true'"),
        ("0042: 1\n", "line 1: .*'0042'"),
        ("", "an empty file"),
        ("- a\n", "got list"),
        ("shards: a\n", "got shards"),
        ("extends: 3\n", "got 3"),
        ("extends: broken.yaml\n", "extends itself through broken.yaml"),
        ("extends: minimum.yaml\n", "did you mean .*minimal.yaml"),
    ],
)
def test_a_broken_file_is_named_with_its_line(path, text, problem):
    """Plain YAML takes the last of two equal keys, so half of an edit would be
    ignored.
    """
    broken = path.with_name("broken.yaml")
    broken.write_text(text)
    with pytest.raises(RecipeError, match=problem) as caught:
        Recipe.load(broken)
    assert str(broken.parent) in str(caught.value)


def test_a_missing_file_suggests_the_nearest_name(path):
    near = path.with_name("minimla.yaml")
    assert problems(near) == [f"no recipe at {near}; did you mean {path}?"]
    nowhere = path.parent / "nowhere" / "a.yaml"
    assert problems(nowhere) == [f"no recipe at {nowhere}"]


def test_command_line_values_are_yaml(path):
    """2e-5 is a number (PyYAML alone reads text), lists are lists, null is None."""
    recipe = Recipe.load(
        path,
        [
            "optim.lr=2e-5",
            "optim.betas=[0.8, 9e-1]",
            "tensorar.offset_weights=[1, 0.5, 1e-1, 0]",
            "train.sample_prompts=[a red circle, 'one, two']",
            "train.init_from=null",
            "run.seed=1e3",
            "zero.extra.sub_group_size=1e9",
            "run.name='1e9'",
        ],
    )
    assert recipe.optim.lr == 2e-5 and recipe.optim.betas == (0.8, 0.9)
    assert recipe.tensorar.offset_weights == [1, 0.5, 0.1, 0]
    assert recipe.train.sample_prompts == ["a red circle", "one, two"]
    assert recipe.train.init_from is None and recipe.run.seed == 1000
    # DeepSpeed's section is not checked, so the text "1e9" would reach DeepSpeed.
    assert recipe.zero.extra == {"sub_group_size": 1_000_000_000}
    assert recipe.run.name == "1e9"


@pytest.mark.parametrize(
    "overrides, replaced",
    [
        (["train.steps=5", "train.steps=7"], ["train.steps=5"]),
        (["train.steps=5", "optim.lr=1", "train.steps=7", "optim.lr=2"], ["train.steps=5", "optim.lr=1"]),
        (["train.save_every=5", "train={steps: 7}"], ["train.save_every=5"]),
        (["train={steps: 5}", "train.steps=7"], []),
        (["train.steps=7", "train.steps=7"], []),
        (["train.steps=7", "train.step=7"], []),
    ],
)
def test_the_last_override_wins_and_the_others_are_named(path, overrides, replaced):
    """Of `train.steps=5 ... train.steps=7` in a long command, one was ignored in
    silence.
    """
    if "train.step=7" not in overrides:
        assert Recipe.load(path, overrides).train.steps == 7
    assert [note.split(" is replaced by ")[0] for note in given_twice(overrides)] == replaced


@pytest.mark.parametrize(
    "override, key",
    [
        ("train.steps", "train.steps"),
        ("train.steps=[1", "train.steps"),
        ("data.shards.first=a", "data.shards.first"),
    ],
)
def test_an_override_that_cannot_be_applied_is_one_problem(path, override, key):
    first, *rest = problems(path, override)
    assert first == "the command line: 1 problem" and len(rest) == 1 and rest[0].split()[0] == key


@pytest.mark.parametrize(
    "overrides, blocks",
    [
        (["train.stesp=3"], {"the command line": ["train.stesp"]}),
        (["train.steps=three", "optim.lr=-1"], {"the command line": ["optim.lr", "train.steps"]}),
        (["train={steps: 0}"], {"the command line": ["train.steps"]}),
        # Rules about two settings: the recipe was right before the command line changed
        # one of them.
        (["train.grad_accum=3"], {"the command line": ["data.batch_size"]}),
        (["tensorar.window=3"], {"the command line": ["tensorar.offset_weights"]}),
        (["train.epochs=1"], {"the command line": ["train.steps"]}),
        (["backbone.pth=x"], {"the command line": ["backbone.pth"]}),
        # A section, or settings in a setting, that only the command line has.
        (["Train.steps=3"], {"the command line": ["Train"]}),
        (["sampler.top_k.first=3"], {"the command line": ["sampler.top_k"]}),
        (["zeero.stage.x=3", "lr=1"], {"the command line": ["zeero", "lr"]}),
    ],
)
def test_a_mistake_of_the_command_line_is_not_blamed_on_the_file(path, overrides, blocks):
    """`train.stesp=3` once printed `recipes/x.yaml: 1 problem`, and people searched the
    file for it.
    """
    path.write_text(path.read_text().replace("{window: 4}", "{window: 2, offset_weights: [1, 1]}"))
    Recipe.load(path)
    found: dict[str, list[str]] = {}
    for line in problems(path, *overrides):
        if not line.startswith(" "):
            found[source := line.partition(":")[0]] = []
        else:
            found[source].append(line.split()[0])
    assert found == blocks


def test_mistakes_of_both_are_listed_apart(path):
    path.write_text(path.read_text().replace("{window: 4}", "{windw: 2}") + "optim: {lr: 0}\n")
    assert [line.split()[0] for line in problems(path, "train.steps=0")] == [
        "the",
        "train.steps",
        f"{path}:",
        "tensorar.windw",
        "optim.lr",
    ]


def test_extends_merges_sections_and_replaces_lists(path):
    """A variant states only its differences; a list is one value and is not appended
    to.
    """
    (path.parent / "deep").mkdir()
    middle, top = path.with_name("middle.yaml"), path.parent / "deep" / "top.yaml"
    middle.write_text(
        "extends: minimal.yaml\ntrain: {grad_accum: 2, sample_prompts: [a, b]}\noptim: {lr: 1e-3}\n"
    )
    top.write_text("extends: ../middle.yaml\ntrain: {sample_prompts: [c]}\n")
    recipe = Recipe.load(top, ["optim.eps=1e-6"])
    assert (recipe.train.steps, recipe.train.grad_accum, recipe.train.sample_prompts) == (3, 2, ["c"])
    assert (recipe.optim.lr, recipe.optim.eps) == (1e-3, 1e-6)
    assert Recipe.load(path).train.grad_accum == 1, "the base is unchanged"


def test_another_backbone_takes_no_settings_of_the_one_it_replaces(path):
    """Open-MAGVIT2 extends a LlamaGen recipe: it has no image_size, so keeping that
    setting would be an error.
    """
    top, changed = path.with_name("top.yaml"), path.with_name("changed.yaml")
    llamagen = "{name: llamagen, path: a.pt, image_size: 256}"
    path.write_text(path.read_text().replace("{name: janus, path: models/janus}", llamagen))
    top.write_text("extends: minimal.yaml\nbackbone: {name: open_magvit2, path: a.ckpt}\n")
    expected = {"name": "open_magvit2", "path": "a.ckpt"}
    assert Recipe.load(top).backbone.model_dump(exclude_defaults=True) == expected
    changed.write_text("extends: minimal.yaml\nbackbone: {name: llamagen, path: b.pt}\n")
    assert Recipe.load(changed).backbone.model_dump()["image_size"] == 256, "the same name keeps the rest"


def test_a_problem_in_a_base_is_reported_with_its_file(path):
    """In a chain of three files the report names the file to edit, also for a rule
    about several sections.
    """
    (path.parent / "deep").mkdir()
    middle, top = path.with_name("middle.yaml"), path.parent / "deep" / "top.yaml"
    middle.write_text("extends: minimal.yaml\ntensorar: {windw: 3}\ntrain: {steps: 0}\nbackbone: {pth: x}\n")
    top.write_text("extends: ../middle.yaml\ndata: {batch_size: 0}\n")
    source = f"(in {top.parent / '../middle.yaml'})"
    first, *rest = problems(top)
    assert first == f"{top}: 4 problems"
    assert {line.split()[0]: source in line for line in rest} == {
        "backbone.pth": True,
        "tensorar.windw": True,
        "data.batch_size": False,
        "train.steps": True,
    }
    assert not any("train.steps" in line and source in line for line in problems(top, "train.steps=-1"))
    middle.write_text("extends: minimal.yaml\ntrain: {epochs: 1}\n")
    top.write_text("extends: ../middle.yaml\n")
    assert "minimal.yaml)" in problems(top)[1], "train.steps, which the base gives"


def test_a_missing_base_is_reported_with_the_file_that_extends_it(path):
    top = path.with_name("top.yaml")
    top.write_text("extends: minimla.yaml\n")
    base = path.with_name("minimla.yaml")
    assert problems(top) == [f"no recipe at {base}, which {top} extends; did you mean {path}?"]
    path.write_text("extends: middle.yaml\n")
    path.with_name("middle.yaml").write_text("extends: minimal.yaml\n")
    assert problems(path) == [f"{path}: extends itself through minimal.yaml -> middle.yaml"]


def test_a_resolved_recipe_loads_again(path, tmp_path):
    """The copy in a run folder is the record of the run: it has every setting, with the
    same meaning.
    """
    overrides = [
        "optim.lr=2e-5",
        "tensorar.offset_weights=[1, 0, 0, 0]",
        "sampler.cfg_scale=[1.9, 2]",
        "run.name='2e5'",
        "zero.extra.a={b: [1, 1e9, 'é']}",
    ]
    recipe = Recipe.load(path, overrides)
    recipe.save(tmp_path / "resolved.yaml")
    assert Recipe.load(tmp_path / "resolved.yaml") == recipe
    assert "attn_implementation: sdpa" in recipe.dump(), "defaults are written too"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.launch
def test_recipes_are_read_without_torch():
    """Importing the recipe package is cheap.

    Only checking a backbone's section imports its module, and so torch.
    """
    code = "import sys, mmtensorar.recipe; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
