"""Every recipe of this repository: it plans, and takes one real training step on a small copy of what it names.

The small copies stand in a folder under the very paths and hub ids that the recipes give, in the layout of the
released files: official .pt and .ckpt files, folders, shards. So a recipe runs as it is, and one that gives a file of
another size, codes of another image tokenizer or a prompt that its backbone does not take fails here.
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
from mmtensorar import recipe as module
from mmtensorar.backbones import llamagen, open_magvit2
from mmtensorar.checkpoints import model_folder
from mmtensorar.image_tokenizers import llamagen_vq, open_magvit2_lfq
from mmtensorar.recipe import Recipe
from mmtensorar.training import plan, run_log
from tests.backbones.test_llamagen import t5_folder  # noqa: F401
from tests.helpers.fakes import tiny_llamagen, write_tiny_janus

ROOT = Path(__file__).resolve().parents[1]
# A checkpoint's own recipe.yaml is the record of a run.
FILES = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if "weights" not in path.parts]
RECIPES = [path for path in FILES if module.recipe_class(module.read_settings(path)) is Recipe]
LARGE = [path for path in RECIPES if path.parent.name != "tiny"]
PLAIN = [path for path in LARGE if path.stem.endswith("_plain")]
SCALE = 4  # how much smaller the grids of codes are here


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


def test_the_only_other_kind_of_recipe_is_tested_with_its_own_entry():
    assert [name_of(path) for path in FILES if path not in RECIPES] == ["recipes/tiny/image_tokenizer.yaml"]


def test_every_row_of_the_papers_tables_is_there_with_its_control():
    """And of its ablations, of which exponential, K = 4 and depth 1 are LlamaGen-B's own recipe."""
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
    tuned = {path for path in LARGE if path not in PLAIN and path.parent.name != "ablations"}
    assert {path.with_stem(path.stem + "_plain") for path in tuned} == set(PLAIN)


@pytest.mark.parametrize("path", PLAIN, ids=name_of)
def test_a_control_differs_in_the_window_alone(path):
    """Else it would not tell TensorAR's effect from that of more training."""
    partner = Recipe.load(path.with_stem(path.stem.removesuffix("_plain")))
    control = Recipe.load(path)
    assert difference(control, partner) == {"run.name", "tensorar.window"} and control.tensorar.window == 1


def test_no_file_repeats_what_it_extends_and_no_two_runs_share_a_folder():
    for path in RECIPES:
        *bases, (_, stated) = module._with_bases(path)
        if bases:
            base = leaves(module._merge_all(bases))
            # Another module's section starts from nothing, so it may happen to say the same.
            replaced = {key for key in module.PACKAGES if "name" in stated.get(key, {})}
            repeated = {key for key, value in leaves(stated).items() if base.get(key) == value}
            assert not {key for key in repeated if key.partition(".")[0] not in replaced}, path
    folders = [Recipe.load(path).run_dir for path in RECIPES]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("path", LARGE, ids=name_of)
def test_a_header_says_what_to_run_where_and_what_the_paper_claims(path):
    header = path.read_text().split("\nrun:")[0].split("\nextends:")[0]
    assert f"\n#   deepspeed mmtensorar/train.py {name_of(path)}\n" in header
    assert (
        "\n# Aims at: " in header and "arXiv:2505.16324" in header and "Never run by this project" in header
    )
    num_gpus = int(re.search(r"\n# Hardware: .*?(\d+) GPUs?", header)[1])
    recipe = Recipe.load(path)
    assert recipe.data.batch_size % (num_gpus * recipe.train.grad_accum) == 0


@pytest.mark.parametrize("path", LARGE, ids=name_of)
def test_it_plans_without_any_file(path, tmp_path, monkeypatch):
    """The real sizes: a window or number of heads that the real backbone does not take fails here."""
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load(path)
    text = plan.report(recipe, activations=False)
    share = re.search(r"TensorAR .*\(\+(.*)%\)", text)[1]
    assert (float(share) > 0) == (recipe.tensorar.window > 1)


PLANNED = [path for path in LARGE if "\n# Planned: " in path.read_text()]


@pytest.mark.parametrize("path", PLANNED, ids=name_of)
def test_the_memory_in_a_header_is_what_the_plan_says(path):
    header = path.read_text()
    num_gpus = int(re.search(r"\n# Hardware: .*?(\d+) GPUs?", header)[1])
    recipe = Recipe.load(path)
    model = plan.shapes(recipe)
    largest = max(parameter.numel() for parameter in model.parameters())
    rows = plan.micro_batch(recipe, num_gpus)
    active = plan.activation_bytes(recipe, [rows])[rows]
    peak = plan.memory(recipe, plan.parameters(model), largest, active, num_gpus).peak / plan.GIB
    assert float(re.search(r"\n# Planned: ([\d.]+) GiB a GPU with activations", header)[1]) == pytest.approx(
        peak, abs=0.1
    )


def test_the_recipes_that_people_start_from_tell_their_memory():
    assert {path.stem for path in PLANNED} >= {"janus_pro_7b", "janus_pro_7b_qlora", "janus_pro_1b"}


# ---- one training step ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standins(tmp_path_factory, t5_folder) -> Path:  # noqa: F811
    """A folder in which every file that a recipe names is a small model of the same kind and layout."""
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
    """The tables of released sizes, with a narrow model for each; widths tell them apart, as the real ones do."""
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


def write_standin(section: module.Section, target: Path) -> None:
    torch.manual_seed(0)
    if target.parts[-2:] == ("runs", "tiny_start"):
        target.symlink_to(ROOT / "recipes/tiny/weights/base/backbone")
    elif "recipes/tiny" in str(target):
        target.symlink_to(ROOT / section.path)
    elif section.name in ("janus", "janus_vq"):
        write_tiny_janus(target, width=64)  # 4-bit matrices need that
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
        state = {open_magvit2.official_name(name): value for name, value in model.state_dict().items()}
        state |= {open_magvit2_lfq.INSIDE_AR + name: value for name, value in lfq.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 1}, target)


def llamagen_state(name: str) -> dict:
    """The tensors of the official file of that name."""
    kind, size, image_size = re.fullmatch(r"(c2i|t2i)_(B|L|XL|XXL|3B)_(?:stage\d_)?(\d+)\.pt", name).groups()
    dim, num_layers, num_heads = llamagen.SIZES[size]
    heads = dict(num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_heads)
    tokens = (int(image_size) // llamagen.PIXELS_PER_TOKEN) ** 2
    classes = dict(num_classes=1000) if kind == "c2i" else {}
    condition = {"c2i": "class", "t2i": "text"}[kind]
    model = tiny_llamagen(condition, dim=dim, vocab_size=32, num_tokens=tokens, **heads, **classes)
    return {llamagen.official_name(name): value for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def one_process():
    """A process group of this process alone, and everything put back that training sets for a whole process."""
    pytest.importorskip("deepspeed")
    from mmtensorar.training import engine

    environment, handlers = (
        dict(os.environ),
        {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)},
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    engine.stop_process_group()
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def shrunken(path: Path, out: Path, *changes: str) -> Recipe:
    """The recipe as it is, but for the number of steps and samples, and the pixels a side of small pictures."""
    recipe = Recipe.load(path)
    overrides = [f"run.out={out}", f"data.batch_size={2 * recipe.train.grad_accum}", "data.num_workers=0"]
    overrides += ["train.steps=1", "train.log_every=1", "train.sample_every=1"]
    if image_size := getattr(recipe.image_tokenizer, "image_size", None):
        # The small image tokenizer has 2 pixels a code.
        overrides.append(f"image_tokenizer.image_size={image_size * 2 // (SCALE * 16)}")
    if importlib.util.find_spec("ftfy") is None and hasattr(recipe.backbone, "caption_cleaning"):
        overrides.append("backbone.caption_cleaning=lower")
    return Recipe.load(path, [*overrides, *changes])


def write_shards_of(recipe: Recipe) -> None:
    from tests.training.test_train import write_shards

    shards = Path(recipe.data.shards)
    if not shards.exists():
        shards.parent.mkdir(parents=True, exist_ok=True)
        by_class = (
            recipe.backbone.name == "open_magvit2" or getattr(recipe.backbone, "condition", None) == "class"
        )
        captions = {"captions_of_shards": [["0", "7"], ["207", "999"]]} if by_class else {}
        write_shards(shards, image_tokenizers.load(recipe.image_tokenizer), **captions)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_one_real_training_step(path, standins, one_process, tmp_path, monkeypatch):
    from mmtensorar.train import train

    monkeypatch.chdir(standins)
    shrink_released(monkeypatch)
    recipe = shrunken(path, tmp_path)
    write_shards_of(recipe)
    if recipe.train.init_from is not None:  # the run that it goes on from
        before = shrunken(path, tmp_path, "train.init_from=null")
        model_folder.save(Path(recipe.train.init_from), model_folder.initial_model(before), before)
    assert "activations" in plan.report(recipe)
    train(recipe)
    (row,) = run_log.read_log(recipe.run_dir / "log.jsonl")
    assert len(row["loss_per_offset"]) == recipe.tensorar.window
    assert math.isfinite(row["loss"]) and row["grad_norm"] > 0
    assert (recipe.run_dir / "samples" / "step_1.png").is_file()
    assert model_folder.check_files(recipe.run_dir / "model")["step"] == 1


@pytest.mark.parametrize(
    "change, problem",
    [
        ("backbone.path=models/llamagen/c2i_L_256.pt", "backbone.size is B .*c2i_L_256.pt has width 64"),
        ("backbone.image_size=384", "c2i_B_256.pt is a checkpoint for 256 pixels"),
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
    """What the stand-ins are for: they are as particular as the released files."""
    from mmtensorar.train import train

    monkeypatch.chdir(standins)
    shrink_released(monkeypatch)
    path = ROOT / "recipes/llamagen/b_256.yaml"
    write_shards_of(shrunken(path, tmp_path))
    with pytest.raises(ValueError, match=problem):
        train(shrunken(path, tmp_path, change))
