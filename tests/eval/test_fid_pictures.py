"""FID from pictures: their sources, the real Inception class with random weights, the
whole command.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity import metric_fid, metric_prc
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from eval import layout
from eval.fid import __main__ as command
from eval.fid import features, inception, recorded, score, sources
from mmtensorar import files
from tests.helpers.pictures import closed, encoded, photograph, zeroed_inside

WIDTH = 5


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file like torch-fidelity's, with random weights."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **kwargs: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path="none")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(net.state_dict(), path)
    return path


def noise(num: int, side: int = 16, seed: int = 0) -> np.ndarray:
    """Pictures of shape [num, side, side, 3], uint8, all different."""
    rng = np.random.default_rng(seed)
    ground = rng.integers(0, 256, (num, 1, 1, 3))
    return (ground + rng.integers(-60, 60, (num, side, side, 3))).clip(0, 255).astype(np.uint8)


def write_folder(folder, pictures: np.ndarray):
    folder.mkdir(parents=True)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{index:03d}.png")
    return folder


# ---- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 100])
def test_a_folder_and_an_npz_give_the_same_pictures(tmp_path, size):
    pictures = noise(7)
    np.savez(tmp_path / "plain.npz", pictures)
    np.savez_compressed(tmp_path / "small.npz", arr_0=pictures)
    for path in (write_folder(tmp_path / "folder", pictures), tmp_path / "plain.npz", tmp_path / "small.npz"):
        found = sources.find(path)
        batches = list(found.batches(size))
        assert found.num == 7 and max(map(len, batches)) == min(size, 7)
        np.testing.assert_array_equal(np.concatenate(batches), pictures)


def test_generation_cycles_through_the_prompts(tmp_path):
    """So a split of the Inception score holds all classes."""
    for prompt in range(3):
        for image in range(2):
            path = layout.image_path(tmp_path, prompt, image)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (prompt, image, 0)).save(path)
    batch = next(sources.find(tmp_path, num_prompts=3, num_images=2).batches(6))
    assert batch[:, 0, 0, :2].tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]
    with pytest.raises(ValueError, match="00003 is missing"):
        sources.find(tmp_path, num_prompts=4, num_images=2)


def test_foreign_files_are_refused(tmp_path):
    np.savez(tmp_path / "float.npz", np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "flat.npz", np.zeros((2, 4, 4), np.uint8))
    np.savez(tmp_path / "object.npz", np.array([{}], object))
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    np.savez(tmp_path / "mu.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty").mkdir()
    for name, sentence in {
        "float.npz": "arr_0 is float64 of shape",
        "flat.npz": r"expected uint8 \[N, H, W, 3\]",
        "object.npz": "arr_0 is object",
        "other.npz": "an .npz with an array arr_0",
        "text.npz": "an .npz with an array arr_0",
        "absent.npz": "is missing",
        "absent": "neither a folder nor an .npz",
        "empty": "holds no pictures",
    }.items():
        with pytest.raises(ValueError, match=f"{name}.*{sentence}"):
            sources.find(tmp_path / name)
    with pytest.raises(
        ValueError, match=r"mu.npz: mu and sigma are of shapes \[3\] and \[2, 2\]; expected \[2048\]"
    ):
        sources.reference_statistics(tmp_path / "mu.npz")
    for mean, told in (
        (np.full(2048, np.nan), "float64, or not finite"),
        (np.full(2048, "a"), "<U1, or not finite"),
    ):
        np.savez(tmp_path / "odd.npz", mu=mean, sigma=np.zeros((2048, 2048), np.float32))
        with pytest.raises(ValueError, match=f"odd.npz: mu is {told}"):
            sources.reference_statistics(tmp_path / "odd.npz")


@pytest.mark.slow
def test_a_damaged_archive_is_one_sentence_wherever_it_is_damaged(tmp_path):
    """Also inside deflated content, where zlib raises the error, and for an array that
    is not an archive.
    """
    np.savez_compressed(
        tmp_path / "whole.npz", arr_0=noise(30), mu=np.zeros(2048), sigma=np.zeros((2048, 2048))
    )
    whole = (tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "array.npy", noise(2))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for read in (sources.find, sources.reference_statistics):
        with pytest.raises(ValueError, match="array.npz"):
            read(tmp_path / "array.npz")
    refused = 0
    for place in range(0, len(whole), len(whole) // 60):
        (tmp_path / "bad.npz").write_bytes(whole[:place] + bytes(40) + whole[place + 40 :])
        for read in (
            lambda p: list(sources.find(p).batches(4)),
            sources.reference_statistics,
            recorded.read_features,
        ):
            try:
                read(tmp_path / "bad.npz")
            except ValueError as error:
                assert "bad.npz" in str(error)
                refused += 1
    assert refused > 30


def test_an_interrupted_generation_is_not_scored_as_complete(tmp_path):
    """The record states how many pictures there must be."""
    for prompt in range(2):
        path = layout.image_path(tmp_path, prompt, 0)
        path.parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(path)
    (tmp_path / layout.RECORD).write_text(json.dumps({"num_prompts": 3, "num_images": 1}))
    with pytest.raises(ValueError, match="00002 is missing"):
        sources.find(tmp_path)
    (tmp_path / layout.RECORD).write_text(json.dumps({"num_prompts": 2, "num_images": 1}))
    assert sources.find(tmp_path).num == 2


def test_pictures_of_two_sizes_and_damaged_ones_are_named(tmp_path):
    folder = write_folder(tmp_path / "folder", noise(2))
    Image.new("RGB", (8, 16)).save(folder / "zz.png")
    with pytest.raises(ValueError, match="zz.png: pictures of 16x16 and 8x16 in one folder"):
        list(sources.find(folder).batches(2))
    good = encoded(photograph(16, 16, noise=60), "JPEG", quality=100)
    for content in (b"no picture", closed(good), zeroed_inside(good)):
        (folder / "zz.png").write_bytes(content)
        with pytest.raises(ValueError, match="zz.png: unreadable image"):
            list(sources.find(folder).batches(2))


# ---- the network ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_three_tensors_of_adm(weights):
    """Pool as torch-fidelity computes it; logits without bias; spatial from the 1x1
    branch of Mixed_6d.
    """
    network = inception.Inception.load(weights, torch.device("cpu"))
    pictures = noise(3, side=40)
    found = network(pictures)
    assert (
        found.pool.shape == (3, 2048)
        and found.logits.shape == (3, 1008)
        and found.spatial.shape == (3, 17 * 17 * 7)
    )
    net = network.net
    np.testing.assert_allclose(found.logits, found.pool @ net.fc.weight.numpy().T, rtol=1e-4, atol=1e-4)
    seen = {}
    net.Mixed_6d.register_forward_pre_hook(lambda module, inputs: seen.update(entering=inputs[0]))
    again = network(pictures)
    branch = net.Mixed_6d.branch1x1(seen["entering"])[:, :7].permute(0, 2, 3, 1).reshape(3, -1)
    np.testing.assert_array_equal(found.spatial, branch.numpy())
    np.testing.assert_array_equal(found.spatial, again.spatial)


def test_weights_of_another_model_are_refused(tmp_path, weights):
    """PyTorch's own message advised to load the file with weights_only=False, which
    runs the code in it.
    """
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "page.pth").write_bytes(b"<html>not found</html>")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:5000])
    (tmp_path / "half.pth").write_bytes(weights.read_bytes()[: 10**6])
    torch.save({"a": tmp_path}, tmp_path / "code.pth")
    for name, reason in {
        "other.pth": "does not hold torch-fidelity's Inception",
        "text.pth": "not a file that torch.save wrote",
        "page.pth": "not a file that torch.save wrote",
        "empty.pth": "it ends early",
        "cut.pth": "it ends early",
        "half.pth": "failed reading zip archive",
        "code.pth": "it holds a pathlib.",
        "absent.pth": "no such file",
    }.items():
        with pytest.raises(ValueError, match=f"--inception: .*{name}.*{reason}") as error:
            inception.Inception.load(tmp_path / name, torch.device("cpu"))
        assert "weights_only" not in str(error.value) and "\x1b" not in str(error.value)


def test_metrics_are_those_of_torch_fidelity():
    """Compares the metrics that torch-fidelity has: FID, precision and recall."""
    rng = np.random.default_rng(0)
    one, other = (
        rng.normal(size=(60, 8)).astype(np.float32),
        rng.normal(0.4, 1.3, size=(50, 8)).astype(np.float32),
    )
    statistics = [metric_fid.fid_features_to_statistics(torch.from_numpy(each)) for each in (one, other)]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert score.frechet_distance(score.statistics(one), score.statistics(other)) == pytest.approx(
        theirs, rel=1e-6
    )
    theirs = metric_prc.prc_features_to_metric(torch.from_numpy(one), torch.from_numpy(other), verbose=False)
    assert score.precision_recall(other, one) == pytest.approx((theirs["precision"], theirs["recall"]))


# ---- the command ---------------------------------------------------------------------------------


def test_an_interrupted_run_resumes(tmp_path):
    """Features that were computed are not computed again, except for other pictures or
    another network.
    """
    calls = []

    def network(batch):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        flat = batch.reshape(len(batch), -1).astype(np.float32)
        return inception.Features(flat[:, :4], flat[:, :3], flat[:, :2])

    pictures = sources.find(write_folder(tmp_path / "folder", noise(10)))
    with pytest.raises(KeyboardInterrupt):
        features.extract(pictures, network, "net", tmp_path / "kept", 3)
    found = features.extract(pictures, network, "net", tmp_path / "kept", 3)
    assert calls == [3, 3, 3, 3, 1] and found["pool"].shape == (10, 4)
    next((tmp_path / "kept").glob("*.npz")).write_bytes(b"damaged")
    again = features.extract(pictures, network, "net", tmp_path / "kept", 3)
    assert len(calls) == 6
    np.testing.assert_array_equal(found["pool"], again["pool"])
    features.extract(pictures, network, "another", tmp_path / "kept", 3)
    assert len(calls) == 10


@pytest.mark.parametrize("num", [1, 2, 3])
@pytest.mark.parametrize("side", ["--images", "--ref"])
@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_too_few_pictures_are_named_with_their_folder(tmp_path, capsys, num, side, kind):
    """Not after all features are computed, and not as `features have shape [1, 2048]`."""
    paths = {"--images": write_folder(tmp_path / "many", noise(4)), "--ref": tmp_path / "many"}
    paths[side] = tmp_path / f"few.{kind}"
    if kind == "npz":
        np.savez(paths[side], noise(num))
    else:
        write_folder(paths[side], noise(num))
    given = [str(part) for pair in paths.items() for part in pair]
    assert command.main([*given, "--out", str(tmp_path / "out")]) == 2
    pictures = "1 picture" if num == 1 else f"{num} pictures"
    assert capsys.readouterr().err == f"error: {paths[side]}: {pictures}; expected 4 or more\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [["arr_1"], ["labels"], ["arr_1", "arr_2", "arr_3", "arr_4"]])
def test_arrays_that_are_not_scored_are_named(tmp_path, capsys, names):
    """np.savez(file, half, other_half) gives arr_0 and arr_1, and only arr_0 is read."""
    np.savez(tmp_path / "two.npz", noise(4), **dict.fromkeys(names, noise(2)))
    assert sources.find(tmp_path / "two.npz").num == 4
    assert f"left out {len(names)} (pictures are read from arr_0 only): {names[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mu", "sigma", "mu_s", "sigma_s"])
def test_half_of_the_statistics_is_an_error(tmp_path, name):
    """The other half was computed from the file's 10,000 pictures, and this one
    ignored.
    """
    np.savez(tmp_path / "ref.npz", noise(4), **{name: np.zeros(2048)})
    with pytest.raises(ValueError, match=f"ref.npz: has {name} alone; expected mu"):
        sources.reference_statistics(tmp_path / "ref.npz")


@pytest.fixture
def narrow(monkeypatch):
    """Only the network's first channels: the matrix root of all 2,048 takes half a
    minute.
    """
    whole = inception.Inception.__call__

    def few(self, batch):
        return inception.Features(*(values[:, :WIDTH] for values in whole(self, batch)))

    monkeypatch.setattr(inception.Inception, "__call__", few)


@pytest.mark.slow
def test_from_pictures_to_the_summary(tmp_path, weights, narrow, monkeypatch, capsys):
    """If the reference's file holds statistics, they are used.

    The same pictures have distance 0.
    """
    pictures = noise(6)
    folder = write_folder(tmp_path / "mine", pictures)
    network = inception.Inception.load(weights, torch.device("cpu"))
    found = network(pictures)
    moved = score.statistics(found.pool)
    monkeypatch.setitem(sources.WIDTHS, "pool", WIDTH)
    np.savez(tmp_path / "ref.npz", arr_0=pictures, mu=moved.mean + 1, sigma=moved.covariance)
    arguments = ["--images", str(folder), "--inception", str(weights), "--batch-size", "4", "--device", "cpu"]
    assert command.main([*arguments, "--ref", str(folder), "--out", str(tmp_path / "same")]) == 0
    assert "NOT comparable with published numbers" in capsys.readouterr().out
    same = json.loads((tmp_path / "same" / "summary.json").read_text())
    assert same["fid"] == pytest.approx(0, abs=1e-4) and same["sfid"] == pytest.approx(0, abs=1e-2)
    assert (
        same["precision"] == same["recall"] == 1
        and same["num_images"] == 6
        and same["reference_sha256"] is None
    )
    assert (
        command.main([*arguments, "--ref", str(tmp_path / "ref.npz"), "--out", str(tmp_path / "moved")]) == 0
    )
    moved = json.loads((tmp_path / "moved" / "summary.json").read_text())
    assert moved["fid"] == pytest.approx(WIDTH, rel=1e-3), "each of these means is off by one"
    assert moved["reference_sha256"] == files.sha256(tmp_path / "ref.npz")
    assert moved["statistics_of_the_reference"] == {"pool": "in the file", "spatial": "of its pictures"}
    assert "torch" in moved["versions"]


@pytest.mark.slow
def test_a_class_conditional_model_is_scored(tmp_path, class_ckpt, ckpt, weights, narrow, capsys):
    """Every class has equally many pictures.

    A second run makes none, and computes the same.
    """
    folder = write_folder(tmp_path / "ref", noise(5))
    out = tmp_path / "out"
    arguments = [
        "--ref",
        str(folder),
        "--inception",
        str(weights),
        "--device",
        "cpu",
        "--out",
        str(out),
        "--batch-size",
        "5",
    ]
    assert command.main(["--ckpt", str(class_ckpt), "--num-images", "14", *arguments]) == 0
    assert "14 images made" in capsys.readouterr().out
    first = json.loads((out / "summary.json").read_text())
    assert (
        first["num_images"] == 14
        and first["seed"] == 0
        and first["generation"]["sampling"]["cfg_scale"] == 2.0
    )
    assert command.main(["--ckpt", str(class_ckpt), "--num-images", "14", *arguments]) == 0
    assert "0 images made" in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text()) == first
    for given, sentence in (
        (
            ["--ckpt", str(class_ckpt), "--num-images", "15"],
            "--num-images is 15; expected a multiple of the 7 classes",
        ),
        (["--ckpt", str(ckpt)], "this model takes captions"),
        (["--images", str(tmp_path / "absent")], "absent does not exist"),
    ):
        assert command.main([*given, *arguments]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.startswith("error: ") and error.count("\n") == 1
