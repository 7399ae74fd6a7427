"""Text features in shards: training reads from them what the text encoder would have
computed.
"""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data_tools import check_shards, encode_text, storage
from mmtensorar import backbones
from mmtensorar.backbones import llamagen
from mmtensorar.captions import encoders
from mmtensorar.data import checks, loader
from mmtensorar.data.members import decode_features, encode_codes, encode_features
from mmtensorar.data.shards import Codes, Manifest, Sample, iterate_tar, write_tar
from mmtensorar.recipe import Data, Run, Train
from tests.helpers.fakes import tiny_llamagen, write_tiny_janus, write_tiny_t5

CAPTIONS = [
    "a RED circle",
    "circle",
    "a red",
    "red red",
    "a " * 9,
    "a circle",
]  # five tokens at most, including the end token
LENGTHS = [4, 2, 3, 3, 5, 3]
CODES = Codes(image_tokenizer="fake", weight_hash="a" * 64, grid=(3, 3), factor_sizes=(11,), crops=1)


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    write_tiny_t5(folder)
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    """A text-conditional LlamaGen with 5 slots of 6 numbers."""
    folder = tmp_path_factory.mktemp("backbone")
    tiny_llamagen("text").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three shards of two samples, with codes."""
    folder = tmp_path / "set"
    folder.mkdir()
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "JPEG")
    written = []
    for first in range(0, 6, 2):
        samples = []
        for index in (first, first + 1):
            members = {"jpg": image.getvalue(), "txt": CAPTIONS[index].encode(), "json": b"{}"}
            members["codes.npy"] = encode_codes(np.full((1, 9, 1), index, np.uint16))
            samples.append(Sample(f"{index:09d}", members))
        written.append(write_tar(folder / f"{first:05d}.tar", samples))
    Manifest(shards=tuple(written), num_samples=6, image_size=8, codes=CODES, source="test", seed=0).write(
        folder
    )
    return folder


def encode(folder: Path, t5: Path, *arguments: str) -> int:
    options = [
        "--text-encoder",
        str(t5),
        "--caption-cleaning",
        "lower",
        "--max-tokens",
        "5",
        "--batch-size",
        "2",
    ]
    return encode_text.main([str(folder), *options, *arguments])


def members(folder: Path) -> list[dict[str, bytes]]:
    return [
        sample.members
        for shard in Manifest.read(folder).shards
        for sample in iterate_tar(folder / shard.name)
    ]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def make_recipe(
    folder: Path, backbone: Path, t5: str | Path, text_features: str, **settings
) -> SimpleNamespace:
    settings = {"caption_cleaning": "lower"} | settings
    return SimpleNamespace(
        run=Run(name="test"),
        backbone=llamagen.Config(name="llamagen", path=str(backbone), text_encoder=str(t5), **settings),
        data=Data(shards=str(folder), batch_size=3, uncond_rate=0.5, shuffle=4, text_features=text_features),
        train=Train(steps=1),
    )


def preflight(recipe) -> None:
    image_tokenizer = SimpleNamespace(name="fake", weight_hash="a" * 64, grid=(3, 3), factor_sizes=(11,))
    encoder = backbones.caption_encoder(recipe.backbone)
    checks.preflight(recipe, image_tokenizer, encoder, world_size=1)


# ---- what is written -------------------------------------------------------------------------


def test_only_real_tokens_are_stored_and_their_bytes_are_reported(folder, t5, capsys):
    before = members(folder)
    assert encode(folder, t5) == 0
    printed = capsys.readouterr().out
    assert Manifest.read(folder).text_features.model_dump() == {
        "text_encoder": str(t5),
        "weight_hash": encoders.encoder_hash(str(t5)),
        "width": 6,
        "max_tokens": 5,
        "cleaning": "lower",
    }
    features = [decode_features(sample["t5.npy"], "") for sample in members(folder)]
    assert [row.shape for row in features] == [(length, 6) for length in LENGTHS]
    reference = encoders.T5Features(str(t5), num_slots=5, dim=6, cleaning="lower")
    for caption, row in zip(CAPTIONS, features, strict=True):
        np.testing.assert_allclose(row, reference.features([caption])[0], atol=2e-3)
    assert [{k: v for k, v in sample.items() if k != "t5.npy"} for sample in members(folder)] == before
    # A header and a block per sample: features this small do not need a second block.
    assert (
        f"{6 * 1024} bytes in the shards, 1024 a caption: 1.02e+09 bytes (1.02 GB) per million captions"
        in printed
    )
    assert check_shards.main([str(folder)]) == 0
    assert f"text features of {t5}" in capsys.readouterr().out


def test_encoding_twice_does_nothing_and_another_cleaning_replaces(folder, t5, capsys, monkeypatch):
    assert encode(folder, t5) == 0
    before = content(folder)
    monkeypatch.setattr(encoders.T5Features, "_load", None)  # not even the encoder is loaded
    assert encode(folder, t5) == 0 and content(folder) == before
    assert "reusing" in capsys.readouterr().out
    monkeypatch.undo()
    assert encode(folder, t5, "--caption-cleaning", "none") == 0
    assert Manifest.read(folder).text_features.cleaning == "none"
    assert content(folder) != before and check_shards.main([str(folder)]) == 0


def test_interrupted_encoding_resumes_and_leaves_a_complete_set_meanwhile(folder, t5, monkeypatch):
    before, real, calls = content(folder), encoders.T5Features.features, []

    def dying(self, texts):
        calls.append(texts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, texts)

    monkeypatch.setattr(encoders.T5Features, "features", dying)
    assert encode(folder, t5) == 130
    assert content(folder) == before and check_shards.main([str(folder)]) == 0
    assert encode(folder, t5) == 0
    assert len(calls) == 4, "the first shard was not encoded again"
    cut = content(folder)
    assert encode(folder, t5, "--max-tokens", "4") == encode(folder, t5) == 0
    assert content(folder) == cut


@pytest.mark.parametrize(("count", "is_whole"), [(1, True), (3, True), (4, False), (7, False)])
def test_a_number_above_the_names_says_so(count, is_whole):
    """Of seven emptied captions three were named, without a word on the others."""
    assert ("the first ones named above" not in encode_text.emptied_note(count, "original")) == is_whole


def test_nothing_is_encoded_while_another_process_writes(folder, t5, capsys):
    before = content(folder)
    with storage.only_writer(folder):
        assert encode(folder, t5) == 2
    assert "another process is writing" in capsys.readouterr().err and content(folder) == before


def test_the_hash_is_of_the_encoder_in_any_layout(t5, tmp_path):
    """Released files also hold T5's decoder, and some of them hold the embeddings
    twice.
    """
    state = load_file(t5 / "model.safetensors")
    twice = state["shared.weight"].clone()
    more = {"decoder.final_layer_norm.weight": torch.ones(6), "encoder.embed_tokens.weight": twice}
    save_file(state | more, tmp_path / "model.safetensors")
    assert encoders.encoder_hash(str(tmp_path)) == encoders.encoder_hash(str(t5))
    state["encoder.final_layer_norm.weight"] += 1
    save_file(state, tmp_path / "model.safetensors")
    assert encoders.encoder_hash(str(tmp_path)) != encoders.encoder_hash(str(t5))


# ---- what training reads ---------------------------------------------------------------------


@pytest.mark.parametrize("skip", [0, 3])
def test_live_and_cached_give_the_same_batches(folder, t5, backbone, skip):
    """Features are equal up to the rounding to float16.

    Order, codes, random draws, positions and padding are equal.
    """
    assert encode(folder, t5) == 0
    batches = []
    for text_features in ("live", "cached"):
        recipe = make_recipe(folder, backbone, t5, text_features)
        preflight(recipe)
        stream = loader.stream(
            recipe, backbones.caption_encoder(recipe.backbone), rank=0, world_size=1, skip_batches=skip
        )
        batches.append([next(stream) for _ in range(4)])
    for (codes, live, uncond, *_), (codes_too, cached, uncond_too, *_) in zip(*batches, strict=True):
        assert torch.equal(codes, codes_too) and torch.equal(uncond, uncond_too)
        assert live.values.shape == cached.values.shape == (3, 5, 6) and cached.values.dtype == torch.float32
        assert torch.equal(live.mask, cached.mask)
        assert not cached.values[~cached.mask].any()
        torch.testing.assert_close(live.values, cached.values, rtol=2**-10, atol=1e-4)
        assert not torch.equal(live.values, cached.values), "these are not the live features"


def test_training_on_cached_features_needs_no_text_encoder(folder, t5, backbone, monkeypatch):
    assert encode(folder, t5) == 0
    manifest = Manifest.read(folder)
    named = manifest.text_features.model_copy(update={"text_encoder": "google/flan-t5-xl"})
    manifest.model_copy(update={"text_features": named}).write(folder)
    monkeypatch.setattr(encoders.T5Features, "_load", None)
    recipe = make_recipe(folder, backbone, "google/flan-t5-xl", "cached")
    preflight(recipe)
    _, condition, *_ = next(
        loader.stream(recipe, backbones.caption_encoder(recipe.backbone), rank=0, world_size=1)
    )
    assert condition.values.any()


def test_what_the_manifest_and_the_recipe_disagree_on_is_named(folder, t5, backbone, tmp_path):
    other = tmp_path / "other"
    write_tiny_t5(other, seed=1)
    with pytest.raises(
        ValueError, match="cached, but .* has no text features; run mmtensorar shards encode-text"
    ):
        preflight(make_recipe(folder, backbone, t5, "cached"))
    assert encode(folder, t5) == 0
    for settings, sentence in (
        ((t5, "none"), "caption cleaning: .* has lower .* none;"),
        ((other, "lower"), f"text encoder: .* has {t5} .* {other} "),
        (("google/flan-t5-xl", "lower"), f"text encoder: .* has {t5} .* google/flan-t5-xl;"),
    ):
        text_encoder, cleaning = settings
        with pytest.raises(
            ValueError, match=f"{sentence}.*run mmtensorar shards encode-text again, or set data.text_feat"
        ):
            preflight(make_recipe(folder, backbone, text_encoder, "cached", caption_cleaning=cleaning))
    assert encode(folder, t5, "--max-tokens", "4") == 0
    with pytest.raises(ValueError, match="most tokens of a caption: .* has 4 .* backbone 5;"):
        preflight(make_recipe(folder, backbone, t5, "cached"))
    copy = tmp_path / "copy"
    write_tiny_t5(copy)
    assert encode(folder, t5) == 0
    preflight(make_recipe(folder, backbone, copy, "cached"))  # the same weights in another folder


def test_a_backbone_without_text_features_refuses_cached_ones(folder, tmp_path):
    from mmtensorar.backbones import janus

    write_tiny_janus(tmp_path / "janus")
    recipe = make_recipe(folder, "unused", "unused", "cached")
    recipe.backbone = janus.Config(name="janus", path=str(tmp_path / "janus"))
    with pytest.raises(
        ValueError, match="cached, but the janus backbone takes no text features; expected live"
    ):
        preflight(recipe)


# ---- what a user can get wrong ---------------------------------------------------------------


def test_mistakes_are_sentences(folder, t5, tmp_path, capsys):
    def sentence(code: int) -> str:
        error = capsys.readouterr().err
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        return error

    assert "--text-encoder: no folder ./none" in sentence(encode(folder, "./none"))
    assert "no such folder" in sentence(encode(tmp_path / "absent", t5))
    empty = tmp_path / "empty"
    empty.mkdir()
    save_file({"x": torch.zeros(1)}, empty / "model.safetensors")
    assert "holds no T5 encoder" in sentence(encode(folder, empty))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"classes": ["cat", "dog"]}))
    assert "numbers of 2 classes, which have no text features" in sentence(encode(folder, t5))


def test_features_that_float16_cannot_hold_are_refused(folder, t5, tmp_path, capsys):
    """Infinite features would end training days later, with a loss that is not
    finite.
    """
    state = load_file(t5 / "model.safetensors")
    state["encoder.final_layer_norm.weight"] *= 1e6
    loud = tmp_path / "loud"
    write_tiny_t5(loud)
    save_file(state, loud / "model.safetensors", {"format": "pt"})
    assert encode(folder, loud) == 2
    assert "sample 000000000: t5.npy holds numbers that are not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"t5.npy": None}, "no t5.npy, but the manifest says that the set has text features"),
        ({"t5.npy": b"\x80\x04."}, "t5.npy is not a plain numpy array"),
        (
            {"t5.npy": encode_features(np.zeros((6, 6), np.float16))},
            "has shape [6, 6], the manifest says [1 to",
        ),
    ],
)
def test_damage_is_reported_by_the_check_and_by_the_loader(folder, t5, backbone, capsys, change, expected):
    assert encode(folder, t5) == 0
    manifest = Manifest.read(folder)
    first, *rest = manifest.shards
    head, *tail = iterate_tar(folder / first.name)
    kept = {name: value for name, value in (head.members | change).items() if value is not None}
    written = write_tar(folder / first.name, [Sample(head.key, kept), *tail])
    manifest.model_copy(update={"shards": (written, *rest)}).write(folder)
    assert check_shards.main([str(folder)]) == 2
    assert expected in capsys.readouterr().err
    stream = loader.stream(make_recipe(folder, backbone, t5, "cached"), None, rank=0, world_size=1)
    with pytest.raises(ValueError, match="sample 000000000: (no )?t5.npy"):
        [next(stream) for _ in range(2)]


@pytest.mark.parametrize(
    "number, sentences",
    [
        (0, []),
        (1, ["1 caption encoded now was longer than --max-tokens and was cut"]),
        (
            6,
            ["6 captions encoded now were longer than --max-tokens and were cut, the first ones named above"],
        ),
    ],
)
def test_cut_captions_are_counted_in_a_sentence(number, sentences):
    cut = encode_text.CutCaptions()
    cut.count = number
    assert cut.notes() == sentences


@pytest.mark.parametrize("others", [0, 3, 40])
def test_cut_captions_of_all_ranks_are_one_number(monkeypatch, capsys, tmp_path, others):
    """Each rank printed its own."""
    cut = encode_text.CutCaptions()
    cut.count = 2
    monkeypatch.setattr(encode_text, "sum_over_ranks", lambda number: number + others)
    encode_text.print_cut(cut)
    assert capsys.readouterr().err.startswith(f"note: {2 + others} captions encoded now")
    monkeypatch.setattr(encode_text.ranks, "is_first", lambda: False)
    encode_text.print_cut(cut)
    assert capsys.readouterr().err == ""
