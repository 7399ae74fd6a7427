"""The contracts: every file in backbones/ and image_tokenizers/, found by listing, passes the same tests.

A new file needs a tiny model in TINY_BACKBONES or TINY_IMAGE_TOKENIZERS below; until then it fails here.
"""

import copy
import importlib
from pathlib import Path
from typing import Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import nn

import mmtensorar
from mmtensorar.image_tokenizers import ImageTokenizer
from mmtensorar.model.conditions import Condition
from mmtensorar.model.protocols import Backbone
from mmtensorar.model.windows import slide
from mmtensorar.recipe import SamplerSettings, Section
from mmtensorar.sampling.decode import decode
from mmtensorar.sampling.noise import greedy
from tests.helpers import fakes
from tests.helpers.models import (
    generators,
    noise,
    open_codec,
    random_codes,
    recompute,
    window_logits,
    wrap,
)

UNCOND = torch.tensor([False, True, False])


class Tiny(NamedTuple):
    """A backbone with random weights and prompts for it, three rows that differ (in length too, where it can)."""

    backbone: nn.Module
    condition: Condition


def llamagen(kind: str) -> Tiny:
    backbone = fakes.tiny_llamagen(kind)
    return Tiny(backbone, fakes.llamagen_condition(backbone))


# file -> variant -> builder
TINY_BACKBONES = {
    "janus": {"": lambda: Tiny(fakes.tiny_janus(), fakes.fake_condition())},
    "llamagen": {"class": lambda: llamagen("class"), "text": lambda: llamagen("text")},
    "open_magvit2": {"": lambda: Tiny(fakes.tiny_open_magvit2(), fakes.class_condition(0, 3, 4))},
}
TINY_IMAGE_TOKENIZERS = {
    "janus_vq": fakes.tiny_janus_vq,
    "llamagen_vq": fakes.tiny_llamagen_vq,
    "open_magvit2_lfq": fakes.tiny_lfq,
}


def files(folder: str) -> list[str]:
    paths = (Path(mmtensorar.__file__).parent / folder).glob("*.py")
    return sorted(path.stem for path in paths if not path.stem.startswith("_"))


def variants() -> list:
    """One parameter per variant, or for a file without a tiny model the file alone, which then fails."""
    return [
        pytest.param((name, variant), id=f"{name}-{variant}" if variant else name)
        for name in files("backbones")
        for variant in TINY_BACKBONES.get(name, [""])
    ]


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=variants())
def tiny(request) -> Tiny:
    name, variant = request.param
    assert name in TINY_BACKBONES, (
        f"backbones/{name}.py has no tiny model in tests/backbones/test_contract.py"
    )
    return TINY_BACKBONES[name][variant]()


@pytest.fixture(params=files("image_tokenizers"))
def image_tokenizer(request) -> nn.Module:
    assert request.param in TINY_IMAGE_TOKENIZERS, (
        f"image_tokenizers/{request.param}.py has no tiny model in tests/backbones/test_contract.py"
    )
    return TINY_IMAGE_TOKENIZERS[request.param]()


def check_protocol(model: nn.Module, protocol: type) -> None:
    """Every attribute that the protocol annotates, of its kind, and every method it defines."""
    assert isinstance(model, nn.Module)
    hints = get_type_hints(protocol)
    assert hints, "a protocol without attributes would prove nothing"
    for name, kind in hints.items():
        value = getattr(model, name)
        if get_origin(kind) is Union:
            assert any(
                value in get_args(part) if get_origin(part) is Literal else isinstance(value, part)
                for part in get_args(kind)
            )
            continue
        assert isinstance(value, get_origin(kind) or kind), name
        if get_origin(kind) is tuple:
            assert value and all(isinstance(item, get_args(kind)[0]) for item in value), name
    for name, value in vars(protocol).items():
        if callable(value) and not name.startswith("_"):
            assert callable(getattr(model, name)), name


# ---- backbones -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder, functions", [("backbones", ["caption_encoder", "unread"]), ("image_tokenizers", [])]
)
def test_every_file_has_its_config_and_load(folder, functions):
    """A recipe's `name` is the file's, and finds these in it."""
    for name in files(folder):
        module = importlib.import_module(f"mmtensorar.{folder}.{name}")
        assert issubclass(module.Config, Section), name
        assert module.Config.model_fields["name"].annotation == Literal[name], name
        assert all(callable(getattr(module, function, None)) for function in ["load", *functions]), name


@torch.no_grad()
def test_a_backbone_has_the_parts_of_the_protocol(tiny):
    """Attributes of the right kinds, and modules that take and give the shapes that the protocol says."""
    backbone, condition = tiny
    check_protocol(backbone, Backbone)
    B, T, D = 3, backbone.num_tokens, backbone.dim
    codes, prefix = random_codes(backbone), backbone.prefix(condition, UNCOND)
    P = prefix.mask.shape[1]
    assert prefix.embeds.shape == (B, P, D) and prefix.mask.dtype == torch.bool and prefix.mask[:, -1].all()
    embeds = backbone.embed(codes[:, :, None])
    assert embeds.shape == (B, T, 1, D), "codes may have any leading shape"
    rows = torch.cat([prefix.embeds, embeds[:, :, 0]], dim=1)[:, :-1]
    mask = torch.cat([prefix.mask, torch.ones(B, T - 1, dtype=torch.bool)], dim=1)
    hidden = backbone(rows, mask)
    assert hidden.shape == rows.shape
    for factor, size in enumerate(backbone.factor_sizes):
        prev = codes[:, :, None, :factor]
        logits = backbone.head(hidden[:, P - 1 :, None], prev)
        assert logits.shape == (B, T, 1, size)
        halves = backbone.head.output_maps[factor](backbone.head.states(hidden[:, P - 1 :, None], prev))
        assert torch.equal(halves, logits)
    assert len(backbone.head.output_maps) == len(backbone.factor_sizes)


@torch.no_grad()
def test_fresh_heads_change_nothing_at_offset_0(tiny):
    """Attaching TensorAR at K = 4 leaves the model that was released: the same hidden states, and logits of every factor."""
    backbone, condition = tiny
    plain, fresh = wrap(backbone, 1).eval(), wrap(copy.deepcopy(backbone), 4).eval()
    codes = random_codes(backbone)
    windows, valid = slide(codes[:, :-1], 4)
    windows[:, :, 1:] = windows.flip(0)[:, :, 1:]  # drafts that are wrong
    expected = plain.hidden(codes[:, :-1, None], valid[:, :1], condition, UNCOND)
    hidden = fresh.hidden(windows, valid, condition, UNCOND)
    assert torch.equal(hidden, expected)
    for factor in range(len(backbone.factor_sizes)):
        prev = codes[:, :, None, :factor]
        logits = window_logits(fresh, hidden, prev.expand(-1, -1, 4, -1))
        # Within rounding, for some processors multiply four rows in another order than one.
        torch.testing.assert_close(
            logits[:, :, 0], window_logits(plain, expected, prev)[:, :, 0], rtol=1e-5, atol=1e-6
        )
    images = [
        decode(model, condition, SamplerSettings(cfg_scale=3.0), draw=greedy).codes
        for model in (plain, fresh)
    ]
    assert torch.equal(*images)


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("window", [1, 4])
def test_cached_decoding_equals_recomputation(tiny, window, cfg_scale):
    """Every window of every step: the cache, its places and its mask are exact."""
    model = wrap(tiny.backbone, window).eval()
    if window > 1:
        open_codec(model)
    settings = SamplerSettings(cfg_scale=cfg_scale)
    decoded = decode(model, tiny.condition, settings, draw=greedy, keep_trace=True)
    assert torch.equal(decoded.trace, recompute(model, tiny.condition, cfg_scale))
    settings = SamplerSettings(cfg_scale=cfg_scale, lookahead=3)
    ahead = decode(model, tiny.condition, settings, draw=greedy, keep_trace=True)
    assert torch.equal(ahead.trace, decoded.trace) and ahead.passes <= decoded.passes
    assert len(decoded.codes.flatten(1).unique(dim=0)) > 1, "equal images would prove little"


@torch.no_grad()
def test_several_rows_after_a_cache(tiny):
    """Rows may follow a cache together, and see each other causally."""
    backbone = tiny.backbone.eval()
    prefix = backbone.prefix(tiny.condition, UNCOND)
    P, T = prefix.mask.shape[1], backbone.num_tokens
    rows = torch.cat([prefix.embeds, torch.randn(3, T - 1, backbone.dim)], dim=1)
    mask = torch.cat([prefix.mask, torch.ones(3, T - 1, dtype=torch.bool)], dim=1)
    cache = backbone.new_cache(P + T - 1)
    parts = [backbone(rows[:, a:b], mask[:, :b], cache) for a, b in ((0, P), (P, P + 4), (P + 4, P + T - 1))]
    # Padded rows reach nobody, and are each implementation's own affair.
    found, expected = torch.cat(parts, dim=1)[mask], backbone(rows, mask)[mask]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("draw", [greedy, None], ids=["greedy", "sampled"])
@pytest.mark.parametrize("window, cfg_scale", [(1, 1.0), (3, 3.0)])
def test_a_prompt_gives_the_image_it_has_alone(tiny, window, cfg_scale, draw):
    """Prompts of unequal length in one batch: neither neighbours nor padding leave a mark."""
    model, condition = wrap(tiny.backbone, window).eval(), tiny.condition
    if window > 1:
        open_codec(model)
    settings = SamplerSettings(cfg_scale=cfg_scale, temperature=0.9, top_k=8)
    together = decode(model, condition, settings, draw=draw, generator=generators(5, 6, 7)).codes
    assert len(together.unique(dim=0)) > 1
    for i in range(3):
        one = Condition(condition.values[i : i + 1], condition.mask[i : i + 1])
        alone = decode(model, one, settings, draw=draw, generator=generators(5 + i)).codes
        assert torch.equal(alone[0], together[i]), i


def test_every_trainable_parameter_gets_a_gradient(tiny):
    """One without is dead weight, and under ZeRO a rank that waits."""
    model = open_codec(wrap(tiny.backbone, 3))
    model(random_codes(tiny.backbone), tiny.condition, UNCOND, noise()).loss.backward()
    trainable = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and not [name for name, gradient in trainable if gradient is None or not gradient.any()]


# ---- image tokenizers ----------------------------------------------------------------------------


def test_an_image_tokenizer_has_the_parts_of_the_protocol(image_tokenizer):
    check_protocol(image_tokenizer, ImageTokenizer)
    assert image_tokenizer.name in TINY_IMAGE_TOKENIZERS


def test_an_image_tokenizer_is_frozen_and_in_eval_mode(image_tokenizer):
    """Also inside a model that trains."""
    nn.ModuleList([image_tokenizer]).train()
    assert not any(module.training for module in image_tokenizer.children())
    assert not any(parameter.requires_grad for parameter in image_tokenizer.parameters())


def test_pixels_become_codes_and_codes_pixels(image_tokenizer):
    """Shapes, ranges, no gradients; a picture has the codes it has alone; another size is refused."""
    size, (down, across) = image_tokenizer.image_size, image_tokenizer.grid
    pixels = torch.rand(2, 3, size, size) * 2 - 1
    codes = image_tokenizer.encode(pixels)
    sizes = torch.tensor(image_tokenizer.factor_sizes)
    assert codes.shape == (2, down * across, len(sizes)) and codes.dtype == torch.int64
    assert (codes >= 0).all() and (codes < sizes).all()
    assert torch.equal(codes[1:], image_tokenizer.encode(pixels[1:]))
    decoded = image_tokenizer.decode(codes)
    assert decoded.shape == pixels.shape and decoded.isfinite().all() and not decoded.requires_grad
    with pytest.raises(
        ValueError, match=rf"pixels are \[{size}, {2 * size}\], the image tokenizer expects {size} a side"
    ):
        image_tokenizer.encode(torch.zeros(1, 3, size, 2 * size))


def test_an_image_tokenizer_is_itself_after_a_round_trip(image_tokenizer, tmp_path):
    """Shards record the weight hash, which a file must not change; in half the bytes where that loses nothing."""
    module = importlib.import_module(f"mmtensorar.image_tokenizers.{image_tokenizer.name}")
    section = module.Config(name=image_tokenizer.name, path=str(tmp_path))
    image_tokenizer.save_pretrained(tmp_path)
    found = module.load(section)
    assert found.weight_hash == image_tokenizer.weight_hash
    assert (found.grid, found.image_size) == (image_tokenizer.grid, image_tokenizer.image_size)
    full = (tmp_path / "model.safetensors").stat().st_size
    for parameter in found.parameters():
        parameter.copy_(parameter.half())
    found.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 0.8 * full
    assert all(
        torch.equal(a, b) for a, b in zip(module.load(section).parameters(), found.parameters(), strict=True)
    )
