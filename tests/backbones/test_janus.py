"""Janus: its prompts, and files that fit or are refused by name.

test_parity.py shows that it computes what the original computes; test_contract.py tests
what all backbones do.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as functional
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmtensorar import backbones, image_tokenizers
from mmtensorar.backbones import janus
from mmtensorar.image_tokenizers import janus_vq
from mmtensorar.model.conditions import Condition
from mmtensorar.model.drafts import FixedSchedule
from mmtensorar.model.tensorar import TensorAR
from tests.helpers.fakes import tiny_janus
from tests.parity import FIXTURES, read_tensors, tensors_file

CASE = FIXTURES / "janus" / "t2i_tiny_hf.json"
# The same weights under DeepSeek's names; both files would be too large for the
# repository.
DEEPSEEK = Path(__file__).resolve().parents[3] / "shared/parity/janus/t2i_tiny_deepseek.safetensors"


@pytest.fixture(scope="module")
def reference() -> SimpleNamespace:
    """The manifest and the tensors of a Janus that the reference code was run on."""
    torch.set_num_threads(1)
    return SimpleNamespace(manifest=json.loads(CASE.read_text()), tensors=read_tensors(tensors_file(CASE)))


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory) -> Path:
    """The fixture's weights as a released checkpoint: config.json and
    model.safetensors.
    """
    path = tmp_path_factory.mktemp("janus")
    weights = {
        k.removeprefix("weights/"): v for k, v in reference.tensors.items() if k.startswith("weights/")
    }
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(reference.manifest["config"]["hf"]))
    return path


@pytest.fixture(scope="module")
def vq(folder):
    return image_tokenizers.load(janus_vq.Config(name="janus_vq", path=str(folder)))


def prompts(*rows: Tensor, pad: int = 3) -> Condition:
    """Prompts padded left to the length of the longest."""
    P = max(map(len, rows))
    values = torch.stack([functional.pad(row, (P - len(row), 0), value=pad) for row in rows])
    mask = torch.stack([torch.arange(P) >= P - len(row) for row in rows])
    return Condition(values, mask)


# ---- the model -----------------------------------------------------------------------------------


def test_unconditional_prompt():
    """The first and last tokens stay.

    All tokens between become pad, which is attended to; padding of the batch stays
    masked.
    """
    backbone = tiny_janus()
    pad, everything = backbone.prefix.pad_id, torch.ones(2, dtype=torch.bool)
    padded = backbone.prefix(
        prompts(torch.tensor([1, 9, 9, 9, 6]), torch.tensor([1, 9, 6]), pad=pad), everything
    )
    expected = torch.tensor([[1, pad, pad, pad, 6], [pad, pad, 1, pad, 6]])
    assert torch.equal(padded.embeds, backbone.prefix.embed_tokens(expected))
    assert padded.mask.int().tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]


def test_sizes_come_from_the_config(folder, vq):
    """Three places of the config hold the grid; all parts must read the same one."""
    backbone = load(folder)
    assert (backbone.num_tokens, backbone.factor_sizes, backbone.dim) == (16, (48,), 64)
    assert (vq.grid, vq.factor_sizes, vq.image_size) == ((4, 4), (48,), 8)


def test_the_vq_model_inside_a_janus_equals_the_separate_one(vq, tmp_path):
    """Shards record the weight hash, so it must not depend on the file that the weights
    came from.
    """
    vq.save_pretrained(tmp_path)
    alone = image_tokenizers.load(janus_vq.Config(name="janus_vq", path=str(tmp_path)))
    assert alone.weight_hash == vq.weight_hash
    assert not any(parameter.requires_grad for parameter in alone.parameters())
    assert not alone.train().model.training


# ---- files ---------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    """A random tiny Janus, saved by the backbone itself."""
    torch.manual_seed(0)
    tiny_janus().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def load(folder: Path) -> janus.JanusBackbone:
    return backbones.load(janus.Config(name="janus", path=str(folder)))


def edit(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors of model.safetensors, or drop those given as None.

    Write the points of a name as __.
    """
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        name = name.replace("__", ".")
        assert name in tensors
        tensors[name] = value
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def test_round_trip_is_exact(saved):
    """Sampling uses exactly the trained weights, bit for bit."""
    torch.manual_seed(0)
    made, loaded = tiny_janus().state_dict(), load(saved).state_dict()
    assert made.keys() == loaded.keys()
    assert all(torch.equal(made[name], loaded[name]) for name in made)


def test_only_the_generation_path_is_saved(saved):
    """Vision tower, VQ model and lm_head are not saved: a quarter of the 1B, which
    nothing here uses.
    """
    names = load_file(saved / "model.safetensors").keys()
    parts = {".".join(name.split(".")[:2]) for name in names}
    assert parts == {
        "model.language_model",
        "model.generation_embeddings",
        "model.generation_aligner",
        "model.generation_head",
    }


def test_a_missing_tensor_is_named(saved):
    edit(saved, model__language_model__norm__weight=None)
    with pytest.raises(
        ValueError, match=r"saved: 1 tensors? .*missing.* model\.language_model\.norm\.weight"
    ):
        load(saved)


@pytest.mark.parametrize("name", ["model.language_model.layers.7.mlp.up_proj.weight", "banana"])
def test_an_unexpected_tensor_is_named(saved, name):
    """A model with more layers than its config states used to load as a smaller
    model.
    """
    path = saved / "model.safetensors"
    save_file(load_file(path) | {name: torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"unexpected.*{name}"):
        backbones.load(janus.Config(name="janus", path=str(saved)))


def test_a_tensor_of_another_shape_is_named_with_its_file(saved):
    """copy_ would broadcast one row over the whole table."""
    edit(saved, model__generation_embeddings__weight=torch.zeros(1, 8))
    with pytest.raises(
        ValueError,
        match=r"model\.safetensors: model\.generation_embeddings\.weight has shape \[1, 8\].*\[11, 8\]",
    ):
        load(saved)


@pytest.mark.parametrize("model_type", ["llama", None])
def test_another_model_type_is_refused(saved, model_type):
    """A language model has tensors with the same names."""
    settings = json.loads((saved / "config.json").read_text()) | {"model_type": model_type}
    (saved / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"config\.json: model_type is {model_type!r}, expected 'janus'"):
        load(saved)


@pytest.mark.parametrize(
    "setting, value",
    [("hidden_act", "x"), ("head_dim", -1), ("num_hidden_layers", "six"), ("vocab_size", -5)],
)
def test_settings_of_which_no_model_can_be_built(saved, setting, value):
    settings = json.loads((saved / "config.json").read_text())
    settings["text_config"][setting] = value
    (saved / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"config\.json: (no model can be built of it|not a valid Janus)"):
        load(saved)


def test_absent_and_unreadable_files_are_named(saved, tmp_path):
    with pytest.raises(ValueError, match="backbone.path: no folder .*nowhere"):
        load(tmp_path / "nowhere")
    (saved / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read as safetensors"):
        load(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors, nor another"):
        load(saved)


# ---- DeepSeek's layout ---------------------------------------------------------------------------


@pytest.fixture
def deepseek_folder(reference, tmp_path) -> Path:
    """The same model as DeepSeek stores it, in two safetensors files with an index."""
    if not DEEPSEEK.is_file():
        pytest.skip("the parity fixture in DeepSeek's layout is not beside this checkout (../shared/parity)")
    tensors = load_file(DEEPSEEK)
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
    names = sorted(weights)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, here in parts.items():
        save_file({name: weights[name] for name in here}, tmp_path / file)
    index = {"weight_map": {name: file for file, here in parts.items() for name in here}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = reference.manifest["config"]["deepseek"]
    settings = settings | {"language_config": settings["language_config"] | {"pad_token_id": 3}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return tmp_path


def test_both_layouts_load_as_the_same_model(deepseek_folder, folder, vq, tmp_path):
    """Weights, sizes and weight hash are equal, so shards encoded with one layout fit a
    recipe with the other.
    """
    deepseek, hub = load(deepseek_folder), load(folder)
    assert all(torch.equal(value, hub.state_dict()[name]) for name, value in deepseek.state_dict().items())
    assert (deepseek.num_tokens, deepseek.dim, deepseek.factor_sizes) == (
        hub.num_tokens,
        hub.dim,
        hub.factor_sizes,
    )
    alike = image_tokenizers.load(janus_vq.Config(name="janus_vq", path=str(deepseek_folder)))
    assert (alike.weight_hash, alike.grid, alike.image_size) == (vq.weight_hash, vq.grid, vq.image_size)
    deepseek.save_pretrained(tmp_path / "saved")
    assert all(
        torch.equal(value, hub.state_dict()[name])
        for name, value in load(tmp_path / "saved").state_dict().items()
    )


def test_a_part_missing_in_a_deepseek_config_is_named(deepseek_folder):
    settings = json.loads((deepseek_folder / "config.json").read_text())
    del settings["gen_head_config"]
    (deepseek_folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"config\.json: 'gen_head_config' is missing"):
        load(deepseek_folder)


def test_a_part_that_is_missing_is_named(deepseek_folder):
    """For example when a download missed one of the two shards of the 7B."""
    (deepseek_folder / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-2\.safetensors is missing"):
        load(deepseek_folder)


def test_shapes_need_only_the_configuration(deepseek_folder):
    """A rank that receives its weights from another rank downloads *.json.

    That includes the index of weight files that are not there.
    """
    for path in deepseek_folder.glob("*.safetensors"):
        path.unlink()
    width = json.loads((deepseek_folder / "config.json").read_text())["language_config"]["hidden_size"]
    section = janus.Config(name="janus", path=str(deepseek_folder))
    assert backbones.load(section, weights=False, device="meta").dim == width


# ---- prompts -------------------------------------------------------------------------------------


WORDS = [
    "<unk>",
    "<pad>",
    "<bos>",
    "<begin_of_image>",
    "<|User|>",
    "<|Assistant|>",
    ":",
    "a",
    "red",
    "circle",
]


def write_text_tokenizer(folder: Path, words: list[str]) -> None:
    """One id per word, in order.

    The special tokens of the prompt are words too, as in the released files.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in words if word.startswith("<")]
    )
    marks = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<bos>"}
    PreTrainedTokenizerFast(tokenizer_object=fast, **marks).save_pretrained(folder)


def test_the_prompt_is_the_official_one():
    """Written out here, because the model was trained on exactly this text."""
    assert (
        janus.PROMPT.format(caption="a {red} circle")
        == "<|User|>: a {red} circle\n\n<|Assistant|>:<begin_of_image>"
    )


def test_captions_become_left_padded_prompts(tmp_path):
    """BOS once in front, begin-of-image last in every row, pads before the shorter
    prompt.
    """
    write_text_tokenizer(tmp_path, WORDS)
    encode = backbones.caption_encoder(janus.Config(name="janus", path=str(tmp_path)))
    condition = encode(["a red circle", "circle", ""])
    assert condition.values.tolist() == [
        [2, 4, 6, 7, 8, 9, 5, 6, 3],
        [1, 1, 2, 4, 6, 9, 5, 6, 3],
        [1, 1, 1, 2, 4, 6, 5, 6, 3],
    ]
    assert torch.equal(condition.mask, condition.values != 1)


def test_a_caption_cannot_end_the_prompt(tmp_path):
    """Names of special tokens in a caption are text: begin-of-image occurs once, at the
    end.
    """
    write_text_tokenizer(tmp_path, WORDS)
    encode = backbones.caption_encoder(janus.Config(name="janus", path=str(tmp_path)))
    (row,) = encode(["a <begin_of_image> red <|Assistant|> circle <bos>"]).values.tolist()
    assert [row.count(WORDS.index(name)) for name in ("<begin_of_image>", "<|Assistant|>", "<bos>")] == [
        1,
        1,
        1,
    ]
    assert row[-1] == WORDS.index("<begin_of_image>")


def test_a_text_tokenizer_without_begin_of_image_is_refused(tmp_path):
    """Its id would be <unk>, and every image would start from it."""
    write_text_tokenizer(tmp_path, [word for word in WORDS if word != "<begin_of_image>"])
    with pytest.raises(ValueError, match="lacks a token that Janus needs: BOS, pad or <begin_of_image>"):
        backbones.caption_encoder(janus.Config(name="janus", path=str(tmp_path)))


# ---- training ------------------------------------------------------------------------------------


def test_activation_checkpointing_changes_nothing_but_memory():
    """Loss and gradients are equal.

    The layers run twice, which shows that the switch works.
    """
    torch.manual_seed(0)
    backbone = tiny_janus().train()
    model = TensorAR(backbone, None, None, FixedSchedule("none"), offset_weights=[1.0])
    codes = torch.randint(11, (2, 9, 1))
    condition = prompts(torch.tensor([1, 4, 5, 6]), torch.tensor([1, 6]), pad=0)
    runs = []
    # Counted before the forward call, because the second call stops inside, as soon as
    # it has what the backward pass needs.
    backbone.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs[-1].append("layer 0"))
    results = []
    for policy in (False, True, "selective"):
        backbone.activation_checkpointing = policy
        assert backbone.activation_checkpointing == policy
        runs.append([])
        model.zero_grad()
        loss = model(codes, condition, torch.tensor([False, True])).loss
        loss.backward()
        results.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
    assert list(map(len, runs)) == [1, 2, 2]
