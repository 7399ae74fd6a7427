"""Shards may come from anywhere.

Equal input gives equal bytes; damaged or hostile input is one sentence, never a crash.
"""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from mmtensorar import files
from mmtensorar.data import shards
from mmtensorar.data.members import (
    check_features,
    decode_caption,
    decode_codes,
    decode_features,
    encode_codes,
    encode_features,
)
from mmtensorar.data.pictures import SHARD_FORMATS, center_square, decode_picture
from mmtensorar.data.shards import Manifest, Sample, Staging, iterate_tar, write_tar

SAMPLES = [Sample("a", {"txt": b"one", "json": b"{}"}), Sample("b", {"txt": b"two"})]


def write_members(path, members: list[tuple[str, bytes]], **attributes):
    """A tar as anybody could make it.

    attributes: fields of each TarInfo, such as type and linkname.
    """
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in attributes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return path


def sentence(path) -> str:
    with pytest.raises(ValueError) as caught:
        list(iterate_tar(path))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


# ---- tars ------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    shard = write_tar(tmp_path / "00000.tar", SAMPLES)
    assert list(iterate_tar(tmp_path / "00000.tar")) == SAMPLES
    assert shard.num_samples == 2 and shard.sha256 == files.sha256(tmp_path / "00000.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["00000.tar"]


def test_equal_samples_give_equal_bytes(tmp_path):
    assert write_tar(tmp_path / "x.tar", SAMPLES).sha256 == write_tar(tmp_path / "y.tar", SAMPLES).sha256


def test_every_truncation_is_refused(tmp_path):
    """tarfile accepts a tar that ends between two members as complete: samples would be
    lost silently.
    """
    whole = write_tar(tmp_path / "whole.tar", SAMPLES)
    content = (tmp_path / whole.name).read_bytes()
    end = 6 * 512  # three members, with one header and one block each
    for length in (0, 1, 511, 512, 700, 1024, 1536, 2048, end - 512, end, end + 512, end + 1023):
        path = tmp_path / "cut.tar"
        path.write_bytes(content[:length])
        sentence(path)


def test_a_damaged_header_is_refused(tmp_path):
    """tarfile takes a header with a wrong checksum for the end of the tar."""
    path = write_members(tmp_path / "x.tar", [("a.txt", b"one"), ("b.txt", b"two")])
    content = bytearray(path.read_bytes())
    content[1024 + 3] ^= 1
    path.write_bytes(content)
    assert "damaged or cut after a.txt" in sentence(path)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("a.txt", b"1"), ("a.txt", b"2")], "sample a: member a.txt occurs twice"),
        ([("a.txt", b"1"), ("b.txt", b"2"), ("a.json", b"{}")], "sample a: its members are not together"),
        ([("../a.txt", b"1")], "is a path"),
        ([("folder/a.txt", b"1")], "is a path"),
        ([("/etc/a.txt", b"1")], "is a path"),
        ([(".a.txt", b"1")], "is a path"),
        ([("a\x1b[2J.txt", b"1")], "is a path or has"),  # would clear the terminal that shows it
        ([("a.exe", b"1")], "sample a: member a.exe has an unknown extension; known: jpg"),
        ([("a", b"1")], "unknown extension"),
        ([("a.pkl", b"1")], "sample a: member a.pkl is refused"),
        ([("a.pyd", b"1")], "refused"),
        ([("a.codes.pth", b"1")], "refused"),
        ([("a.txt", b"x" * 70000)], "sample a: member a.txt has 70000 bytes, more than the 65536 allowed"),
    ],
)
def test_hostile_members_are_refused(tmp_path, members, expected):
    assert expected in sentence(write_members(tmp_path / "x.tar", members))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_only_plain_files_are_read(tmp_path, kind):
    path = write_members(tmp_path / "x.tar", [("a.txt", b"")], type=kind, linkname="/etc/passwd")
    assert "sample a: member a.txt is a link, folder or device" in sentence(path)


def test_a_compressed_tar_is_refused(tmp_path):
    """The size of a compressed tar does not show how much it unpacks to."""
    with tarfile.open(tmp_path / "x.tar", "w:gz"):
        pass
    assert "damaged" in sentence(tmp_path / "x.tar")


def test_a_missing_shard_and_a_command_are_refused(tmp_path):
    assert "missing" in sentence(tmp_path / "absent.tar")
    with pytest.raises(ValueError, match="missing"):
        list(iterate_tar("pipe:cat x.tar"))


def test_the_writer_refuses_what_the_reader_would(tmp_path):
    with pytest.raises(ValueError, match="is a path"):
        write_tar(tmp_path / "x.tar", [Sample("../a", {"txt": b"1"})])
    assert not (tmp_path / "x.tar").exists()


# ---- members ---------------------------------------------------------------------------------


def test_codes_round_trip():
    codes = np.arange(6, dtype=np.uint16).reshape(1, 3, 2)
    assert np.array_equal(decode_codes(encode_codes(codes), "here"), codes)


def npy(array, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(1))
    return buffer.getvalue()


HEADER = b"\x93NUMPY\x01\x00"
MALICIOUS = {
    "objects": npy(np.array([{"a": 1}], dtype=object), allow_pickle=True),
    "pickle": pickle.dumps([1]),
    "archive": archive(),
    "broken archive": archive()[:40],
    "nothing": b"",
    "cut": npy(np.zeros((1, 4, 1), np.uint16))[:-2],
    "int64": npy(np.zeros((1, 4, 1))),
    "two axes": npy(np.zeros((1, 4), np.uint16)),
    "huge": HEADER
    + b"\x46\x00"
    + b"{'descr': '<u2', 'fortran_order': False, 'shape': (1, %d, 1), }   " % 2**50,
    "header is no literal": HEADER + b"\x10\x00" + b"__import__('os')",
    "header does not parse": HEADER + b"\x10\x00" + b"{'descr': (((((\n",
}


@pytest.mark.parametrize("content", MALICIOUS.values(), ids=MALICIOUS)
def test_only_plain_uint16_arrays_are_codes(content):
    with pytest.raises(ValueError, match="^here: codes.npy"):
        decode_codes(content, "here")


def test_random_damage_to_codes_is_always_one_sentence():
    whole, rng = npy(np.zeros((1, 4, 1), np.uint16)), np.random.default_rng(0)
    for _ in range(300):
        content = bytearray(whole)
        content[rng.integers(8, 80)] = rng.integers(256)
        try:
            decode_codes(bytes(content), "here")
        except ValueError as error:
            assert str(error).startswith("here: codes.npy")


def test_features_round_trip_and_are_checked():
    """A feature that is not finite would give a loss that is not finite, far from its
    cause.
    """
    features = np.arange(6, dtype=np.float16).reshape(3, 2)
    assert np.array_equal(decode_features(encode_features(features), "here"), features)
    for wrong in (npy(features.astype(np.float32)), npy(features[None]), b""):
        with pytest.raises(ValueError, match="^here: t5.npy"):
            decode_features(wrong, "here")
    expected = shards.TextFeatures(text_encoder="x", weight_hash="y", width=2, max_tokens=3, cleaning="none")
    check_features(features, expected, "here")
    for wrong, sentence in (
        (np.zeros((4, 2), np.float16), r"t5.npy has shape \[4, 2\], the manifest says \[1 to 3, 2\]"),
        (np.zeros((0, 2), np.float16), r"t5.npy has shape \[0, 2\]"),
        (np.zeros((3, 3), np.float16), r"t5.npy has shape \[3, 3\]"),
        (features + np.float16(np.inf), "not finite"),
    ):
        with pytest.raises(
            ValueError, match=f"^here: {sentence}|^here: t5.npy holds numbers that are {sentence}"
        ):
            check_features(wrong, expected, "here")


def picture(mode="RGB", size=(4, 3), kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


def test_transparent_parts_become_white():
    """A bare conversion would show the colour under the transparent parts, which is
    mostly black.
    """
    image = decode_picture(picture("RGBA"), "here")
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)


def test_upright_follows_the_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    content = picture(kind="JPEG", exif=exif)
    assert decode_picture(content, "here").size == (4, 3)
    assert decode_picture(content, "here", upright=True).size == (3, 4)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a JPEG, PNG or WEBP"),
        (b"GIF89a nonsense", "not a JPEG, PNG or WEBP"),
        (picture(kind="GIF"), "not a JPEG, PNG or WEBP"),
        (picture(kind="TIFF"), "not a JPEG, PNG or WEBP"),
        (picture(size=(64, 64), kind="JPEG")[:-60], "truncated"),
        (picture(size=(64, 64))[:-30], "unreadable"),
        (picture("1", size=(9450, 9450)), "9450x9450 pixels, more than"),
    ],
)
def test_unreadable_images_are_one_sentence(content, reason):
    with pytest.raises(ValueError, match=f"^here: unreadable image .*{reason}|^here: {reason} image"):
        decode_picture(content, "here", formats=SHARD_FORMATS)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"\xff", "not UTF-8"), (b" \n", "empty"), (b"a" * 70000, "70000 bytes")]
)
def test_captions_are_short_utf8(content, reason):
    with pytest.raises(ValueError, match=f"^here: the caption .*{reason}"):
        decode_caption(content, "here")


# ---- manifest --------------------------------------------------------------------------------


def make_manifest(folder, *names: str, source="test") -> Manifest:
    written = tuple(write_tar(folder / name, SAMPLES) for name in names)
    return Manifest(shards=written, num_samples=2 * len(names), image_size=8, source=source, seed=0)


def test_manifest_round_trip_and_its_json(tmp_path):
    manifest = make_manifest(tmp_path, "00000.tar")
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert list(written) == [
        "format",
        "shards",
        "num_samples",
        "image_size",
        "codes",
        "text_features",
        "classes",
        "source",
        "seed",
        "made",
    ]
    assert written["format"] == 1 and written["codes"] is None
    assert list(written["shards"][0]) == ["name", "num_samples", "sha256"]


def test_a_folder_without_manifest_is_incomplete(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        Manifest.read(tmp_path / "absent")
    with pytest.raises(
        ValueError, match="has no manifest.json: the shard set is incomplete .*mmtensorar shards make"
    ):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format": 2}, "format 2; this version reads format 1"),
        ({"num_samples": 5}, "manifest.json: num_samples is not the sum over the shards"),
        ({"image_size": "8"}, "image_size: expected a valid integer, got '8'"),
        ({"image_size": 10**30}, "image_size"),
        ({"colour": 1}, "colour: unknown key"),
        ({"shards": [{"name": "a.tar", "num_samples": 2}]}, "shards.0.sha256: missing"),
        ({"seed": "x" * 10**6}, "seed: expected a valid integer"),
        ({"shards": [{"name": "../x.tar", "num_samples": 2, "sha256": "0" * 64}]}, "shards.0.name"),
        (
            {"shards": [{"name": "gone.tar", "num_samples": 2, "sha256": "0" * 64}]},
            "gone.tar: the shard is missing",
        ),
    ],
)
def test_a_wrong_manifest_is_one_sentence(tmp_path, change, expected):
    """In our words: `Value error, ...` and `Extra inputs are not permitted` are
    pydantic's.
    """
    manifest = make_manifest(tmp_path, "00000.tar").model_dump(mode="json")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(ValueError) as caught:
        Manifest.read(tmp_path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000, '{"format": ' + "1" * 5000 + "}"])
def test_a_file_that_is_not_a_manifest_is_refused(tmp_path, content):
    """Of a number with thousands of digits, Python advises to call a function of its
    own.
    """
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="manifest.json: (not JSON|format None)") as caught:
        Manifest.read(tmp_path)
    assert "sys." not in str(caught.value)


# ---- staging ---------------------------------------------------------------------------------


def test_a_set_is_replaced_as_a_whole(tmp_path):
    """Until the commit the old set stays; after the commit no shard of the old set is
    left.
    """
    old = make_manifest(tmp_path, "00000.tar", "00001.tar")
    old.write(tmp_path)
    staging = Staging(tmp_path, "new")
    new = make_manifest(staging.path, "00000.tar", source="new")
    assert Manifest.read(tmp_path) == old
    staging.commit(new)
    assert Manifest.read(tmp_path) == new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "manifest.json"]


@pytest.mark.parametrize("calls", range(1, 7))
def test_a_commit_interrupted_anywhere_is_finished_later(tmp_path, monkeypatch, calls):
    """After a kill between any two renames, the folder has the old set, the new set, or
    no manifest, but never a mixture.
    """
    import os

    old = make_manifest(tmp_path, "00000.tar", "00001.tar")
    old.write(tmp_path)
    staging = Staging(tmp_path, "new")
    new = make_manifest(staging.path, "00000.tar", "00002.tar", source="new")
    rename, left = os.replace, [calls]

    def dying(source, target):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", dying)
    try:
        staging.commit(new)
    except KeyboardInterrupt:
        pass
    monkeypatch.setattr(os, "replace", rename)
    if (tmp_path / "manifest.json").exists():
        assert Manifest.read(tmp_path) in (old, new)
    Staging.recover(tmp_path)
    assert Manifest.read(tmp_path) == new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "00002.tar", "manifest.json"]


def test_staged_shards_are_reused_only_for_the_same_set(tmp_path):
    staging = Staging(tmp_path, {"seed": 1})
    shard = write_tar(staging.path / "00000.tar", SAMPLES)
    assert not staging.finished("00000.tar")  # it is not recorded as complete yet
    staging.record(shard)
    assert Staging(tmp_path, {"seed": 1}).finished("00000.tar") == shard
    assert not Staging(tmp_path, {"seed": 2}).finished("00000.tar")
    assert not Staging(tmp_path, {"seed": 1}).finished("00000.tar")


def test_a_square_is_the_centre_scaled_as_in_training():
    """The picture is halved by means of four pixels while possible.

    The grey levels can be checked by eye.
    """
    stripes = np.zeros((4, 8, 3), np.uint8)
    stripes[:, 2:4], stripes[:, 4:6] = 100, 200  # the centre's left and right half
    stripes[::2, 2:6] += 40
    small = center_square(Image.fromarray(stripes), 2)
    assert np.asarray(small)[..., 0].tolist() == [[120, 220], [120, 220]]
    for size in ((64, 64), (130, 70), (71, 300), (20, 31)):
        assert center_square(Image.new("RGB", size, "red"), 64).size == (64, 64)
    same = Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8))
    assert (np.asarray(center_square(same, 64)) == np.asarray(same)).all()
