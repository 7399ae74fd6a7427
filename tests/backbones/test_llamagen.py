"""LlamaGen: padding, attention, files that fit or are refused by name, and
conditions.

test_parity.py shows that it computes what the original computes; test_contract.py tests
what all backbones do.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmtensorar import backbones
from mmtensorar.backbones import llamagen
from mmtensorar.captions import cleaning, encoders
from mmtensorar.model import attention
from mmtensorar.model.conditions import Condition
from mmtensorar.recipe import Lora, Recipe, Run, SamplerSettings, Train
from mmtensorar.sampling.decode import decode
from mmtensorar.sampling.noise import greedy
from mmtensorar.training import plan
from tests.helpers.fakes import llamagen_condition, tiny_llamagen
from tests.helpers.models import window_logits, wrap

CONDITIONS = ("class", "text")
GUIDED = SamplerSettings(cfg_scale=2.0)


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=CONDITIONS)
def backbone(request):
    return tiny_llamagen(request.param)


def codes_of(backbone, batch: int = 3) -> Tensor:
    return torch.randint(backbone.factor_sizes[0], (batch, backbone.num_tokens, 1))


# ---- beyond the contract -------------------------------------------------------------------------


@torch.no_grad()
def test_padding_never_affects_the_output():
    """The null caption has values in every slot.

    Under a short caption's mask only its last slots count.
    """
    backbone = tiny_llamagen("text")
    condition, everything = llamagen_condition(backbone), torch.ones(3, dtype=torch.bool)
    model, codes = wrap(backbone, 1), codes_of(backbone)
    valid = torch.ones(backbone.num_tokens - 1, 1, dtype=torch.bool)

    def logits(condition: Condition, uncond: Tensor) -> Tensor:
        return window_logits(
            model, model.hidden(codes[:, :-1, None], valid, condition, uncond), codes[:, :, None, :0]
        )

    before = logits(condition, everything)
    backbone.prefix.null_caption[:2] += 1
    after = logits(condition, everything)
    # Rows have 5, 3 and 1 real slots of 5: the first two slots are real for row 0 only.
    assert [torch.equal(*rows) for rows in zip(before, after, strict=True)] == [False, True, True]
    noise = condition.values + torch.randn_like(condition.values) * ~condition.mask[..., None]
    assert torch.equal(logits(condition, ~everything), logits(Condition(noise, condition.mask), ~everything))


def test_activation_checkpointing_changes_nothing_but_memory(backbone):
    model, results, runs = wrap(backbone, 1), [], []
    backbone.layers[0].feed_forward.register_forward_pre_hook(lambda *_: runs.append("layer 0"))
    codes, condition = codes_of(backbone), llamagen_condition(backbone)
    for policy in (False, True, "selective"):
        backbone.activation_checkpointing = policy
        model.zero_grad()
        runs.clear()
        loss = model(codes, condition, torch.tensor([False, True, False])).loss
        loss.backward()
        results.append(
            (loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}, len(runs))
        )
    for result in results[1:]:
        torch.testing.assert_close(result[:2], results[0][:2], rtol=0, atol=0)
    assert [count for *_, count in results] == [1, 2, 2], "the layers run twice, so the switch is connected"


# ---- attention -----------------------------------------------------------------------------------


def stand_in_flash_attn() -> SimpleNamespace:
    """The two functions of the flash-attn package that we call, as its documentation
    defines them, without a GPU.
    """

    def one(query, key, value):  # [S, H, C], [N, G, C]; causal, aligned at the last key
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        scores = torch.einsum("shc,nhc->hsn", query.float(), key.float()) * query.shape[-1] ** -0.5
        S, N = scores.shape[1:]
        scores = scores.masked_fill(torch.ones(S, N).tril(N - S) == 0, float("-inf"))
        return torch.einsum("hsn,nhc->shc", scores.softmax(-1), value.float()).to(value.dtype)

    def flash_attn_func(q, k, v, causal):
        return torch.stack([one(*row) for row in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(q, k, v, borders_q, borders_k, max_q, max_k, causal):
        assert borders_q.dtype == borders_k.dtype == torch.int32
        assert max_q >= borders_q.diff().max() and max_k >= borders_k.diff().max()
        parts = [
            one(q[borders_q[i] : borders_q[i + 1]], *(x[borders_k[i] : borders_k[i + 1]] for x in (k, v)))
            for i in range(len(borders_q) - 1)
        ]
        return torch.cat(parts)

    return SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_queries", [7, 3, 1])
def test_all_implementations_agree(monkeypatch, num_queries, padded):
    """Tested on a whole sequence, a few rows after a cache, and one row; also with
    padded rows and zero keys.
    """
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in_flash_attn())
    query, key, value = torch.randn(3, 4, num_queries, 8), torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 8)
    key[:, :, :2] = 0  # keys of a prefix are zero after the rotary table
    mask = torch.arange(7) >= torch.tensor([0, 2, 6])[:, None] if padded else None

    def run(name: str, dtype: torch.dtype) -> Tensor:
        pattern = attention.pattern(mask, num_queries, 7, name)
        return attention.attend(query.to(dtype), key.to(dtype), value.to(dtype), pattern)

    exact = run("eager", torch.float32)
    assert exact.isfinite().all()
    torch.testing.assert_close(run("sdpa", torch.float32), exact, atol=1e-6, rtol=1e-5)
    for name in ("eager", "sdpa", "flash_attention_2"):
        torch.testing.assert_close(run(name, torch.bfloat16).float(), exact, atol=0.02, rtol=0.02)
    if padded and num_queries == 7:
        # A padded row attends only to itself.
        torch.testing.assert_close(exact[2, :, :6], value.repeat_interleave(2, 1)[2, :, :6])


def test_flash_attention_is_refused_where_it_cannot_run(monkeypatch):
    """The error comes at the start, not at the first step.

    float32 is always refused, because the kernels do not support it.
    """
    section = llamagen.Config(name="llamagen", path="x", attn_implementation="flash_attention_2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match="attn_implementation is flash_attention_2, but flash-attn is not usable"
    ):
        backbones.load(section)
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in_flash_attn())
    x = torch.randn(1, 1, 2, 8)
    with pytest.raises(ValueError, match="computes in bf16 or fp16, not in torch.float32"):
        attention.attend(x, x, x, attention.pattern(None, 2, 2, "flash_attention_2"))


@torch.no_grad()
def test_eager_and_sdpa_give_equal_outputs(backbone):
    codes, condition = codes_of(backbone), llamagen_condition(backbone)
    losses = []
    for name in ("sdpa", "eager"):
        backbone.attn_implementation = name
        losses.append(wrap(backbone, 1)(codes, condition, torch.tensor([False, True, False])).loss)
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)


# ---- files ---------------------------------------------------------------------------------------


def official_state(backbone) -> dict[str, Tensor]:
    return {
        llamagen.LlamaGenBackbone.official_name(name): value.clone()
        for name, value in backbone.state_dict().items()
    }


def load(path: Path, **settings):
    return backbones.load(llamagen.Config(name="llamagen", path=str(path), **settings))


def equal(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def released(monkeypatch):
    """A tiny model in place of the released B, at 256 pixels, which cannot be read from
    a file alone.
    """
    monkeypatch.setitem(llamagen.SIZES, "B", (16, 2, 2))
    return {condition: tiny_llamagen(condition, num_tokens=256, num_kv_heads=2) for condition in CONDITIONS}


def test_round_trip_is_exact(backbone, tmp_path):
    """Sampling uses exactly the trained weights, including the null caption."""
    backbone.save_pretrained(tmp_path)
    found = load(tmp_path)
    assert equal(found, backbone) and found.config == backbone.config
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llamagen"
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "tok_embeddings.weight" in names and "layers.1.attention.wqkv.weight" in names


def test_the_null_caption_is_saved_and_keeps_its_precision(tmp_path):
    """It is not a parameter.

    If it were lost, or rounded to bf16 with the weights, every guided image would
    change.
    """
    backbone = tiny_llamagen("text")
    assert "prefix.null_caption" not in dict(backbone.named_parameters())
    exact = backbone.prefix.null_caption.clone()
    backbone.bfloat16()
    assert backbone.layers[0].attention.wo.weight.dtype == torch.bfloat16
    assert torch.equal(backbone.prefix.null_caption, exact)
    backbone.save_pretrained(tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["cls_embedding.uncond_embedding"], exact)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize(
    "wrap_up",
    [
        lambda state: {
            "model": state,
            "steps": 7,
            "args": argparse.Namespace(image_size=256),
            "optimizer": {},
        },
        lambda state: {"module": state},
        lambda state: {"state_dict": state},
        lambda state: state,  # trained with FSDP
        lambda state: state | {"freqs_cis": torch.zeros(257, 4, 2)},
    ],
    ids=["model", "module", "state_dict", "bare", "freqs_cis"],
)
def test_official_pt_files_load(released, condition, wrap_up, tmp_path):
    """Width, depth, classes and caption slots come from the tensors, everything else
    from the released model.
    """
    path = tmp_path / "weights.pt"
    torch.save(wrap_up(official_state(released[condition])), path)
    found = load(path, size="B", condition=condition, image_size=256)
    assert equal(found, released[condition]) and found.config == released[condition].config
    save_file(official_state(released[condition]), tmp_path / "weights.safetensors")
    assert equal(load(tmp_path / "weights.safetensors", image_size=256), released[condition])


def test_a_wrong_file_is_refused_by_name(released, tmp_path):
    """Every error is one sentence that names the tensors, and comes before any value is
    copied.
    """
    path = tmp_path / "c2i.pt"

    def refused(problem: str, settings: dict | None = None, **changes: Tensor | None) -> None:
        state = official_state(released["class"]) | {
            name.replace("__", "."): value for name, value in changes.items()
        }
        torch.save({"model": {name: value for name, value in state.items() if value is not None}}, path)
        with pytest.raises(ValueError, match=problem):
            load(path, **({"image_size": 256} | (settings or {})))

    refused(r"c2i\.pt: 1 tensor is missing, norm\.weight$", norm__weight=None)
    refused(r"c2i\.pt: 1 tensor is unexpected, lm_head\.weight$", lm_head__weight=torch.zeros(1))
    many = {f"extra__{number:02d}": torch.zeros(1) for number in range(12)}
    refused(
        r"1 tensor is missing, norm\.weight; 12 .* unexpected, among them extra\.00, .*09$",
        norm__weight=None,
        **many,
    )
    refused(r"norm\.weight has shape \[8\], expected \[16\]", norm__weight=torch.ones(8))
    refused(
        r"not a LlamaGen GPT: tok_embeddings\.weight is missing; it has cls_e", tok_embeddings__weight=None
    )
    refused("expected cls_embedding.embedding_table.weight", cls_embedding__embedding_table__weight=None)
    refused(r"width 16 and 3 layers .* released size \(B, L, XL", layers__2__ffn_norm__weight=torch.ones(16))
    refused("backbone.image_size: ", {"image_size": None})
    refused("backbone.size is L .*24 layers.*has width 16, 2 layers", {"size": "L"})
    refused("backbone.condition is text, .*is class-conditional", {"condition": "text"})


@pytest.mark.parametrize("evidence", ["name", "args", "config"])
def test_a_256_pixel_checkpoint_under_a_384_pixel_recipe_is_refused(released, evidence, tmp_path):
    """All tensors fit, because positions are computed.

    Only the name, the saved arguments or config.json show the size.
    """
    state = official_state(released["class"])
    path = tmp_path / ("c2i_B_256.pt" if evidence == "name" else "mine.pt")
    if evidence == "config":
        path = tmp_path / "folder"
        released["class"].save_pretrained(path)
    else:
        args = {"args": argparse.Namespace(image_size=256)} if evidence == "args" else {}
        torch.save({"model": state} | args, path)
    assert equal(load(path, image_size=256), released["class"])
    with pytest.raises(ValueError, match=r"backbone.image_size is 384, but .* 256 pixels"):
        load(path, image_size=384)


def test_a_pt_file_cannot_run_code(tmp_path):
    """weights_only: a pickle that calls a function is refused, not executed."""

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match=r"trap\.pt: cannot be read as PyTorch weights"):
        load(tmp_path / "trap.pt", image_size=256)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="backbone.path: no file .*absent.pt"):
        load(tmp_path / "absent.pt", image_size=256)


def test_a_broken_config_is_named(tmp_path):
    tiny_llamagen().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for change, problem in (
        ({"num_tokens": 8}, "num_tokens 8"),
        ({"dimm": 3}, "dimm: unknown key"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=rf"config\.json: .*{problem}"):
            load(tmp_path)


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, condition, parameters, budget",
    [
        ("B", "class", 110_888_448, 0.046),
        ("L", "class", 342_910_976, 0.027),
        ("XL", "class", 774_699_520, 0.019),
        ("XXL", "class", 1_410_972_672, 0.015),
        ("3B", "class", 3_096_659_200, None),
        ("XL", "text", 777_678_080, None),
    ],
)
def test_released_sizes_and_the_papers_budget(size, condition, parameters, budget):
    """Counted on the meta device.

    For four of the sizes the paper gives the percentage that TensorAR adds at depth 1.
    """
    recipe = Recipe.model_construct(
        backbone=llamagen.Config(
            name="llamagen", path="not-here.pt", size=size, condition=condition, image_size=256
        ),
        tensorar=Recipe.model_fields["tensorar"].default,
        train=Train(steps=1),
        run=Run(name="sizes"),
        lora=Lora(),
    )
    counts = plan.parameters(plan.meta_model(recipe))
    assert counts["backbone"] == parameters
    assert budget is None or counts["tensorar"] / parameters <= budget


# ---- conditions ----------------------------------------------------------------------------------


def test_class_numbers_are_the_captions_of_a_class_conditional_model(tmp_path):
    """So ImageNet-style shards need no other schema, and `generate --prompt 6`
    works.
    """
    tiny_llamagen().save_pretrained(tmp_path)
    encode = backbones.caption_encoder(llamagen.Config(name="llamagen", path=str(tmp_path)))
    condition = encode(["3", " 6\n"])
    assert condition.values.tolist() == [[3], [6]] and condition.mask.tolist() == [[True], [True]]
    for wrong in ("a red circle", "7", "-1", ""):
        with pytest.raises(ValueError, match=f"{wrong!r} .*expected 0 to 6"):
            encode([wrong])


def test_left_pad():
    """The end of the caption is next to the image tokens; the padding is zeros."""
    condition = encoders.left_pad([torch.tensor([[1.0], [2], [3], [4]]), torch.tensor([[5.0], [6]])], 4)
    assert condition.values[..., 0].tolist() == [[1, 2, 3, 4], [0, 0, 5, 6]]
    assert condition.mask.int().tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_the_text_encoder_moves_to_the_device_of_the_model(t5_folder, monkeypatch):
    """With --device cpu on a machine with a GPU, it once ran on the GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    encode = encoders.T5Features(
        str(t5_folder), num_slots=5, dim=6, cleaning="lower", device=torch.device("cpu")
    )
    assert encode.features(["a red circle"])[0].dtype == torch.float32
    encoder, _ = encode._loaded
    assert encoder.device.type == "cpu" and encoder.dtype == torch.float32


def test_captions_become_left_padded_features(t5_folder, tmp_path):
    """Every caption has its own words and the end token, whatever its neighbours are.

    Longer captions are truncated.
    """
    from transformers import T5EncoderModel

    tiny_llamagen("text").save_pretrained(tmp_path)
    settings = dict(
        name="llamagen", path=str(tmp_path), text_encoder=str(t5_folder), caption_cleaning="lower"
    )
    encode = backbones.caption_encoder(llamagen.Config(**settings))
    condition = encode(["a RED circle", "circle", "", "a " * 9])
    assert condition.values.shape == (4, 5, 6) and condition.values.dtype == torch.float32
    assert condition.mask.sum(1).tolist() == [4, 2, 1, 5] and condition.mask[:, -1].all()
    assert not condition.values[~condition.mask].any()
    reference = T5EncoderModel.from_pretrained(t5_folder).eval()
    with torch.no_grad():
        alone = reference(torch.tensor([[3, 4, 5, 1]])).last_hidden_state[0]
    torch.testing.assert_close(condition.values[0, 1:], alone, atol=1e-5, rtol=1e-5)
    model = wrap(tiny_llamagen("text"), 1).eval()
    assert decode(model, condition, GUIDED, draw=greedy).codes.shape == (4, 9, 1)


def test_a_text_encoder_of_another_width_is_refused(t5_folder, tmp_path):
    tiny_llamagen("text", caption_dim=8).save_pretrained(tmp_path)
    settings = dict(name="llamagen", path=str(tmp_path), text_encoder=str(t5_folder), caption_cleaning="none")
    with pytest.raises(ValueError, match="makes features of 6, the backbone was trained with 8"):
        backbones.caption_encoder(llamagen.Config(**settings))(["a"])


def test_captions_of_another_shape_are_refused():
    """Features of cached shards may come from another encoder.

    The matrix product would fail with an unclear error, or not at all.
    """
    backbone = tiny_llamagen("text")
    short = Condition(torch.zeros(2, 4, 6), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"captions are \[4, 6\] features, the backbone expects \[5, 6\]"):
        backbone.prefix(short, torch.zeros(2, dtype=torch.bool))


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("A cat   sitting on a mat!", "a cat sitting on a mat!"),
        ("<b>Red</b> car &amp; truck, see https://example.com/a?b=1", "red car truck, see"),
        ("\u201cquoted\u201d \u2013 l\u2019\u00e9t\u00e9", '"quoted" - l\'\u00e9t\u00e9'),
        ("Canvas 10x20 jc6640vc #123 1234567 free shipping", "canvas"),
        ("one-two-three-four-five", "one two three four five"),
        ("a dog.A cat,a bird", "a dog. a cat, a bird"),
        ('"the whole caption"', "the whole caption"),
    ],
)
def test_cleaning(caption, expected):
    """The expected texts were worked out by hand, from the description of the
    original's steps.
    """
    pytest.importorskip("ftfy")
    pytest.importorskip("bs4")
    assert cleaning.prepare(caption, "original") == expected


def test_cleaning_a_long_caption_terminates():
    """Patterns with lookahead took minutes for the 64 KiB that a caption may have,
    while all ranks waited.
    """
    pytest.importorskip("ftfy")
    long = "a.a." * 16000
    assert cleaning.prepare(long, "original") == cleaning.prepare(
        long[: cleaning.MAX_CLEANED_CHARS], "original"
    )


def test_cleaning_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ValueError, match=r"needs the package ftfy: pip install -e '\.\[text\]'"):
        encoders.T5Features("x", num_slots=5, dim=6)
    assert (
        cleaning.prepare(" A Cat ", "lower") == "a cat" and cleaning.prepare(" A Cat ", "none") == " A Cat "
    )


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.launch
@pytest.mark.parametrize("condition", ["class", "text"])
def test_two_ranks_train_under_zero_3(condition, t5_folder, tmp_path):
    """From shards to a model folder that loads.

    The null caption, a buffer, is still exact after a step.
    """
    pytest.importorskip("deepspeed")
    from mmtensorar import image_tokenizers
    from mmtensorar.checkpoints import model_folder
    from mmtensorar.image_tokenizers import llamagen_vq
    from tests.helpers.runs import run
    from tests.helpers.shards import write_shards

    backbone = tiny_llamagen(condition, num_tokens=16, vocab_size=32)
    of_text = {"text_encoder": str(t5_folder), "caption_cleaning": "lower"} if condition == "text" else {}
    backbone.save_pretrained(tmp_path / "gpt")
    sizes = dict(codebook_size=32, ch=32, num_res_blocks=1, z_channels=8)
    architecture = llamagen_vq.Architecture(**sizes, encoder_ch_mult=[1, 1], decoder_ch_mult=[1, 1])
    llamagen_vq.LlamaGenVQ(llamagen_vq.VQModel(architecture), 8).save_pretrained(tmp_path / "vq")
    recipe = {
        "run": {"name": "zero", "out": str(tmp_path / "runs")},
        "backbone": {"name": "llamagen", "path": str(tmp_path / "gpt"), **of_text},
        "image_tokenizer": {"name": "llamagen_vq", "path": str(tmp_path / "vq")},
        "tensorar": {"window": 4, "num_heads": 2},
        "data": {"shards": str(tmp_path / "shards"), "batch_size": 4, "shuffle": 0, "uncond_rate": 0.5},
        "train": {
            "steps": 1,
            "log_every": 1,
            "save_every": 0,
            "activation_checkpointing": True,
            "precision": "fp32",
        },
        "zero": {"stage": 3},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    vq = image_tokenizers.load(llamagen_vq.Config(**recipe["image_tokenizer"]))
    write_shards(tmp_path / "shards", vq, *([] if condition == "text" else [[["0", "3"], ["1", "2"]]]))
    done = run(tmp_path, ranks=2)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "attention: sdpa" in done.stdout
    loaded = model_folder.load(tmp_path / "runs" / "zero" / "model")
    trained = loaded.model.backbone
    if condition == "text":
        assert torch.equal(trained.prefix.null_caption, backbone.prefix.null_caption)
    assert not torch.equal(trained.layers[0].attention.wqkv.weight, backbone.layers[0].attention.wqkv.weight)
    prompt = "a red circle" if condition == "text" else 2
    codes = decode(loaded.model, loaded.caption_encoder([prompt]), GUIDED, draw=greedy).codes
    assert loaded.image_tokenizer.decode(codes).shape == (1, 3, 8, 8)
