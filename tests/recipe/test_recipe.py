"""Recipes: a typo never passes in silence, all mistakes come at once, and what is saved loads again."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmtensorar import recipe as module
from mmtensorar.recipe import Recipe, RecipeError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
IMAGE_TOKENIZER = ROOT / "recipes" / "tiny" / "image_tokenizer.yaml"
KNOWN = ", ".join(module.known_names("backbone"))

MINIMAL = """
run: {name: test}
backbone: {name: janus, path: models/janus}
image_tokenizer: {name: janus_vq, path: models/janus}
tensorar: {window: 4}
data: {shards: data/train, batch_size: 4}
train: {steps: 3}
"""


@pytest.fixture
def path(tmp_path) -> Path:
    file = tmp_path / "minimal.yaml"
    file.write_text(MINIMAL)
    return file


def mistakes(path: Path, *overrides: str) -> list[str]:
    """The lines of the report, the first one naming the file."""
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, overrides)
    return str(caught.value).splitlines()


def test_noise_named_as_in_the_paper_is_noise_alone(path):
    """Self-drafts are a default of the schedule that they were measured with."""
    shares = {
        given: Recipe.load(path, [*given]).tensorar.self_drafts
        for given in (
            (),
            ("tensorar.schedule=full",),
            ("tensorar.schedule=exponential",),
            ("tensorar.schedule=[0, 1, 1, 1]",),
            ("tensorar.schedule=sqrt", "tensorar.self_drafts=0.5"),
            ("tensorar.self_drafts=0",),
        )
    }
    assert list(shares.values()) == [1, 1, 0, 0, 0.5, 0]


# ---- mistakes ------------------------------------------------------------------------------------


def test_all_mistakes_at_once_with_the_nearest_key(path):
    """The report as the style guide shows it: one run of the command finds every typo."""
    assert mistakes(path, "tensorar.windw=3", "data.batch_size=four") == [
        f"{path}: 2 problems",
        "  tensorar.windw   unknown key; did you mean tensorar.window?",
        "  data.batch_size  expected an integer >= 1, got 'four'",
    ]


def test_mistakes_in_named_sections_come_with_the_others(path):
    """backbone and image_tokenizer are checked by other classes, in the same report."""
    report = "\n".join(mistakes(path, "backbone.pth=x", "image_tokenizer.name=janus_qv", "train.steps=0"))
    assert "3 problems" in report
    assert "backbone.pth          unknown key; did you mean backbone.path?" in report
    known = ", ".join(module.known_names("image_tokenizer"))
    assert f"image_tokenizer.name  expected one of {known}, got 'janus_qv'; did you mean janus_vq?" in report
    assert "train.steps           expected an integer >= 1 or null, got 0" in report


def test_settings_that_do_not_fit_each_other_come_together(path):
    """These checks see the whole recipe; the first used to hide the others."""
    flash = ("backbone.attn_implementation=flash_attention_2", "train.precision=fp32")
    report = mistakes(
        path, "tensorar.offset_weights=[1, 0.5]", "train.grad_accum=3", "zero.offload_params=cpu", *flash
    )
    assert report == [
        f"{path}: 4 problems",
        "  tensorar.offset_weights has 2 numbers, tensorar.window is 4; expected one number per offset",
        "  data.batch_size 4 is not a multiple of train.grad_accum 3",
        "  zero.offload_params needs zero.stage 3, found 0",
        "  backbone.attn_implementation flash_attention_2 needs train.precision bf16, found fp32; sdpa computes in both",
    ]


@pytest.mark.parametrize(
    "override, problem",
    [
        ("window=3", "window  unknown key; did you mean tensorar.window?"),  # right key, section forgotten
        ("data.lr=1", "data.lr  unknown key; did you mean optim.lr?"),
        ("optim.xyz=1", "optim.xyz  unknown key; known here: optim.name, optim.lr, optim.tensorar_lr"),
        ("backbone.name=gpt", f"backbone.name  expected one of {KNOWN}, got 'gpt'"),
        (
            "backbone.name=lamagen",
            f"backbone.name  expected one of {KNOWN}, got 'lamagen'; did you mean llamagen?",
        ),
        ("backbone=janus", f"backbone  expected settings with a name ({KNOWN}), got 'janus'"),
        ("backbone.path=", "backbone.path  expected text, not empty, got None"),
        ("train.steps=1.5", "train.steps  expected an integer >= 1 or null, got 1.5"),
        (
            "train.steps=true",
            "train.steps  expected an integer >= 1 or null, got True",
        ),  # which pydantic takes for 1
        (
            "tensorar.offset_weights=[1, -1, 1, 1]",
            "tensorar.offset_weights is [1.0, -1.0, 1.0, 1.0]; expected numbers >= 0",
        ),
        (
            "optim.name=cpu_adam",
            "optim.name cpu_adam is for zero.offload_optimizer cpu; without it use adamw",
        ),
        ("zero.nvme_path=disk", "zero.nvme_path has an effect only with zero.offload_optimizer nvme"),
        ("zero.offload_optimizer=cpu", "zero.offload_optimizer needs zero.stage 1, 2 or 3, found 0"),
        ("zero.extra.stage=2", "zero.extra.stage has a setting of its own, zero.stage"),
        ("train.precision=fp16", "train.precision  expected 'bf16' or 'fp32', got 'fp16'"),
        ("data.uncond_rate=2", "data.uncond_rate  expected a number >= 0 and <= 1, got 2"),
        ("optim.lr=.inf", "optim.lr  expected a number > 0, got inf"),
        ("optim.betas=[0.9, 1]", "optim.betas  expected a list of 2 numbers >= 0 and < 1, got [0.9, 1]"),
        ("optim.betas=[0.9]", "optim.betas  expected a list of 2 numbers >= 0 and < 1, got [0.9]"),
        ("tensorar.offset_weights=unifrm", "'uniform' or 'first_only' or 'geometric' or null, got 'unifrm'"),
        ("tensorar.offset_weights=[1, a, 1, 1]", "expected a list of numbers or 'uniform'"),
        ("train.sample_prompts=[a, 2]", "train.sample_prompts  expected a list of texts, got ['a', 2]"),
        ("tensorar.offset_weights=[true, true, 1, 1]", "got [True, True, 1, 1]"),
        ("sampler.top_k=[true]", "got [True]"),
        ("sampler.top_k=1.5", "expected an integer >= 0 or a list of integers >= 0, not empty, got 1.5"),
        (
            "sampler.cfg_scale=[2, -1]",
            "expected a number >= 0 or a list of numbers >= 0, not empty, got [2, -1]",
        ),
        ("sampler.top_p=[]", "a list of numbers > 0 and <= 1, not empty, got []"),
        ("run.name=a/b", "run.name  expected text like ^[A-Za-z0-9]"),
        ("tensorar=3", "tensorar  expected settings (key: value), got 3"),
        ("train.steps", "train.steps  expected key=value on the command line"),
        ("train.steps=[1", "train.steps  the value on the command line is not YAML: '[1'"),
        ("data.shards={a: 0}", "data.shards  the weight of a is 0; expected a number above 0"),
        ("data.shards={a:3}", "data.shards  the weight of a:3 is None; expected a number above 0"),
        ("data.shards={a: 1, a/: 2}", "data.shards  a folder is named twice"),
        ("data.shards.first=a", "data.shards.first  shards is 'data/train' and has no keys inside"),
    ],
)
def test_one_mistake_is_one_sentence(path, override, problem):
    """What was found, what was expected, where; one setting is one problem whatever pydantic makes of it."""
    first, *rest = mistakes(path, override)
    assert first == f"{path}: 1 problem"
    assert len(rest) == 1 and problem in rest[0]


@pytest.mark.parametrize(
    "overrides, problem",
    [
        (
            ["train.loss_kernel=liger", "train.z_loss=0.1"],
            "train.loss_kernel liger makes neither label_smoothing nor z_loss",
        ),
        (
            ["zero.offload_optimizer=nvme"],
            "zero.offload_optimizer nvme needs zero.nvme_path, a folder of each node's own disk",
        ),
        (
            ["zero.offload_optimizer=nvme", "zero.nvme_path=disk", "zero.stage=2"],
            "zero.offload_optimizer nvme needs zero.stage 3",
        ),
        (
            ["zero.offload_optimizer=nvme", "zero.nvme_path=disk", "optim.name=adamw"],
            "does not go with optim.name adamw; use cpu_adam",
        ),
        (
            ["zero.offload_optimizer=nvme", "zero.nvme_path=disk", "train.ema_decay=0.9"],
            "does not go with train.ema_decay",
        ),
    ],
)
def test_settings_that_do_not_go_together_name_what_does(path, overrides, problem):
    assert problem in "\n".join(mistakes(path, *overrides))


def test_missing_settings_are_named(tmp_path):
    (tmp_path / "empty.yaml").write_text("run: {}\ndata: {shards: a}\n")
    report = "\n".join(mistakes(tmp_path / "empty.yaml"))
    for key in ("run.name", "backbone", "image_tokenizer", "data.batch_size", "train"):
        assert f"  {key.ljust(15)}  missing; this setting has no default" in report, key


@pytest.mark.parametrize(
    "text, problem",
    [
        ("train: {steps: 1}\ntrain: {steps: 2}\n", "line 2: the key 'train' is given twice"),
        ("train:\n  steps: 1\n  steps: 2\n", "line 3: the key 'steps' is given twice"),
        ("a: [1\n", "line 2: expected ',' or ']'"),
        ("? [1, 2]\n: 3\n", "line 1: a key is a name"),
        ("yes: 1\n", "line 1: a key is a name, found 'yes'"),
        ("", "expected settings (key: value), got an empty file"),
        ("- a\n", "expected settings (key: value), got list"),
        ("extends: 3\n", "extends: expected the path of a recipe, got 3"),
        ("extends: broken.yaml\n", "extends itself through broken.yaml"),
        ("extends: minimum.yaml\n", "did you mean"),
    ],
)
def test_a_broken_file_is_named_with_its_line(path, text, problem):
    """Plain YAML takes the last of two equal keys, so half of an edit would be ignored."""
    broken = path.with_name("broken.yaml")
    broken.write_text(text)
    (report,) = mistakes(broken)
    assert problem in report and str(broken.parent) in report


def test_missing_file_suggests_its_neighbour(path):
    near = path.with_name("minimla.yaml")
    assert mistakes(near) == [f"no recipe at {near}; did you mean {path}?"]
    assert mistakes(path.parent / "nowhere" / "a.yaml") == [
        f"no recipe at {path.parent / 'nowhere' / 'a.yaml'}"
    ]


# ---- reading -------------------------------------------------------------------------------------


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
    # Nothing checks what goes to DeepSpeed, so the text "1e9" would get there.
    assert recipe.zero.extra == {"sub_group_size": 1_000_000_000}
    assert recipe.run.name == "1e9"


def test_sampler_numbers_may_be_one_per_factor(path):
    """A code of two factors has two temperatures; what is saved is what was given."""
    recipe = Recipe.load(path, ["sampler.cfg_scale=[1.9, 2]", "sampler.temperature=1.1"])
    assert (recipe.sampler.cfg_scale, recipe.sampler.temperature, recipe.sampler.top_k) == (
        [1.9, 2.0],
        1.1,
        0,
    )
    recipe.save(path.with_name("resolved.yaml"))
    assert Recipe.load(path.with_name("resolved.yaml")) == recipe


def test_the_last_override_wins(path):
    assert Recipe.load(path, ["train.steps=5", "train.steps=7"]).train.steps == 7


def test_extends_merges_sections_and_replaces_lists(path):
    """A variant states its differences only; a list is one value and is not appended to."""
    (path.parent / "deep").mkdir()
    middle, top = path.with_name("middle.yaml"), path.parent / "deep" / "top.yaml"
    middle.write_text(
        "extends: minimal.yaml\ntrain: {grad_accum: 2, sample_prompts: [a, b]}\noptim: {lr: 1e-3}\n"
    )
    top.write_text("extends: ../middle.yaml\ntrain: {sample_prompts: [c]}\n")
    recipe = Recipe.load(top, ["optim.eps=1e-6"])
    assert (recipe.train.steps, recipe.train.grad_accum, recipe.train.sample_prompts) == (3, 2, ["c"])
    assert (recipe.optim.lr, recipe.optim.eps) == (1e-3, 1e-6)
    assert Recipe.load(path).train.grad_accum == 1, "the base is left as it was"


def test_another_backbone_takes_no_settings_of_the_one_it_replaces(path):
    """Open-MAGVIT2 on top of a LlamaGen recipe: image_size means nothing to it, and would be refused."""
    top, changed = path.with_name("top.yaml"), path.with_name("changed.yaml")
    llamagen = "{name: llamagen, path: a.pt, image_size: 256}"
    path.write_text(MINIMAL.replace("{name: janus, path: models/janus}", llamagen))
    top.write_text("extends: minimal.yaml\nbackbone: {name: open_magvit2, path: a.ckpt}\n")
    assert Recipe.load(top).backbone.model_dump(exclude_defaults=True) == {
        "name": "open_magvit2",
        "path": "a.ckpt",
    }
    changed.write_text("extends: minimal.yaml\nbackbone: {name: llamagen, path: b.pt}\n")
    assert Recipe.load(changed).backbone.image_size == 256, "the same name keeps the rest"


def test_a_mistake_in_a_base_is_reported_with_its_file(path):
    """Of a chain of three files it names the one to edit; what the command line or the top file set needs none."""
    (path.parent / "deep").mkdir()
    middle, top = path.with_name("middle.yaml"), path.parent / "deep" / "top.yaml"
    middle.write_text("extends: minimal.yaml\ntensorar: {windw: 3}\ntrain: {steps: 0}\nbackbone: {pth: x}\n")
    top.write_text("extends: ../middle.yaml\ndata: {batch_size: 0}\n")
    found = f"{top.parent / '../middle.yaml'}"
    assert mistakes(top) == [
        f"{top}: 4 problems",
        f"  backbone.pth     unknown key; did you mean backbone.path? (in {found})",
        f"  tensorar.windw   unknown key; did you mean tensorar.window? (in {found})",
        "  data.batch_size  expected an integer >= 1, got 0",
        f"  train.steps      expected an integer >= 1 or null, got 0 (in {found})",
    ]
    assert "  train.steps      expected an integer >= 1 or null, got -1" in mistakes(top, "train.steps=-1")


def test_a_base_that_is_not_there_is_reported_with_who_wants_it(path):
    top = path.with_name("top.yaml")
    top.write_text("extends: minimla.yaml\n")
    base = path.with_name("minimla.yaml")
    assert mistakes(top) == [f"no recipe at {base}, which {top} extends; did you mean {path}?"]
    path.write_text("extends: middle.yaml\n")
    path.with_name("middle.yaml").write_text("extends: minimal.yaml\n")
    (report,) = mistakes(path)
    assert report == f"{path}: extends itself through minimal.yaml -> middle.yaml"


def test_resolved_recipe_loads_again(path, tmp_path):
    """The copy in a run folder is the record of the run: every setting is in it, and it means the same."""
    overrides = [
        "optim.lr=2e-5",
        "tensorar.offset_weights=[1, 0, 0, 0]",
        "run.name='2e5'",
        "zero.extra.a={b: [1, 1e9, 'é']}",
    ]
    recipe = Recipe.load(path, overrides)
    recipe.save(tmp_path / "resolved.yaml")
    assert Recipe.load(tmp_path / "resolved.yaml") == recipe
    assert recipe.backbone.attn_implementation == "sdpa" and "attn_implementation: sdpa" in recipe.dump()
    assert not list(tmp_path.glob("*.partial"))


def test_settings_do_not_change_after_validation(path):
    with pytest.raises(ValueError, match="frozen"):
        Recipe.load(path).train.steps = 4


# ---- command line --------------------------------------------------------------------------------


def test_main_prints_the_resolved_recipe(path, capsys):
    assert module.main([str(path), "train.steps=9"]) == 0
    out, err = capsys.readouterr()
    assert yaml.safe_load(out)["train"]["steps"] == 9 and not err


@pytest.mark.parametrize("arguments", [["FILE", "tensorar.windw=3"], ["nowhere.yaml"], ["."]])
def test_main_answers_mistakes_with_a_sentence(path, capsys, arguments):
    """Exit code 2 and no traceback: the reader is at fault, not the program."""
    assert module.main([str(path) if a == "FILE" else a for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and "Traceback" not in err and not out


def test_overrides_may_stand_around_options(path, monkeypatch, capsys):
    """Plain argparse refuses positional words after an option."""
    from mmtensorar.training import plan

    monkeypatch.setattr(plan, "report", lambda recipe: f"steps {recipe.train.steps}")
    assert module.main([str(path), "--plan", "train.steps=9"]) == 0
    assert capsys.readouterr().out == "steps 9\n"


def test_the_image_tokenizers_recipe_is_checked_and_printed_too(tmp_path, capsys):
    """It used to be refused with a list of keys that a recipe of the other kind has."""
    assert module.main([str(IMAGE_TOKENIZER), "steps=700"]) == 0
    out, err = capsys.readouterr()
    printed = yaml.safe_load(out)
    assert (printed["steps"], printed["num_embeddings"], printed["embed_dim"]) == (700, 1024, 8) and not err
    assert module.main([str(IMAGE_TOKENIZER), "stepz=7", "lr=fast"]) == 2
    err = capsys.readouterr().err
    assert (
        "2 problems" in err
        and "stepz  unknown key; did you mean steps?" in err
        and "expected a number" in err
    )
    kind = f"error: {IMAGE_TOKENIZER}: a recipe of study.train_image_tokenizer"
    assert module.main([str(IMAGE_TOKENIZER), "--plan"]) == 2
    assert capsys.readouterr().err == f"{kind}, for which there is no plan\n"
    with pytest.raises(RecipeError) as caught:
        Recipe.load(IMAGE_TOKENIZER)
    assert f"error: {caught.value}" == f"{kind}, not of mmtensorar.train"


def test_recipes_are_read_without_torch():
    """A launcher or an editor's check need not wait for it."""
    code = "import sys, mmtensorar.recipe; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout
        == "False\n"
    )


# ---- the recipes of this repository --------------------------------------------------------------


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_recipe_loads(file):
    """However deep it lies, of whatever kind, and without its model being here."""
    recipe = module.read_recipe(module.recipe_class(module.read_settings(file)), file)
    assert isinstance(recipe, Recipe) == (file != IMAGE_TOKENIZER)


@pytest.mark.parametrize(
    "extra, problem",
    [
        (
            "{offload_optimizer: {device: nvme, nvme_path: /tmp}}",
            "cannot be saved for resuming; the nearest is zero.offload_optimizer nvme",
        ),
        ("{offload_param: {device: nvme}}", "the nearest is zero.offload_params cpu"),
        (
            "{offload_optimizer: {device: cpu, ratio: 0.5}}",
            "cannot be saved for resuming; the nearest is zero.offload_optimizer cpu",
        ),
    ],
)
def test_states_that_could_not_be_saved_are_refused(extra, problem):
    """They would have been saved as nothing, and the run resumed from its start without a word."""
    with pytest.raises(RecipeError, match=problem):
        Recipe.load(ROOT / "recipes" / "tiny" / "tensorar.yaml", [f"zero.extra={extra}"])
