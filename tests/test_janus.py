"""Janus: parity with the reference code on fixed tiny weights, and files that fit or are refused by name."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmtensorar import backbones, image_tokenizers
from mmtensorar.backbones import Condition, janus
from mmtensorar.decode import Sampler, decode
from mmtensorar.generate import to_images
from mmtensorar.image_tokenizers import janus_vq
from mmtensorar.noise import FixedSchedule
from mmtensorar.tensorar import TensorAR
from tests.fakes import tiny_janus

FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "parity" / "janus"
CASE = "t2i_tiny_hf"

# Gradients in the fixture carry DeepSeek's names.
DEEPSEEK_NAMES = {
    "gen_embed.weight": "embed.embeddings.weight",
    "gen_aligner.layers.0.weight": "embed.aligner.fc1.weight",
    "gen_head.vision_head.bias": "head.head.vision_head.bias",
    "language_model.model.layers.0.self_attn.k_proj.weight": "language_model.layers.0.self_attn.k_proj.weight",
    "language_model.model.norm.weight": "language_model.norm.weight",
}


class Reference:
    """The fixture's tensors and how closely each has to be met."""

    def __init__(self) -> None:
        self.manifest = json.loads((FIXTURES / f"{CASE}.json").read_text())
        self.tensors = load_file(FIXTURES / f"{CASE}.safetensors")
        self.rules = {name: rule for call in self.manifest["calls"] for name, rule in call["outputs"].items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def check(self, name: str, found: Tensor) -> None:
        """Compare with outputs/NAME under the manifest's rule, the one ending in * for all names it begins."""
        expected = self.tensors[f"outputs/{name}"]
        (rule,) = (r for n, r in self.rules.items() if f"outputs/{name}" == n or (n[-1] == "*" and f"outputs/{name}".startswith(n[:-1])))
        assert found.shape == expected.shape, name
        if rule["compare"] == "equal":
            assert torch.equal(found, expected), name
        elif rule["compare"] == "max_abs_diff":
            assert (found.int() - expected.int()).abs().max() <= rule["max"], name
        else:
            assert rule["compare"] == "allclose"
            torch.testing.assert_close(found, expected, atol=rule["atol"], rtol=rule["rtol"], msg=lambda text: f"{name}: {text}")


@pytest.fixture(scope="module")
def reference() -> Reference:
    if not (FIXTURES / f"{CASE}.json").is_file():
        pytest.skip("the Janus parity fixtures are not beside this checkout (../shared/parity/janus)")
    torch.set_num_threads(1)
    return Reference()


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory) -> Path:
    """The fixture's weights as a released checkpoint: config.json and model.safetensors."""
    path = tmp_path_factory.mktemp("janus")
    weights = {k.removeprefix("weights/"): v for k, v in reference.tensors.items() if k.startswith("weights/")}
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(reference.manifest["config"]["hf"]))
    return path


@pytest.fixture
def model(folder) -> TensorAR:
    backbone = backbones.load(janus.Config(name="janus", path=str(folder)))
    return TensorAR(backbone, None, None, FixedSchedule("none"), offset_weights=[1.0]).eval()


@pytest.fixture(scope="module")
def vq(folder):
    return image_tokenizers.load(janus_vq.Config(name="janus_vq", path=str(folder)))


def prompts(*rows: Tensor, pad: int = 3) -> Condition:
    """Prompts padded left to the longest."""
    P = max(map(len, rows))
    values = torch.stack([functional.pad(row, (P - len(row), 0), value=pad) for row in rows])
    mask = torch.stack([torch.arange(P) >= P - len(row) for row in rows])
    return Condition(values, mask)


class Recorder:
    """A greedy sampler that keeps the logits it was shown."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        self.seen.append(logits[:, 0])
        return Sampler(greedy=True)(logits, uniform)

    @property
    def step_logits(self) -> Tensor:
        return torch.stack(self.seen, dim=1)  # [B, T, V]


# ---- parity --------------------------------------------------------------------------------------


def test_image_token_embeddings(reference, model):
    """The generation table and the aligner: a table of its own, not the codebook."""
    with torch.no_grad():
        reference.check("teacher_forced/image_token_embeds", model.backbone.embed(reference["inputs/image_tokens"][..., None]))


@pytest.mark.parametrize("stream", ["cond", "uncond"])
def test_teacher_forced(reference, model, stream):
    """Hidden states and logits with and without the prompt; row 0 is the begin-of-image place."""
    codes, condition = reference["inputs/image_tokens"][..., None], prompts(*reference["inputs/prompt_ids"])
    with torch.no_grad():
        valid = torch.ones(codes.shape[1] - 1, 1, dtype=torch.bool)
        hidden = model.hidden(codes[:, :-1, None], valid, condition, torch.full((len(codes),), stream == "uncond"))
        reference.check(f"teacher_forced/hidden_{stream}", hidden)
        reference.check(f"teacher_forced/logits_{stream}", model.logits(hidden, codes[:, :, None, :0])[:, :, 0])


def test_unconditional_prompt(reference, model):
    """First and last token stay, the rest becomes pad and is attended to; padding of the batch stays masked."""
    ids = reference["inputs/prompt_ids"]
    everything = torch.ones(len(ids), dtype=torch.bool)
    table = model.backbone.prefix.embed_tokens
    prefix = model.backbone.prefix(prompts(*ids), everything)
    assert torch.equal(prefix.embeds, table(reference["outputs/prompt/uncond_ids"]))
    assert prefix.mask.all()
    padded = model.backbone.prefix(prompts(torch.tensor([1, 9, 9, 9, 6]), torch.tensor([1, 9, 6])), everything[:2])
    assert torch.equal(padded.embeds, table(torch.tensor([[1, 3, 3, 3, 6], [3, 3, 1, 3, 6]])))
    assert padded.mask.int().tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]


def test_training_loss_and_gradients(reference, model):
    """The plain model's loss is the cross entropy of the reference's logits, down to its gradients."""
    codes = reference["inputs/image_tokens"][..., None]
    loss = model(codes, prompts(*reference["inputs/prompt_ids"]), torch.zeros(len(codes), dtype=torch.bool)).loss
    reference.check("train/ce_loss", loss.detach())
    loss.backward()
    parameters = dict(model.backbone.named_parameters())
    prefix = "outputs/train/grad/"
    names = [name.removeprefix(prefix) for name in reference.tensors if name.startswith(prefix)]
    assert len(names) == len(DEEPSEEK_NAMES)
    for name in names:
        reference.check(f"train/grad/{name}", parameters[DEEPSEEK_NAMES[name]].grad)


@pytest.mark.parametrize("case, cfg_scale", [("greedy_cfg1", 1.0), ("greedy_cfg5", 5.0)])
def test_greedy_generation(reference, model, vq, case, cfg_scale):
    """From prompt to picture: the official script's tokens, logits and pixels."""
    recorder = Recorder()
    codes = decode(model, prompts(*reference["inputs/prompt_ids"]), recorder, cfg_scale=cfg_scale).codes
    reference.check(f"{case}/tokens", codes[..., 0])
    reference.check(f"{case}/step_logits", recorder.step_logits)
    pixels = vq.decode(codes)
    reference.check(f"{case}/image", pixels)
    pictures = [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(p.height, p.width, 3) for p in to_images(pixels)]
    reference.check(f"{case}/image_uint8", torch.stack(pictures))


def test_ragged_batch(reference, model):
    """Two prompts of unequal length in one padded batch give what each gives alone in the reference."""
    recorder = Recorder()
    condition = prompts(*(reference[f"inputs/ragged_prompt_{i}"] for i in range(2)))
    codes = decode(model, condition, recorder, cfg_scale=5.0).codes
    for i in range(2):
        reference.check(f"ragged_cfg5/tokens_{i}", codes[i, :, 0])
        reference.check(f"ragged_cfg5/step_logits_{i}", recorder.step_logits[i])


def test_vq_decode(reference, vq):
    """Rows are normalised at look-up; the fixture's have unequal lengths on purpose."""
    codes = reference["inputs/image_tokens"]
    reference.check("vq/codebook_entry", vq.model.quantize.get_codebook_entry(codes))
    reference.check("vq/decode_image", vq.decode(codes[..., None]))


def test_vq_encode(reference, vq):
    """The nearest row by angle; transformers' own search agrees on half of these codes only."""
    pixels = reference["inputs/pixels"]
    reference.check("vq/encode_pre_quant", vq.model.quant_conv(vq.model.encoder(pixels)))
    codes = vq.encode(pixels)
    reference.check("vq/encode_indices", codes[..., 0])
    reference.check("vq/encode_quantized", vq.model.quantize.get_codebook_entry(codes[..., 0]))
    reference.check("vq/reconstruction", vq.decode(codes))


def test_sizes_come_from_the_config(model, vq):
    """Three places of the config hold the grid; all parts must read the same one."""
    assert (model.backbone.num_tokens, model.backbone.factor_sizes, model.backbone.dim) == (16, (48,), 64)
    assert (vq.grid, vq.factor_sizes, vq.image_size) == ((4, 4), (48,), 8)


def test_vq_whole_and_alone_are_one_tokenizer(vq, tmp_path):
    """Shards record the weight hash, so it must not depend on the file the weights came from."""
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
    """Replace tensors of model.safetensors, or drop those given as None; the names' points are written __."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        name = name.replace("__", ".")
        assert name in tensors
        tensors[name] = value
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def test_round_trip_is_exact(saved):
    """What was trained is what is sampled from, bit for bit."""
    torch.manual_seed(0)
    made, loaded = tiny_janus().state_dict(), load(saved).state_dict()
    assert made.keys() == loaded.keys()
    assert all(torch.equal(made[name], loaded[name]) for name in made)


def test_only_the_generation_path_is_saved(saved):
    """No vision tower, VQ model or lm_head: a quarter of the 1B that nothing here uses."""
    names = load_file(saved / "model.safetensors").keys()
    parts = {".".join(name.split(".")[:2]) for name in names}
    assert parts == {"model.language_model", "model.generation_embeddings", "model.generation_aligner", "model.generation_head"}


def test_a_missing_tensor_is_named(saved):
    edit(saved, model__language_model__norm__weight=None)
    with pytest.raises(ValueError, match=r"saved: 1 tensors? .*missing.* model\.language_model\.norm\.weight"):
        load(saved)


@pytest.mark.parametrize("name", ["model.language_model.layers.7.mlp.up_proj.weight", "banana"])
def test_a_tensor_that_the_configuration_has_no_place_for_is_named(saved, name):
    """A model of more layers than its config tells of used to load as one of fewer."""
    path = saved / "model.safetensors"
    save_file(load_file(path) | {name: torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"unexpected.*{name}"):
        backbones.load(janus.Config(name="janus", path=str(saved)))


def test_a_tensor_of_another_shape_is_named_with_its_file(saved):
    """copy_ would broadcast a row over the whole table."""
    edit(saved, model__generation_embeddings__weight=torch.zeros(1, 8))
    with pytest.raises(ValueError, match=r"model\.safetensors: model\.generation_embeddings\.weight has shape \[1, 8\].*\[11, 8\]"):
        load(saved)


@pytest.mark.parametrize("model_type", ["llama", None])
def test_another_model_type_is_refused(saved, model_type):
    """A language model has tensors of the same names."""
    settings = json.loads((saved / "config.json").read_text()) | {"model_type": model_type}
    (saved / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"config\.json: model_type is {model_type!r}, expected 'janus'"):
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
    tensors = load_file(FIXTURES / "t2i_tiny_deepseek.safetensors")
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


def test_both_layouts_are_one_model(deepseek_folder, folder, vq, tmp_path):
    """Weights, sizes and weight hash are equal, so shards encoded with one fit a recipe with the other."""
    deepseek, hub = load(deepseek_folder), load(folder)
    assert all(torch.equal(value, hub.state_dict()[name]) for name, value in deepseek.state_dict().items())
    assert (deepseek.num_tokens, deepseek.dim, deepseek.factor_sizes) == (hub.num_tokens, hub.dim, hub.factor_sizes)
    alike = image_tokenizers.load(janus_vq.Config(name="janus_vq", path=str(deepseek_folder)))
    assert (alike.weight_hash, alike.grid, alike.image_size) == (vq.weight_hash, vq.grid, vq.image_size)
    deepseek.save_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, hub.state_dict()[name]) for name, value in load(tmp_path / "saved").state_dict().items())


def test_a_deepseek_config_that_lacks_a_part_is_named(deepseek_folder):
    settings = json.loads((deepseek_folder / "config.json").read_text())
    del settings["gen_head_config"]
    (deepseek_folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"config\.json: 'gen_head_config' is missing"):
        load(deepseek_folder)


def test_a_part_that_is_missing_is_named(deepseek_folder):
    """One of the two shards of the 7B forgotten in a download."""
    (deepseek_folder / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-2\.safetensors is missing"):
        load(deepseek_folder)


def test_shapes_need_the_configuration_alone(deepseek_folder):
    """A rank that gets its weights from another downloads *.json, which brings the index of weights that stay away."""
    for path in deepseek_folder.glob("*.safetensors"):
        path.unlink()
    width = json.loads((deepseek_folder / "config.json").read_text())["language_config"]["hidden_size"]
    section = janus.Config(name="janus", path=str(deepseek_folder))
    assert backbones.load(section, weights=False, device="meta").dim == width


# ---- prompts -------------------------------------------------------------------------------------


WORDS = ["<unk>", "<pad>", "<bos>", "<begin_of_image>", "<|User|>", "<|Assistant|>", ":", "a", "red", "circle"]


def write_text_tokenizer(folder: Path, words: list[str]) -> None:
    """One id per word, in order; the marks of the prompt are words of their own, as in the released files."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words if word.startswith("<")])
    marks = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<bos>"}
    PreTrainedTokenizerFast(tokenizer_object=fast, **marks).save_pretrained(folder)


def test_the_prompt_is_the_official_one():
    """Written out: the model was trained on this very text."""
    assert janus.PROMPT.format(caption="a {red} circle") == "<|User|>: a {red} circle\n\n<|Assistant|>:<begin_of_image>"


def test_captions_become_left_padded_prompts(tmp_path):
    """BOS once in front, begin-of-image last in every row, pads before the shorter prompt."""
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
    """Names of special tokens in a caption are text: begin-of-image stands once, at the end."""
    write_text_tokenizer(tmp_path, WORDS)
    encode = backbones.caption_encoder(janus.Config(name="janus", path=str(tmp_path)))
    (row,) = encode(["a <begin_of_image> red <|Assistant|> circle <bos>"]).values.tolist()
    assert [row.count(WORDS.index(name)) for name in ("<begin_of_image>", "<|Assistant|>", "<bos>")] == [1, 1, 1]
    assert row[-1] == WORDS.index("<begin_of_image>")


def test_a_text_tokenizer_without_begin_of_image_is_refused(tmp_path):
    """Its id would be <unk>, and every image would start from it."""
    write_text_tokenizer(tmp_path, [word for word in WORDS if word != "<begin_of_image>"])
    with pytest.raises(ValueError, match="lacks a token that Janus needs: BOS, pad or <begin_of_image>"):
        backbones.caption_encoder(janus.Config(name="janus", path=str(tmp_path)))


# ---- training ------------------------------------------------------------------------------------


def test_activation_checkpointing_changes_nothing_but_memory():
    """Same loss, same gradients; and the layers do run twice, so the switch is connected."""
    torch.manual_seed(0)
    backbone = tiny_janus().train()
    model = TensorAR(backbone, None, None, FixedSchedule("none"), offset_weights=[1.0])
    codes = torch.randint(11, (2, 9, 1))
    condition = prompts(torch.tensor([1, 4, 5, 6]), torch.tensor([1, 6]), pad=0)
    runs = []
    # Before the forward: the second one stops inside, as soon as it has what the backward needs.
    backbone.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs[-1].append("layer 0"))
    results = []
    for enabled in (False, True):
        backbone.activation_checkpointing = enabled
        assert backbone.activation_checkpointing == enabled
        runs.append([])
        model.zero_grad()
        loss = model(codes, condition, torch.tensor([False, True])).loss
        loss.backward()
        results.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert list(map(len, runs)) == [1, 2]
