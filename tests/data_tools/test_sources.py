"""Every source gives the same pictures with their own captions, and problems in a
source are named.
"""

import csv
import io
import json
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import pipeline, sources
from data_tools.sources import parquet
from mmtensorar.data.pictures import decode_picture, encoded_picture
from mmtensorar.data.shards import Manifest, iterate_tar
from tests.helpers.sources import (
    COLORS,
    assert_right,
    captions,
    content,
    fails,
    fields,
    made,
    make,
    picture,
    write_tar,
)

ROOT = Path(__file__).resolve().parents[2]
# ---- sources ---------------------------------------------------------------------------------


def test_a_folder_with_json_captions(tmp_path, files):
    for color in COLORS:
        row = {"caption": f"a {color} picture", "licence": "none"}
        (files / f"{color}.json").write_text(json.dumps(row))
    assert make(tmp_path / "set", "--folder", files) == 0
    assert_right(tmp_path / "set")
    assert fields(tmp_path / "set") == {"licence": "none"}


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_table_becomes_shards(tmp_path, files, suffix):
    """The table has a spreadsheet's byte order mark, a quoted comma and an empty line.

    Other columns are kept.
    """
    path = files / f"list.{suffix}"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if suffix == "tsv" else ",")
        writer.writerow(["file", "note", "text"])
        for color in COLORS:
            writer.writerow([f"{color}.png", "one, two", f"a {color} picture"])
        file.write("\r\n")
    assert make(tmp_path / "set", "--csv", path, "--image-column", "file", "--caption-columns", "text") == 0
    assert_right(tmp_path / "set")
    assert fields(tmp_path / "set") == {"note": "one, two"}


def test_paths_may_be_relative_to_another_folder(tmp_path, files):
    table = tmp_path / "list.csv"
    table.write_text("image,caption\n" + "".join(f"{color}.png,a {color} picture\n" for color in COLORS))
    assert make(tmp_path / "set", "--csv", table, "--image-root", files) == 0
    assert_right(tmp_path / "set")


def arrow_table(kind: str):
    import pyarrow

    image = {
        "path": [f"{color}.png" for color in COLORS],
        "bytes": [picture(color) for color in COLORS],
        "struct": [{"bytes": picture(color), "path": None} for color in COLORS],
    }[kind]
    text = [f"a {color} picture" for color in COLORS]
    return pyarrow.table({"image": image, "caption": text, "width": [20] * len(COLORS)})


def test_dictionaries_in_parquet_are_their_values(tmp_path, files):
    """A column of paths with a dictionary was refused, and other ones were left out."""
    import pyarrow.parquet

    table = arrow_table("path").append_column("kind", [["plain"] * len(COLORS)])
    for number, name in enumerate(table.column_names):
        table = table.set_column(number, name, table.column(number).dictionary_encode())
    pyarrow.parquet.write_table(table, files / "rows.parquet")
    assert make(tmp_path / "set", "--parquet", files / "rows.parquet") == 0
    assert_right(tmp_path / "set")
    assert fields(tmp_path / "set") == {"kind": "plain", "width": 20}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["path", "bytes", "struct"])
def test_parquet_files_become_shards(tmp_path, files, kind):
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow_table(kind), files / "rows.parquet", row_group_size=2)
    assert make(tmp_path / "set", "--parquet", files / "rows.parquet", "--samples-per-shard", 4) == 0
    assert_right(tmp_path / "set")
    assert fields(tmp_path / "set") == {"width": 20}


def test_a_folder_of_parquet_files_stays_in_row_groups(tmp_path):
    """Rows of a row group are read together, so they stay together in the shuffled
    order.
    """
    import pyarrow.parquet

    (tmp_path / "rows").mkdir()
    for number in range(2):
        text = [f"{number} {row // 4} {row % 4}" for row in range(16)]
        table = pyarrow.table({"image": [picture("red")] * 16, "caption": text})
        pyarrow.parquet.write_table(table, tmp_path / "rows" / f"{number}.parquet", row_group_size=4)
    assert make(tmp_path / "set", "--parquet", tmp_path / "rows") == 0
    order = [sample.members["txt"].decode().rsplit(" ", 1) for sample in made(tmp_path / "set")]
    groups = [{group for group, _ in order[start : start + 4]} for start in range(0, 32, 4)]
    assert all(len(group) == 1 for group in groups) and len(set.union(*groups)) == 8
    assert [group for group, _ in order] != sorted(group for group, _ in order)


def test_a_saved_dataset_becomes_shards(tmp_path, files, capsys):
    import datasets

    rows = {
        "image": [str(files / f"{color}.png") for color in COLORS],
        "text": [f"a {color} picture" for color in COLORS],
    }
    found = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"test": found}).save_to_disk(tmp_path / "saved")
    arguments = ("--dataset", tmp_path / "saved", "--caption-columns", "text")
    assert make(tmp_path / "set", *arguments, "--split", "test") == 0
    assert_right(tmp_path / "set")
    capsys.readouterr()
    assert "no split 'train'; found test" in fails(capsys, make(tmp_path / "other", *arguments))


@pytest.mark.parametrize("bad", [[0], [3], [2, 5]])
@pytest.mark.parametrize("is_list", [False, True])
def test_text_of_a_dataset_that_is_not_utf8_is_a_problem_of_its_row(tmp_path, capsys, bad, is_list):
    import datasets
    import pyarrow

    raw = [b"\xff\xfeb" if row in bad else f"a {color} picture".encode() for row, color in enumerate(COLORS)]
    text = pyarrow.array(raw).cast(pyarrow.binary()).view(pyarrow.string())
    text = pyarrow.ListArray.from_arrays(list(range(len(raw) + 1)), text) if is_list else text
    table = pyarrow.table({"image": [picture(color) for color in COLORS], "caption": text})
    datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(tmp_path / "saved")
    capsys.readouterr()
    sentence = f"saved: split train, row {bad[0]}: a column of captions holds text that is not UTF-8"
    assert sentence in fails(capsys, make(tmp_path / "set", "--dataset", tmp_path / "saved"))
    assert make(tmp_path / "set", "--dataset", tmp_path / "saved", "--on-error", "skip") == 0
    assert_right(tmp_path / "set", [color for row, color in enumerate(COLORS) if row not in bad])
    assert sentence in (tmp_path / "set" / "left_out.jsonl").read_text()


@pytest.mark.parametrize("kind", ["a file", "a folder", "the place", "both", "outside"])
def test_a_dataset_of_a_folder_follows_links(tmp_path, files, capsys, monkeypatch, kind):
    """A picture through a link was "not a file of the dataset"."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    place = tmp_path / "place"
    place.mkdir()
    pictures = place / "pictures"
    if kind in ("a folder", "both"):
        pictures.symlink_to("../files")
    else:
        pictures.mkdir()
        for color in COLORS:
            (pictures / f"{color}.png").symlink_to(files / f"{color}.png")
    if kind in ("the place", "both"):
        place = tmp_path / "other"
        place.symlink_to("place")
    rows = {
        "image": [
            str((files if kind == "outside" else place / "pictures") / f"{color}.png") for color in COLORS
        ],
        "caption": [f"a {color} picture" for color in COLORS],
    }
    found = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
    monkeypatch.setattr("data_tools.sources.dataset.load_split", lambda location, split: found)
    code = make(tmp_path / "set", "--dataset", place)
    if kind == "outside":
        assert "is not a file of the dataset" in fails(capsys, code)
    else:
        assert code == 0
        assert_right(tmp_path / "set")


def test_a_dataset_of_labels_takes_a_template(tmp_path, files, capsys):
    import datasets

    rows = {"image": [str(files / f"{color}.png") for color in COLORS], "label": list(range(len(COLORS)))}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLORS))}
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    arguments = ("--dataset", tmp_path / "saved", "--caption-columns", "label")
    capsys.readouterr()
    assert "'label' holds class numbers; add --class-template" in fails(
        capsys, make(tmp_path / "set", *arguments)
    )
    assert make(tmp_path / "set", *arguments, "--class-template", "a {} picture") == 0
    assert_right(tmp_path / "set")
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    assert "cannot be loaded as a dataset" in fails(
        capsys, make(tmp_path / "b", "--dataset", tmp_path / "empty")
    )


def test_tars_of_other_tools_become_shards(tmp_path, capsys):
    """The names begin with ./, there are folders and a pickle that is never opened, and
    captions are in txt, in json, or made from a class number.
    """
    members = {"./": b"", "./a/": b""}
    for number, color in enumerate(COLORS):
        members[f"./a/{number}.PNG" if number % 2 else f"./a/{number}.png"] = picture(color)
        members[f"./a/{number}.pkl"] = b"cos\nsystem\n(S'false'\ntR."
        text = f"a {color} picture"
        kind, value = (("txt", text), ("json", json.dumps({"caption": text})), ("cls", str(number)))[
            number % 3
        ]
        members[f"./a/{number}.{kind}"] = value.encode()
    folders = {name: tarfile.DIRTYPE for name in ("./", "./a/")}
    write_tar(tmp_path / "theirs.tar", members, folders)
    names = tmp_path / "names.json"
    names.write_text(json.dumps({str(number): color for number, color in enumerate(COLORS)}))
    arguments = ("--tars", tmp_path / "theirs.tar", "--class-names", names)
    assert make(tmp_path / "set", *arguments, "--class-template", "a {} picture", "--on-error", "raise") == 0
    assert "left out members of other kinds: 6 .pkl" in capsys.readouterr().err
    assert_right(tmp_path / "set")


def test_class_members_of_tars_keep_their_numbers(tmp_path, capsys):
    members = {
        f"{number}.{kind}": value
        for number, color in enumerate(COLORS)
        for kind, value in (("png", picture(color)), ("cls", str(number).encode()))
    }
    write_tar(tmp_path / "theirs.tar", members)
    assert "add --class-names" in fails(capsys, make(tmp_path / "set", "--tars", tmp_path / "theirs.tar"))
    (tmp_path / "names.json").write_text(
        json.dumps({str(number): color for number, color in enumerate(COLORS)})
    )
    assert (
        make(tmp_path / "set", "--tars", tmp_path / "theirs.tar", "--class-names", tmp_path / "names.json")
        == 0
    )
    assert Manifest.read(tmp_path / "set").classes == COLORS
    assert captions(tmp_path / "set") == [str(number) for number in range(len(COLORS))]


def tar_of_classes(path: Path, texts: dict[str, bytes]) -> Path:
    """Pictures with their classes and, beside them, other captions: kind -> content."""
    members = {}
    for number, color in enumerate(COLORS[:3]):
        members |= {f"{number}.png": picture(color), f"{number}.cls": str(number).encode()}
        members |= {f"{number}.{kind}": value for kind, value in texts.items()}
    return write_tar(path, members)


@pytest.fixture
def color_names(tmp_path) -> Path:
    names = tmp_path / "names.json"
    names.write_text(json.dumps({str(number): color for number, color in enumerate(COLORS[:3])}))
    return names


@pytest.mark.parametrize(
    "texts", [{"txt": b"x"}, {"json": b'{"caption": "x"}'}, {"caption": b"x", "json": b"{}"}]
)
def test_options_of_classes_have_an_effect_beside_text(tmp_path, capsys, texts, color_names):
    """A template had none, and a set of class numbers had texts for captions."""
    source = ("--tars", tar_of_classes(tmp_path / "a.tar", texts), "--class-names", color_names)
    assert make(tmp_path / "numbers", *source) == 0
    assert captions(tmp_path / "numbers") == ["0", "1", "2"]
    assert Manifest.read(tmp_path / "numbers").classes == COLORS[:3]
    assert "whose .txt or .json is not the caption: 3" in capsys.readouterr().err
    assert make(tmp_path / "named", *source, "--class-template", "a {} picture") == 0
    assert_right(tmp_path / "named", COLORS[:3])
    assert make(tmp_path / "plain", *source[:2], "--class-template", "a {}") == 2
    assert "add --class-names" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["txt", "text", "json"])
def test_samples_without_a_class_are_told(tmp_path, capsys, kind, color_names):
    text = b'{"caption": "x"}' if kind == "json" else b"x"
    path = write_tar(
        tmp_path / "a.tar",
        {"0.png": picture("red"), "0.cls": b"0", "1.png": picture("blue"), f"1.{kind}": text},
    )
    source = ("--tars", path, "--class-names", color_names)
    assert make(tmp_path / "set", *source, "--class-template", "a {}") == 0
    assert captions(tmp_path / "set") == ["a red", "x"]
    assert "without a class, where --class-template has no effect: 1" in capsys.readouterr().err
    assert f"sample 1: no class number; with --class-names expected a cls member, found png, {kind}" in fails(
        capsys, make(tmp_path / "numbers", *source)
    )


def test_our_own_shards_can_be_sharded_again(tmp_path):
    """Pictures that already have the right size stay as they are, byte for byte."""
    assert make(tmp_path / "one", "--synthesize", "shapes", "--num-samples", 7) == 0
    arguments = ("--tars", tmp_path / "one", "--format", "keep", "--samples-per-shard", 3)
    assert make(tmp_path / "two", *arguments) == 0
    pairs = [{(s.members["jpg"], s.members["txt"]) for s in made(tmp_path / name)} for name in ("one", "two")]
    assert pairs[0] == pairs[1] and len(Manifest.read(tmp_path / "two").shards) == 3


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (
            {"a.txt": b"x"},
            "sample a: expected one of apng, bmp, gif, jfif, jpe, jpeg, jpg, mpo, png, tif, tiff, webp, "
            "found txt",
        ),
        ({"a.png": b"", "a.txt": b"\xff"}, "sample a: the caption is not UTF-8"),
        ({"a.png": b"", "a.json": b"[" * 100_000}, "sample a: the json member: not JSON"),
        ({"a.png": b""}, "sample a: no caption; expected a txt or json member, found png"),
        ({"a.png": b"", "a.cls": b"x"}, "sample a: cls holds 'x'; expected a class number"),
        (
            {"a.png": b"", "a.txt": b"x", "b.png": b"", "b.txt": b"x", "a.json": b"{}"},
            "its members are not together",
        ),
        ({"a.png": b"", "a.txt": b"x", "a.PNG": b""}, "member a.PNG occurs twice"),
    ],
)
def test_a_bad_sample_of_a_tar_is_named(tmp_path, capsys, members, expected):
    write_tar(tmp_path / "theirs.tar", members)
    assert expected in fails(capsys, make(tmp_path / "set", "--tars", tmp_path / "theirs.tar"))


@pytest.mark.parametrize(
    "names", ["a.png b.png a.txt b.txt", "a.txt b.png b.txt a.png", "b.png a.txt a.png b.cls"]
)
@pytest.mark.parametrize("extra", [(), ("--on-error", "skip"), ("--dry-run",)])
def test_members_that_are_not_together_are_told_with_the_way_out(tmp_path, capsys, names, extra):
    """Of a tar in the order of its folder, the first sample had "no caption", and the
    advice was to leave it out.
    """
    path = write_tar(tmp_path / "a.tar", {f"./{name}": picture("red") for name in names.split()})
    sentence = fails(capsys, make(tmp_path / "set", "--tars", path, *extra))
    assert "a.tar: sample " in sentence and "not together" in sentence and "tar --sort=name" in sentence
    assert "skip" not in sentence


def test_a_link_in_a_tar_is_refused(tmp_path, capsys):
    write_tar(tmp_path / "link.tar", {"a.png": b""}, {"a.png": tarfile.SYMTYPE})
    assert "is a link, folder or device" in fails(
        capsys, make(tmp_path / "set", "--tars", tmp_path / "link.tar")
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "list.csv:1: expected one column 'image', found nothing"),
        (b"image,text\n", "list.csv:1: expected one column 'caption', found 'image', 'text'"),
        (b"image,caption\n", "list.csv: no rows in it"),
        (b"image,caption\nred.png\n", "list.csv:2: 1 cell, but the header has 2"),
        (b'image,caption\nred.png,"a\n', "list.csv:2: not CSV"),
        (b"image,caption\nred.png,\xff\n", "not UTF-8"),
        (b"image,caption\n../x.png,a\n", "list.csv:2: image '../x.png' lies outside"),
        (b"image,caption\nred.png,\n", "list.csv:2: no caption in 'caption'"),
        (b"image,caption\nred.png," + b"a" * 2**21 + b"\n", "list.csv:2: not CSV"),
    ],
)
def test_a_bad_table_is_named(tmp_path, files, capsys, text, expected):
    (files / "list.csv").write_bytes(text)
    assert expected in fails(capsys, make(tmp_path / "set", "--csv", files / "list.csv"))


@pytest.mark.parametrize("kind", ["path", "bytes", "struct"])
@pytest.mark.parametrize(
    "column", ["caption", "note", "captions"], ids=["a caption", "another column", "a list of captions"]
)
def test_text_that_is_not_utf8_is_a_problem_of_its_row(tmp_path, files, capsys, kind, column):
    """One such caption ended the work, without the name of a file or row."""
    import pyarrow
    import pyarrow.parquet

    table = arrow_table(kind)
    raw = [f"a {color} picture".encode() for color in COLORS]
    raw[3] = b"\xff\xfeb"
    broken = pyarrow.array(raw).cast(pyarrow.binary()).view(pyarrow.string())
    if column == "captions":
        broken = pyarrow.ListArray.from_arrays(list(range(len(raw) + 1)), broken)
    table = table.drop_columns([column] if column in table.column_names else [])
    path = files / "rows.parquet"
    pyarrow.parquet.write_table(table.append_column(column, broken), path, row_group_size=2)
    arguments = ("--parquet", path, "--caption-columns", "caption" if column == "note" else column)
    sentence = f"rows.parquet: row group 1, row 1: column {column!r} holds text that is not UTF-8"
    assert sentence in fails(capsys, make(tmp_path / "set", *arguments))
    assert make(tmp_path / "set", *arguments, "--on-error", "skip") == 0
    assert_right(tmp_path / "set", [color for color in COLORS if color != COLORS[3]])
    assert sentence in json.loads((tmp_path / "set" / "left_out.jsonl").read_text())["reason"]


@pytest.mark.parametrize("kind", ["path", "bytes", "struct"])
def test_no_thread_of_pyarrow_holds_what_a_parquet_file_gave(tmp_path, files, monkeypatch, kind):
    """A damaged file beside good ones ended a third of the runs with exit code 134.

    A thread of pyarrow, which had read a good file ahead, freed the bytes after the
    interpreter had begun to end. Now only the thread that asks for rows reads.
    """
    import pyarrow.parquet

    readers = set()

    class File(io.FileIO):
        def read(self, size=-1):
            readers.add(threading.get_ident())
            return super().read(size)

    (tmp_path / "rows").mkdir()
    pyarrow.parquet.write_table(arrow_table(kind), tmp_path / "rows" / "a.parquet", row_group_size=2)
    (tmp_path / "rows" / "b.parquet").write_bytes((tmp_path / "rows" / "a.parquet").read_bytes()[:-9])
    monkeypatch.setattr(Path, "open", lambda path, mode: File(path, mode))
    layout, pictures = sources.Layout(root=files), []
    with pytest.raises(ValueError, match="b.parquet: not a complete Parquet file"):
        for item in parquet.SOURCE.read(str(tmp_path / "rows"), layout).items:
            pictures.append(item.picture())
    assert pictures == [picture(color) for color in COLORS]
    assert readers == {threading.get_ident()}


def test_a_bad_parquet_file_is_named(tmp_path, capsys):
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    for table, expected in (
        (pyarrow.table({"caption": ["x"]}), "expected one column 'image', found 'caption'"),
        (
            pyarrow.table({"image": [1], "caption": ["x"]}),
            "column 'image' holds int64; expected paths or bytes",
        ),
        (
            pyarrow.table({"image": pyarrow.array([None], pyarrow.binary()), "caption": ["x"]}),
            "no bytes of a picture",
        ),
        (pyarrow.table({"image": [b"x"], "caption": ["x"]}), "parquet rows.parquet 0 0: unreadable image"),
        (pyarrow.table({"image": [b"x"], "caption": [None]}), "row group 0, row 0: no caption in 'caption'"),
    ):
        pyarrow.parquet.write_table(table, path)
        assert expected in fails(capsys, make(tmp_path / "set", "--parquet", path))
    path.write_bytes(path.read_bytes()[:-20])
    assert "not a complete Parquet file" in fails(capsys, make(tmp_path / "set", "--parquet", path))


# ---- captions --------------------------------------------------------------------------------


@pytest.fixture
def two_captions(files) -> Path:
    lines = [
        {"image": f"{color}.png", "short": color, "long": [f"a {color} picture", ""]} for color in COLORS
    ]
    (files / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return files / "list.jsonl"


def test_captions_in_several_columns(tmp_path, two_captions):
    arguments = ("--jsonl", two_captions, "--caption-columns", "short,long")
    long = {f"a {color} picture" for color in COLORS}
    assert make(tmp_path / "first", *arguments) == 0
    assert captions(tmp_path / "first") == sorted(COLORS)
    assert make(tmp_path / "each", *arguments, "--captions", "each") == 0
    assert captions(tmp_path / "each") == sorted([*COLORS, *long])
    draws = set()
    for seed in range(4):
        assert make(tmp_path / str(seed), *arguments, "--captions", "random", "--seed", seed) == 0
        found = captions(tmp_path / str(seed))
        assert len(found) == len(COLORS) and set(found) <= {*COLORS, *long}
        draws.add(tuple(found))
    assert len(draws) > 1


CLASSES = ("n01", "n02", "polar_bear")


def folder_of_classes(root: Path) -> list[object]:
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        (root / name / "a.png").write_bytes(picture("red"))
    return ["--class-folder", root]


def dataset_of_classes(root: Path) -> list[object]:
    import datasets

    features = {"image": datasets.Value("binary"), "caption": datasets.ClassLabel(names=list(CLASSES))}
    rows = {"image": [picture("red")] * 3, "caption": [0, 1, 2]}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).save_to_disk(root)
    return ["--dataset", root]


@pytest.mark.parametrize("write", [folder_of_classes, dataset_of_classes])
@pytest.mark.parametrize(
    ("names", "expected", "note"),
    [
        ({"n1": "tench"}, None, "--class-names has 'n1', which no class is called, and no name for 'n01',"),
        ({"n01": "a", "n02": "b", "polar bear": "c"}, None, "and no name for 'polar_bear'"),
        ({"N01": "a", "n02": "b"}, None, "has 'N01'"),
        ({"n01": "tench"}, ["a n02", "a polar bear", "a tench"], "classes without a name in --class-names: "),
        (
            {"n01": "a", "n02": "b", "polar_bear": "c", "n03": "d"},
            ["a a", "a b", "a c"],
            "names in --class-names without a class: 'n03'",
        ),
    ],
)
def test_names_that_fit_no_class_are_told(tmp_path, capsys, write, names, expected, note):
    """The caption was "a n01", with exit code 0."""
    (tmp_path / "names.json").write_text(json.dumps(names))
    source = (*write(tmp_path / "classes"), "--class-names", tmp_path / "names.json")
    capsys.readouterr()
    code = make(tmp_path / "set", *source, "--class-template", "a {}")
    if expected is None:
        assert note in fails(capsys, code)
    else:
        assert code == 0 and captions(tmp_path / "set") == expected and note in capsys.readouterr().err


def test_class_names_become_captions(tmp_path):
    for name in ("n01", "polar_bear"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / "classes" / name / "a.png").write_bytes(picture("red"))
    (tmp_path / "names.json").write_text('{"n01": "tench"}')
    arguments = ("--class-folder", tmp_path / "classes", "--class-names", tmp_path / "names.json")
    templates = ("--class-template", "a photo of a {}", "--class-template", "{}", "--captions", "each")
    assert make(tmp_path / "set", *arguments, *templates) == 0
    assert captions(tmp_path / "set") == [
        "a photo of a polar bear",
        "a photo of a tench",
        "polar bear",
        "tench",
    ]
    assert Manifest.read(tmp_path / "set").classes is None


# ---- what is taken ---------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Six good pictures, and one of every kind that an option leaves out."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for color in COLORS:
        (folder / f"{color}.png").write_bytes(picture(color))
        (folder / f"{color}.txt").write_text(f"a {color} picture")
    for name, value, text in (
        ("small", picture("red", (12, 40)), "a small picture"),
        ("wide", picture("red", (100, 20)), "a wide picture"),
        ("brief", picture("red"), "x"),
        ("wordy", picture("red"), "word " * 50),
        ("again", picture("red"), "a red picture"),
        ("broken", picture("red")[:50], "a broken picture"),
        ("silent", picture("red"), None),
    ):
        (folder / f"{name}.png").write_bytes(value)
        if text:
            (folder / f"{name}.txt").write_text(text)
    return folder


FILTERS = (
    "--min-side",
    16,
    "--max-aspect",
    2,
    "--min-caption",
    5,
    "--max-caption",
    40,
    "--deduplicate",
    "--on-error",
    "skip",
)


def test_skipped_samples_are_counted_and_listed(tmp_path, mixed, capsys):
    assert make(tmp_path / "set", "--folder", mixed, *FILTERS) == 0
    assert_right(tmp_path / "set")
    out = capsys.readouterr().out
    assert (
        "left out 7 of 13: " in out
        and "1 damaged" in out
        and "1 without a caption" in out
        and "1 duplicate" in out
    )
    lines = [json.loads(line) for line in (tmp_path / "set" / "left_out.jsonl").read_text().splitlines()]
    reasons = {line["name"].removesuffix(".png"): line["reason"] for line in lines}
    assert reasons.pop("red" if "red" in reasons else "again").startswith("duplicate of ")
    assert reasons.pop("broken").startswith("error: ") and "no caption" in reasons.pop("silent")
    assert reasons == {
        "small": "smaller side below 16 pixels",
        "wide": "longer side more than 2 times the smaller",
        "brief": "caption shorter than 5 characters",
        "wordy": "caption longer than 40 characters",
    }


@pytest.mark.launch
@pytest.mark.parametrize(
    "size", [("--samples-per-shard", 2), ("--bytes-per-shard", "10K"), ("--samples-per-shard", 100)]
)
def test_the_bytes_do_not_depend_on_workers_or_interruptions(tmp_path, mixed, monkeypatch, size):
    """Every stage is interrupted once."""
    arguments = ("--folder", mixed, *FILTERS, *size, "--validation-share", 0.4)
    assert make(tmp_path / "one", *arguments) == 0
    command = [
        sys.executable,
        "data_tools/make_shards.py",
        "--image-size",
        "16",
        "--workers",
        "2",
        *map(str, arguments),
    ]
    subprocess.run(
        [*command, "--out", tmp_path / "two"], check=True, cwd=ROOT, timeout=60, capture_output=True
    )
    for stage in ("make_part", "make_shard"):
        real, calls = getattr(pipeline, stage), []

        def interrupted(*task, real=real, calls=calls):
            if len(calls) == 1:
                raise KeyboardInterrupt
            calls.append(task)
            return real(*task)

        monkeypatch.setattr(pipeline, stage, interrupted)
        make(tmp_path / "cut", *arguments)
        monkeypatch.setattr(pipeline, stage, real)
    assert make(tmp_path / "cut", *arguments) == 0
    for suffix in ("", "_validation"):
        whole = content(tmp_path / f"one{suffix}")
        assert whole == content(tmp_path / f"two{suffix}") == content(tmp_path / f"cut{suffix}")
        Manifest.read(tmp_path / f"one{suffix}")


def test_a_validation_split_takes_nothing_twice_and_does_not_move(tmp_path):
    """Whether a picture is in the validation split depends on the picture alone, not on
    its caption, the seed, the order or the number of samples.
    """
    for count, seed in ((60, 0), (90, 0), (60, 1)):
        folder = tmp_path / f"in{count}"
        folder.mkdir(exist_ok=True)
        for number in range(count):
            (folder / f"{number}.png").write_bytes(picture(f"#{number:06x}"))
            (folder / f"{number}.txt").write_text(f"number {number}")
        arguments = ("--folder", folder, "--validation-share", 0.25, "--seed", seed)
        assert make(tmp_path / f"{count} {seed}", *arguments) == 0
    held = {name: set(captions(tmp_path / f"{name}_validation")) for name in ("60 0", "90 0", "60 1")}
    for name, found in held.items():
        rest = set(captions(tmp_path / name))
        assert not found & rest and len(found | rest) == int(name.split()[0])
    assert held["60 0"] == held["60 1"] == {text for text in held["90 0"] if int(text.split()[1]) < 60}
    assert 5 <= len(held["60 0"]) <= 25


@pytest.mark.parametrize("kind", ["csv", "parquet", "tars"])
def test_a_picture_with_several_captions_is_on_one_side(tmp_path, kind):
    """COCO's layout has one row per caption.

    If rows were split, most pictures would be in both sets.
    """
    import pyarrow.parquet

    rows = [
        (f"{number}.png", picture(f"#{number:06x}"), f"number {number} said {n}")
        for number in range(20)
        for n in range(5)
    ]
    for name, content_, _ in rows:
        (tmp_path / name).write_bytes(content_)
    (tmp_path / "list.csv").write_text(
        "image,caption\n" + "\n".join(f"{name},{text}" for name, _, text in rows)
    )
    table = pyarrow.table({"image": [row[1] for row in rows], "caption": [row[2] for row in rows]})
    pyarrow.parquet.write_table(table, tmp_path / "list.parquet")
    source = tmp_path / f"list.{kind}"
    if kind == "tars":
        source = tmp_path / "first"
        assert make(source, "--csv", tmp_path / "list.csv") == 0
    assert make(tmp_path / "set", f"--{kind}", source, "--validation-share", 0.3) == 0
    train, held = (
        {text.split()[1] for text in captions(tmp_path / name)} for name in ("set", "set_validation")
    )
    assert train and held and not train & held and len(captions(tmp_path / "set")) == 5 * len(train)


def test_a_set_made_from_our_shards_keeps_their_fields(tmp_path, files):
    """The new set keeps classes, sizes before cropping, and names.

    Tars of an unfinished run are not read, and a set is not made from itself.
    """
    for color in COLORS:
        (files / color).mkdir()
        (files / f"{color}.png").rename(files / color / "1.png")
    assert make(tmp_path / "set", "--class-folder", files) == 0
    unfinished = tmp_path / "set" / ".unfinished-x"
    unfinished.mkdir()
    (unfinished / "00000.tar").write_bytes((tmp_path / "set" / "00000.tar").read_bytes())
    assert (
        make(tmp_path / "again", "--tars", tmp_path / "set", "--min-side", 20) == 0
    )  # the pictures were 20 pixels wide before cropping, and are 16 now
    assert Manifest.read(tmp_path / "again").classes == Manifest.read(tmp_path / "set").classes
    of = {sample.members["txt"]: json.loads(sample.members["json"]) for sample in made(tmp_path / "set")}
    assert {
        sample.members["txt"]: json.loads(sample.members["json"]) for sample in made(tmp_path / "again")
    } == of
    assert make(tmp_path / "named", "--tars", tmp_path / "set", "--class-template", "a {} picture") == 0
    assert_right(tmp_path / "named")


def test_a_set_is_not_made_from_itself(tmp_path, captioned, capsys):
    assert make(tmp_path / "set", "--folder", captioned) == 0
    assert "the same folder" in fails(
        capsys, make(tmp_path / "set", "--tars", tmp_path / "set", "--overwrite")
    )


def test_a_split_that_leaves_one_side_empty_writes_neither(tmp_path, captioned, capsys):
    said = fails(capsys, make(tmp_path / "set", "--folder", captioned, "--validation-share", 0.999))
    assert "gives 0 samples and 6 for validation" in said
    assert not (tmp_path / "set_validation" / "manifest.json").exists()


def test_long_thin_pictures_need_little_memory(tmp_path, capsys):
    """A picture of 30,000 x 1 pixels, scaled to 384 at its shorter side, has 11 million
    columns.
    """
    folder = tmp_path / "in"
    folder.mkdir()
    for number, size in enumerate([(1, 30_000), (30_000, 1), (3, 200)]):
        (folder / f"{number}.png").write_bytes(picture("red", size))
        (folder / f"{number}.txt").write_text("a red picture")
    for crop in ("center", "random", "pad", "stretch"):
        assert make(tmp_path / crop, "--folder", folder, "--crop", crop, "--image-size", 384) == 0
        assert len(made(tmp_path / crop)) == 3


def test_pictures_with_16_bits_and_with_broken_exif(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    ramp = np.linspace(0, 65535, 16 * 16).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(folder / "ramp.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    content_ = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(content_, "JPEG", exif=exif)
    good = content_.getvalue()
    rng = np.random.default_rng(0)
    for number in range(200):  # broken in the EXIF block
        broken = bytearray(good)
        broken[int(rng.integers(30, 60))] = int(rng.integers(256))
        (folder / f"{number}.jpg").write_bytes(bytes(broken))
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text(path.stem)
    assert make(tmp_path / "set", "--folder", folder, "--on-error", "skip", "--format", "png") == 0
    (found,) = (sample for sample in made(tmp_path / "set") if sample.members["txt"] == b"ramp")
    assert np.abs(np.asarray(Image.open(io.BytesIO(found.members["png"])))[..., 0] - ramp // 257).max() <= 1


def test_hidden_folders_and_huge_captions(tmp_path, captioned, capsys):
    (captioned / ".checkpoints").mkdir()
    (captioned / ".checkpoints" / "red.png").write_bytes((captioned / "red.png").read_bytes())
    assert make(tmp_path / "set", "--folder", captioned) == 0
    assert_right(tmp_path / "set")
    assert "left out 1 (hidden): .checkpoints" in capsys.readouterr().err
    (captioned / ".checkpoints" / "red.png").unlink()
    (captioned / ".checkpoints").rmdir()
    (captioned / "blue.txt").write_text("x" * 2_000_000)
    assert "more than the 1048576 bytes allowed" in fails(
        capsys, make(tmp_path / "huge", "--folder", captioned)
    )


def test_duplicates_by_picture_or_by_sample(tmp_path, captioned):
    (captioned / "again.png").write_bytes((captioned / "red.png").read_bytes())
    (captioned / "again.txt").write_text("another caption")
    for choice, left in (
        (["--deduplicate"], 7),
        (["--deduplicate", "samples"], 7),
        (["--deduplicate", "pictures"], 6),
    ):
        assert make(tmp_path / "_".join(choice), "--folder", captioned, *choice) == 0
        assert len(made(tmp_path / "_".join(choice))) == left


def test_a_row_group_too_large_to_hold_is_refused(tmp_path, monkeypatch, capsys):
    """pyarrow writes a million rows into one row group by default, and a worker holds
    all pictures of a row group.
    """
    import pyarrow.parquet

    table = pyarrow.table(
        {"image": [picture(color) for color in COLORS], "caption": [f"a {color} picture" for color in COLORS]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    group = pyarrow.parquet.ParquetFile(tmp_path / "rows.parquet").metadata.row_group(0)
    monkeypatch.setattr(parquet, "MAX_GROUP", group.column(0).total_uncompressed_size - 1)
    assert "write the file again with row_group_size" in fails(
        capsys, make(tmp_path / "set", "--parquet", tmp_path / "rows.parquet")
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=1)
    assert make(tmp_path / "set", "--parquet", tmp_path / "rows.parquet") == 0


def test_no_flipped_bit_of_a_parquet_footer_loses_a_row(tmp_path):
    """Every row is given, or the file is refused.

    Where a flipped bit gave a column no values, pyarrow returned a row group without
    rows, and they were missing without a word. Where it changed a column's statistics,
    looking at the column ended the process.
    """
    import pyarrow.parquet

    from data_tools.sources import Layout

    table = pyarrow.table({"image": [b"x"] * 6, "caption": list("abcdef")})
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    good, layout = path.read_bytes(), Layout(image="image", captions=("caption",))
    footer = 8 + int.from_bytes(good[-8:-4], "little")
    refused = 0
    for bit in range(0, 8 * footer, 13):
        damaged = bytearray(good)
        damaged[-1 - bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert len(list(parquet.SOURCE.read(str(path), layout).items)) == 6, bit
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert 50 < refused < 8 * footer / 13


@pytest.mark.parametrize("name", ["image", "caption", "note"])
def test_a_column_of_a_parquet_file_whose_name_is_not_utf8(tmp_path, name):
    """The message was `expected UTF-8`, without the file."""
    import pyarrow.parquet

    from data_tools.sources import Layout

    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"image": [b"x"], "caption": ["a"], "note": ["b"]})
    pyarrow.parquet.write_table(table, path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(name.encode(), b"\xe9" + name[1:].encode()))
    with pytest.raises(ValueError, match=r"rows\.parquet: damaged \(the name of a column is not UTF-8"):
        list(parquet.SOURCE.read(str(path), Layout(image="image", captions=("caption",))).items)


def test_a_row_that_no_shard_can_hold_is_left_out(tmp_path, files, capsys):
    rows = [
        {"image": "red.png", "caption": "a red picture", "note": "x" * 1_100_000},
        {"image": "blue.png", "caption": "b"},
    ]
    (files / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = fails(capsys, make(tmp_path / "set", "--jsonl", files / "list.jsonl"))
    assert "red.png: its .json would have" in said
    assert make(tmp_path / "set", "--jsonl", files / "list.jsonl", "--on-error", "skip") == 0
    assert captions(tmp_path / "set") == ["b"]


def test_shards_hold_as_many_bytes_as_asked_for(tmp_path):
    arguments = ("--synthesize", "shapes", "--num-samples", 40)
    assert make(tmp_path / "set", *arguments, "--bytes-per-shard", "20K") == 0
    sizes = [
        (tmp_path / "set" / shard.name).stat().st_size for shard in Manifest.read(tmp_path / "set").shards
    ]
    assert len(sizes) > 2 and all(size <= 20_000 + 10_240 for size in sizes)  # tars are padded at the end
    assert all(size > 10_000 for size in sizes[:-1])
    assert make(tmp_path / "other", *arguments) == 0
    assert made(tmp_path / "set") == made(tmp_path / "other")


def test_a_limit_takes_a_part_of_the_same_order(tmp_path, mixed):
    assert make(tmp_path / "all", "--folder", mixed, "--on-error", "skip") == 0
    assert make(tmp_path / "some", "--folder", mixed, "--on-error", "skip", "--limit", 5) == 0
    some, all_of_it = made(tmp_path / "some"), made(tmp_path / "all")
    assert 0 < len(some) <= 5 and some == all_of_it[: len(some)]


def test_a_dry_run_writes_nothing(tmp_path, mixed, capsys):
    before = sorted(tmp_path.iterdir())
    assert make(tmp_path / "set", "--folder", mixed, *FILTERS, "--dry-run") == 0
    out = capsys.readouterr().out
    assert (
        "13 items; of the first 13, 7 would be kept" in out
        and "1 left out: smaller side below 16 pixels" in out
    )
    assert "nothing was written" in out and sorted(tmp_path.iterdir()) == before


def test_nothing_left_is_an_error_with_its_reasons(tmp_path, mixed, capsys):
    sentence = fails(
        capsys, make(tmp_path / "set", "--folder", mixed, "--min-side", 1000, "--on-error", "skip")
    )
    assert "nothing is left of 13 samples (11 smaller side below 1000 pixels, 1 " in sentence
    assert not (tmp_path / "set" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("text", "content", "counted", "reason"),
    [
        (None, picture("red"), "1 without a caption", "no caption; expected it in"),
        ("\u200b", picture("red"), "1 without a caption", "the caption is empty"),
        ("x", picture("red")[:50], "1 damaged", "unreadable image"),
        ("x\0", picture("red"), "1 invalid", "not text in UTF-8: NUL"),
    ],
)
def test_nothing_left_gives_a_reason_and_the_list(tmp_path, capsys, text, content, counted, reason):
    """The sentence was: nothing is left of 1 sample (1 damaged), whatever it was."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.png").write_bytes(content)
    if text is not None:
        (tmp_path / "files" / "a.txt").write_text(text)
    source = ("--folder", tmp_path / "files", "--on-error", "skip")
    assert f"({counted}); the first, a.png: " in (error := fails(capsys, make(tmp_path / "set", *source)))
    (row,) = (tmp_path / "set" / "left_out.jsonl").read_text().splitlines()
    assert reason in error and reason in json.loads(row)["reason"]
    (tmp_path / "files" / "b.png").write_bytes(picture("blue"))  # the list is in nobody's way
    (tmp_path / "files" / "b.txt").write_text("b")
    assert make(tmp_path / "set", *source) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--quality", 101), "at most 100"),
        (("--validation-share", 1.5), "between 0 and 1"),
        (("--bytes-per-shard", "1X"), "expected a number of bytes, such as 500M"),
        (("--crops", 10), "--crops goes with --image-tokenizer"),
        (("--max-tokens", 10), "--max-tokens goes with --text-encoder"),
        (("--device", "cpu"), "--device goes with --image-tokenizer or --text-encoder"),
        (("--image-size", 8193), "at most 8192 pixels"),
        (("--on-eror", "skip"), "unknown option --on-eror; did you mean --on-error?"),
        (("--max-aspect", 0.5), "at least 1"),
        (("--class-template", "a photo"), "has no {}"),
        (("--class-template", "a {}"), "goes with --class-folder"),
        (("--class-names", "names.json"), "goes with --class-folder"),
        (("--image-column", "picture"), "--image-column goes with --dataset, --jsonl, --parquet or --csv"),
        (("--image-root", "."), "--image-root goes with --jsonl, --parquet or --csv"),
        (("--split", "test"), "--split goes with --dataset"),
        (("--num-samples", 3), "goes with --synthesize"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, capsys, arguments, expected):
    with pytest.raises(SystemExit) as stopped:
        make(tmp_path / "set", "--folder", tmp_path, *arguments)
    assert stopped.value.code == 2 and expected in capsys.readouterr().err


# ---- a new source ----------------------------------------------------------------------------

PLUG_IN = """
import io
from functools import partial

from PIL import Image

from data_tools.sources import Item, Layout, Listing, Source


def items(place: str, layout: Layout):
    for number in range(layout.arguments["num_squares"]):
        yield Item(str(number), partial(square, place, number), (f"square {number}",), {"source": "squares"})


def square(color: str, number: int) -> Image.Image:
    return Image.new("RGB", (20 + number, 20), color)


def read(place: str, layout: Layout) -> Listing:
    return Listing(items(place, layout))


ARGUMENTS = {"--num-squares": {"type": int, "default": 3}}
SOURCE = Source("--squares", "squares of a color", read, arguments=ARGUMENTS)
"""


def test_a_source_is_one_file(tmp_path, monkeypatch, capsys):
    """Its option, its arguments and their check exist only while the file does.

    The set is made like that of any other source.
    """
    folder = tmp_path / "plug_ins"
    folder.mkdir()
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(folder)])
    arguments = ("--squares", "red", "--num-squares", 5)

    def refusal(*arguments) -> str:
        with pytest.raises(SystemExit):
            make(tmp_path / "refused", *arguments)
        return capsys.readouterr().err

    assert "unknown option --squares" in refusal(*arguments)
    (folder / "squares.py").write_text(PLUG_IN)
    assert make(tmp_path / "set", *arguments) == 0
    manifest = Manifest.read(tmp_path / "set")
    assert manifest.num_samples == 5 and manifest.source.startswith("squares red ")
    captions = {sample.members["txt"] for sample in iterate_tar(tmp_path / "set" / "00000.tar")}
    assert captions == {f"square {number}".encode() for number in range(5)}
    assert "--num-squares goes with --squares" in refusal("--folder", tmp_path, "--num-squares", 5)
    (folder / "squares.py").unlink()
    monkeypatch.delitem(sys.modules, "data_tools.sources.squares")
    assert "unknown option --squares" in refusal(*arguments)


# ---- what is made ----------------------------------------------------------------------------


@pytest.fixture
def banner(tmp_path) -> Path:
    """Red, lime and blue next to each other, three times as wide as high."""
    folder = tmp_path / "banner"
    folder.mkdir()
    image = Image.new("RGB", (96, 32), "red")
    image.paste("lime", (32, 0, 64, 32))
    image.paste("blue", (64, 0, 96, 32))
    image.save(folder / "a.png")
    (folder / "a.txt").write_text("a banner")
    return folder


def pixels(out: Path) -> np.ndarray:
    (sample,) = made(out)
    return np.asarray(decode_picture(encoded_picture(sample, ""), ""), np.int64)


def near(found: np.ndarray, color: str) -> bool:
    return bool(np.abs(found - np.array(Image.new("RGB", (1, 1), color).getpixel((0, 0)))).max() < 30)


def test_crop_policies(tmp_path, banner):
    for crop in ("center", "random", "pad", "stretch"):
        assert (
            make(tmp_path / crop, "--folder", banner, "--image-size", 30, "--crop", crop, "--format", "png")
            == 0
        )
    assert near(pixels(tmp_path / "center")[:, 4:-4], "lime")
    pad, stretch = pixels(tmp_path / "pad"), pixels(tmp_path / "stretch")
    assert near(pad[:8], "white") and near(pad[-8:], "white")
    for found in (pad[13:17], stretch):
        assert near(found[:, 2:7], "red") and near(found[:, 13:17], "lime") and near(found[:, 23:28], "blue")
    seen = set()
    for seed in range(6):
        assert (
            make(
                tmp_path / str(seed),
                "--folder",
                banner,
                "--image-size",
                30,
                "--crop",
                "random",
                "--seed",
                seed,
            )
            == 0
        )
        seen.add(pixels(tmp_path / str(seed)).tobytes())
    assert len(seen) > 2


def test_formats_and_quality(tmp_path, banner):
    sizes = {}
    for kind, quality in (("jpg", 95), ("jpg", 20), ("webp", 95), ("png", 95)):
        out = tmp_path / f"{kind}{quality}"
        assert make(out, "--folder", banner, "--format", kind, "--quality", quality) == 0
        (sample,) = made(out)
        assert list(sample.members) == [kind, "txt", "json"]
        sizes[kind, quality] = len(sample.members[kind])
    assert sizes["jpg", 20] < sizes["jpg", 95]


def test_keep_copies_only_what_is_square_upright_and_of_the_size(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (16, 16), "red").save(folder / "same.webp")
    Image.new("RGB", (16, 16), "red").save(folder / "turned.jpg", exif=turned)
    Image.new("RGB", (17, 16), "red").save(folder / "wide.png")
    for name in ("same", "turned", "wide"):
        (folder / f"{name}.txt").write_text(name)
    assert make(tmp_path / "set", "--folder", folder, "--format", "keep") == 0
    found = {sample.members["txt"].decode(): sample.members for sample in made(tmp_path / "set")}
    assert found["same"]["webp"] == (folder / "same.webp").read_bytes()
    assert found["turned"]["jpg"] != (folder / "turned.jpg").read_bytes() and "jpg" in found["wide"]
