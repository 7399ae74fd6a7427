"""A finished set is reused only while its source has the same pictures.

A picture that was edited into one of the same size in bytes gave the old set, with its
old pixels.
"""

import csv
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from data_tools import reuse
from mmtensorar.data.shards import MANIFEST, Manifest
from tests.helpers.sources import content, fails, made, make, picture, write_tar

BEFORE, AFTER = "red", "lime"
CAPTIONS = {"a": "first", "b": "second", "c": "third"}


def of_one_size(color: str) -> bytes:
    """A PNG whose size in bytes does not depend on its colour."""
    return picture(color).ljust(300, b"\0")


def without_times(manifest: Manifest) -> dict:
    """What the manifest of an earlier version records."""
    assert manifest.made is not None and "source_state" in manifest.made
    return {key: value for key, value in manifest.made.items() if key != "source_state"}


def folder(root: Path, color: str) -> tuple[str, Path, Path]:
    for name, caption in CAPTIONS.items():
        (root / f"{name}.png").write_bytes(of_one_size(color if name == "b" else BEFORE))
        (root / f"{name}.txt").write_text(caption)
    return "--folder", root, root / "b.png"


def class_folder(root: Path, color: str) -> tuple[str, Path, Path]:
    for name in CAPTIONS:
        (root / name).mkdir(exist_ok=True)
        (root / name / "1.png").write_bytes(of_one_size(color if name == "b" else BEFORE))
    return "--class-folder", root, root / "b" / "1.png"


def jsonl(root: Path, color: str) -> tuple[str, Path, Path]:
    folder(root, color)
    rows = [{"image": f"{name}.png", "caption": caption} for name, caption in CAPTIONS.items()]
    (root / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "--jsonl", root / "list.jsonl", root / "b.png"


def table(root: Path, color: str) -> tuple[str, Path, Path]:
    folder(root, color)
    with (root / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("image", "caption"), *((f"{name}.png", text) for name, text in CAPTIONS.items())])
    return "--csv", root / "list.csv", root / "b.png"


def parquet(root: Path, color: str) -> tuple[str, Path, Path]:
    import pyarrow.parquet

    folder(root, color)
    rows = {"image": [f"{name}.png" for name in CAPTIONS], "caption": list(CAPTIONS.values())}
    pyarrow.parquet.write_table(pyarrow.table(rows), root / "rows.parquet")
    return "--parquet", root / "rows.parquet", root / "b.png"


def parquet_bytes(root: Path, color: str) -> tuple[str, Path, Path]:
    import pyarrow.parquet

    pictures = [of_one_size(color if name == "b" else BEFORE) for name in CAPTIONS]
    rows = pyarrow.table({"image": pictures, "caption": list(CAPTIONS.values())})
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pyarrow.parquet.write_table(rows, root / "rows.parquet", **plain)
    return "--parquet", root, root / "rows.parquet"


def tar(root: Path, color: str) -> tuple[str, Path, Path]:
    members = {}
    for name, caption in CAPTIONS.items():
        members |= {
            f"{name}.png": of_one_size(color if name == "b" else BEFORE),
            f"{name}.txt": caption.encode(),
        }
    return "--tars", root, write_tar(root / "some.tar", members)


SOURCES = [folder, class_folder, jsonl, table, parquet, parquet_bytes, tar]


@pytest.fixture(params=SOURCES, ids=lambda source: source.__name__)
def source(request, tmp_path):
    root = tmp_path / "files"
    root.mkdir()
    return lambda color: request.param(root, color)


def test_a_picture_of_the_same_size_is_noticed(tmp_path, source, capsys):
    option, place, edited = source(BEFORE)
    size = edited.stat().st_size
    assert make(tmp_path / "set", option, place) == 0
    before = content(tmp_path / "set")
    capsys.readouterr()
    assert make(tmp_path / "set", option, place) == 0
    printed = capsys.readouterr().out
    assert "reusing" in printed and "comparing" not in printed
    source(AFTER)
    assert edited.stat().st_size == size
    assert "holds another set" in fails(capsys, make(tmp_path / "set", option, place))
    assert content(tmp_path / "set") == before  # nothing is replaced without --overwrite
    assert make(tmp_path / "set", option, place, "--overwrite") == 0
    pictures = (Image.open(io.BytesIO(sample.members["jpg"])) for sample in made(tmp_path / "set"))
    assert sorted(image.getpixel((8, 8))[1] > 200 for image in pictures) == [False, False, True]


def test_another_time_alone_is_no_change(tmp_path, source, capsys):
    """A Parquet file whose time differed was another set at once."""
    option, place, edited = source(BEFORE)
    assert make(tmp_path / "set", option, place) == 0
    os.utime(edited, ns=(0, 0))
    capsys.readouterr()
    assert make(tmp_path / "set", option, place) == 0
    printed = capsys.readouterr().out
    assert "comparing the pictures" in printed and "reusing" in printed


def test_a_time_that_was_restored_over_another_picture_is_noticed(tmp_path, source, capsys):
    option, place, edited = source(BEFORE)
    assert make(tmp_path / "set", option, place) == 0
    status = edited.stat()
    source(AFTER)
    os.utime(edited, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "has changed since it was made" in fails(capsys, make(tmp_path / "set", option, place))


def test_a_time_that_was_restored_is_noticed(tmp_path, captioned, capsys):
    (captioned / "red.png").write_bytes(of_one_size("red"))
    assert make(tmp_path / "set", "--folder", captioned) == 0
    status = (captioned / "red.png").stat()
    (captioned / "red.png").write_bytes(of_one_size("lime"))
    os.utime(captioned / "red.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    sentence = fails(capsys, make(tmp_path / "set", "--folder", captioned))
    assert "red.png has changed since it was made" in sentence


@pytest.mark.parametrize("what", ["times", "no times", "a copy"])
def test_equal_pictures_are_reused_after_a_comparison(tmp_path, captioned, capsys, what):
    """Files that were only copied have other times; sets of earlier versions recorded
    none.
    """
    out = tmp_path / "set"
    assert make(out, "--folder", captioned, "--samples-per-shard", 4, "--validation-share", 0.4) == 0
    before = content(out)
    manifest = Manifest.read(out)
    source = captioned
    if what == "no times":
        manifest.model_copy(update={"made": without_times(manifest)}).write(out)
    elif what == "times":
        os.utime(captioned / "blue.png", ns=(0, 0))
    else:
        source = tmp_path / "copy" / captioned.name
        shutil.copytree(captioned, source, copy_function=shutil.copyfile)
    capsys.readouterr()
    again = ("--folder", source, "--samples-per-shard", 4, "--validation-share", 0.4)
    assert make(out, *again) == 0
    printed = capsys.readouterr().out
    assert "comparing the pictures" in printed and "reusing" in printed
    after = content(out)
    assert {**before, MANIFEST: b""} == {**after, MANIFEST: b""}
    os.utime(source / "red.png", ns=(0, 0))
    assert make(out, *again, "--overwrite") == 0 and "reusing" in capsys.readouterr().out
    assert make(out, *again) == 0 and "comparing" not in capsys.readouterr().out  # the times are recorded


def test_a_set_without_times_is_not_reused_when_a_picture_differs(tmp_path, captioned, capsys):
    out = tmp_path / "set"
    (captioned / "blue.png").write_bytes(of_one_size("blue"))
    assert make(out, "--folder", captioned) == 0
    manifest = Manifest.read(out)
    manifest.model_copy(update={"made": without_times(manifest)}).write(out)
    (captioned / "blue.png").write_bytes(of_one_size("lime"))
    assert "blue.png has changed" in fails(capsys, make(out, "--folder", captioned))


@pytest.mark.parametrize("captions", ["first", "each"])
def test_a_picture_that_was_left_out_and_repaired_is_noticed(tmp_path, captioned, capsys, captions):
    good = of_one_size("red")
    (captioned / "red.png").write_bytes(b"\0" * len(good))
    (captioned / "red.txt").unlink()
    (captioned / "red.json").write_text(json.dumps({"caption": ["one", "two", "a long caption"]}))
    arguments = ("--folder", captioned, "--on-error", "skip", "--captions", captions, "--max-caption", 15)
    assert make(tmp_path / "set", *arguments) == 0
    (captioned / "red.png").write_bytes(good)
    assert "red.png has changed" in fails(capsys, make(tmp_path / "set", *arguments))


@pytest.mark.parametrize("mode", ["samples", "pictures"])
@pytest.mark.parametrize("edited", ["b", "a", "both", "touched"])
@pytest.mark.parametrize("captions", ["first", "each"])
def test_a_duplicate_that_was_edited_is_noticed(tmp_path, capsys, mode, edited, captions):
    """The set was reused, and the new picture was lost."""
    root = tmp_path / "files"
    root.mkdir()
    for name in "abc":
        (root / f"{name}.png").write_bytes(of_one_size("blue" if name == "c" else BEFORE))
        (root / f"{name}.json").write_text('{"caption": ["one", "two"]}')
    arguments = ("--folder", root, "--deduplicate", mode, "--captions", captions)
    assert make(tmp_path / "set", *arguments) == 0
    for name in {"both": "ab", "touched": ""}.get(edited, edited):
        (root / f"{name}.png").write_bytes(of_one_size(AFTER))
    os.utime(root / "c.png", ns=(0, 0))
    capsys.readouterr()
    if edited == "touched":
        assert make(tmp_path / "set", *arguments) == 0 and "reusing" in capsys.readouterr().out
        return
    sentence = fails(capsys, make(tmp_path / "set", *arguments))
    assert "a.png has changed" in sentence or "b.png has changed" in sentence
    assert make(tmp_path / "set", *arguments, "--overwrite") == 0
    assert len(made(tmp_path / "set")) == (2 + (edited != "both")) * (
        2 if captions == "each" and mode == "samples" else 1
    )


def test_work_that_was_interrupted_does_not_keep_an_old_picture(tmp_path, captioned, monkeypatch):
    from data_tools import pipeline

    (captioned / "red.png").write_bytes(of_one_size("red"))
    arguments = ("--folder", captioned, "--samples-per-shard", 1)
    make_part, left = pipeline.make_part, [5]

    def dying(*task):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return make_part(*task)

    monkeypatch.setattr(pipeline, "make_part", dying)
    assert make(tmp_path / "set", *arguments) == 130
    monkeypatch.undo()
    for color in ("red", "blue", "white"):  # one of them is in a finished part
        (captioned / f"{color}.png").write_bytes(of_one_size("lime"))
    assert make(tmp_path / "set", *arguments) == 0
    found = {sample.members["txt"]: sample.members["jpg"] for sample in made(tmp_path / "set")}
    for color in ("red", "blue", "white"):
        assert Image.open(io.BytesIO(found[f"a {color} picture".encode()])).getpixel((8, 8))[1] > 200


def test_other_names_of_classes_are_not_the_old_set(tmp_path, capsys):
    """The captions are numbers in both cases; the names are in the manifest alone."""
    members = {"0.png": picture("red"), "0.cls": b"0", "1.png": picture("blue"), "1.cls": b"1"}
    arguments = ("--tars", write_tar(tmp_path / "a.tar", members), "--class-names", tmp_path / "names.json")
    (tmp_path / "names.json").write_text('{"0": "cat", "1": "dog"}')
    assert make(tmp_path / "set", *arguments) == 0
    (tmp_path / "names.json").write_text('{"0": "dog", "1": "cat"}')
    assert "holds another set" in fails(capsys, make(tmp_path / "set", *arguments))


def test_a_damaged_set_whose_source_changed_can_be_overwritten(tmp_path, captioned, capsys):
    assert make(tmp_path / "set", "--folder", captioned) == 0
    whole = (tmp_path / "set" / "00000.tar").read_bytes()
    (tmp_path / "set" / "00000.tar").write_bytes(whole[:2000])
    os.utime(captioned / "red.png", ns=(0, 0))
    assert "damaged or cut" in fails(capsys, make(tmp_path / "set", "--folder", captioned))
    assert make(tmp_path / "set", "--folder", captioned, "--overwrite") == 0
    assert (tmp_path / "set" / "00000.tar").read_bytes() == whole


@pytest.mark.parametrize(
    "line", ["[1]", '{"name": "a"', '{"name": "a"}', '{"name": 1, "reason": "x"}', "null"]
)
def test_a_damaged_list_of_what_was_left_out_is_named(tmp_path, line):
    path = tmp_path / "left_out.jsonl"
    path.write_text('{"name": "a", "reason": "damaged"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"left_out\.jsonl line 2: expected name and reason"):
        reuse.left_out_rows(path)
