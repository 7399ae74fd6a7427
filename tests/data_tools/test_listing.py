"""Everything in a place that a command points at is read, or counted and named with the
reason.

`ln -s ../c b/more` gave one of two samples, and `a.tar.gz` beside `b.tar` was passed
over: exit code 0 and no word in both cases.
"""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_tools import check_shards, inspect_shards
from data_tools.sources import Layout, webdataset
from mmtensorar.data.shards import Manifest
from tests.helpers.sources import (
    COLORS,
    assert_right,
    captions,
    content,
    fails,
    made,
    make,
    picture,
    write_tar,
)

HALF = COLORS[:3], COLORS[3:]


# ---- links and hidden files, in every source that lists folders ------------------------------


def captioned_pictures(root: Path, colors) -> None:
    root.mkdir(parents=True)
    for color in colors:
        (root / f"{color}.png").write_bytes(picture(color))
        (root / f"{color}.txt").write_text(f"a {color} picture")


def classes(root: Path, colors) -> None:
    for color in colors:
        (root / color).mkdir(parents=True)
        (root / color / "1.png").write_bytes(picture(color))


def parquet(root: Path, colors) -> None:
    import pyarrow.parquet

    root.mkdir(parents=True)
    rows = [{"image": picture(color), "caption": f"a {color} picture"} for color in colors]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "rows.parquet")


def tars(root: Path, colors) -> None:
    root.mkdir(parents=True)
    write_tar(root / "some.tar", members(colors))


def members(colors) -> dict[str, bytes]:
    found = {}
    for color in colors:
        found |= {f"{color}.png": picture(color), f"{color}.txt": f"a {color} picture".encode()}
    return found


TREES = {"--folder": captioned_pictures, "--parquet": parquet, "--tars": tars}


def linked(root: Path, kind: str, write) -> Path:
    """A folder whose second half is behind a link, in one of several ways."""
    write(root / "b", HALF[0])
    if kind == "a linked folder":
        write(root / "c", HALF[1])
        (root / "b" / "more").symlink_to("../c")
    elif kind == "a link in a linked folder":
        write(root / "d", HALF[1])
        (root / "c").mkdir()
        (root / "c" / "deep").symlink_to(root / "d")
        (root / "b" / "more").symlink_to("../c")
    elif kind == "linked files":
        write(root / "c", HALF[1])
        for path in (root / "c").iterdir():
            (root / "b" / f"1_{path.name}").symlink_to(path)
    else:  # circles
        write(root / "c", HALF[1])
        (root / "b" / "more").symlink_to("../c")
        (root / "c" / "back").symlink_to("../b")
        (root / "b" / "self").symlink_to(".")
    return root / "b"


@pytest.mark.parametrize(
    "kind", ["a linked folder", "a link in a linked folder", "linked files", "a circle of links"]
)
@pytest.mark.parametrize("option", TREES)
def test_what_is_behind_links_is_read_once(tmp_path, capsys, option, kind):
    place = linked(tmp_path, kind, TREES[option])
    assert make(tmp_path / "set", option, place) == 0
    assert_right(tmp_path / "set")
    err = capsys.readouterr().err
    assert f"note: {place}: followed " in err
    assert ("a folder that is listed already" in err) == (kind == "a circle of links")


BAD = os.fsdecode(b"p\xff")  # a name that is not UTF-8


@pytest.mark.parametrize("option", TREES)
def test_a_name_that_is_not_utf8_is_a_problem_of_its_file(tmp_path, capsys, option):
    """One such file, of any kind, stopped a folder even with --on-error skip."""
    TREES[option](tmp_path / "b", COLORS)
    (tmp_path / "b" / f"{BAD}.md").write_text("x")
    assert make(tmp_path / "other", option, tmp_path / "b") == 0
    assert r"'p\udcff.md'" in capsys.readouterr().err
    kinds = (".png", ".tar", ".parquet")
    first = next(path for path in sorted((tmp_path / "b").rglob("*")) if path.suffix in kinds)
    shutil.copy(first, first.with_name(f"{BAD}{first.suffix}"))
    source = (option, tmp_path / "b")
    assert make(tmp_path / "set", *source) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert rf"p\udcff{first.suffix}': a name that is not UTF-8" in sentence
    if option == "--folder":  # a whole tar or table is never skipped
        assert make(tmp_path / "set", *source, "--on-error", "skip") == 0
        assert_right(tmp_path / "set")
        assert "not UTF-8" in (tmp_path / "set" / "left_out.jsonl").read_text()


@pytest.mark.parametrize("name", ["cyan", BAD])
def test_a_class_that_cannot_be_read_is_an_error(tmp_path, capsys, name):
    """Without its link's target, a class was left out as "beside the folders", which
    shifts the numbers of the others.
    """
    classes(tmp_path / "b", COLORS)
    if name == "cyan":
        (tmp_path / "b" / name).symlink_to("../missing")
    else:
        shutil.copytree(tmp_path / "b" / "red", tmp_path / "b" / name)
    sentence = fails(capsys, make(tmp_path / "set", "--class-folder", tmp_path / "b", "--on-error", "skip"))
    assert ("a link without a target" if name == "cyan" else "not UTF-8") in sentence


@pytest.mark.parametrize("option", TREES)
def test_hidden_files_and_checkpoints_of_notebooks_are_left_out(tmp_path, capsys, option):
    TREES[option](tmp_path / "b", COLORS)
    for folder in (".ipynb_checkpoints", ".trash", "sub/.ipynb_checkpoints"):
        shutil.copytree(tmp_path / "b", tmp_path / "b" / folder)
    for path in [*(tmp_path / "b").glob("*.*")]:
        if path.is_file():
            shutil.copy(path, path.with_name(f"._{path.name}"))
    assert make(tmp_path / "set", option, tmp_path / "b") == 0
    assert_right(tmp_path / "set")
    assert "(hidden): ." in capsys.readouterr().err


def test_classes_behind_links(tmp_path, capsys):
    """A link to the whole folder, or from one class into another, does not mix the
    classes.
    """
    classes(tmp_path / "b", HALF[0])
    classes(tmp_path / "c", HALF[1])
    for color in HALF[1]:
        (tmp_path / "b" / color).symlink_to(tmp_path / "c" / color)
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "2.png").write_bytes(picture("blue"))
    (tmp_path / "b" / "blue" / "more").symlink_to("../../extra")
    (tmp_path / "b" / "red" / "all").symlink_to("..")
    (tmp_path / "b" / "red" / "other").symlink_to("../blue")
    (tmp_path / "b" / "beside.png").write_bytes(picture("red"))
    (tmp_path / "b" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "b" / "red" / "notes.md").write_text("x")
    (tmp_path / "b" / "blue" / "notes.md").write_text("x")
    assert make(tmp_path / "set", "--class-folder", tmp_path / "b") == 0
    assert Manifest.read(tmp_path / "set").classes == tuple(sorted(COLORS))
    assert captions(tmp_path / "set") == ["0", "1", "1", "2", "3", "4", "5"]  # blue has two
    start = f"note: {tmp_path / 'b'}: "
    printed = capsys.readouterr().err.splitlines()
    assert [line.removeprefix(start) for line in printed if line.startswith(start)] == [
        "left out 1 (hidden): .ipynb_checkpoints",
        "left out 1 (beside the folders): beside.png",
        "followed 1 (a link out of the folder): blue/more",
        "left out 2 (not a picture): blue/notes.md, red/notes.md",
        "left out 2 (a folder that is listed already): red/all, red/other",
    ]


@pytest.mark.parametrize(
    ("link", "target", "first"),
    [
        ("kitty", "lime", "the class 'lime'"),
        ("a", "red", "the class 'red'"),
        ("pet", "../b/blue", "the class 'blue'"),
        ("all", ".", "the whole folder"),
        ("kitty", "far", "the class 'far'"),
    ],
)
def test_a_class_that_is_another_one_is_refused(tmp_path, capsys, link, target, first):
    """The same pictures had two class numbers, without a word."""
    classes(tmp_path / "b", COLORS)
    if target == "far":
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "1.png").write_bytes(picture("red"))
        (tmp_path / "b" / "far").symlink_to("../c")
    (tmp_path / "b" / link).symlink_to(target)
    sentence = fails(capsys, make(tmp_path / "set", "--class-folder", tmp_path / "b"))
    assert f"{link!r} is {first} under another name" in sentence


def test_a_folder_that_two_classes_link_to_has_one_class(tmp_path, capsys):
    classes(tmp_path / "b", COLORS)
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "2.png").write_bytes(picture("blue"))
    for color in ("blue", "red", "yellow"):
        (tmp_path / "b" / color / "more").symlink_to("../../extra")
    assert make(tmp_path / "set", "--class-folder", tmp_path / "b") == 0
    assert len(captions(tmp_path / "set")) == len(COLORS) + 1
    assert "left out 2 (a folder that is listed already): red/more" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_reach_pictures_behind_links(tmp_path, kind):
    import pyarrow.parquet

    captioned_pictures(tmp_path / "far", COLORS)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "images").symlink_to("../far")
    rows = [{"image": f"images/{color}.png", "caption": f"a {color} picture"} for color in COLORS]
    (tmp_path / "b" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = ["image,caption", *(",".join(row.values()) for row in rows)]
    (tmp_path / "b" / "rows.csv").write_text("\n".join(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b" / "rows.parquet")
    assert make(tmp_path / "set", f"--{kind}", tmp_path / "b" / f"rows.{kind}") == 0
    assert_right(tmp_path / "set")


def test_captions_without_a_picture_are_counted(tmp_path, captioned, capsys):
    (captioned / "lost.txt").write_text("no picture")
    (captioned / "red.json").write_text("{}")
    (captioned / "a.tar").write_bytes(b"")
    (captioned / "b.gif").symlink_to("gone")
    assert make(tmp_path / "set", "--folder", captioned) == 0
    err = capsys.readouterr().err
    assert "left out 1 (no picture of that name): lost.txt" in err
    assert "left out 1 (its .txt is used): red.json" in err
    assert "a.tar" in err and "left out 1 (a link without a target): b.gif" in err


@pytest.mark.parametrize(
    ("picture_suffix", "text", "unused"),
    [
        (".PNG", ".TXT", ()),
        (".png", ".Txt", ()),
        (".PNG", ".JSON", ()),
        (".png", ".txt", (".TXT", ".json")),
        (".Png", ".TXT", (".JSON",)),
    ],
)
def test_the_case_of_a_suffix_does_not_count(tmp_path, capsys, picture_suffix, text, unused):
    """A.PNG beside A.TXT had no caption."""
    for suffix in (text, *unused):
        right = suffix == text
        content = "a red picture" if right else "another"
        content = json.dumps({"caption": content}) if suffix.lower() == ".json" else content
        (tmp_path / f"A{suffix}").write_text(content)
    (tmp_path / f"A{picture_suffix}").write_bytes(picture("red"))
    assert make(tmp_path / "set", "--folder", tmp_path) == 0
    assert captions(tmp_path / "set") == ["a red picture"]
    err = capsys.readouterr().err
    assert (f"left out {len(unused)} (its {text} is used)" in err) == bool(unused)
    assert "no picture" not in err


# ---- compressed tars -------------------------------------------------------------------------


def compressed(path: Path, found: dict[str, bytes]) -> Path:
    plain = write_tar(path.with_name("plain"), found).read_bytes()
    path.with_name("plain").unlink()
    kind = {"gz": "gz", "tgz": "gz", "GZ": "gz", "bz2": "bz2", "tbz2": "bz2", "xz": "xz", "txz": "xz"}
    if (suffix := path.name.rpartition(".")[2]) in kind:
        import bz2
        import gzip
        import lzma

        pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind[suffix]]
        path.write_bytes(pack(plain))
    else:
        import pyarrow

        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(plain)
    return path


@pytest.mark.parametrize(
    "name",
    ["a.tar.gz", "a.tgz", "a.TAR.GZ", "a.tar.zst", "a.tzst", "a.tar.bz2", "a.tbz2", "a.tar.xz", "a.txz"],
)
def test_compressed_tars_are_read_beside_plain_ones(tmp_path, name):
    (tmp_path / "b").mkdir()
    compressed(tmp_path / "b" / name, members(HALF[0]))
    write_tar(tmp_path / "b" / "b.tar", members(HALF[1]))
    assert make(tmp_path / "set", "--tars", tmp_path / "b") == 0
    assert_right(tmp_path / "set")


@pytest.mark.parametrize("kind", [0x50, 0x5A, 0x5F])
@pytest.mark.parametrize("name", ["a.tar.zst", "a.tzst", "a.tar"])
def test_zstd_may_begin_with_a_frame_to_skip(tmp_path, name, kind):
    """pzstd writes the length of each part into one."""
    whole = compressed(tmp_path / "a.tar.zst", members(COLORS)).read_bytes()
    skipped = bytes((kind, 0x2A, 0x4D, 0x18, 4, 0, 0, 0)) + len(whole).to_bytes(4, "little")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / name).write_bytes(skipped + whole + skipped)
    assert make(tmp_path / "set", "--tars", tmp_path / "b") == 0
    assert_right(tmp_path / "set")


@pytest.mark.parametrize("name", ["00009.txz", "b.tzst", "b.tar.lz4", "more/00001.tar", "more/deep/b.TGZ"])
def test_a_tar_that_a_set_does_not_name_is_told(tmp_path, captioned, capsys, name):
    out = tmp_path / "set"
    assert make(out, "--folder", captioned) == 0
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_bytes(b"x")
    note = f"left out 1 (not in manifest.json): {name}"
    capsys.readouterr()
    assert make(tmp_path / "again", "--tars", out) == 0 and note in capsys.readouterr().err
    assert check_shards.main([str(out)]) == 0 and note in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar"])
def test_a_compressed_tar_by_its_own_name(tmp_path, name):
    """What a file is, its first bytes say: a tar that is compressed may have any
    name.
    """
    path = compressed(tmp_path / "a.tar.gz", members(COLORS)).rename(tmp_path / name)
    assert make(tmp_path / "set", "--tars", path) == 0
    assert_right(tmp_path / "set")


@pytest.mark.launch
def test_workers_unpack_for_themselves(tmp_path):
    (tmp_path / "b").mkdir()
    for number in range(3):
        compressed(tmp_path / "b" / f"{number}.tar.gz", members(COLORS[2 * number : 2 * number + 2]))
    for workers in (1, 2):
        arguments = ("--tars", tmp_path / "b", "--samples-per-shard", 1, "--workers", workers)
        assert make(tmp_path / str(workers), *arguments) == 0
    assert content(tmp_path / "1") == content(tmp_path / "2")
    assert_right(tmp_path / "1")


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("a.tar.gz", lambda content: content[:-30], "a.tar.gz: damaged or cut: it cannot be unpacked"),
        ("a.tar.gz", lambda content: content[:100] + b"\xff" * 9 + content[109:], "damaged"),
        ("a.tar.zst", lambda content: content[: len(content) // 2], "a.tar.zst: damaged or cut"),
        ("a.tar.xz", lambda content: content[:-40], "a.tar.xz: damaged or cut: it cannot be unpacked"),
        ("a.tar.gz", lambda content: b"not compressed" * 99, "a.tar.gz: damaged or cut after the start"),
        (
            "a.tar.lz4",
            lambda content: b"\x04\x22\x4d\x18" + content,
            "a.tar.lz4: compressed with lz4, which is not read",
        ),
        (
            "a.tar.Z",
            lambda content: b"\x1f\x9d" + content,
            "a.tar.Z: compressed with compress, which is not read",
        ),
        ("a.tar.br", lambda content: content[99:], "a.tar.br: compressed with"),
    ],
)
def test_a_compressed_tar_that_is_damaged_or_of_another_kind_is_named(
    tmp_path, capsys, name, change, expected
):
    (tmp_path / "b").mkdir()
    write_tar(tmp_path / "b" / "b.tar", members(COLORS))
    rng = np.random.default_rng(0)
    noise = {f"{number}.txt": rng.bytes(3000) for number in range(9)}
    suffix = name.rpartition(".")[2]
    path = compressed(tmp_path / f"x.tar.{suffix if suffix in ('gz', 'zst', 'xz') else 'gz'}", noise)
    (tmp_path / "b" / name).write_bytes(change(path.read_bytes()))
    assert expected in fails(capsys, make(tmp_path / "set", "--tars", tmp_path / "b", "--on-error", "skip"))


def test_files_that_are_no_tars_are_counted(tmp_path, capsys):
    tars(tmp_path / "b", COLORS)
    for name in ("some.json", "a.zip", "deep/b.rar", "c.tar.md5"):
        (tmp_path / "b" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "b" / name).write_bytes(b"x")
    found = members(["red"]) | {"._red.png": b"x", "more/.hidden/x": b"x"}
    write_tar(tmp_path / "b" / "mac.tar", {f"mac/{name}": value for name, value in found.items()})
    assert make(tmp_path / "set", "--tars", tmp_path / "b") == 0
    assert len(made(tmp_path / "set")) == len(COLORS) + 1
    err = capsys.readouterr().err
    assert "left out 4 (not a tar): a.zip, c.tar.md5, deep/b.rar and 1 more" in err
    assert "left out members of other kinds: " in err and "hidden" in err
    (tmp_path / "b" / "empty.tar").write_bytes(bytes(10240))
    assert make(tmp_path / "more", "--tars", tmp_path / "b") == 0
    assert "left out 1 (no samples in it): empty.tar" in capsys.readouterr().err


@pytest.mark.parametrize("read", ["check", "inspect", "--tars"])
def test_tars_that_the_manifest_does_not_name_are_counted(tmp_path, captioned, capsys, read):
    assert make(tmp_path / "set", "--folder", captioned) == 0
    write_tar(tmp_path / "set" / "more.tar", members(["red"]))
    (tmp_path / "set" / "more.tar.gz").write_bytes(b"x")
    capsys.readouterr()
    if read == "--tars":
        assert make(tmp_path / "again", "--tars", tmp_path / "set") == 0
    else:
        module = check_shards if read == "check" else inspect_shards
        assert module.main([str(tmp_path / "set"), *(["--workers", "1"] if read == "check" else [])]) == 0
    assert "left out 2 (not in manifest.json): more.tar, more.tar.gz" in capsys.readouterr().err


def test_training_names_the_command_that_makes_a_set_of_tars(tmp_path):
    compressed(tmp_path / "a.tar.gz", members(COLORS))
    with pytest.raises(ValueError, match="mmtensorar shards make --tars"):
        Manifest.read(tmp_path)


def test_a_tar_that_changes_after_listing_is_named(tmp_path):
    """Its workers would read other bytes at the places they were told."""
    path = write_tar(tmp_path / "a.tar", members(COLORS))
    items = list(webdataset.read(str(path), Layout()).items)
    assert items[0].picture() == picture(COLORS[0])
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("x.txt"), io.BytesIO())
    with pytest.raises(ValueError, match="a.tar: it changed while it was read"):
        items[0].picture()
