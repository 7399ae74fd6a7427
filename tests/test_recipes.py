"""Every recipe of this repository loads, plans, and takes one real training step on
small stand-ins.

The stand-ins are in a folder under the paths and hub ids that the recipes name, in the
layout of the released files: official .pt and .ckpt files, folders, shards. So a recipe
runs unchanged. It fails here if it names a file of another size, codes of another image
tokenizer or a prompt that its backbone does not accept.
"""

import importlib.util
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from mmtensorar import image_tokenizers
from mmtensorar.backbones import llamagen, open_magvit2
from mmtensorar.checkpoints import model_folder
from mmtensorar.image_tokenizers import llamagen_vq, open_magvit2_lfq
from mmtensorar.recipe import PACKAGES, Recipe, Section, files
from mmtensorar.recipe.__main__ import read_any_recipe
from mmtensorar.training import plan, run_log
from tests.helpers.fakes import tiny_llamagen, write_tiny_janus

ROOT = Path(__file__).resolve().parents[1]
# The recipe.yaml of a model folder is the record of a run.
FILES = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if "weights" not in path.parts]
IMAGE_TOKENIZER = ROOT / "recipes/tiny/image_tokenizer.yaml"  # for study.train_image_tokenizer
RECIPES = [path for path in FILES if path != IMAGE_TOKENIZER]
LARGE = [path for path in RECIPES if path.parent.name != "tiny"]
SCALE = 4  # the stand-ins' grids of codes are smaller by this factor


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def leaves(settings: dict, where: str = "") -> dict:
    """'section.key' -> value of nested settings."""
    found = {}
    for key, value in settings.items():
        found |= leaves(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
    return found


def difference(a: Recipe, b: Recipe) -> set[str]:
    first, second = (leaves(recipe.model_dump(mode="json")) for recipe in (a, b))
    return {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_recipe_loads(path):
    """Recipes in every folder load, without their models and shards."""
    assert isinstance(Recipe.load(path), Recipe)


def test_the_recipe_of_the_image_tokenizer_and_the_shipped_one_load():
    """The shipped model folder holds settings of earlier versions."""
    assert read_any_recipe(str(IMAGE_TOKENIZER), []).model_dump()["num_embeddings"] == 1024
    assert Recipe.load(ROOT / "recipes/tiny/weights/base/recipe.yaml").tensorar.window == 1


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_header_has_command_hardware_and_expectation(path):
    header = path.read_text().split("\n\n")[0]
    assert name_of(path) in header and "\n# Hardware: " in header
    assert "\n# Aims at" in header or "\n# Expect" in header


def test_every_row_of_the_papers_tables_has_a_recipe():
    """So has every row of its ablations; exponential, K = 4 and depth 1 are
    LlamaGen-B's own recipe.
    """
    rows = ["janus_pro_7b", "open_magvit2/b_256", "open_magvit2/l_256"]
    rows += [
        f"llamagen/{name}" for name in ("b_256", "l_256", "xl_384", "xxl_384", "t2i_xl_256", "t2i_xl_512")
    ]
    for row in rows:
        recipe = Recipe.load(ROOT / "recipes" / f"{row}.yaml")
        assert (recipe.tensorar.window, recipe.tensorar.schedule, recipe.tensorar.depth) == (
            4,
            "exponential",
            1,
        ), row
    base = Recipe.load(ROOT / "recipes/llamagen/b_256.yaml")
    ablations = [Recipe.load(path) for path in (ROOT / "recipes/ablations").glob("*.yaml")]
    for key, values in {
        "schedule": {"linear", "sine", "sqrt", "none"},
        "window": {2, 8},
        "depth": {2, 4},
    }.items():
        changed = [
            recipe for recipe in ablations if difference(recipe, base) == {"run.name", f"tensorar.{key}"}
        ]
        assert {getattr(recipe.tensorar, key) for recipe in changed} == values


def test_no_file_repeats_what_it_extends_and_no_two_runs_share_a_folder():
    for path in RECIPES:
        *bases, (_, stated) = files.read_files(path)
        if bases:
            base = leaves(files.merge(bases))
            # A section for another module starts from nothing, so it may happen to
            # repeat a value.
            replaced = {key for key in PACKAGES if "name" in stated.get(key, {})}
            repeated = {key for key, value in leaves(stated).items() if base.get(key) == value}
            assert not {key for key in repeated if key.partition(".")[0] not in replaced}, path
    folders = [Recipe.load(path).run_dir for path in RECIPES]
    assert len(set(folders)) == len(folders)


@pytest.mark.plan
@pytest.mark.parametrize("path", LARGE, ids=name_of)
def test_every_recipe_plans_without_any_file(path, tmp_path, monkeypatch):
    """Uses the real sizes: a window or a number of heads that the real backbone does
    not accept fails here.
    """
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load(path)
    text = plan.report(recipe, activations=False)
    share = re.search(r"TensorAR .*\(\+(.*)%\)", text)[1]
    assert (float(share) > 0) == (recipe.tensorar.window > 1)


# ---- one training step ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standins(tmp_path_factory, t5_folder) -> Path:
    """A folder in which every file that a recipe names is a small model of the same
    kind and layout.
    """
    folder = tmp_path_factory.mktemp("standins")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        shrink_released(patch)
        for path in RECIPES:
            recipe = Recipe.load(path)
            for section in (recipe.backbone, recipe.image_tokenizer):
                target = folder / section.path
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    write_standin(section, target)
            if encoder := getattr(recipe.backbone, "text_encoder", None):
                (folder / encoder).parent.mkdir(parents=True, exist_ok=True)
                if not (folder / encoder).exists():
                    (folder / encoder).symlink_to(t5_folder)
    return folder


def shrink_released(patch: pytest.MonkeyPatch) -> None:
    """Replace the tables of released sizes by narrow models; every size still has its
    own width.
    """
    sizes = {size: (4 * heads, 2, 2) for size, (_, _, heads) in llamagen.SIZES.items()}
    patch.setattr(llamagen, "SIZES", sizes)
    patch.setattr(llamagen, "PIXELS_PER_TOKEN", SCALE * llamagen.PIXELS_PER_TOKEN)
    small = dict(num_heads=2, spatial_layers=2, factorized_bits=(2, 3), grid=4, ffn_width=48)
    released = {
        size: open_magvit2.Architecture(
            dim=4 * config.num_heads, factorized_layers=config.factorized_layers, **small
        )
        for size, config in open_magvit2.RELEASED.items()
    }
    patch.setattr(open_magvit2, "RELEASED", released)
    lfq = dict(ch=32, ch_mult=(1, 1), num_res_blocks=1, factorized_bits=(2, 3), image_size=8)
    patch.setattr(open_magvit2_lfq, "RELEASED", {2: open_magvit2_lfq.Architecture(**lfq)})


def write_standin(section: Section, target: Path) -> None:
    torch.manual_seed(0)
    if target.parts[-2:] == ("runs", "tiny_start"):
        target.symlink_to(ROOT / "recipes/tiny/weights/base/backbone")
    elif "recipes/tiny" in str(target):
        target.symlink_to(ROOT / section.path)
    elif section.name in ("janus", "janus_vq"):
        write_tiny_janus(target, width=64)  # 4-bit matrices need this width
    elif section.name == "llamagen":
        torch.save({"model": llamagen_state(target.name), "steps": 1}, target)
    elif section.name == "llamagen_vq":
        sizes = dict(codebook_size=32, ch=32, num_res_blocks=1, z_channels=8)
        architecture = llamagen_vq.Architecture(**sizes, encoder_ch_mult=[1, 1], decoder_ch_mult=[1, 1])
        torch.save({"model": llamagen_vq.VQModel(architecture).state_dict()}, target)
    else:
        # An official file of the transformer holds the image tokenizer too.
        lfq = open_magvit2_lfq.LFQ(open_magvit2_lfq.RELEASED[2])
        size = re.fullmatch(r"AR_256_(\w+)\.ckpt", target.name)[1]
        model = open_magvit2.OpenMagvit2Backbone(open_magvit2.RELEASED[size])
        state = {
            open_magvit2.OpenMagvit2Backbone.official_name(name): value
            for name, value in model.state_dict().items()
        }
        state |= {open_magvit2_lfq.INSIDE_AR + name: value for name, value in lfq.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 1}, target)


def llamagen_state(name: str) -> dict:
    """The tensors of the official file with that name."""
    kind, size, image_size = re.fullmatch(r"(c2i|t2i)_(B|L|XL|XXL|3B)_(?:stage\d_)?(\d+)\.pt", name).groups()
    dim, num_layers, num_heads = llamagen.SIZES[size]
    heads = dict(num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_heads)
    tokens = (int(image_size) // llamagen.PIXELS_PER_TOKEN) ** 2
    classes = dict(num_classes=1000) if kind == "c2i" else {}
    condition = {"c2i": "class", "t2i": "text"}[kind]
    model = tiny_llamagen(condition, dim=dim, vocab_size=32, num_tokens=tokens, **heads, **classes)
    return {
        llamagen.LlamaGenBackbone.official_name(name): value for name, value in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def one_process():
    """A process group of one rank.

    Process-wide settings of training are restored afterwards.
    """
    pytest.importorskip("deepspeed")
    from mmtensorar.training import distributed

    environment, handlers = (
        dict(os.environ),
        {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)},
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    distributed.stop_process_group()
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def shrunken(path: Path, out: Path, *changes: str) -> Recipe:
    """The recipe with one step, few samples and small pictures, and otherwise
    unchanged.
    """
    recipe = Recipe.load(path)
    overrides = [f"run.out={out}", f"data.batch_size={2 * recipe.train.grad_accum}", "data.num_workers=0"]
    overrides += ["train.steps=1", "train.log_every=1", "train.sample_every=1"]
    if recipe.train.parts != "qlora":
        # Where a CPU has no instructions for bfloat16, it is 70 times slower than
        # float32.
        overrides.append("train.precision=fp32")
    if image_size := getattr(recipe.image_tokenizer, "image_size", None):
        # The small image tokenizer has 2 pixels per code.
        overrides.append(f"image_tokenizer.image_size={image_size * 2 // (SCALE * 16)}")
    if importlib.util.find_spec("ftfy") is None and hasattr(recipe.backbone, "caption_cleaning"):
        overrides.append("backbone.caption_cleaning=lower")
    return Recipe.load(path, [*overrides, *changes])


def write_shards_of(recipe: Recipe) -> None:
    from tests.helpers.shards import write_shards

    shards = Path(recipe.data.shards)
    if not shards.exists():
        shards.parent.mkdir(parents=True, exist_ok=True)
        by_class = (
            recipe.backbone.name == "open_magvit2" or getattr(recipe.backbone, "condition", None) == "class"
        )
        captions = {"captions_of_shards": [["0", "7"], ["207", "999"]]} if by_class else {}
        write_shards(shards, image_tokenizers.load(recipe.image_tokenizer), **captions)


@pytest.mark.launch
@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_one_real_training_step(path, standins, one_process, tmp_path, monkeypatch):
    from mmtensorar.train import train

    monkeypatch.chdir(standins)
    shrink_released(monkeypatch)
    recipe = shrunken(path, tmp_path)
    write_shards_of(recipe)
    if recipe.train.init_from is not None:  # the run whose model it starts from
        before = shrunken(path, tmp_path, "train.init_from=null")
        model_folder.save(Path(recipe.train.init_from), model_folder.initial_model(before), before)
    if path.stem in ("b_256", "t2i_xl_256", "janus_pro_1b"):  # one of each kind
        assert "activations" in plan.report(recipe)
    train(recipe)
    (row,) = run_log.read_log(recipe.run_dir / "log.jsonl")
    assert len(row["loss_per_offset"]) == recipe.tensorar.window
    assert math.isfinite(row["loss"]) and row["grad_norm"] > 0
    assert (recipe.run_dir / "samples" / "step_1.png").is_file()
    assert model_folder.check_files(recipe.run_dir / "model")["step"] == 1


@pytest.mark.launch
@pytest.mark.parametrize(
    "change, problem",
    [
        ("backbone.path=models/llamagen/c2i_L_256.pt", "backbone.size is B .*c2i_L_256.pt has width 64"),
        ("backbone.image_size=384", "c2i_B_256.pt was trained at 256 pixels"),
        ("backbone.condition=text", "c2i_B_256.pt is class-conditional"),
        ("image_tokenizer.image_size=12", "grid: data/imagenet_256_llamagen has images of 4x4 codes"),
        ("tensorar.num_heads=7", "tensorar.num_heads is 7; expected a divisor"),
        ("sampler.cfg_scale=[1.9, 2]", "cfg_scale"),
        ("train.sample_prompts=[a red circle]", "'a red circle' is not a class number"),
    ],
)
def test_a_recipe_that_does_not_fit_its_files_fails(
    change, problem, standins, one_process, tmp_path, monkeypatch
):
    """The stand-ins are checked as strictly as the released files."""
    from mmtensorar.train import train

    monkeypatch.chdir(standins)
    shrink_released(monkeypatch)
    path = ROOT / "recipes/llamagen/b_256.yaml"
    write_shards_of(shrunken(path, tmp_path))
    with pytest.raises(ValueError, match=problem):
        train(shrunken(path, tmp_path, change))
