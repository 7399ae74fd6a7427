"""Contracts: every file in backbones/ and image_tokenizers/, found by listing, passes
the same tests.

A new file needs a tiny model in TINY_BACKBONES or TINY_IMAGE_TOKENIZERS below; until it
has one it fails here.
"""

import copy
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import nn

import mmtensorar
from mmtensorar.captions.encoders import ClassNumbers, T5Features
from mmtensorar.model.conditions import CaptionEncoder, Condition
from mmtensorar.model.protocols import (
    Backbone,
    BackboneFile,
    ImageTokenizer,
    ImageTokenizerFile,
)
from mmtensorar.model.windows import slide
from mmtensorar.recipe import BackboneConfig, NamedSection, SamplerSettings
from mmtensorar.sampling.decode import decode
from mmtensorar.sampling.noise import greedy
from tests.helpers import fakes
from tests.helpers.decoding import generators, recompute
from tests.helpers.models import (
    noise,
    open_codec,
    random_codes,
    window_logits,
    wrap,
)

UNCOND = torch.tensor([False, True, False])


class Tiny(NamedTuple):
    """A backbone with random weights, and three different prompts for it, of different
    lengths where possible.
    """

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
    """One parameter per variant.

    A file without a tiny model gives one parameter, which then fails.
    """
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


def is_a(value, kind) -> bool:
    """Whether a value has an annotated type, for the annotations that our protocols
    use.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(is_a(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(is_a(item, arguments[0]) for item in value)
    if origin is type:
        return isinstance(value, type) and issubclass(value, arguments[0])
    if origin is Callable or kind is Callable:
        return callable(value)
    return isinstance(value, origin or kind)


def check_protocol(subject, protocol: type) -> None:
    """Every attribute that the protocol annotates exists with its type, and so does
    every method that it defines.
    """
    hints = get_type_hints(protocol)
    assert hints, "a protocol without attributes would prove nothing"
    for name, kind in hints.items():
        assert hasattr(subject, name), name
        assert is_a(getattr(subject, name), kind), name
    for name, value in vars(protocol).items():
        if callable(value) and not name.startswith("_"):
            assert callable(getattr(subject, name, None)), name


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", files("backbones"))
def test_a_backbone_file_has_the_names_of_the_protocol(name):
    """Its Config has the fields of every backbone's section, with a default that works
    on every machine.
    """
    file = importlib.import_module(f"mmtensorar.backbones.{name}")
    check_protocol(file, BackboneFile)
    fields = file.Config.model_fields
    assert issubclass(file.Config, BackboneConfig) and fields["name"].annotation == Literal[name]
    assert fields["attn_implementation"].default == "sdpa" and fields["path"].is_required()
    assert file.IMAGE_TOKENIZER in files("image_tokenizers")
    section = file.Config(name=name, path="x").at("there")
    assert isinstance(section, file.Config) and section.path == "there"


@pytest.mark.parametrize("name", files("image_tokenizers"))
def test_an_image_tokenizer_file_has_the_names_of_the_protocol(name):
    file = importlib.import_module(f"mmtensorar.image_tokenizers.{name}")
    check_protocol(file, ImageTokenizerFile)
    assert issubclass(file.Config, NamedSection)
    assert file.Config.model_fields["name"].annotation == Literal[name]


@pytest.mark.parametrize("attribute", ["SIGNATURES", "MODEL_TYPES"])
def test_no_two_files_claim_the_same_release(attribute):
    """Otherwise conversion would recognise one release as the other."""
    claims = [
        claim
        for folder in ("backbones", "image_tokenizers")
        for name in files(folder)
        for claim in getattr(importlib.import_module(f"mmtensorar.{folder}.{name}"), attribute)
    ]
    assert len(claims) == len(set(claims))


# ---- backbones -----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_backbone_has_the_parts_of_the_protocol(tiny):
    """Attributes have the right types, and modules accept and return the shapes that
    the protocol documents.
    """
    backbone, condition = tiny
    assert isinstance(backbone, nn.Module)
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
def test_the_example_condition_is_one_that_the_prefix_takes(tiny):
    """Plans run the model on it: it has the kind that the backbone declares, and its
    length.
    """
    backbone = tiny.backbone
    example = backbone.example_condition(3, 5)
    assert example.values.dtype == tiny.condition.values.dtype
    assert example.values.is_floating_point() == (backbone.condition == "features")
    assert example.mask.shape == (3, backbone.prefix_len or 5)
    assert backbone.prefix(example, UNCOND).embeds.shape == (*example.mask.shape, backbone.dim)


def test_the_declarations_of_a_backbone_are_usable(tiny):
    """Adapter targets are linear layers, and the sampler settings exist."""
    linear = [name for name, part in tiny.backbone.named_modules() if isinstance(part, nn.Linear)]
    assert any(re.fullmatch(tiny.backbone.lora_targets, name) for name in linear)
    SamplerSettings(**tiny.backbone.default_sampling)


def test_a_backbone_is_unchanged_by_saving_and_loading(tiny, tmp_path):
    """Through `save_pretrained` and `load`; tensor by tensor too, for models that do
    not fit into memory.
    """
    backbone = tiny.backbone
    backbone.save_pretrained(tmp_path)
    file = importlib.import_module(f"mmtensorar.backbones.{backbone.name}")
    section = file.Config(name=backbone.name, path=str(tmp_path))
    expected = backbone.state_dict()
    loaded, weights = file.load(section), file.lazy_weights(section)
    weights.check()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(loaded.state_dict()[name], value) and torch.equal(weights.value(name), value), name
    saved = {weights.saved_name(name) for name in expected}
    assert saved == {name for name, _ in weights.tensors()}
    (tmp_path / "empty").mkdir()
    backbone.save_config(tmp_path / "empty")
    config = "config.json"
    assert (tmp_path / "empty" / config).read_text() == (tmp_path / config).read_text()


@torch.no_grad()
def test_fresh_heads_change_nothing_at_offset_0(tiny):
    """Attaching TensorAR at K = 4 leaves the released model unchanged: the same hidden
    states, and the same logits of every factor.
    """
    backbone, condition = tiny
    plain, fresh = wrap(backbone, 1).eval(), wrap(copy.deepcopy(backbone), 4).eval()
    codes = random_codes(backbone)
    windows, valid = slide(codes[:, :-1], 4)
    windows[:, :, 1:] = windows.flip(0)[:, :, 1:]  # wrong drafts
    expected = plain.hidden(codes[:, :-1, None], valid[:, :1], condition, UNCOND)
    hidden = fresh.hidden(windows, valid, condition, UNCOND)
    assert torch.equal(hidden, expected)
    for factor in range(len(backbone.factor_sizes)):
        prev = codes[:, :, None, :factor]
        logits = window_logits(fresh, hidden, prev.expand(-1, -1, 4, -1))
        # Equal up to rounding, because some processors multiply four rows in another
        # order than one row.
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
    """Compares every window of every step: the cache, its positions and its mask are
    exact.
    """
    model = wrap(tiny.backbone, window).eval()
    if window > 1:
        open_codec(model)
    settings = SamplerSettings(cfg_scale=cfg_scale, lookahead=1)
    decoded = decode(model, tiny.condition, settings, draw=greedy, keep_trace=True)
    assert torch.equal(decoded.trace, recompute(model, tiny.condition, cfg_scale))
    settings = SamplerSettings(cfg_scale=cfg_scale, lookahead=3)
    ahead = decode(model, tiny.condition, settings, draw=greedy, keep_trace=True)
    assert torch.equal(ahead.trace, decoded.trace) and max(ahead.passes) <= max(decoded.passes)
    assert len(decoded.codes.flatten(1).unique(dim=0)) > 1, "equal images would prove little"


@torch.no_grad()
def test_several_rows_after_a_cache(tiny):
    """Several rows may follow a cache together, and attend to each other causally."""
    backbone = tiny.backbone.eval()
    prefix = backbone.prefix(tiny.condition, UNCOND)
    P, T = prefix.mask.shape[1], backbone.num_tokens
    rows = torch.cat([prefix.embeds, torch.randn(3, T - 1, backbone.dim)], dim=1)
    mask = torch.cat([prefix.mask, torch.ones(3, T - 1, dtype=torch.bool)], dim=1)
    cache = backbone.new_cache(P + T - 1)
    parts = [backbone(rows[:, :P], prefix.mask, cache)]
    parts += [backbone(rows[:, a:b], None, cache) for a, b in ((P, P + 4), (P + 4, P + T - 1))]
    # No other row attends to padded rows, and their values are up to the
    # implementation.
    found, expected = torch.cat(parts, dim=1)[mask], backbone(rows, mask)[mask]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("draw", [greedy, None], ids=["greedy", "sampled"])
@pytest.mark.parametrize("window, cfg_scale", [(1, 1.0), (3, 3.0)])
def test_an_image_does_not_depend_on_the_other_prompts_of_its_batch(tiny, window, cfg_scale, draw):
    """Prompts of unequal length in one batch: neither neighbours nor padding change an
    image.
    """
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
    """A parameter without a gradient is never trained, and under ZeRO it makes a rank
    wait.
    """
    model = open_codec(wrap(tiny.backbone, 3))
    model(random_codes(tiny.backbone), tiny.condition, UNCOND, noise()).loss.backward()
    trainable = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and not [name for name, gradient in trainable if gradient is None or not gradient.any()]


@pytest.mark.parametrize("encoder", [ClassNumbers(5), T5Features("x", num_slots=4, dim=6, cleaning="none")])
def test_a_caption_encoder_has_the_parts_of_the_protocol(encoder):
    """Data and generation use these parts, whatever the class."""
    check_protocol(encoder, CaptionEncoder)
    encoder.to(torch.device("cpu"))
    assert (encoder.identity() is None) == (encoder.kind != "features")


# ---- image tokenizers ----------------------------------------------------------------------------


def test_an_image_tokenizer_has_the_parts_of_the_protocol(image_tokenizer):
    assert isinstance(image_tokenizer, nn.Module)
    check_protocol(image_tokenizer, ImageTokenizer)
    assert image_tokenizer.name in TINY_IMAGE_TOKENIZERS


def test_an_image_tokenizer_is_frozen_and_in_eval_mode(image_tokenizer):
    """Also inside a model that trains."""
    nn.ModuleList([image_tokenizer]).train()
    assert not any(module.training for module in image_tokenizer.children())
    assert not any(parameter.requires_grad for parameter in image_tokenizer.parameters())


def test_pixels_become_codes_and_codes_pixels(image_tokenizer):
    """Checks shapes and ranges, also those of the vectors that stand for the codes.

    There are no gradients, a picture has the same codes in any batch, and another size
    is refused.
    """
    size, (down, across) = image_tokenizer.image_size, image_tokenizer.grid
    pixels = torch.rand(2, 3, size, size) * 2 - 1
    codes = image_tokenizer.encode(pixels)
    sizes = torch.tensor(image_tokenizer.factor_sizes)
    assert codes.shape == (2, down * across, len(sizes)) and codes.dtype == torch.int64
    assert (codes >= 0).all() and (codes < sizes).all()
    assert torch.equal(codes[1:], image_tokenizer.encode(pixels[1:]))
    decoded = image_tokenizer.decode(codes)
    assert decoded.shape == pixels.shape and decoded.isfinite().all() and not decoded.requires_grad
    vectors = image_tokenizer.vectors(codes)
    assert vectors.shape[:2] == codes.shape[:2] and vectors.dtype == torch.float32
    assert torch.equal(vectors[1:], image_tokenizer.vectors(codes[1:])) and not vectors.requires_grad
    with pytest.raises(
        ValueError, match=rf"pixels are \[{size}, {2 * size}\], the image tokenizer expects {size} a side"
    ):
        image_tokenizer.encode(torch.zeros(1, 3, size, 2 * size))


def test_an_image_tokenizer_is_unchanged_by_saving_and_loading(image_tokenizer, tmp_path):
    """Shards record the weight hash, which saving must not change.

    The file has half the bytes where that loses nothing.
    """
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
