"""Open-MAGVIT2: two factors in bf16 and under ZeRO-3, and its files.

test_parity.py shows that it computes what the original computes; test_contract.py tests
what all backbones do.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmtensorar import backbones, image_tokenizers
from mmtensorar.backbones import open_magvit2
from mmtensorar.checkpoints import model_folder
from mmtensorar.image_tokenizers import open_magvit2_lfq
from mmtensorar.image_tokenizers.open_magvit2_lfq import codes_to_latents, latents_to_codes
from mmtensorar.model import attention, layers
from mmtensorar.model.drafts import FixedSchedule
from mmtensorar.model.loss import LossSettings
from mmtensorar.model.tensorar import TensorAR
from mmtensorar.recipe import SamplerSettings
from mmtensorar.sampling.decode import decode
from mmtensorar.sampling.noise import greedy
from tests.helpers.fakes import class_condition, tiny_lfq, tiny_open_magvit2
from tests.helpers.models import noise, open_codec, window_logits, wrap

UNCOND = torch.tensor([False, True, False])


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def random_codes(batch: int = 3, num_tokens: int = 9, sizes: tuple[int, ...] = (4, 8)) -> Tensor:
    return torch.stack([torch.randint(size, (batch, num_tokens)) for size in sizes], dim=-1)


# ---- the model -----------------------------------------------------------------------------------


def test_the_factorised_attention_equals_the_spatial_one():
    """For two positions it equals causal attention with the first two rows of the
    positions' rotary table.
    """
    factor = open_magvit2.FactorAttention(32, 2)
    spatial = layers.SelfAttention(32, 2, 2)
    spatial.load_state_dict(factor.state_dict())
    table = layers.rotary_table(1, 9, 16, 10000, torch.device("cpu"))
    x = torch.randn(5, 2, 32)
    for length in (1, 2):
        expected = spatial(x[:, :length], table[:length], attention.pattern(None, length, length, "eager"))
        torch.testing.assert_close(factor(x[:, :length]), expected, atol=1e-6, rtol=1e-5)


def test_sdpa_and_eager_agree():
    """Also at the class token, whose query and key are zero vectors."""
    backbone, x, mask = tiny_open_magvit2().eval(), torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.bool)
    results = []
    for backbone.attn_implementation in ("sdpa", "eager"):
        with torch.no_grad():
            results.append(backbone(x, mask))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    assert not torch.equal(*results), "the setting is not connected"


def test_bits_by_hand():
    """Lowest bit first, zero is the negative side, and the full index is pre + 4 post
    for 2 + 3 bits.
    """
    latents = torch.tensor([0.1, -1, 0, 2, 3])[None, :, None, None]
    assert latents_to_codes(latents, (2, 3)).tolist() == [[[1, 6]]]
    assert latents_to_codes(latents, (5,)).tolist() == [[[25]]]
    signs = codes_to_latents(torch.tensor([[[1, 6]]]), (2, 3), (1, 1))
    assert signs.flatten().tolist() == [1, -1, -1, 1, 1]


# ---- beyond the contract -------------------------------------------------------------------------


def test_chunked_loss_equals_whole_loss():
    """Two factors, K = 4, and chunks that split a batch row: loss and gradients are
    equal.
    """
    backbone, codes, condition = tiny_open_magvit2(), random_codes(), class_condition(0, 3, 4)
    codec = open_codec(wrap(backbone, 4))
    results = []
    for chunk_tokens in (4096, 8):
        model = TensorAR(
            backbone,
            codec.encoder,
            codec.decoder,
            FixedSchedule("linear"),
            offset_weights=[1.0, 0.1, 0.1, 0.1],
            loss=LossSettings(chunk_tokens=chunk_tokens),
        )
        model.zero_grad()
        output = model(codes, condition, UNCOND, noise())
        output.loss.backward()
        results.append((output, {name: p.grad.clone() for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)
    assert all(gradient.abs().sum() > 0 for gradient in results[0][1].values()), (
        "a parameter without a gradient"
    )


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_bf16_trains_and_is_near_fp32(autocast):
    """The original fails here: its rotation returns float32, and attention receives two
    dtypes.
    """
    model = wrap(tiny_open_magvit2(), 3)
    codes, condition = random_codes(), class_condition(0, 3, 4)
    whole = model(codes, condition, UNCOND, noise()).loss
    model.zero_grad()
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(codes, condition, UNCOND, noise())
    output.loss.backward()
    assert output.loss.item() == pytest.approx(whole.item(), rel=0.02)
    # A fresh codec passes no gradient through its zero projection, but every gradient
    # that exists must be finite.
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        codes = decode(model.eval(), condition, SamplerSettings(cfg_scale=[2.0, 1.5]), draw=greedy).codes
    assert codes.shape == (3, 9, 2)


def test_bf16_logits_are_near_fp32():
    backbone = tiny_open_magvit2().eval()
    codes, condition = random_codes(), class_condition(0, 3, 4)

    @torch.no_grad()
    def logits() -> list[Tensor]:
        model = wrap(backbone, 1)
        hidden = model.hidden(codes[:, :-1, None], torch.ones(8, 1, dtype=torch.bool), condition, UNCOND)
        return [window_logits(model, hidden, codes[:, :, None, :factor]).float() for factor in range(2)]

    whole = logits()
    backbone.bfloat16()
    for half, expected in zip(logits(), whole, strict=True):
        error = (half - expected).norm() / expected.norm()
        assert 0 < error < 0.05  # 0.03 here: 2^-8 per rounding, amplified by random weights


def test_activation_checkpointing_changes_nothing_but_memory():
    """Loss and gradients are equal, with dropout on.

    The layers run twice, which shows that the switch works.
    """
    backbone = tiny_open_magvit2().train()
    for block in backbone.layers:
        block.dropout = 0.1
    model = TensorAR(backbone, None, None, FixedSchedule("none"), offset_weights=[1.0])
    codes, condition = random_codes(), class_condition(0, 3, 4)
    runs, results = [], []
    backbone.layers[0].feed_forward.register_forward_pre_hook(lambda *_: runs[-1].append("layer 0"))
    for policy in (False, True, "selective"):
        torch.manual_seed(1)
        backbone.activation_checkpointing = policy
        runs.append([])
        model.zero_grad()
        loss = model(codes, condition, UNCOND).loss
        loss.backward()
        results.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
    assert list(map(len, runs)) == [1, 2, 2]


def test_dropout_is_off_by_default_and_in_eval():
    settings = tiny_open_magvit2().config
    mask, x = torch.ones(1, 4, dtype=torch.bool), torch.randn(1, 4, 32)
    noisy = open_magvit2.OpenMagvit2Backbone(settings, dropout=0.5)
    assert not torch.equal(noisy(x, mask), noisy(x, mask))
    assert torch.equal(noisy.eval()(x, mask), noisy(x, mask))
    assert torch.equal((plain := tiny_open_magvit2().train())(x, mask), plain(x, mask))


# ---- training ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def magvit_bench(tmp_path_factory) -> Path:
    """A folder with a tiny backbone and image tokenizer, shards of class numbers, and a
    recipe.
    """
    pytest.importorskip("deepspeed")
    from tests.helpers.shards import write_shards

    folder = tmp_path_factory.mktemp("open_magvit2")
    torch.manual_seed(0)
    tiny_open_magvit2(side=4).save_pretrained(folder / "ar")
    lfq = tiny_lfq(image_size=8)
    lfq.save_pretrained(folder / "lfq")
    recipe = {
        "run": {"name": "unnamed", "out": str(folder / "runs")},
        "backbone": {"name": "open_magvit2", "path": str(folder / "ar")},
        "image_tokenizer": {"name": "open_magvit2_lfq", "path": str(folder / "lfq")},
        # Without noise, so that ranks draw no random numbers.
        "tensorar": {"window": 3, "num_heads": 2, "schedule": "none"},
        "data": {"shards": str(folder / "shards"), "batch_size": 4, "shuffle": 0, "uncond_rate": 0},
        # With a small eps Adam turns rounding noise in gradients near zero into full
        # steps.
        "optim": {"lr": 3e-3, "eps": 1e-2},
        "train": {
            "steps": 2,
            "log_every": 1,
            "save_every": 0,
            "precision": "fp32",
            "activation_checkpointing": True,
            # In four chunks, so that the head, and the table that it shares, runs several
            # times per step and again in the backward pass. With many more, the second
            # step of ZeRO-3 takes long.
            "loss_chunk_tokens": 48,
        },
        "sampler": {"cfg_scale": [1.9, 2.0], "temperature": [1.1, 1.0]},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    write_shards(folder / "shards", lfq, [["0", "3"], ["1", "4"]])
    return folder


@pytest.mark.launch
def test_zero_3_on_two_ranks_equals_one_rank(magvit_bench):
    """Where the head uses the embedding's table, ZeRO-3 must gather it there too, and
    sum both gradients.
    """
    from tests.helpers.runs import rows, run

    one = run(magvit_bench, "run.name=one")
    assert one.returncode == 0, one.stderr[-3000:]
    two = run(
        magvit_bench,
        "run.name=two",
        "zero.stage=3",
        "train.sample_every=2",
        "train.sample_prompts=['4']",
        ranks=2,
    )
    assert two.returncode == 0, (two.stdout + two.stderr)[-3000:]
    for a, b in zip(rows(magvit_bench, "one"), rows(magvit_bench, "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4), (a, b)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), (a, b)
    assert (magvit_bench / "runs" / "two" / "samples" / "step_2.png").is_file()
    loaded = model_folder.load(magvit_bench / "runs" / "two" / "model")
    assert loaded.image_tokenizer.factor_sizes == loaded.model.backbone.factor_sizes == (4, 8)


# ---- files: the backbone -------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    tiny_open_magvit2().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def load(path: Path, **settings) -> open_magvit2.OpenMagvit2Backbone:
    return backbones.load(open_magvit2.Config(name="open_magvit2", path=str(path), **settings))


def pickled(saved: Path, **changes: Tensor | None) -> Path:
    """The saved model as an official file: Lightning's pickle with the image tokenizer
    inside, next to config.json.
    """
    state = load_file(saved / "model.safetensors")
    state |= {"first_stage_model.encoder.conv_in.weight": torch.zeros(1)} | changes
    (saved / "model.safetensors").unlink()
    state = {name: value for name, value in state.items() if value is not None}
    torch.save({"state_dict": state, "epoch": 3, "pytorch-lightning_version": "2"}, saved / "tiny.ckpt")
    return saved


def test_round_trip_is_exact(saved):
    torch.manual_seed(0)
    made, loaded = tiny_open_magvit2().state_dict(), load(saved).state_dict()
    assert made.keys() == loaded.keys()
    assert all(torch.equal(made[name], loaded[name]) for name in made)
    assert "transformer.head.1.weight" in load_file(saved / "model.safetensors"), "the official names"
    official = load(pickled(saved)).state_dict()
    assert all(torch.equal(made[name], official[name]) for name in made)


def test_a_parameter_has_one_owner(saved):
    """The head looks the first factor up in the embedding's table: one parameter, saved
    once, trained by both.
    """
    backbone = load(saved)
    assert backbone.head.shared[0] is backbone.embed.pre_emb
    assert not [name for name in backbone.head.state_dict() if "pre_emb" in name]


def test_wrong_files_are_refused_by_name(saved):
    """The error lists missing and unexpected tensors, the first ten of each with the
    count, and then wrong shapes.
    """
    name = "transformer.spatial_blocks.1.ffn_norm.weight"
    state = load_file(saved / "model.safetensors")
    extra = {f"transformer.more.{i}": torch.zeros(1) for i in range(12)}
    save_file({k: v for k, v in state.items() if k != name} | extra, saved / "model.safetensors")
    sentence = rf"saved: 1 tensor is missing, {name}; 12 tensors are unexpected, among"
    with pytest.raises(ValueError, match=sentence) as caught:
        load(saved)
    assert str(caught.value).count("transformer.more") == 10
    save_file(state | {name: torch.zeros(1)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model.safetensors: {name} has shape \[1\], expected \[32\]"):
        load(saved)


def test_a_wrong_pickle_is_refused_by_name(saved, tmp_path):
    path = (
        pickled(saved, **{"transformer.norm.weight": None, "encoder.conv_in.weight": torch.zeros(1)})
        / "tiny.ckpt"
    )
    with pytest.raises(
        ValueError, match="1 tensor is missing, transformer.norm.weight; 1 tensor is unexpected, encoder"
    ):
        load(path)
    path.write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match="tiny.ckpt: cannot be read as PyTorch weights"):
        load(path)
    torch.save({"state_dict": {}, "hyper_parameters": Path("a")}, path)
    with pytest.raises(
        ValueError, match=r"tiny.ckpt: cannot be read as PyTorch weights \(it holds a pathlib\S*\)"
    ):
        load(path)
    with pytest.raises(ValueError, match="backbone.path: no file .*nowhere.ckpt"):
        load(tmp_path / "nowhere.ckpt")
    with pytest.raises(ValueError, match="backbone.path: no folder .*nowhere"):
        load(tmp_path / "nowhere")
    torch.save({}, saved / "second.ckpt")
    with pytest.raises(ValueError, match="has second.ckpt, tiny.ckpt; give one of these files as the path"):
        load(saved)
    for file in saved.glob("*.ckpt"):
        file.unlink()
    with pytest.raises(ValueError, match="saved has no model.safetensors, nor another weights file"):
        load(saved)


def test_an_official_file_of_unknown_width_is_refused(saved):
    """Without config.json the width distinguishes B, L and XL; then everything has to
    fit.
    """
    path = pickled(saved)
    (path / "config.json").unlink()
    with pytest.raises(
        ValueError, match="pre_emb.weight is 32 wide, expected 1024 for B, 1280 for L, 1536 for XL"
    ):
        load(path)
    torch.save({"state_dict": {"transformer.pre_emb.weight": torch.zeros(64, 1280)}}, path / "tiny.ckpt")
    with pytest.raises(
        ValueError, match=r"tiny.ckpt: 278 tensors are missing, among them transformer.class_emb"
    ):
        load(path)


def test_another_size_than_the_recipes_is_refused(saved):
    with pytest.raises(
        ValueError, match="size is B, but .* is of another size: dim 32, expected 1024, num_heads 2"
    ):
        load(saved, size="B")


def test_a_config_that_does_not_fit_is_named(saved):
    settings = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(settings | {"dim": "wide"}))
    with pytest.raises(ValueError, match=r"config.json: dim: expected a valid integer.*, got 'wide'"):
        load(saved)


def test_captions_are_class_numbers(saved):
    encode = backbones.caption_encoder(open_magvit2.Config(name="open_magvit2", path=str(saved)))
    condition = encode(["4", "0"])
    assert condition.values.tolist() == [[4], [0]] and condition.mask.all()
    for caption in ("5", "-1", "a red circle", ""):
        with pytest.raises(ValueError, match="expected 0 to 4"):
            encode([caption])


def test_the_last_row_of_the_table_is_not_a_class(saved):
    backbone = load(saved)
    prefix = backbone.prefix(class_condition(1, 2), torch.tensor([False, True]))
    assert torch.equal(prefix.embeds[:, 0], backbone.prefix.class_emb.embedding_table.weight[[1, 5]])


# ---- files: the image tokenizer ------------------------------------------------------------------


def load_lfq(path: Path, **settings) -> open_magvit2_lfq.LFQ:
    return image_tokenizers.load(open_magvit2_lfq.Config(name="open_magvit2_lfq", path=str(path), **settings))


def official(
    folder: Path, raw: open_magvit2_lfq.LFQ, ema: open_magvit2_lfq.LFQ | None, prefix: str = ""
) -> Path:
    """A tokenizer checkpoint as training saves it, or (with a prefix) the same inside
    an AR checkpoint.
    """
    raw.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    state = {prefix + name: value for name, value in raw.state_dict().items()}
    state[prefix + "loss.logvar"] = torch.zeros(1)
    if ema is not None:
        state |= {"model_ema." + name.replace(".", ""): value for name, value in ema.state_dict().items()}
        state |= {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    if prefix:
        state["transformer.pre_emb.weight"] = torch.zeros(1)
    torch.save({"state_dict": state}, folder / "tiny.ckpt")
    return folder


def test_averaged_weights_are_the_default_and_can_be_switched_off(tmp_path):
    """When raw weights exist too, the averaged ones are used by default.

    A saved tokenizer records which ones it has.
    """
    raw, ema = tiny_lfq(), tiny_lfq()
    path = official(tmp_path / "official", raw, ema)
    assert (
        load_lfq(path).weight_hash
        == load_lfq(path, ema=True).weight_hash
        == ema.weight_hash
        != raw.weight_hash
    )
    assert load_lfq(path, ema=False).weight_hash == raw.weight_hash
    load_lfq(path).save_pretrained(tmp_path / "saved")
    for setting in (None, True):
        assert load_lfq(tmp_path / "saved", ema=setting).weight_hash == ema.weight_hash
    with pytest.raises(ValueError, match="ema is false, but .*saved holds"):
        load_lfq(tmp_path / "saved", ema=False)


def test_the_tokenizer_inside_an_ar_checkpoint(tmp_path):
    raw = tiny_lfq()
    path = official(tmp_path / "ar", raw, None, "first_stage_model.")
    assert load_lfq(path).weight_hash == raw.weight_hash
    with pytest.raises(ValueError, match=r"ema is true, but .* has no averaged weights"):
        load_lfq(path, ema=True)


def test_codes_are_the_signs_of_the_decoders_input():
    """The test covers all codes, in both directions."""
    codes = torch.cartesian_prod(torch.arange(4), torch.arange(8)).unflatten(0, (2, 16))
    assert torch.equal(latents_to_codes(codes_to_latents(codes, (2, 3), (4, 4)), (2, 3)), codes)


def test_a_wrong_tokenizer_is_refused_by_name(tmp_path):
    path = official(tmp_path / "official", tiny_lfq(), None)
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"ch_mult": [1, 2]}))
    with pytest.raises(
        ValueError, match=r"ckpt: 2 tensors are missing, decoder.up.0.block.0.nin_shortcut.weight, encoder"
    ):
        load_lfq(path)
    (path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer \(it has 2 levels encoder.down.\*, expected 5 or 4\)"):
        load_lfq(path)
