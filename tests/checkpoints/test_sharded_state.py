"""Training state in pieces: written by some ranks, read by others."""

import json
import random
from pathlib import Path

import pytest
import torch

from mmtensorar.checkpoints import sharded_state
from mmtensorar.checkpoints.sharded_state import Piece

PARAMETERS = {"a": 70, "b": 5, "c": 1, "d": 33}


def cut(num_ranks: int, seed: int) -> list[tuple[list[Piece], list[torch.Size]]]:
    """For every rank its pieces and the shapes of its flat tensors: the pieces are in
    any order, with padding between them.
    """
    rng, found = random.Random(seed), []
    stretches = []
    for name, size in PARAMETERS.items():
        at = sorted({0, size, *(rng.randrange(size) for _ in range(num_ranks - 1))})
        stretches += [(name, start, stop - start) for start, stop in zip(at, at[1:], strict=False)]
    rng.shuffle(stretches)
    for rank in range(num_ranks):
        own, fill, layout = stretches[rank::num_ranks], [0, 0], []
        for name, start, number in own:
            flat = rng.randrange(2)
            layout.append(Piece(name, start, flat, fill[flat], number))
            fill[flat] += number + rng.randrange(3)
        found.append((layout, [torch.Size([size + 2]) for size in fill]))
    return found


def values(name: str, key: str) -> torch.Tensor:
    size = PARAMETERS[name]
    return torch.arange(size) + {"master": 0.5, "exp_avg": 1000.25}[key] + 10_000 * ord(name)


def write(folder, layouts) -> None:
    folder.mkdir()
    for rank, (layout, shapes) in enumerate(layouts):
        state = [
            {key: torch.zeros(shape) for key in ("master", "exp_avg")}
            | {"step": torch.tensor(7.0), "count": 3}
            for shape in shapes
        ]
        for piece in layout:
            for key in ("master", "exp_avg"):
                part = values(piece.name, key)[piece.start : piece.start + piece.number]
                state[piece.flat][key][piece.flat_start : piece.flat_start + piece.number] = part
        sharded_state.write(folder, rank, layout, shapes, state)


@pytest.mark.parametrize("seed", range(4))
def test_any_cut_is_read_from_any_other(tmp_path, seed):
    number = 0
    for saved_ranks in (1, 2, 5):
        for num_ranks in (1, 2, 5):
            number += 1
            write(tmp_path / str(number), cut(saved_ranks, seed))
            for rank, (layout, shapes) in enumerate(cut(num_ranks, seed + 100)):
                state = sharded_state.read(
                    tmp_path / str(number), rank, num_ranks, saved_ranks, layout, shapes
                )
                for piece in layout:
                    for key in ("master", "exp_avg"):
                        found = state[piece.flat][key][piece.flat_start : piece.flat_start + piece.number]
                        assert torch.equal(
                            found, values(piece.name, key)[piece.start : piece.start + piece.number]
                        )
                for held, shape in zip(state, shapes, strict=True):
                    assert held["master"].shape == held["exp_avg"].shape == shape, "also where all is padding"
                    assert held["step"].item() == 7 and held["count"] == 3
                for flat in range(len(shapes)):  # one flat tensor at a time, as with offloading to NVMe
                    alone = sharded_state.read(
                        tmp_path / str(number), rank, num_ranks, saved_ranks, layout, shapes, flats=[flat]
                    )
                    assert alone[flat].keys() == state[flat].keys()
                    assert all(
                        torch.equal(torch.as_tensor(alone[flat][key]), torch.as_tensor(each))
                        for key, each in state[flat].items()
                    )


def test_an_unchanged_cut_is_read_as_it_is_with_moments_of_any_kind(tmp_path):
    layout, shapes = [Piece("a", 0, 0, 0, 70)], [torch.Size([7, 10])]
    table = torch.arange(4.0)
    state = [
        {
            "master": torch.randn(7, 10),
            "state1": torch.randint(9, (7, 10), dtype=torch.uint8),
            "qmap1": table,
            "qmap2": table,
        }
    ]
    sharded_state.write(tmp_path, 0, layout, shapes, state)
    found = sharded_state.read(tmp_path, 0, 1, 1, layout, shapes)
    assert found[0].keys() == state[0].keys()
    assert all(torch.equal(found[0][key], value) for key, value in state[0].items())
    with pytest.raises(ValueError, match="is scaled in blocks of a rank's piece, so it needs as many ranks"):
        sharded_state.read(tmp_path, 0, 2, 1, [Piece("a", 0, 0, 0, 35)], [torch.Size([35])])


def test_what_is_missing_is_named(tmp_path):
    write(tmp_path / "one", cut(2, 0))
    with pytest.raises(ValueError, match="it holds 0 of 4 numbers of e"):
        sharded_state.read(tmp_path / "one", 0, 1, 2, [Piece("e", 0, 0, 0, 4)], [torch.Size([4])])
    assert sharded_state.missing(tmp_path / "one", 3) == [2]
    path = tmp_path / "one" / "rank_00001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pieces": 3}))
    with pytest.raises(ValueError, match="rank_00001.json: expected pieces, sizes, numbers, sha256"):
        sharded_state.read(tmp_path / "one", 0, 1, 2, *cut(1, 0)[0])
    path.unlink()
    with pytest.raises(ValueError, match="rank_00001.json is missing"):
        sharded_state.read(tmp_path / "one", 0, 1, 2, *cut(1, 0)[0])


def test_a_copy_does_not_follow_the_weights():
    weight = torch.ones(3)
    copy = sharded_state.copied([{"master": weight, "count": 1}])
    weight.add_(1)
    assert copy[0]["master"].tolist() == [1, 1, 1] and copy[0]["count"] == 1


def test_copies_that_all_ranks_hold_are_read_once(tmp_path):
    """Without ZeRO every rank holds everything: rank 0's file serves any number of
    ranks, also for 8-bit moments.
    """
    layout, shapes = [Piece("a", 0, 0, 0, 70)], [torch.Size([70])]
    state = [{"master": torch.randn(70), "state1": torch.randint(9, (70,), dtype=torch.uint8)}]
    sharded_state.write(tmp_path, 0, layout, shapes, state)
    for rank in range(3):
        found = sharded_state.read(tmp_path, rank, 3, 1, layout, shapes)
        assert torch.equal(found[0]["master"], state[0]["master"]) and torch.equal(
            found[0]["state1"], state[0]["state1"]
        )


def test_values_that_were_read_do_not_keep_the_file_open(tmp_path):
    """Some network file systems cannot delete a mapped file, and others do not free its
    space.
    """
    write(tmp_path / "one", cut(1, 0))
    for cut_to in (cut(1, 0), cut(2, 0)):
        held = sharded_state.read(tmp_path / "one", 0, len(cut_to), 1, *cut_to[0])
        assert held and str(tmp_path / "one") not in Path("/proc/self/maps").read_text()


def test_an_invalid_piece_is_refused(tmp_path):
    write(tmp_path / "one", cut(1, 0))
    path = tmp_path / "one" / "rank_00000.json"
    found = json.loads(path.read_text())
    for wrong in ([["a", 0]], [["a", 0, 9, 0, 1]], [["a", 0, 0, 0, "1"]]):
        path.write_text(json.dumps(found | {"pieces": wrong}))
        with pytest.raises(ValueError, match="expected pieces of name, start, flat, flat_start and number"):
            sharded_state.read(tmp_path / "one", 0, 1, 1, *cut(1, 0)[0])
    (tmp_path / "one" / sharded_state.STATE).write_text(
        json.dumps({"step": 3, "world_size": 1, "sha256": {}})
    )
    with pytest.raises(ValueError, match="format None, expected 1"):
        sharded_state.recorded(tmp_path / "one")
