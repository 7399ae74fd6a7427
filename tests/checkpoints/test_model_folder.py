"""Consolidated checkpoints: what is saved loads again, and a broken folder is named in
one sentence.
"""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mmtensorar import backbones
from mmtensorar.checkpoints import model_folder, released
from mmtensorar.recipe import Recipe
from tests.helpers import fakes
from tests.helpers.fakes import write_tiny_janus


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tiny_janus(folder / "janus")
    return folder


def make(bench, window: int, *, num_heads: int = 2, **train) -> Recipe:
    recipe = {
        "run": {"name": "test", "out": str(bench / "runs")},
        "backbone": {"name": "janus", "path": str(bench / "janus")},
        "image_tokenizer": {"name": "janus_vq", "path": str(bench / "janus" / "vq")},
        "tensorar": {"window": window, "num_heads": num_heads},
        "data": {"shards": "none", "batch_size": 4},
        "train": {"steps": 1, **train},
    }
    (bench / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return Recipe.load(bench / "recipe.yaml", [])


@pytest.fixture(scope="module")
def saved(bench):
    """A window-3 checkpoint with a codec that is not fresh, and the weights that it
    must hold.
    """
    recipe = make(bench, 3)
    model = model_folder.initial_model(recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.01)
    model_folder.save_state_dict(bench / "model", model.state_dict(), recipe, step=7)
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_round_trip(bench, saved):
    loaded = model_folder.load(bench / "model")
    assert equal(loaded.model.state_dict(), saved)
    assert not loaded.model.training
    assert loaded.recipe.tensorar.window == 3
    assert model_folder.read_index(bench / "model")["step"] == 7
    assert loaded.caption_encoder(["a red circle"]).values.shape[0] == 1
    assert loaded.image_tokenizer.grid == (4, 4)


def test_saving_again_replaces(bench, saved):
    model = model_folder.load(bench / "model").model
    model_folder.save(bench / "again", model, make(bench, 3), step=1)
    model_folder.save(bench / "again", model, make(bench, 3), step=2)
    assert model_folder.check_files(bench / "again")["step"] == 2
    assert not [path for path in bench.iterdir() if path.suffix in (".partial", ".old")]


def test_window_1_has_no_codec_file(bench, saved):
    recipe = make(bench, 1, init_from=str(bench / "model"))
    model = model_folder.initial_model(recipe)
    model_folder.save(bench / "plain", model, recipe)
    assert not (bench / "plain" / model_folder.CODEC).exists()
    assert equal(model_folder.load(bench / "plain").model.backbone.state_dict(), model.backbone.state_dict())


def test_init_from_takes_the_codec_only_when_it_fits(bench, saved):
    same = model_folder.initial_model(make(bench, 3, init_from=str(bench / "model")))
    assert equal(same.state_dict(), saved)
    # The number of heads changes no shape: the saved codec would load, and compute
    # something else.
    for window, num_heads in (4, 2), (3, 4):
        other = model_folder.initial_model(
            make(bench, window, num_heads=num_heads, init_from=str(bench / "model"))
        )
        fresh = model_folder.initial_model(make(bench, window, num_heads=num_heads))
        assert equal(
            model_folder.codec_state(other.state_dict()), model_folder.codec_state(fresh.state_dict())
        )
        assert equal(other.backbone.state_dict(), same.backbone.state_dict()), (
            "it comes from the checkpoint either way"
        )


def test_init_from_needs_nothing_else(bench, saved):
    """It once needed the original's files too, and compared names and shapes only with
    those.
    """
    recipe = make(bench, 3, init_from=str(bench / "model"))
    gone = recipe.model_copy(
        update={"backbone": recipe.backbone.model_copy(update={"path": str(bench / "gone")})}
    )
    assert equal(model_folder.initial_model(gone).state_dict(), saved)
    started = model_folder.starting(gone)
    assert Path(started.backbone.path) == bench / "model" / "backbone"
    assert model_folder.starting(started) == started, "a continued run reads this recipe and compares"
    assert model_folder.starting(make(bench, 3)) == make(bench, 3)
    with pytest.raises(ValueError, match=r"no model folder at .*gone: expected checkpoint\.json"):
        model_folder.starting(make(bench, 3, init_from=str(bench / "gone")))


def test_init_from_a_damaged_folder_is_refused(bench, saved, tmp_path):
    """Otherwise a training run of days would start from damaged weights."""
    shutil.copytree(bench / "model", tmp_path / "model")
    damage(tmp_path / "model" / "backbone" / "model.safetensors")
    with pytest.raises(ValueError, match=r"backbone/model\.safetensors is damaged"):
        model_folder.initial_model(make(bench, 3, init_from=str(tmp_path / "model")))


def test_attention_is_chosen_where_the_model_is_loaded(bench, saved, monkeypatch):
    """It is not chosen by the recipe, which was made on another machine.

    flash-attn in float32 is refused before the weights are read.
    """
    eager = model_folder.load(bench / "model", attn_implementation="eager")
    assert eager.recipe.backbone.attn_implementation == "eager"
    assert eager.model.backbone.attn_implementation == "eager"
    with pytest.raises(
        ValueError, match="attn_implementation is flash_attention_2, but flash-attn is not usable here"
    ):
        model_folder.load(bench / "model", attn_implementation="flash_attention_2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "there")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"computes in bf16 or fp16, not in torch\.float32"):
        model_folder.load(bench / "model", attn_implementation="flash_attention_2")


def test_a_saved_backbone_keeps_its_text_tokenizer(bench, saved):
    captions = ["a red circle", "a blue square"]
    before = backbones.caption_encoder(make(bench, 3).backbone)(captions)
    after = model_folder.load(bench / "model").caption_encoder(captions)
    assert all(map(torch.equal, before, after))
    assert not torch.equal(after.values[0], after.values[1]), "the words are known"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no model folder at .*nowhere: expected checkpoint\.json"):
        model_folder.load(tmp_path / "nowhere")


def test_a_damaged_file_is_named(bench, saved, tmp_path):
    shutil.copytree(bench / "model", tmp_path / "model")
    path = tmp_path / "model" / model_folder.CODEC
    damage(path)
    with pytest.raises(ValueError, match="tensorar.safetensors is damaged"):
        model_folder.load(tmp_path / "model")
    path.unlink()
    with pytest.raises(ValueError, match="tensorar.safetensors is missing"):
        model_folder.load(tmp_path / "model")


def test_another_format_is_refused(tmp_path):
    (tmp_path / model_folder.INDEX).write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match=r"checkpoint\.json: .*format 99, expected 1"):
        model_folder.load(tmp_path)


def test_a_folder_that_is_not_a_model_folder_is_not_replaced(bench, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not a model folder"):
        model_folder.save_state_dict(tmp_path, {}, make(bench, 3))
    assert (tmp_path / "thesis.txt").is_file()


@pytest.mark.launch
def test_loading_needs_no_deepspeed():
    """Generation must work where DeepSpeed is not installed."""
    code = "import sys, mmtensorar.checkpoints.model_folder; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "settings", [{}, {"parts": "lora"}, {"init_from": "saved"}, {"freeze": [r"layers\.0"]}]
)
def test_a_model_read_tensor_by_tensor_equals_one_read_whole(bench, saved, settings):
    """This is how ZeRO-3 reads a model.

    The modules have no values; every tensor is read from the files when it is needed;
    buffers that no file has exist.
    """
    if "init_from" in settings:
        settings = {"init_from": str(bench / "model")}
    recipe = make(bench, 3, **settings)
    whole, skeleton, value_of = (
        model_folder.model_to_train(recipe),
        model_folder.skeleton(recipe),
        model_folder.initial_values(recipe),
    )
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert equal({name: value_of(name) for name in skeleton.state_dict()}, whole.state_dict())
    assert equal(dict(skeleton.named_buffers()), dict(whole.named_buffers())) and len(list(whole.buffers()))
    assert [p.requires_grad for p in skeleton.parameters()] == [p.requires_grad for p in whole.parameters()]


@pytest.mark.parametrize("name", ["llamagen", "open_magvit2"])
def test_the_other_backbones_are_read_tensor_by_tensor_too(tmp_path, name):
    backbone = fakes.tiny_llamagen("text") if name == "llamagen" else fakes.tiny_open_magvit2()
    backbone.save_pretrained(tmp_path / "backbone")
    module = importlib.import_module(f"mmtensorar.backbones.{name}")
    section = module.Config(name=name, path=str(tmp_path / "backbone"))
    whole, unread = backbones.load(section), backbones.lazy_weights(section)
    with released.meta_parameters():
        skeleton = backbones.load(section, weights=False)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert equal({key: unread.value(key) for key in skeleton.state_dict()}, whole.state_dict())
