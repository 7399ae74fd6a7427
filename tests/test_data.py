"""The loader: what a rank receives is a pure function of (recipe, rank, world size), and damage is a sentence."""

import io
import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mmtensorar import data
from mmtensorar.backbones import Condition
from mmtensorar.captions import ClassNumbers
from mmtensorar.recipe import Data, Run, Train
from mmtensorar.shards import Codes, Manifest, Sample, encode_codes, write_tar

GRID, NUM_CODES = (1, 2), 1000


def write_set(folder: Path, counts: list[int], crops: int = 1) -> Path:
    """Shards in which sample i of the set has the caption "i" and the codes [i, i]; crop a of several has [i, a]."""
    folder.mkdir()
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "JPEG")
    shards, index = [], 0
    for number, count in enumerate(counts):
        samples = []
        for _ in range(count):
            members = {"jpg": image.getvalue(), "txt": str(index).encode(), "json": b"{}"}
            codes = [[index, crop if crops > 1 else index] for crop in range(crops)]
            members["codes.npy"] = encode_codes(np.array(codes, np.uint16)[..., None])
            samples.append(Sample(f"{index:09d}", members))
            index += 1
        shards.append(write_tar(folder / f"{number:05d}.tar", samples))
    codes = Codes(image_tokenizer="fake", weight_hash="a" * 64, grid=GRID, factor_sizes=(NUM_CODES,), crops=crops)
    Manifest(shards=tuple(shards), num_samples=index, image_size=8, codes=codes, source="test", seed=0).write(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("data") / "set", [5, 7, 6, 4])


def make_recipe(folder: Path, *, batch_size=4, grad_accum=1, seed=3, **settings) -> SimpleNamespace:
    """The three sections that the loader reads."""
    settings = {"shuffle": 4, "uncond_rate": 0.5} | settings
    return SimpleNamespace(
        run=Run(name="test", seed=seed),
        data=Data(shards=str(folder), batch_size=batch_size, **settings),
        train=Train(steps=1, grad_accum=grad_accum),
    )


def caption_encoder(captions: list[str]) -> Condition:
    values = torch.tensor([[int(caption)] for caption in captions])
    return Condition(values, torch.ones_like(values, dtype=torch.bool))


def take(recipe, count: int, *, rank=0, world_size=1, skip=0) -> list[tuple[list[int], list[bool]]]:
    """The next batches as ([sample numbers], [uncond]); codes and captions must be of the same samples."""
    batches = []
    stream = data.stream(recipe, caption_encoder, rank=rank, world_size=world_size, skip_batches=skip)
    for codes, condition, uncond in islice(stream, count):
        assert codes.dtype == torch.int64 and uncond.dtype == torch.bool
        assert torch.equal(codes, condition.values[:, None].expand(-1, 2, 1))
        batches.append((condition.values[:, 0].tolist(), uncond.tolist()))
    return batches


def numbers(batches) -> list[int]:
    return [number for batch, _ in batches for number in batch]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipping_equals_having_read(folder, num_workers):
    """A resumed run goes on with exactly the batches it would have seen: in an epoch, at its end, epochs later."""
    recipe = make_recipe(folder, num_workers=num_workers)
    whole = take(recipe, 20)  # 80 rows of a set of 22
    for skip in (1, 5, 14) if num_workers == 0 else (5,):
        assert take(recipe, 20 - skip, skip=skip) == whole[skip:]


def test_every_epoch_holds_every_sample_once_in_another_order(folder):
    seen = numbers(take(make_recipe(folder, batch_size=11), 4))
    first, second = seen[:22], seen[22:]
    assert sorted(first) == sorted(second) == list(range(22))
    assert first != second != sorted(second)


def test_the_seed_changes_the_order_and_the_coins(folder):
    one, other = (take(make_recipe(folder, seed=seed), 5) for seed in (1, 2))
    assert one == take(make_recipe(folder, seed=1), 5)
    assert [batch for batch, _ in one] != [batch for batch, _ in other]
    assert [coins for _, coins in one] != [coins for _, coins in other]


def test_without_shuffle_buffer_a_lane_is_read_in_its_order(folder):
    """A batch of one row is one lane: the shards one after another."""
    seen = numbers(take(make_recipe(folder, batch_size=1, shuffle=0), 22))
    starts = {0: 5, 5: 7, 12: 6, 18: 4}
    while seen:
        start = seen[0]
        assert seen[: starts[start]] == list(range(start, start + starts[start]))
        seen = seen[starts[start] :]


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """101 samples in 24 shards of very different sizes."""
    return write_set(tmp_path_factory.mktemp("many") / "set", [1, 2, 3, 11, 1, 2, 3, 7] * 3 + [11])


def global_batches(folder: Path, world_size: int, num_workers: int, steps: int, *, skip: int = 0, grad_accum: int = 1) -> list:
    """Per step the samples and coins of all ranks, in the order of the global batch."""
    recipe = make_recipe(folder, batch_size=16, num_workers=num_workers, shuffle=48, grad_accum=grad_accum)
    ranks = [
        take(recipe, steps * grad_accum, rank=rank, world_size=world_size, skip=skip * grad_accum)
        for rank in range(world_size)
    ]
    found = []
    for step in range(steps):
        parts = [ranks[r][step * grad_accum + micro] for micro in range(grad_accum) for r in range(world_size)]
        found.append((numbers(parts), [coin for _, coins in parts for coin in coins]))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_the_order_is_the_same_for_any_number_of_ranks_and_readers(many, world_size, num_workers):
    steps = 15  # past two ends of an epoch, neither with a batch
    assert global_batches(many, world_size, num_workers, steps) == global_batches(many, 1, 0, steps)


@pytest.mark.parametrize("grad_accum", [2, 4])
def test_the_order_is_the_same_for_any_accumulation(many, grad_accum):
    assert global_batches(many, 2, 0, 5, grad_accum=grad_accum) == global_batches(many, 1, 0, 5)


def test_a_run_goes_on_with_another_number_of_ranks(many):
    """2 ranks, then 1, then 4: no sample is lost or seen twice."""
    whole = global_batches(many, 1, 0, 14)
    parts = global_batches(many, 2, 1, 5) + global_batches(many, 1, 3, 4, skip=5) + global_batches(many, 4, 0, 5, skip=9)
    assert parts == whole
    seen = [number for batch, _ in parts for number in batch]
    assert sorted(seen[:101]) == list(range(101)) and sorted(seen[101:202]) == list(range(101))


def test_the_uncond_rate_is_the_share_of_rows_without_prompt(folder):
    def share(rate):
        return np.mean([c for _, coins in take(make_recipe(folder, batch_size=100, uncond_rate=rate), 10) for c in coins])

    assert share(0.0) == 0 and share(1.0) == 1
    assert abs(share(0.1) - 0.1) < 0.04


def test_ranks_share_the_shards_and_the_batch(tmp_path):
    """In an epoch no two ranks see the same sample, and together they see all."""
    folder = write_set(tmp_path / "set", [3] * 8)
    recipe = make_recipe(folder, batch_size=12, grad_accum=2)
    parts = [numbers(take(recipe, 4, rank=rank, world_size=2)) for rank in (0, 1)]  # 4 batches of 12 / (2 * 2)
    assert not set(parts[0]) & set(parts[1])
    assert sorted(parts[0] + parts[1]) == list(range(24))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_crop_is_drawn_anew_each_time_and_a_resumed_run_draws_the_same(tmp_path, num_workers):
    folder = write_set(tmp_path / "set", [5, 7, 6, 4], crops=10)

    def drawn(count: int, *, seed: int = 3, skip: int = 0) -> list[list[list[int]]]:
        recipe = make_recipe(folder, batch_size=22, seed=seed, num_workers=num_workers)
        stream = data.stream(recipe, caption_encoder, rank=0, world_size=1, skip_batches=skip)
        return [codes[..., 0].tolist() for codes, _, _ in islice(stream, count)]

    whole = drawn(40)
    assert drawn(3, skip=37) == whole[37:] and drawn(2, seed=4) != whole[:2]
    pairs = [tuple(pair) for batch in whole for pair in batch]
    assert len(set(pairs)) > 210, "40 epochs of 22 samples show nearly each of their 220 crops"
    share = np.bincount([crop for _, crop in pairs], minlength=10) / len(pairs)
    assert share.min() > 0.06 and share.max() < 0.14


# ---- what a user can get wrong ---------------------------------------------------------------


def fake_tokenizer(**other) -> SimpleNamespace:
    parts = {"name": "fake", "weight_hash": "a" * 64, "grid": GRID, "factor_sizes": (NUM_CODES,), "image_size": 8}
    return SimpleNamespace(**parts | other)


def test_preflight_accepts_what_fits(folder):
    data.preflight(make_recipe(folder, num_workers=2), fake_tokenizer(), world_size=2)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"factor_sizes": (16384,)}, r"codebook size: .*1000.*16384"),
        ({"grid": (24, 24)}, r"grid: .*1x2.*24x24"),
        ({"weight_hash": "b" * 64}, r"weights: .*aaaa.*bbbb.*encode_codes"),
    ],
)
def test_preflight_names_both_sides_of_a_mismatch(folder, other, sentence):
    with pytest.raises(ValueError, match=sentence):
        data.preflight(make_recipe(folder), fake_tokenizer(**other), world_size=1)


@pytest.mark.parametrize(
    ("encoder", "sentence"),
    [
        (ClassNumbers(3), None),
        (ClassNumbers(2), "has 3 classes, the fake backbone 2"),
        (caption_encoder, "holds images of numbered classes, but the fake backbone takes captions"),
    ],
)
def test_classes_are_for_a_backbone_of_as_many_classes(tmp_path, monkeypatch, encoder, sentence):
    """A text-conditional model would be trained on the captions 0, 1 and 2, without a word."""
    folder = write_set(tmp_path / "set", [2])
    Manifest.read(folder).model_copy(update={"classes": ("cat", "dog", "owl")}).write(folder)
    recipe = make_recipe(folder)
    recipe.backbone = SimpleNamespace(name="fake")
    monkeypatch.setattr(data.backbones, "caption_encoder", lambda section: encoder)
    if sentence is None:
        data.preflight(recipe, fake_tokenizer(), world_size=1)
    else:
        with pytest.raises(ValueError, match=sentence):
            data.preflight(recipe, fake_tokenizer(), world_size=1)


def test_fewer_shards_than_readers_are_refused(folder):
    """webdataset would give some ranks nothing, in silence, and the others would wait for them for ever."""
    recipe = make_recipe(folder, num_workers=3)
    with pytest.raises(ValueError, match="4 shards, too few for 2 ranks x 3 readers"):
        data.preflight(recipe, fake_tokenizer(), world_size=2)
    with pytest.raises(ValueError, match="too few"):
        take(recipe, 1, world_size=2)


def test_shards_without_codes_are_refused(tmp_path):
    folder = write_set(tmp_path / "set", [2])
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"codes": None}))
    with pytest.raises(ValueError, match="no image codes; run data_tools/encode_codes.py"):
        data.preflight(make_recipe(folder), fake_tokenizer(), world_size=1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_is_one_sentence_naming_shard_and_key(tmp_path, num_workers):
    """Also out of a worker process, whose exceptions arrive wrapped in a traceback."""
    folder = write_set(tmp_path / "set", [2, 2])
    for path in folder.glob("*.tar"):
        path.write_bytes(path.read_bytes()[:-10000])
    with pytest.raises(ValueError, match=r"0000\d\.tar: damaged or cut after") as caught:
        take(make_recipe(folder, num_workers=num_workers), 3)
    assert "\n" not in str(caught.value)


def test_a_code_outside_the_codebook_is_refused(tmp_path):
    """On a GPU it would end in an assertion of the embedding kernel, far from its cause."""
    folder = write_set(tmp_path / "set", [1])
    codes = np.array([[[1], [1000]]], np.uint16)
    write_tar(folder / "00000.tar", [Sample("bad", {"txt": b"0", "codes.npy": encode_codes(codes)})])
    with pytest.raises(ValueError, match=r"00000.tar: sample bad: codes.npy holds code 1000, but factor 0 has 1000"):
        take(make_recipe(folder, batch_size=1), 1)


def test_a_shard_with_fewer_samples_than_announced_is_refused(tmp_path):
    folder = write_set(tmp_path / "set", [1, 3])
    (folder / "00001.tar").write_bytes((folder / "00000.tar").read_bytes())
    with pytest.raises(ValueError, match="00001.tar: 1 samples, the manifest says 3"):
        take(make_recipe(folder, batch_size=1), 8)
