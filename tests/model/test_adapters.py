"""train.parts: all, heads, lora and qlora train only their own parameters, and load to
the same outputs.
"""

import json
import shutil

import pytest
import torch

from mmtensorar import merge
from mmtensorar.checkpoints import model_folder
from mmtensorar.model import adapters
from mmtensorar.recipe import Recipe, RecipeError
from mmtensorar.training import plan
from tests.helpers.fakes import class_condition, tiny_llamagen, write_tiny_janus

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

PARTS = ["all", "heads", "lora", "qlora"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Starting weights of both kinds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapters")
    write_tiny_janus(folder / "janus", width=adapters.BLOCK)
    write_tiny_janus(folder / "narrow")
    tiny_llamagen(
        vocab_size=32, num_tokens=16, dim=adapters.BLOCK, ffn_dim=2 * adapters.BLOCK
    ).save_pretrained(folder / "llamagen")
    return folder


def make(bench, kind: str, **changes) -> Recipe:
    settings = {
        "run": {"name": "test", "out": str(bench / "runs")},
        "backbone": {"name": kind, "path": str(bench / kind)},
        "image_tokenizer": {"name": "janus_vq", "path": str(bench / "janus" / "vq")},
        "tensorar": {"window": 2, "num_heads": 2},
        "data": {"shards": "none", "batch_size": 4},
        "train": {"steps": 1, **changes},
        "lora": {"rank": 4},
    }
    path = bench / "recipe.yaml"
    path.write_text(json.dumps(settings))
    return Recipe.load(path, [])


def batch(recipe: Recipe, model):
    condition = class_condition(1, 2) if recipe.backbone.name == "llamagen" else None
    if condition is None:
        from mmtensorar import backbones

        condition = backbones.caption_encoder(recipe.backbone)(["a red circle", "a blue square"])
    codes = torch.randint(32, (2, model.backbone.num_tokens, 1), generator=torch.Generator().manual_seed(1))
    return codes, condition, torch.tensor([False, True])


def losses(model, inputs) -> torch.Tensor:
    # In train mode, because for inference on a CPU bitsandbytes rounds the NF4 scales
    # once more.
    with torch.no_grad():
        return model.train()(*inputs, torch.Generator().manual_seed(2)).loss_per_offset


def stepped(recipe: Recipe):
    """A model after three large steps, its state before them, and a batch."""
    model = model_folder.model_to_train(recipe).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = batch(recipe, model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(3):
        optimizer.zero_grad()
        model(*inputs, torch.Generator().manual_seed(2)).loss.backward()
        optimizer.step()
    return model, before, inputs


def save(recipe: Recipe, model, folder) -> None:
    if recipe.train.parts in adapters.WITH_ADAPTERS:
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        model_folder.save_adapters(folder, recipe, trained, step=3)
    else:
        model_folder.save(folder, model, recipe, step=3)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("kind", ["janus", "llamagen"])
def test_a_step_changes_what_is_trained_and_loads_to_the_same_outputs(bench, tmp_path, kind, parts):
    recipe = make(bench, kind, parts=parts, precision="fp32")
    model, before, inputs = stepped(recipe)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= trained and any(name.startswith("encoder.") for name in changed)
    assert (parts == "all") == any(
        ".layers." in name and name.startswith("backbone.") and ".lora_" not in name for name in changed
    )
    assert (parts in ("all", "heads")) == any(name.startswith("backbone.head.") for name in changed)
    assert (parts in ("lora", "qlora")) == any(".lora_B" in name for name in changed)
    save(recipe, model, tmp_path / "model")
    loaded = model_folder.load(tmp_path / "model").model
    assert not any(".lora_" in name for name, _ in loaded.named_parameters())
    torch.testing.assert_close(losses(loaded, inputs), losses(model, inputs), rtol=1e-4, atol=1e-5)
    assert (losses(loaded, inputs) - losses(model_folder.initial_model(recipe), inputs)).abs().max() > 1e-3


def test_folded_adapters_give_the_same_model_folder(bench, tmp_path, capsys):
    recipe = make(bench, "janus", parts="lora", precision="fp32")
    model, _, inputs = stepped(recipe)
    save(recipe, model, tmp_path / "model")
    size = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    whole = sum(path.stat().st_size for path in (bench / "janus").glob("*.safetensors"))
    assert size < whole / 2, "only adapters and codec"
    assert merge.main([str(tmp_path / "model"), str(tmp_path / "merged")]) == 0
    loaded = model_folder.load(tmp_path / "merged")
    torch.testing.assert_close(losses(loaded.model, inputs), losses(model, inputs), rtol=1e-4, atol=1e-5)
    assert loaded.recipe.train.parts == "all" and model_folder.read_index(tmp_path / "merged")["step"] == 3
    assert merge.main([str(tmp_path / "merged"), str(tmp_path / "twice")]) == 2
    assert "has no adapters.safetensors" in capsys.readouterr().err
    start = make(bench, "janus", init_from=str(tmp_path / "merged"), precision="fp32")
    torch.testing.assert_close(
        losses(model_folder.initial_model(start), inputs), losses(model, inputs), rtol=1e-4, atol=1e-5
    )


def test_adapters_are_for_one_backbone_only(bench, tmp_path):
    shutil.copytree(bench / "janus", tmp_path / "janus")
    recipe = make(bench, "janus", parts="lora")
    recipe = recipe.model_copy(
        update={"backbone": recipe.backbone.model_copy(update={"path": str(tmp_path / "janus")})}
    )
    model = model_folder.model_to_train(recipe)
    save(recipe, model, tmp_path / "model")
    with pytest.raises(ValueError, match="train.init_from: "):
        model_folder.initial_model(make(bench, "janus", init_from=str(tmp_path / "model")))
    content = bytearray((tmp_path / "janus" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "janus" / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="adapters"):
        model_folder.load(tmp_path / "model")


def test_four_bits_are_counted_and_take_a_quarter(bench):
    full, small = (plan.meta_model(make(bench, "janus", parts=parts)) for parts in ("lora", "qlora"))
    assert plan.parameters(full)["four_bit"] == 0 < plan.parameters(small)["four_bit"]
    assert (
        plan.parameters(full)["trainable"]
        == plan.parameters(small)["trainable"]
        < plan.parameters(full)["backbone"]
    )
    weights = [
        plan.memory(make(bench, "janus", parts="lora"), {**EMPTY, "four_bit": number}, 0, 0, 1).weights
        for number in (0, 6400)
    ]
    assert weights == [2 * 6400, 3301.5625]


EMPTY = {"backbone": 6400, "tensorar": 0, "trainable": 0}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"freeze": ["no_such_thing"]},
            "train.freeze: 'no_such_thing' matches no parameter",
        ),
        ({"freeze": ["."]}, "leave nothing to train"),
    ],
)
def test_settings_that_leave_nothing_to_train_are_refused(bench, changes, problem):
    with pytest.raises(ValueError, match=problem):
        model_folder.model_to_train(make(bench, "janus", **changes))


def test_freeze_applies_on_top_of_parts(bench):
    model = model_folder.model_to_train(make(bench, "janus", parts="heads", freeze=[r"^encoder\."]))
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"decoder", "backbone"}


def test_conflicting_settings_of_adapters_are_refused(bench):
    make(bench, "janus")
    for changes, problem in (
        (["train.parts=qlora", "zero.stage=3"], "train.parts"),
        (["train.freeze=['(']"], r"'\('"),
    ):
        with pytest.raises(RecipeError, match=problem):
            Recipe.load(bench / "recipe.yaml", changes)
    recipe = Recipe.load(bench / "recipe.yaml", ["train.parts=lora", "lora.targets=nothing"])
    narrow = Recipe.load(bench / "recipe.yaml", ["train.parts=qlora", f"backbone.path={bench / 'narrow'}"])
    with pytest.raises(ValueError, match="q_proj .*multiple of 64"):
        model_folder.model_to_train(narrow)
    with pytest.raises(ValueError, match="lora.targets 'nothing' matches no matrix"):
        model_folder.model_to_train(recipe)
