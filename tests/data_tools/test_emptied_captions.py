"""Captions of which the cleaning leaves nothing: counted, named, found later, and kept
on request.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import check_shards, encode_text
from mmtensorar.captions import cleaning
from mmtensorar.captions.encoders import T5Features
from mmtensorar.data import loader
from mmtensorar.data.members import decode_features, encode_features
from mmtensorar.data.shards import Manifest, Sample, iterate_tar, write_tar
from tests.helpers.fakes import write_tiny_t5
from tests.helpers.sources import make, picture
from tests.helpers.sources import write_tar as pack_tar

EMPTIED = [
    "红色的圆",
    "红色的圆，蓝色的星。",
    "https://example.org/a.jpg",
    "...",
    "IMG_0001.jpg",
    "12345678",
    "@name",
]
KEPT = ["a red circle", "!!!", "猫 cat", "кот", "🔴"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    write_tiny_t5(folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """A set with four captions that original empties, and one that it keeps."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "JPEG")
    samples = [
        Sample(f"{number:09d}", {"jpg": image.getvalue(), "txt": caption.encode(), "json": b"{}"})
        for number, caption in enumerate([*EMPTIED[:4], "a red circle"])
    ]
    (tmp_path / "set").mkdir()
    shard = write_tar(tmp_path / "set" / "00000.tar", samples)
    Manifest(shards=(shard,), num_samples=5, image_size=8, source="test", seed=0).write(tmp_path / "set")
    return tmp_path / "set"


def encode(folder: Path, t5: Path, kind: str) -> int:
    options = ["--text-encoder", t5, "--caption-cleaning", kind, "--max-tokens", 5, "--batch-size", 2]
    return encode_text.main([str(folder), *map(str, options)])


def replace_member(folder: Path, name: str, value: bytes) -> None:
    """Replace a member of the first sample, and update the manifest."""
    first, *others = iterate_tar(folder / "00000.tar")
    shard = write_tar(folder / "00000.tar", [Sample(first.key, first.members | {name: value}), *others])
    Manifest.read(folder).model_copy(update={"shards": (shard,)}).write(folder)


@pytest.mark.parametrize("caption", EMPTIED)
def test_a_caption_that_is_emptied_can_be_kept(caption):
    assert cleaning.leaves_nothing(caption, "original")
    assert cleaning.prepare(caption, "original_or_raw") == caption
    for kind in ("original_or_raw", "lower", "none"):
        assert not cleaning.leaves_nothing(caption, kind)


@pytest.mark.parametrize("caption", KEPT)
def test_other_captions_are_cleaned_as_before(caption):
    assert not cleaning.leaves_nothing(caption, "original")
    assert cleaning.prepare(caption, "original_or_raw") == cleaning.prepare(caption, "original")


def test_encoding_counts_and_names_them_and_a_check_finds_them(tmp_path, folder, t5, capsys):
    """Chinese captions, links and '...' became the features of an empty prompt without
    a word.
    """
    assert encode(folder, t5, "original") == 0
    told = capsys.readouterr()
    assert "left nothing: 4" in told.out and "original_or_raw" in told.out
    for number in range(3):  # the first ones are named
        assert f"sample {number:09d}: caption cleaning original" in told.err and EMPTIED[number] in told.err
    assert check_shards.main([str(folder), "--workers", "1", "--report", str(tmp_path / "r.json")]) == 0
    told = capsys.readouterr()
    assert "captions emptied by cleaning: 4" in told.out and "no problems" in told.out
    assert "sample 000000003: " in told.err
    emptied = json.loads((tmp_path / "r.json").read_text())["emptied"]
    assert [each["key"] for each in emptied] == [f"{number:09d}" for number in range(4)]


def test_the_raw_text_is_encoded_on_request(folder, t5, capsys):
    assert encode(folder, t5, "original_or_raw") == 0
    told = capsys.readouterr()
    assert "nothing" not in told.out + told.err
    assert Manifest.read(folder).text_features.cleaning == "original_or_raw"
    lengths = [len(decode_features(s.members["t5.npy"], "")) for s in iterate_tar(folder / "00000.tar")]
    assert all(length > 1 for length in lengths)
    assert check_shards.main([str(folder), "--workers", "1"]) == 0
    assert "emptied" not in capsys.readouterr().out


def test_shards_made_with_features_count_them(tmp_path, t5, capsys):
    source = tmp_path / "files"
    source.mkdir()
    for number, caption in enumerate([EMPTIED[0], EMPTIED[2], "a red circle"]):
        (source / f"{number}.png").write_bytes(picture("red"))
        (source / f"{number}.txt").write_text(caption, encoding="utf-8")
    assert make(tmp_path / "set", "--folder", source, "--text-encoder", t5, "--max-tokens", 5) == 0
    assert "left nothing: 2" in capsys.readouterr().out
    kept = ("--caption-cleaning", "original_or_raw")
    assert make(tmp_path / "kept", "--folder", source, "--text-encoder", t5, "--max-tokens", 5, *kept) == 0
    assert "nothing" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["folder", "jsonl", "tars"])
def test_captions_are_named_by_their_item(tmp_path, t5, capsys, kind):
    """The part of unfinished work that was named is gone when the set is made."""
    source, long = tmp_path / "files", "a red circle " * 9
    source.mkdir()
    for number, caption in enumerate([EMPTIED[0], long]):
        (source / f"{number}.png").write_bytes(picture("red"))
        (source / f"{number}.txt").write_text(caption, encoding="utf-8")
    rows = [{"image": "0.png", "caption": EMPTIED[0]}, {"image": "1.png", "caption": long}]
    (tmp_path / "files" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    members = {path.name: path.read_bytes() for path in sorted(source.glob("?.*"))}
    (tmp_path / "tars").mkdir()
    tar = pack_tar(tmp_path / "tars" / "a.tar", members)
    place, empty, cut = {
        "folder": (source, "folder 0.png", "folder 1.png"),
        "jsonl": (source / "rows.jsonl", "jsonl 0.png", "jsonl 1.png"),
        "tars": (tar, "webdataset a.tar 0", "webdataset a.tar 1"),
    }[kind]
    assert make(tmp_path / "set", f"--{kind}", place, "--text-encoder", t5, "--max-tokens", 5) == 0
    err = capsys.readouterr().err
    assert f"{empty}: caption cleaning" in err and f"{cut}: the caption has" in err
    assert ".unfinished" not in err


def test_prompts_are_named_when_they_are_encoded(t5, capsys):
    """Generation, evaluation and training with live features all call the encoder."""
    encoder = T5Features(str(t5), num_slots=5, dim=6)
    encoder([EMPTIED[0], "a red circle", EMPTIED[3]])
    told = capsys.readouterr().err
    assert EMPTIED[0] in told and EMPTIED[3] in told and "circle" not in told
    for _ in range(98):
        encoder([EMPTIED[1]])
    assert encoder.emptied.count == 100
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "number 10)" in lines[1] and "number 100)" in lines[2]


def test_training_on_cached_features_names_them(t5, capsys):
    encoder = T5Features(str(t5), num_slots=5, dim=6)
    captions = [EMPTIED[0], "a red circle", EMPTIED[3]]
    features = [np.zeros((length, 6), np.float16) for length in (1, 4, 1)]
    names = [f"00000.tar: sample {number}" for number in range(3)]
    codes = np.zeros((3, 9, 1), np.uint16)
    batch = loader.RawBatch(codes, captions, np.zeros(3, bool), features, names, [])
    loader.add_condition(batch, encoder, 5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and names[0] in lines[0] and names[2] in lines[1]


@pytest.mark.parametrize("text", [b"", b" \n\t", b"\xef\xbb\xbf", "\u200b\u2060".encode(), "\u3000".encode()])
def test_a_check_finds_empty_captions(folder, capsys, text):
    replace_member(folder, "txt", text)
    assert check_shards.main([str(folder), "--workers", "1"]) == 2
    assert "sample 000000000: the caption is empty" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(0, 6), (6, 6), (1, 0)])
def test_a_check_finds_features_without_tokens(tmp_path, folder, t5, capsys, shape):
    assert encode(folder, t5, "lower") == 0
    replace_member(folder, "t5.npy", encode_features(np.zeros(shape, np.float16)))
    assert check_shards.main([str(folder), "--workers", "1"]) == 2
    assert "sample 000000000: t5.npy has shape" in capsys.readouterr().err
