"""The loader: the batches of a rank depend only on recipe, rank and world size, and
damage is one sentence.
"""

import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmtensorar.captions.encoders import ClassNumbers
from mmtensorar.data import checks, loader, shard_mixture
from mmtensorar.data.members import encode_codes
from mmtensorar.data.shards import Manifest, Sample, iterate_tar, sample_starts, write_tar
from mmtensorar.recipe import Train
from tests.helpers.loading import NUM_CODES, caption_encoder, fake_tokenizer, make_recipe, write_set


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("data") / "set", [5, 7, 6, 4])


def take(recipe, count: int, *, rank=0, world_size=1, skip=0) -> list[tuple[list[int], list[bool]]]:
    """The next batches as ([sample numbers], [uncond]).

    Codes and captions must belong to the same samples.
    """
    batches = []
    stream = loader.stream(recipe, caption_encoder, rank=rank, world_size=world_size, skip_batches=skip)
    for codes, condition, uncond, *_ in islice(stream, count):
        assert codes.dtype == torch.int64 and uncond.dtype == torch.bool
        assert torch.equal(codes, condition.values[:, None].expand(-1, 2, 1))
        batches.append((condition.values[:, 0].tolist(), uncond.tolist()))
    return batches


def numbers(batches) -> list[int]:
    return [number for batch, _ in batches for number in batch]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipping_batches_equals_reading_them(folder, num_workers):
    """A resumed run reads exactly the batches it would have read: inside an epoch, at
    its end, and epochs later.
    """
    recipe = make_recipe(folder, num_workers=num_workers)
    whole = take(recipe, 20)  # 80 rows from a set of 22 samples
    for skip in (1, 5, 14) if num_workers == 0 else (5,):
        assert take(recipe, 20 - skip, skip=skip) == whole[skip:]


def test_every_epoch_holds_every_sample_once_in_another_order(folder):
    seen = numbers(take(make_recipe(folder, batch_size=11), 4))
    first, second = seen[:22], seen[22:]
    assert sorted(first) == sorted(second) == list(range(22))
    assert first != second != sorted(second)


def test_the_seed_changes_the_order_and_the_unconditional_rows(folder):
    one, other = (take(make_recipe(folder, seed=seed), 5) for seed in (1, 2))
    assert one == take(make_recipe(folder, seed=1), 5)
    assert [batch for batch, _ in one] != [batch for batch, _ in other]
    assert [coins for _, coins in one] != [coins for _, coins in other]


def test_without_shuffle_buffer_a_lane_is_read_in_its_order(folder):
    """A batch of one row is one lane, which reads the shards one after another."""
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


def global_batches(
    folder: Path, world_size: int, num_workers: int, steps: int, *, skip: int = 0, grad_accum: int = 1
) -> list:
    """The samples and random draws of all ranks per step, in the order of the global
    batch.
    """
    recipe = make_recipe(folder, batch_size=16, num_workers=num_workers, shuffle=48, grad_accum=grad_accum)
    ranks = [
        take(recipe, steps * grad_accum, rank=rank, world_size=world_size, skip=skip * grad_accum)
        for rank in range(world_size)
    ]
    found = []
    for step in range(steps):
        parts = [
            ranks[r][step * grad_accum + micro] for micro in range(grad_accum) for r in range(world_size)
        ]
        found.append((numbers(parts), [coin for _, coins in parts for coin in coins]))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_the_order_is_the_same_for_any_number_of_ranks_and_readers(many, world_size, num_workers):
    steps = 15  # past the ends of two epochs, neither at the end of a batch
    assert global_batches(many, world_size, num_workers, steps) == global_batches(many, 1, 0, steps)


@pytest.mark.parametrize("grad_accum", [2, 4])
def test_the_order_is_the_same_for_any_accumulation(many, grad_accum):
    assert global_batches(many, 2, 0, 5, grad_accum=grad_accum) == global_batches(many, 1, 0, 5)


def test_a_run_resumes_on_another_number_of_ranks(many):
    """2 ranks, then 1, then 4: no sample is lost or read twice."""
    whole = global_batches(many, 1, 0, 14)
    parts = (
        global_batches(many, 2, 1, 5)
        + global_batches(many, 1, 3, 4, skip=5)
        + global_batches(many, 4, 0, 5, skip=9)
    )
    assert parts == whole
    seen = [number for batch, _ in parts for number in batch]
    assert sorted(seen[:101]) == list(range(101)) and sorted(seen[101:202]) == list(range(101))


def test_the_uncond_rate_is_the_share_of_rows_without_prompt(folder):
    def share(rate):
        return np.mean(
            [c for _, coins in take(make_recipe(folder, batch_size=100, uncond_rate=rate), 10) for c in coins]
        )

    assert share(0.0) == 0 and share(1.0) == 1
    assert abs(share(0.1) - 0.1) < 0.04


def test_ranks_share_the_shards_and_the_batch(tmp_path):
    """In an epoch no two ranks read the same sample, and together they read all
    samples.
    """
    folder = write_set(tmp_path / "set", [3] * 8)
    recipe = make_recipe(folder, batch_size=12, grad_accum=2)
    # 4 batches of 12 / (2 * 2) rows.
    parts = [numbers(take(recipe, 4, rank=rank, world_size=2)) for rank in (0, 1)]
    assert not set(parts[0]) & set(parts[1])
    assert sorted(parts[0] + parts[1]) == list(range(24))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_crop_is_drawn_anew_each_time_and_a_resumed_run_draws_the_same(tmp_path, num_workers):
    folder = write_set(tmp_path / "set", [5, 7, 6, 4], crops=10)

    def drawn(count: int, *, seed: int = 3, skip: int = 0) -> list[list[list[int]]]:
        recipe = make_recipe(folder, batch_size=22, seed=seed, num_workers=num_workers)
        stream = loader.stream(recipe, caption_encoder, rank=0, world_size=1, skip_batches=skip)
        return [codes[..., 0].tolist() for codes, *_ in islice(stream, count)]

    whole = drawn(40)
    assert drawn(3, skip=37) == whole[37:] and drawn(2, seed=4) != whole[:2]
    pairs = [tuple(pair) for batch in whole for pair in batch]
    assert len(set(pairs)) > 210, "40 epochs of 22 samples show nearly each of their 220 crops"
    share = np.bincount([crop for _, crop in pairs], minlength=10) / len(pairs)
    assert share.min() > 0.06 and share.max() < 0.14


# ---- what a user can get wrong ---------------------------------------------------------------


def test_preflight_accepts_what_fits(folder):
    checks.preflight(make_recipe(folder, num_workers=2), fake_tokenizer(), caption_encoder, world_size=2)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"factor_sizes": (16384,)}, r"codebook size: .*1000.*16384"),
        ({"grid": (24, 24)}, r"grid: .*1x2.*24x24"),
        ({"weight_hash": "b" * 64}, r"weights: .*aaaa.*bbbb.*encode-codes"),
    ],
)
def test_preflight_names_both_sides_of_a_mismatch(folder, other, sentence):
    with pytest.raises(ValueError, match=sentence):
        checks.preflight(make_recipe(folder), fake_tokenizer(**other), caption_encoder, world_size=1)


@pytest.mark.parametrize(
    ("encoder", "sentence"),
    [
        (ClassNumbers(3), None),
        (ClassNumbers(2), "has 3 classes, the fake backbone 2"),
        (caption_encoder, "holds images of numbered classes, but the fake backbone takes captions"),
    ],
)
def test_classes_need_a_backbone_with_the_same_number_of_classes(tmp_path, encoder, sentence):
    """A text-conditional model would be trained on the captions 0, 1 and 2 without an
    error.
    """
    folder = write_set(tmp_path / "set", [2])
    Manifest.read(folder).model_copy(update={"classes": ("cat", "dog", "owl")}).write(folder)
    recipe = make_recipe(folder)
    if sentence is None:
        checks.preflight(recipe, fake_tokenizer(), encoder, world_size=1)
    else:
        with pytest.raises(ValueError, match=sentence):
            checks.preflight(recipe, fake_tokenizer(), encoder, world_size=1)


def test_fewer_shards_than_readers_are_noted(folder, capsys):
    """webdataset would silently give some ranks nothing.

    Here the ranks begin at different positions of the same shards.
    """
    checks.preflight(make_recipe(folder, num_workers=2), fake_tokenizer(), caption_encoder, world_size=2)
    assert not capsys.readouterr().out
    checks.preflight(
        make_recipe(folder, batch_size=16, num_workers=3), fake_tokenizer(), caption_encoder, world_size=2
    )
    assert "has 4 shards for 6 readers" in capsys.readouterr().out


def test_shards_without_codes_are_refused(tmp_path):
    folder = write_set(tmp_path / "set", [2])
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"codes": None}))
    with pytest.raises(ValueError, match="no image codes; run mmtensorar shards encode-codes"):
        checks.preflight(make_recipe(folder), fake_tokenizer(), caption_encoder, world_size=1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_is_one_sentence_naming_shard_and_key(tmp_path, num_workers):
    """This also holds for damage in a worker process, whose exceptions arrive wrapped
    in a traceback.
    """
    folder = write_set(tmp_path / "set", [2, 2])
    for path in folder.glob("*.tar"):
        path.write_bytes(path.read_bytes()[:-10000])
    with pytest.raises(ValueError, match=r"0000\d\.tar: damaged or cut after") as caught:
        take(make_recipe(folder, num_workers=num_workers), 3)
    assert "\n" not in str(caught.value)


def test_a_code_outside_the_codebook_is_refused(tmp_path):
    """On a GPU it would fail in an assertion of the embedding kernel, far from its
    cause.
    """
    folder = write_set(tmp_path / "set", [1])
    codes = np.array([[[1], [1000]]], np.uint16)
    write_tar(folder / "00000.tar", [Sample("bad", {"txt": b"0", "codes.npy": encode_codes(codes)})])
    with pytest.raises(
        ValueError, match=r"00000.tar: sample bad: codes.npy holds code 1000, but factor 0 has 1000"
    ):
        take(make_recipe(folder, batch_size=1), 1)


def test_a_shard_with_fewer_samples_than_announced_is_refused(tmp_path):
    folder = write_set(tmp_path / "set", [1, 3])
    (folder / "00001.tar").write_bytes((folder / "00000.tar").read_bytes())
    with pytest.raises(ValueError, match="00001.tar: 1 sample, the manifest says 3"):
        take(make_recipe(folder, batch_size=1), 8)


# ---- several sets ----------------------------------------------------------------------------


def with_sets(recipe: SimpleNamespace, weights: dict[str, float]) -> SimpleNamespace:
    recipe.data = recipe.data.model_copy(update={"shards": weights})
    return recipe


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> list[Path]:
    """Sets of 30, 20 and 7 samples, numbered from 0, 100 and 200."""
    root = tmp_path_factory.mktemp("three")
    return [
        write_set(root / name, counts, first=first)
        for name, counts, first in (("a", [10, 20], 0), ("b", [5, 5, 10], 100), ("c", [3, 4], 200))
    ]


def test_every_set_has_rows_by_its_weight_and_its_own_epochs(three):
    recipe = with_sets(
        make_recipe(three[0], batch_size=8), dict(zip(map(str, three), (5, 2, 1), strict=True))
    )
    batches = [batch for batch, _ in take(recipe, 40)]
    for number, (rows, total) in enumerate(((5, 30), (2, 20), (1, 7))):
        seen = [[n - 100 * number for n in batch if n // 100 == number] for batch in batches]
        assert {len(each) for each in seen} == {rows}
        order = [n for each in seen for n in each]
        for start in range(0, len(order) - total + 1, total):
            assert sorted(order[start : start + total]) == list(range(total))


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 3), (2, 0), (2, 1), (4, 0), (8, 0)])
def test_the_order_of_several_sets_is_the_same_for_any_ranks_and_readers(three, world_size, num_workers):
    weights = dict(zip(map(str, three), (0.5, 0.3, 0.2), strict=True))

    def batches(world_size: int, num_workers: int, skip: int) -> list[list[int]]:
        recipe = with_sets(make_recipe(three[0], batch_size=16, shuffle=32, num_workers=num_workers), weights)
        ranks = [take(recipe, 8, rank=rank, world_size=world_size, skip=skip) for rank in range(world_size)]
        return [numbers([ranks[rank][step] for rank in range(world_size)]) for step in range(8)]

    assert batches(world_size, num_workers, 0) == batches(1, 0, 0)
    assert batches(world_size, num_workers, 5)[:3] == batches(1, 0, 0)[5:]


def test_every_rank_reads_from_every_set():
    """The rows of a set are spread over the batch, not put at its beginning."""
    owners = [number for number, _ in shard_mixture.spread_rows([8, 4, 4])]
    for rank in range(4):
        assert sorted(owners[4 * rank : 4 * rank + 4]) == [0, 0, 1, 2]
    assert sorted(shard_mixture.spread_rows([3, 2])) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_rows_add_up_to_the_batch_and_follow_the_weights():
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights = {
            str(number): float(weight)
            for number, weight in enumerate(rng.uniform(0.5, 2, rng.integers(1, 6)))
        }
        rows = int(rng.integers(16, 300))
        shares = shard_mixture.apportion_rows(weights, rows)
        assert sum(shares.values()) == rows
        assert all(abs(shares[name] - rows * weights[name] / sum(weights.values())) < 1 for name in weights)
    with pytest.raises(
        ValueError, match="data.shards: b has weight 0.01 of 1.01, less than one row of data.batch_size 4"
    ):
        shard_mixture.apportion_rows({"a": 1, "b": 0.01}, 4)


def test_preflight_checks_every_set(three, tmp_path):
    recipe = with_sets(make_recipe(three[0], batch_size=8), {str(folder): 1.0 for folder in three})
    one = checks.preflight(recipe, fake_tokenizer(), caption_encoder, world_size=2)
    assert one != checks.preflight(
        with_sets(recipe, {str(folder): 1.0 for folder in three[:2]}),
        fake_tokenizer(),
        caption_encoder,
        world_size=2,
    )
    other = write_set(tmp_path / "other", [3, 3])
    manifest = Manifest.read(other)
    codes = manifest.codes.model_copy(update={"weight_hash": "b" * 64})
    manifest.model_copy(update={"codes": codes}).write(other)
    with pytest.raises(ValueError, match=f"image tokenizer weights: {other} was encoded with"):
        checks.preflight(
            with_sets(recipe, {str(three[0]): 1.0, str(other): 1.0}),
            fake_tokenizer(),
            caption_encoder,
            world_size=2,
        )


# ---- damage ----------------------------------------------------------------------------------


def damage(folder: Path, shard: str, keys: set[str], change) -> None:
    """Change the members of some samples; the manifest keeps its counts."""
    samples = [
        Sample(sample.key, change(dict(sample.members))) if sample.key in keys else sample
        for sample in iterate_tar(folder / shard)
    ]
    write_tar(folder / shard, samples)


def without_caption(members: dict) -> dict:
    del members["txt"]
    return members


def with_wrong_code(members: dict) -> dict:
    return members | {"codes.npy": encode_codes(np.array([[[1], [NUM_CODES]]], np.uint16))}


@pytest.fixture
def damaged(tmp_path) -> Path:
    """40 samples in 4 shards.

    Samples 3 and 25 have bad members, and the third shard is truncated, which loses its
    last samples.
    """
    folder = write_set(tmp_path / "set", [10, 10, 10, 10])
    damage(folder, "00000.tar", {"000000003"}, without_caption)
    damage(folder, "00002.tar", {"000000021"}, with_wrong_code)
    content = (folder / "00002.tar").read_bytes()
    starts = sample_starts(folder / "00002.tar")
    (folder / "00002.tar").write_bytes(content[: int(starts[7]) + 700])  # in the middle of the eighth sample
    return folder


BAD = {3, 21, 27, 28, 29}


def skipping(folder: Path, steps: int, *, rank=0, world_size=1, skip=0, num_workers=0, **settings):
    recipe = make_recipe(
        folder, batch_size=8, shuffle=16, on_error="skip", num_workers=num_workers, **settings
    )
    stream = loader.stream(recipe, caption_encoder, rank=rank, world_size=world_size, skip_batches=skip)
    return [(batch.condition.values[:, 0].tolist(), batch.skipped) for batch in islice(stream, steps)]


def test_a_damaged_sample_is_reported_and_another_takes_its_place(damaged):
    batches = skipping(damaged, 5)  # one epoch
    seen = numbers([(batch, None) for batch, _ in batches])
    assert len(seen) == 40 and set(seen) == set(range(40)) - BAD
    sentences = [sentence for _, skipped in batches for sentence in skipped]
    assert len(sentences) == len(BAD)
    assert sum("00000.tar: sample 000000003: no txt member" in s for s in sentences) == 1
    assert sum("00002.tar: sample 000000021: codes.npy holds code 1000" in s for s in sentences) == 1
    assert sum("00002.tar: damaged or cut after" in s for s in sentences) == 3
    with pytest.raises(ValueError, match="00000.tar|00002.tar"):
        take(make_recipe(damaged, batch_size=8, shuffle=16), 5)


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (2, 0), (4, 0)])
def test_the_replacement_does_not_depend_on_ranks_readers_or_resuming(damaged, world_size, num_workers):
    whole = skipping(damaged, 9)
    ranks = [
        skipping(damaged, 9, rank=r, world_size=world_size, num_workers=num_workers)
        for r in range(world_size)
    ]
    for step, (batch, skipped) in enumerate(whole):
        parts = [ranks[rank][step] for rank in range(world_size)]
        assert numbers(parts) == batch and sorted(s for _, part in parts for s in part) == sorted(skipped)
    assert skipping(damaged, 4, skip=5) == whole[5:]


def test_a_missing_shard_is_skipped_sample_by_sample(damaged):
    (damaged / "00001.tar").unlink()
    with pytest.raises(ValueError, match="the shard is missing"):
        skipping(damaged, 1)  # reported before training starts
    (damaged / "00001.tar").write_bytes(b"")
    batches = skipping(damaged, 5)
    assert sum(len(skipped) for _, skipped in batches) == len(BAD) + 10


def test_a_set_without_a_valid_sample_is_an_error(tmp_path):
    folder = write_set(tmp_path / "set", [4])
    damage(folder, "00000.tar", {f"{number:09d}" for number in range(4)}, without_caption)
    with pytest.raises(ValueError, match="no txt member; and no undamaged"):
        skipping(folder, 1)


# ---- validation ------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_validation_reads_every_sample_once_with_equal_batches_on_all_ranks(many, world_size):
    recipe = make_recipe(many)
    recipe.data = recipe.data.model_copy(update={"validation": str(many), "validation_batch_size": 4})
    found, lengths = {}, set()
    for rank in range(world_size):
        batches = list(loader.validation_batches(recipe, caption_encoder, rank=rank, world_size=world_size))
        lengths.add(len(batches))
        for number, num_samples, batch in batches:
            assert len(batch.codes) and not batch.uncond.any()
            if num_samples:
                assert num_samples == len(batch.codes)
                found[number] = batch.condition.values[:, 0].tolist()
    assert len(lengths) == 1 and sorted(found) == list(range(26))
    assert sorted(n for batch in found.values() for n in batch) == list(range(101))
    if world_size > 1:
        alone = loader.validation_batches(recipe, caption_encoder, rank=0, world_size=1)
        assert found == {number: batch.condition.values[:, 0].tolist() for number, _, batch in alone}


@pytest.mark.parametrize(("crops", "middle"), [(1, 0), (2, 0), (5, 4), (10, 4)])
def test_validation_takes_the_middle_crop(tmp_path, crops, middle):
    """encode_codes writes crops in this order: four corners, the centre, and then their
    mirror images.
    """
    write_set(tmp_path / "set", [4, 3], crops=crops)
    recipe = make_recipe(tmp_path / "set")
    recipe.data = recipe.data.model_copy(
        update={"validation": str(tmp_path / "set"), "validation_batch_size": 4}
    )
    batches = [
        batch for _, _, batch in loader.validation_batches(recipe, caption_encoder, rank=0, world_size=1)
    ]
    codes = [row for batch in batches for row in batch.codes[..., 0].tolist()]
    assert sorted(codes) == [[index, middle if crops > 1 else index] for index in range(7)]


def test_epochs_are_converted_to_steps(three):
    recipe = with_sets(make_recipe(three[0], batch_size=8), {str(folder): 1.0 for folder in three})
    recipe.train = Train(epochs=2.5)
    assert loader.steps_of(recipe) == int(2.5 * 57 / 8)
