"""Metrics on features: values worked out on paper."""

import json

import numpy as np
import pytest
import torch

from eval.fid import __main__ as command
from eval.fid import inception, score


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return score.frechet_distance(score.statistics(one), score.statistics(other))


def test_frechet_distance_by_hand():
    """Equal sets: 0. Shifted by d: |d|^2. Twice as wide: (2 s - s)^2 per dimension."""
    points = np.random.default_rng(0).normal(size=(500, 3))
    assert distance(points, points) == pytest.approx(0, abs=1e-9)
    assert distance(points, points + [3, 4, 0]) == pytest.approx(25)
    spread = points.std(axis=0, ddof=1)
    axes = np.diag(spread**2)
    one, other = score.Statistics(np.zeros(3), axes), score.Statistics(np.zeros(3), 4 * axes)
    assert score.frechet_distance(one, other) == pytest.approx((spread**2).sum())
    assert distance(points, points * 2) == pytest.approx(distance(points * 2, points))


def test_fewer_images_than_dimensions():
    """The covariances are singular.

    The distance is still a number, and a set has distance 0 to itself.
    """
    points = np.random.default_rng(0).normal(size=(5, 20)).astype(np.float32)
    assert distance(points, points) == pytest.approx(0, abs=1e-4)
    with pytest.raises(ValueError, match="two or more images"):
        score.statistics(points[:1])
    with pytest.raises(ValueError, match="20 and 3 wide"):
        distance(points, points[:, :3])


def test_inception_score_by_hand():
    """Certain, and V classes equally often: V.

    Undecided: 1. A short last split counts like the others.
    """
    sure = np.eye(4, dtype=np.float32) * 1000
    assert score.inception_score(sure) == pytest.approx(4)
    assert score.inception_score(np.zeros((5, 4), np.float32)) == pytest.approx(1)
    six = np.concatenate([sure, sure[:2]])
    assert score.inception_score(six, split_size=4) == pytest.approx((4 + 2) / 2)


def test_precision_and_recall_by_hand(monkeypatch):
    """Points on a line, one neighbour: the balls of the reference have radius 1, those
    of the samples radius 4.
    """
    reference = np.array([[0.0], [1], [10], [11]])
    samples = np.array([[0.5], [4.5], [20], [24]])
    assert score.precision_recall(reference, samples, neighbours=1) == (0.25, 0.5)
    assert score.precision_recall(reference, reference, neighbours=1) == (1, 1)
    cloud = np.random.default_rng(0).normal(size=(50, 8))
    whole = score.precision_recall(cloud[:30], cloud[20:])
    monkeypatch.setattr(score, "BLOCK", 7)
    assert score.precision_recall(cloud[:30], cloud[20:]) == whole
    with pytest.raises(ValueError, match="more than 3 images, the samples have 3"):
        score.precision_recall(cloud, cloud[:3])


def test_the_command_computes_what_the_arrays_allow(tmp_path, capsys):
    cloud = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    np.savez(tmp_path / "f.npz", ref_pool=cloud, sample_pool=cloud)
    arguments = ["score", "--features", str(tmp_path / "f.npz"), "--out", str(tmp_path / "out.json")]
    assert command.main(arguments) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert (
        found["precision"] == found["recall"] == 1 and "sfid" not in found and "inception_score" not in found
    )
    assert "fid" in capsys.readouterr().out


def test_mistakes_are_sentences(tmp_path, capsys):
    """One of the mistakes is an array that only a pickle could hold."""
    whole = np.ones((5, 2), np.float32)
    np.savez(tmp_path / "object.npz", ref_pool=np.array([{}], object))
    np.savez(tmp_path / "int.npz", ref_pool=whole.astype(int))
    np.savez(tmp_path / "nan.npz", ref_pool=whole * np.nan)
    np.savez(tmp_path / "one.npz", ref_pool=whole)
    np.savez(tmp_path / "empty.npz", sample_logits=whole[:0])
    np.savez(tmp_path / "alone.npz", ref_pool=whole, ref_spatial=whole[:1])
    np.save(tmp_path / "single.npy", whole)
    (tmp_path / "text.npz").write_text("no archive")
    cases = {
        "object.npz": "not an .npz of arrays",
        "int.npz": "ref_pool is int64 of shape [5, 2]; expected floats",
        "nan.npz": "ref_pool has numbers that are not finite",
        "empty.npz": "sample_logits has features of 0 pictures; expected 1 or more",
        "alone.npz": "ref_spatial has features of 1 picture; expected 2 or more",
        "one.npz": "no metric can be computed",
        "single.npy": "not an .npz of arrays",
        "text.npz": "not an .npz of arrays",
        "absent.npz": "is missing",
    }
    for name, sentence in cases.items():
        assert command.main(["score", "--features", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert name in error and sentence in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    "given, noted",
    [
        (
            ("ref_pool", "sample_pool", "sample_logit"),
            (
                "left out 1 (expected ref_pool, ",
                "): sample_logit\n",
                "no sample_logits, so no inception_score",
            ),
        ),
        (("ref_spatial", "sample_spatial"), ("no ref_pool and sample_pool, so no fid", "so no precision\n")),
        (("sample_logits", "sample_pool", "ref_spatial"), ("no ref_pool, so no fid", "no sample_spatial, ")),
        (("ref_pool", "sample_pool", "ref_spatial", "sample_spatial", "sample_logits"), ()),
    ],
)
def test_metrics_that_are_not_computed_are_named(tmp_path, capsys, given, noted):
    """An array with a misspelt name was ignored, and its metric was missing in
    silence.
    """
    cloud = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    np.savez(tmp_path / "f.npz", **dict.fromkeys(given, cloud))
    assert command.main(["score", "--features", str(tmp_path / "f.npz")]) == 0
    error = capsys.readouterr().err
    assert all(part in error for part in noted) and bool(noted) == bool(error), error


@pytest.mark.parametrize(
    "name, found", [("nowhere", "no such file"), (".", "a folder"), ("a/b.pth", "no such")]
)
def test_a_missing_file_of_inception_is_named(tmp_path, name, found):
    with pytest.raises(ValueError, match=f"^--inception: .*: {found}"):
        inception.Inception.load(tmp_path / name, torch.device("cpu"))
