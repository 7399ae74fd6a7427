"""Conversion: released files become folders that generate the same tokens and convert
back bit for bit.

Wrong files are named.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmtensorar import (
    backbones,
    convert,
    generate,
    image_tokenizers,
)
from mmtensorar.backbones import janus, llamagen, open_magvit2
from mmtensorar.checkpoints import janus_deepseek, model_folder
from mmtensorar.checkpoints import released as weights
from mmtensorar.image_tokenizers import janus_vq, llamagen_vq, open_magvit2_lfq
from mmtensorar.model import tensorar
from mmtensorar.model.drafts import FixedSchedule
from mmtensorar.model.tensorar import TensorAR
from mmtensorar.recipe import Recipe, SamplerSettings
from mmtensorar.sampling import noise
from mmtensorar.sampling.decode import decode
from tests.helpers.fakes import (
    class_condition,
    llamagen_condition,
    tiny_llamagen,
    tiny_open_magvit2,
    write_tiny_janus,
)


@pytest.fixture(autouse=True)
def released(monkeypatch):
    """Tiny models in place of the released ones, whose sizes cannot be read from a file
    alone.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setitem(llamagen.SIZES, "B", (16, 2, 2))
    monkeypatch.setitem(open_magvit2.RELEASED, "B", tiny_open_magvit2(side=4).config)
    lfq = open_magvit2_lfq.Architecture(
        ch=32, ch_mult=(1, 1), num_res_blocks=1, factorized_bits=(2, 3), image_size=8
    )
    monkeypatch.setitem(open_magvit2_lfq.RELEASED, 2, lfq)


def run(*arguments) -> int:
    return convert.main([str(argument) for argument in arguments])


def refused(capsys, *arguments) -> str:
    """The error of a conversion that fails: one sentence, exit code 2, and nothing is
    written.
    """
    capsys.readouterr()
    assert run(*arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def greedy(model, condition, cfg_scale=2.0) -> Tensor:
    with torch.no_grad():
        return decode(model.eval(), condition, SamplerSettings(cfg_scale=cfg_scale), draw=noise.greedy).codes


def plain(backbone) -> TensorAR:
    return TensorAR(backbone, None, None, FixedSchedule("none"), offset_weights=[1.0])


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def state(path: Path, *keys: str) -> dict[str, Tensor]:
    content = torch.load(path, weights_only=True)
    for key in keys:
        content = content[key]
    return content


# ---- sources -------------------------------------------------------------------------------------


def write_vq(path: Path, codebook_size: int = 11, levels: int = 5) -> llamagen_vq.LlamaGenVQ:
    """A LlamaGen VQ file: averaged weights, raw weights, and the usage record of the
    codes.
    """
    sizes = dict(codebook_size=codebook_size, code_dim=4, ch=32, num_res_blocks=1, z_channels=8)
    mult = dict(encoder_ch_mult=[1] * levels, decoder_ch_mult=[1] * levels)
    vq = llamagen_vq.LlamaGenVQ(llamagen_vq.VQModel(llamagen_vq.Architecture(**sizes, **mult)), 64)
    tensors = vq.model.state_dict() | {llamagen_vq.USAGE: torch.zeros(65536)}
    torch.save(
        {"ema": tensors, "model": {n: torch.zeros_like(v) for n, v in tensors.items()}, "steps": 3}, path
    )
    return vq


def write_llamagen(
    path: Path, condition: str = "class", dtype=torch.float32, **changes: Tensor | None
) -> None:
    backbone = tiny_llamagen(condition, num_tokens=16, num_kv_heads=2)
    tensors = {
        llamagen.LlamaGenBackbone.official_name(name): value.to(dtype)
        for name, value in backbone.state_dict().items()
    }
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    tensors = {name: value for name, value in tensors.items() if value is not None}
    torch.save({"model": tensors, "optimizer": {"state": {}, "param_groups": []}, "steps": 7}, path)


def write_open_magvit2(path: Path, inside: bool = True) -> None:
    """An Open-MAGVIT2 file as Lightning saves it."""
    tensors = {
        open_magvit2.OpenMagvit2Backbone.official_name(n): v
        for n, v in tiny_open_magvit2(side=4).state_dict().items()
    }
    if inside:
        lfq = open_magvit2_lfq.LFQ(open_magvit2_lfq.RELEASED[2])
        tensors |= {open_magvit2_lfq.INSIDE_AR + name: value for name, value in lfq.state_dict().items()}
    torch.save({"state_dict": tensors, "epoch": 3, "global_step": 9}, path)


def write_deepseek(hub: Path, folder: Path) -> dict[str, Tensor]:
    """Convert the Janus of a folder from transformers' layout to DeepSeek's: two .bin
    files with an index.
    """
    source = load_file(hub / "model.safetensors")
    section = janus.Config(name="janus", path=str(hub))
    back = {
        janus.transformers_name(n): janus_deepseek.backbone_name(n)
        for n in backbones.lazy_weights(section).model.state_dict()
    }
    names = {}
    for name in source:
        if name.startswith(janus_vq.INSIDE_JANUS):
            names[name] = janus_deepseek.vq_name(name.removeprefix(janus_vq.INSIDE_JANUS))
        else:
            names[name] = back.get(name, name.removeprefix("model."))
    tensors = {names[name]: value for name, value in source.items()}
    folder.mkdir()
    parts = {"pytorch_model-1.bin": sorted(tensors)[::2], "pytorch_model-2.bin": sorted(tensors)[1::2]}
    for file, here in parts.items():
        torch.save({name: tensors[name] for name in here}, folder / file)
    index = {"weight_map": {name: file for file, here in parts.items() for name in here}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config = json.loads((hub / "config.json").read_text())
    vq = config["vq_config"]
    settings = {
        "model_type": janus_deepseek.MODEL_TYPE,
        "torch_dtype": "float32",
        "language_config": config["text_config"],
        "vision_config": {"params": {"image_size": config["vision_config"]["image_size"] // 2}},
        "gen_vision_config": {
            "params": {"image_token_size": vq["num_embeddings"], "n_embed": vq["embed_dim"]}
        },
        "gen_aligner_config": {"params": {"n_embed": vq["projection_dim"], "depth": vq["num_hidden_layers"]}},
        "gen_head_config": {
            "params": {"n_embed": vq["image_token_embed_dim"], "image_token_embed": vq["projection_dim"]}
        },
    }
    (folder / "config.json").write_text(json.dumps(settings))
    for file in hub.glob("tokenizer*"):
        shutil.copy(file, folder)
    return tensors


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A complete tiny Janus in transformers' layout."""
    folder = tmp_path_factory.mktemp("hub") / "janus"
    write_tiny_janus(folder)
    return folder


# ---- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", ["class", "text"])
def test_llamagen_there_and_back(condition, tmp_path):
    """The folder generates what the file generates, records its source, and converts
    back bit for bit.
    """
    source, vq_file, folder = tmp_path / "gpt.pt", tmp_path / "vq.pt", tmp_path / "out" / "model"
    write_llamagen(source, condition)
    vq = write_vq(vq_file)
    cleaning = ("--caption-cleaning", "lower") if condition == "text" else ()
    assert run(source, folder, "--image-tokenizer", vq_file, "--image-size", 64, *cleaning) == 0
    loaded = model_folder.load(folder)
    direct = backbones.load(llamagen.Config(name="llamagen", path=str(source), image_size=64))
    given = llamagen_condition(direct)
    assert torch.equal(greedy(loaded.model, given), greedy(plain(direct), given))
    assert loaded.model.window == 1 and loaded.image_tokenizer.weight_hash == vq.weight_hash
    assert loaded.image_tokenizer.grid == (4, 4)
    assert loaded.recipe.sampler.cfg_scale == (4.0 if condition == "class" else 7.5)
    record = json.loads((folder / "source.json").read_text())
    assert record["backbone"] == {
        "kind": "llamagen",
        "path": str(source),
        "sha256": {"gpt.pt": sha256(source)},
    }
    assert record["image_tokenizer"]["sha256"] == {"vq.pt": sha256(vq_file)}
    assert run("--original", folder, tmp_path / "back.pt") == 0
    assert equal(state(tmp_path / "back.pt", "model"), state(source, "model"))
    assert run("--original", folder / "image_tokenizer", tmp_path / "vq_back.pt") == 0
    expected = state(vq_file, "ema")
    del expected[llamagen_vq.USAGE]
    assert equal(state(tmp_path / "vq_back.pt", "model"), expected)
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".partial"]
    # A run that starts from the folder is refused for its image size, not for the shape
    # of a tensor.
    settings = [f"train.init_from={folder}", "backbone.image_size=128"]
    with pytest.raises(ValueError, match="image_size is 128, but .*backbone is for 64 pixels"):
        model_folder.initial_model(Recipe.load(folder / "recipe.yaml", settings))


def test_open_magvit2_there_and_back(tmp_path):
    """One file holds backbone and image tokenizer, and so does the file that is written
    back.
    """
    source, folder = tmp_path / "ar.ckpt", tmp_path / "model"
    write_open_magvit2(source)
    assert run(source, folder) == 0
    loaded = model_folder.load(folder)
    direct = backbones.load(open_magvit2.Config(name="open_magvit2", path=str(source)))
    assert torch.equal(
        greedy(loaded.model, class_condition(0, 3)), greedy(plain(direct), class_condition(0, 3))
    )
    inside = image_tokenizers.load(open_magvit2_lfq.Config(name="open_magvit2_lfq", path=str(source)))
    assert loaded.image_tokenizer.weight_hash == inside.weight_hash
    assert run("--original", folder, tmp_path / "back.ckpt") == 0
    assert equal(state(tmp_path / "back.ckpt", "state_dict"), state(source, "state_dict"))
    # A run can start from the folder.
    settings = [f"train.init_from={folder}", "tensorar.window=3", "tensorar.num_heads=2"]
    started = model_folder.initial_model(Recipe.load(folder / "recipe.yaml", settings))
    assert started.window == 3 and equal(started.backbone.state_dict(), direct.state_dict())
    # The image tokenizer alone, from the same file and back.
    assert run(source, tmp_path / "lfq", "--kind", "open_magvit2_lfq") == 0
    assert run("--original", tmp_path / "lfq", tmp_path / "lfq.ckpt") == 0
    assert equal(state(tmp_path / "lfq.ckpt", "state_dict"), dict(inside.state_dict()))


def test_an_image_tokenizer_is_converted_without_a_backbone(hub, tmp_path):
    """Image tokenizers are recognised by their tensors; image_tokenizers.load accepts
    the folder.
    """
    lfq = open_magvit2_lfq.LFQ(open_magvit2_lfq.RELEASED[2])
    torch.save({"state_dict": lfq.state_dict() | {"loss.logvar": torch.zeros(1)}}, tmp_path / "lfq.ckpt")
    vq = write_vq(tmp_path / "vq.pt")
    cases = [
        (tmp_path / "lfq.ckpt", "open_magvit2_lfq", lfq.weight_hash, ()),
        (tmp_path / "vq.pt", "llamagen_vq", vq.weight_hash, ("--image-size", 64)),
        (hub / "vq", "janus_vq", None, ()),
        (hub, "janus_vq", None, ("--kind", "janus_vq")),
    ]
    hashes = []
    for number, (source, kind, weight_hash, options) in enumerate(cases):
        folder = tmp_path / str(number)
        assert run(source, folder, *options) == 0
        loaded = image_tokenizers.load(image_tokenizers.section({"name": kind, "path": str(folder)}))
        assert weight_hash in (None, loaded.weight_hash)
        hashes.append(loaded.weight_hash)
        assert json.loads((folder / "source.json").read_text())["image_tokenizer"]["kind"] == kind
    assert hashes[2] == hashes[3]


def test_values_keep_their_stored_dtype_and_weights_are_split_into_files(monkeypatch, tmp_path):
    """A bf16 model is not expanded to float32, and at most one shard of it is in
    memory.
    """
    monkeypatch.setattr(weights, "SHARD_BYTES", 2000)
    write_llamagen(tmp_path / "c2i_B_64.pt", dtype=torch.bfloat16)
    assert (
        run(tmp_path / "c2i_B_64.pt", tmp_path / "model") == 0
    )  # the image size follows from the official name
    files = sorted((tmp_path / "model" / "backbone").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(sum(v.nbytes for v in load_file(file).values()) <= 2000 for file in files)
    assert run("--original", tmp_path / "model", tmp_path / "back.pt") == 0
    assert equal(state(tmp_path / "back.pt", "model"), state(tmp_path / "c2i_B_64.pt", "model"))


def test_without_an_image_tokenizer_a_model_gives_codes_but_no_images(tmp_path, capsys):
    write_llamagen(tmp_path / "gpt.pt")
    assert run(tmp_path / "gpt.pt", tmp_path / "model", "--image-size", 64) == 0
    assert "without image tokenizer" in capsys.readouterr().out
    loaded = model_folder.load(tmp_path / "model")
    assert loaded.image_tokenizer is None
    assert greedy(loaded.model, loaded.caption_encoder(["3"])).shape == (1, 16, 1)
    options = ["--ckpt", str(tmp_path / "model"), "--prompt", "3", "--out", str(tmp_path / "out")]
    assert generate.main(options) == 2
    assert "no image tokenizer: convert it again, with --image-tokenizer" in capsys.readouterr().err


# ---- Janus ---------------------------------------------------------------------------------------


def with_transformers(folder: Path, condition, tokens: int) -> Tensor:
    """Greedy image tokens from transformers alone, at guidance 5."""
    from transformers import JanusForConditionalGeneration

    model = JanusForConditionalGeneration.from_pretrained(folder).eval()
    settings = model.generation_config
    settings.generation_kwargs = {"boi_token_id": 4}
    settings.bos_token_id, settings.pad_token_id = 2, 1
    values, mask = condition
    with torch.no_grad():
        found = model.generate(
            input_ids=values,
            attention_mask=mask.long(),
            generation_mode="image",
            guidance_scale=5.0,
            do_sample=False,
        )
    return found[:, :tokens]


def trained(folder: Path, target: Path, dtype=torch.float32) -> TensorAR:
    """The checkpoint of a folder after some training, saved as train.py saves it."""
    loaded = model_folder.load(folder)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
            parameter.copy_(parameter.to(dtype))
    recipe = Recipe.load(folder / "recipe.yaml")
    model_folder.save(target, loaded.model, recipe, step=5)
    return loaded.model


def test_janus_goes_back_to_transformers(hub, tmp_path):
    """Plain transformers generates the trained model's tokens.

    Parts that were not trained equal the original bit for bit.
    """
    assert run(hub, tmp_path / "model") == 0
    loaded = model_folder.load(tmp_path / "model")
    direct = backbones.load(janus.Config(name="janus", path=str(hub)))
    condition = loaded.caption_encoder(["a red circle", "a blue square"])
    assert torch.equal(greedy(loaded.model, condition, 5.0), greedy(plain(direct), condition, 5.0))
    assert run("--original", tmp_path / "model", tmp_path / "same") == 0
    before = load_file(hub / "model.safetensors")
    assert equal(load_file(tmp_path / "same" / "model.safetensors"), before)

    model = trained(tmp_path / "model", tmp_path / "trained")
    assert run("--original", tmp_path / "trained", tmp_path / "back") == 0
    ours = greedy(model, condition, 5.0)[..., 0]
    assert torch.equal(with_transformers(tmp_path / "back", condition, 16), ours)
    assert not torch.equal(greedy(plain(direct), condition, 5.0)[..., 0], ours)
    after = load_file(tmp_path / "back" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    untrained = ("model.vision_model.", "model.aligner.", "model.vqmodel.")
    assert not [name for name in changed if name.startswith(untrained)]
    assert (tmp_path / "back" / "tokenizer.json").is_file()


@pytest.mark.parametrize("exact", [True, False])
def test_a_bf16_janus_stays_bf16_where_that_loses_nothing(hub, exact, tmp_path):
    """Otherwise its config says float32: transformers would round the trained weights
    back to bf16.
    """
    half = tmp_path / "half"
    shutil.copytree(hub, half)
    tensors = {name: value.bfloat16() for name, value in load_file(hub / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors", {"format": "pt"})
    config = json.loads((half / "config.json").read_text()) | {"dtype": "bfloat16"}
    (half / "config.json").write_text(json.dumps(config))
    assert run(half, tmp_path / "model") == 0
    stored = load_file(tmp_path / "model" / "backbone" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    trained(tmp_path / "model", tmp_path / "trained", torch.bfloat16 if exact else torch.float32)
    assert run("--original", tmp_path / "trained", tmp_path / "back") == 0
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found["model.language_model.norm.weight"].dtype == (torch.bfloat16 if exact else torch.float32)
    tower = [name for name in tensors if name.startswith("model.vision_model.")]
    assert tower and all(torch.equal(found[name], tensors[name]) for name in tower)
    dtype = json.loads((tmp_path / "back" / "config.json").read_text())["dtype"]
    assert dtype == ("bfloat16" if exact else "float32")


def test_both_layouts_of_janus_give_the_same_model_folder(hub, tmp_path):
    """Converting back restores the layout of the source."""
    tensors = write_deepseek(hub, tmp_path / "deepseek")
    assert run(hub, tmp_path / "a") == run(tmp_path / "deepseek", tmp_path / "b") == 0
    for part in ("backbone", "image_tokenizer"):
        files = [tmp_path / name / part / "model.safetensors" for name in "ab"]
        assert equal(*map(load_file, files))
    record = json.loads((tmp_path / "b" / "source.json").read_text())["backbone"]["sha256"]
    assert record.keys() == {"pytorch_model-1.bin", "pytorch_model-2.bin", "config.json"}
    assert run("--original", tmp_path / "b", tmp_path / "back") == 0
    assert equal(load_file(tmp_path / "back" / "model.safetensors"), tensors)
    assert (
        json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == janus_deepseek.MODEL_TYPE
    )


def test_generate_reads_a_converted_folder(hub, tmp_path):
    assert run(hub, tmp_path / "model") == 0
    options = ["--ckpt", str(tmp_path / "model"), "--prompt", "a red circle", "--out", str(tmp_path / "out")]
    assert generate.main(options) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
    # Our own parts can be converted too: a backbone without an image tokenizer, or with
    # one given separately.
    parts = tmp_path / "model"
    assert run(parts / "backbone", tmp_path / "again", "--image-tokenizer", parts / "image_tokenizer") == 0
    assert equal(
        model_folder.load(tmp_path / "again").model.state_dict(), model_folder.load(parts).model.state_dict()
    )
    assert run(parts / "backbone", tmp_path / "alone") == 0
    assert model_folder.load(tmp_path / "alone").image_tokenizer is None


def test_converting_janus_back_needs_the_original_folder(hub, tmp_path, capsys):
    """No checkpoint holds the vision tower, so the original must be available, with the
    weights that the model started from.
    """
    shutil.copytree(hub, tmp_path / "moved")
    assert run(tmp_path / "moved", tmp_path / "model") == 0
    # Trained from the converted folder's backbone: its recipe leads back to the
    # original.
    recipe = Recipe.load(tmp_path / "model" / "recipe.yaml")
    section = recipe.backbone.model_copy(update={"path": str(tmp_path / "model" / "backbone")})
    model = model_folder.load(tmp_path / "model").model
    model_folder.save(tmp_path / "next", model, recipe.model_copy(update={"backbone": section}))
    assert run("--original", tmp_path / "next", tmp_path / "back") == 0
    shutil.rmtree(tmp_path / "moved")
    error = refused(capsys, "--original", tmp_path / "next", tmp_path / "x")
    assert "moved; give the original Janus as --base" in error
    backbone = tmp_path / "model" / "backbone"
    error = refused(capsys, "--original", tmp_path / "next", tmp_path / "x", "--base", backbone)
    assert "has no vision tower" in error
    other = tmp_path / "other"
    write_tiny_janus(other, num_codes=33)
    error = refused(capsys, "--original", tmp_path / "next", tmp_path / "x", "--base", other)
    assert "is not what" in error and "has shape [33, 8] there, expected [32, 8]" in error
    assert run("--original", tmp_path / "next", tmp_path / "x", "--base", hub) == 0


# ---- windows -------------------------------------------------------------------------------------


def test_a_window_above_1_converts_back_only_with_the_option_that_drops_it(tmp_path, capsys):
    write_open_magvit2(tmp_path / "ar.ckpt")
    assert run(tmp_path / "ar.ckpt", tmp_path / "model") == 0
    recipe = Recipe.load(tmp_path / "model" / "recipe.yaml", ["tensorar.window=3", "tensorar.num_heads=2"])
    model = tensorar.build(model_folder.load(tmp_path / "model").model.backbone, recipe.tensorar)
    model_folder.save(tmp_path / "window", model, recipe)
    error = refused(capsys, "--original", tmp_path / "window", tmp_path / "back.ckpt")
    assert "has tensorar.window 3" in error and "--drop-tensorar" in error
    assert run("--original", tmp_path / "window", tmp_path / "back.ckpt", "--drop-tensorar") == 0
    assert "without the window encoder and decoder" in capsys.readouterr().out
    assert equal(state(tmp_path / "back.ckpt", "state_dict"), state(tmp_path / "ar.ckpt", "state_dict"))


# ---- refusals ------------------------------------------------------------------------------------


def test_wrong_files_are_refused_by_name(tmp_path, capsys):
    source, folder, size = tmp_path / "gpt.pt", tmp_path / "model", ("--image-size", 64)
    extra = {f"extra__{number:02d}": torch.zeros(1) for number in range(12)}
    write_llamagen(source, norm__weight=None, **extra)
    error = refused(capsys, source, folder, *size)
    assert "gpt.pt: 1 tensor is missing, norm.weight; 12 tensors are unexpected, among them extra.00" in error
    assert error.endswith("extra.09")
    write_llamagen(source, norm__weight=torch.ones(8))
    assert "norm.weight has shape [8], expected [16]" in refused(capsys, source, folder, *size)
    write_llamagen(source)
    assert "backbone.image_size: " in refused(capsys, source, folder)
    source.rename(tmp_path / "c2i_B_256.pt")
    error = refused(capsys, tmp_path / "c2i_B_256.pt", folder, "--image-size", 384)
    assert "backbone.image_size is 384" in error and "256 pixels" in error
    torch.save({"conv.weight": torch.zeros(1)}, source)
    error = refused(capsys, source, folder)
    assert "no known model (conv.weight)" in error
    assert "--kind (janus, llamagen, open_magvit2, janus_vq, llamagen_vq, open_magvit2_lfq)" in error
    assert "not a LlamaGen GPT" in refused(capsys, source, folder, "--kind", "llamagen", *size)
    assert "no file" in refused(capsys, tmp_path / "absent.pt", folder)
    assert not folder.exists() and not list(tmp_path.glob("*.partial"))


def test_an_image_tokenizer_of_another_backbone_is_refused(hub, tmp_path, capsys):
    """The mismatch shows in the number of codes or the size of the codebook, and where
    both agree in the official name.
    """
    write_llamagen(tmp_path / "gpt.pt")
    write_vq(tmp_path / "vq_ds16_c2i.pt", levels=4)
    write_vq(tmp_path / "large.pt", codebook_size=12)
    write_vq(tmp_path / "vq_ds16_t2i.pt")

    def given(tokenizer: Path) -> str:
        return refused(
            capsys, tmp_path / "gpt.pt", tmp_path / "m", "--image-size", 64, "--image-tokenizer", tokenizer
        )

    error = given(tmp_path / "vq_ds16_c2i.pt")
    assert "makes 64 codes an image out of 11, the backbone predicts 16 codes an image out of 11" in error
    assert "makes 16 codes an image out of 12" in given(tmp_path / "large.pt")
    assert "for text-conditional models, the backbone is class-" in given(tmp_path / "vq_ds16_t2i.pt")
    # The folder that the file is converted to records the name.
    assert run(tmp_path / "vq_ds16_t2i.pt", tmp_path / "vq", "--image-size", 64) == 0
    assert "for text-conditional models, the backbone is class-" in given(tmp_path / "vq")
    assert "gpt.pt is a llamagen backbone" in given(tmp_path / "gpt.pt")
    error = refused(capsys, hub / "vq", tmp_path / "m", "--image-tokenizer", tmp_path / "large.pt")
    assert "--image-tokenizer" in error and "itself an image tokenizer" in error


def test_a_pickle_cannot_run_code(tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model": Trap()}, tmp_path / "trap.pt")
    error = refused(capsys, tmp_path / "trap.pt", tmp_path / "model")
    assert "trap.pt: cannot be read as PyTorch weights" in error and "weights_only" not in error
    write_llamagen(tmp_path / "gpt.pt")
    options = ("--image-size", 64, "--image-tokenizer", tmp_path / "trap.pt")
    assert "trap.pt" in refused(capsys, tmp_path / "gpt.pt", tmp_path / "model", *options)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "model").exists()


def test_a_broken_config_is_named(hub, tmp_path, capsys):
    shutil.copytree(hub, tmp_path / "broken")
    settings = json.loads((hub / "config.json").read_text())
    for change in {"text_config": "wide"}, {"vq_config": {"num_embeddings": "many"}}, {"vision_config": [1]}:
        (tmp_path / "broken" / "config.json").write_text(json.dumps(settings | change))
        assert "config.json: not a valid JanusConfig" in refused(capsys, tmp_path / "broken", tmp_path / "m")


def test_options_that_have_no_effect_are_refused(hub, tmp_path, capsys):
    """A setting that changes nothing is a misunderstanding."""
    assert "--base has no use without --original" in refused(capsys, hub, tmp_path / "m", "--base", hub)
    assert "--kind has no use with --original" in refused(
        capsys, "--original", hub, tmp_path / "m", "--kind", "janus"
    )
    assert "backbone.image_size: unknown key" in refused(capsys, hub, tmp_path / "m", "--image-size", 64)
    assert run(hub, tmp_path / "m") == 0
    assert "is a model folder of this project already" in refused(capsys, tmp_path / "m", tmp_path / "n")
    write_llamagen(tmp_path / "gpt.pt")
    assert run(tmp_path / "gpt.pt", tmp_path / "llamagen", "--image-size", 64) == 0
    error = refused(capsys, "--original", tmp_path / "llamagen", tmp_path / "folder")
    assert "expected a file that ends in .pt" in error


# ---- interruption --------------------------------------------------------------------------------


def test_an_existing_target_is_never_replaced(tmp_path, capsys):
    write_llamagen(tmp_path / "gpt.pt")
    (tmp_path / "model").mkdir()
    error = refused(capsys, tmp_path / "gpt.pt", tmp_path / "model", "--image-size", 64)
    assert "model exists already; give another name, or remove it" in error
    (tmp_path / "model").rmdir()
    # Files left by a killed run do not matter.
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "half").touch()
    assert run(tmp_path / "gpt.pt", tmp_path / "model", "--image-size", 64) == 0
    assert not (tmp_path / "model.partial").exists() and not (tmp_path / "model" / "half").exists()
    (tmp_path / "back.pt").touch()
    assert "exists already" in refused(capsys, "--original", tmp_path / "model", tmp_path / "back.pt")


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (OSError("no space left on device"), 2)])
def test_an_interrupted_conversion_leaves_nothing(monkeypatch, error, code, tmp_path):
    write_llamagen(tmp_path / "gpt.pt")
    assert run(tmp_path / "gpt.pt", tmp_path / "before", "--image-size", 64) == 0
    monkeypatch.setattr(weights, "SHARD_BYTES", 2000)
    written = []

    def fails_at_the_third(tensors, path, metadata):
        written.append(path)
        if len(written) == 3:
            raise error
        save_file(tensors, path, metadata)

    monkeypatch.setattr(weights, "save_file", fails_at_the_third)
    assert run(tmp_path / "gpt.pt", tmp_path / "model", "--image-size", 64) == code and len(written) == 3

    def half_a_file(content, path):
        path.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", half_a_file)
    assert run("--original", tmp_path / "before", tmp_path / "back.pt") == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before", "gpt.pt"]
