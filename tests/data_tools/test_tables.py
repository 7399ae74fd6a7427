"""Rows and columns of every kind of table: one bad row or name takes nothing else with
it.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from pathlib import Path

import pytest

from data_tools.delimited import plain_rows, quoted_rows
from data_tools.sources import Layout, table
from mmtensorar.files import iterate_lines
from tests.helpers.sources import captions, fails, make, picture, write_tar

NAMES = ("a", "b", "c")


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, color in zip(NAMES, ("red", "lime", "blue"), strict=True):
        (folder / f"{name}.png").write_bytes(picture(color))
    return folder


# ---- columns of captions ---------------------------------------------------------------------

Rows = list[dict[str, object]]


def write_folder(folder: Path, rows: Rows) -> list[object]:
    for name, row in zip(NAMES, rows, strict=True):
        (folder / f"{name}.json").write_text(json.dumps(row))
    return ["--folder", folder]


def write_jsonl(folder: Path, rows: Rows) -> list[object]:
    lines = [json.dumps({"image": f"{n}.png", **row}) for n, row in zip(NAMES, rows, strict=True)]
    (folder / "list.jsonl").write_text("\n".join(lines))
    return ["--jsonl", folder / "list.jsonl"]


def write_tars(folder: Path, rows: Rows) -> list[object]:
    members = {}
    for name, row in zip(NAMES, rows, strict=True):
        members |= {f"{name}.png": (folder / f"{name}.png").read_bytes()}
        members |= {f"{name}.json": json.dumps(row).encode()}
    return ["--tars", write_tar(folder / "a.tar", members)]


def write_delimited(folder: Path, rows: Rows, suffix: str, delimiter: str) -> list[object]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [["image", *columns]]
    lines += [
        [f"{n}.png", *(str(row.get(c) or "") for c in columns)] for n, row in zip(NAMES, rows, strict=True)
    ]
    path = folder / f"list.{suffix}"
    path.write_text("".join(delimiter.join(line) + "\n" for line in lines))
    return ["--csv", path]


def write_csv(folder: Path, rows: Rows) -> list[object]:
    return write_delimited(folder, rows, "csv", ",")


def write_tsv(folder: Path, rows: Rows) -> list[object]:
    return write_delimited(folder, rows, "tsv", "\t")


def write_parquet(folder: Path, rows: Rows) -> list[object]:
    import pyarrow
    import pyarrow.parquet

    columns = dict.fromkeys(key for row in rows for key in row)
    table = {c: [row.get(c) for row in rows] for c in columns} | {"image": [f"{n}.png" for n in NAMES]}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "rows.parquet")
    return ["--parquet", folder / "rows.parquet"]


def write_dataset(folder: Path, rows: Rows) -> list[object]:
    import datasets

    columns = dict.fromkeys(key for row in rows for key in row)
    content = {c: [row.get(c) for row in rows] for c in columns}
    content["image"] = [(folder / f"{name}.png").read_bytes() for name in NAMES]
    datasets.Dataset.from_dict(content).save_to_disk(folder / "saved")
    return ["--dataset", folder / "saved"]


OF_OBJECTS = (write_folder, write_jsonl, write_tars)
OF_TABLES = (write_csv, write_tsv, write_parquet, write_dataset)


@pytest.mark.parametrize("write", [*OF_OBJECTS, *OF_TABLES])
@pytest.mark.parametrize("extra", [(), ("--on-error", "skip"), ("--dry-run",)])
@pytest.mark.parametrize("column", ["shrot", "Short", "image_text"])
def test_a_column_that_no_row_has_is_an_error(tmp_path, pictures, capsys, write, extra, column):
    """Half of the samples were missing, with exit code 0, when the second name was
    misspelt.
    """
    rows: Rows = [{"caption": f"long {n}", "short": n} for n in NAMES]
    source = write(pictures, rows)
    code = make(tmp_path / "set", *source, "--caption-columns", f"caption,{column}", *extra)
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and repr(column) in sentence and "--caption-columns" in sentence
    assert "'caption'" in sentence and "'short'" in sentence
    assert not (tmp_path / "set" / "manifest.json").exists()


@pytest.mark.parametrize("write", [*OF_OBJECTS, *OF_TABLES])
@pytest.mark.parametrize("names", ["caption, short", " caption ,short ", "caption,\tshort"])
def test_names_of_columns_are_stripped(tmp_path, pictures, write, names):
    source = write(pictures, [{"caption": f"long {n}", "short": n} for n in NAMES])
    assert make(tmp_path / "set", *source, "--caption-columns", names, "--captions", "each") == 0
    assert captions(tmp_path / "set") == sorted([*NAMES, *(f"long {n}" for n in NAMES)])


@pytest.mark.parametrize("names", ["caption,,short", ",", "", " ", "short,short"])
def test_empty_and_equal_names_are_refused(tmp_path, pictures, capsys, names):
    source = write_jsonl(pictures, [{"caption": n} for n in NAMES])
    with pytest.raises(SystemExit) as ended:
        make(tmp_path / "set", *source, "--caption-columns", names)
    assert ended.value.code == 2 and "--caption-columns" in capsys.readouterr().err


def test_spaces_around_the_names_in_a_header_do_not_count(tmp_path, pictures):
    (pictures / "list.csv").write_text("caption, image\nx,a.png\ny,b.png\n")
    assert make(tmp_path / "set", "--csv", pictures / "list.csv") == 0
    assert captions(tmp_path / "set") == ["x", "y"]


@pytest.mark.parametrize("write", OF_OBJECTS)
def test_rows_that_lack_a_column_are_counted(tmp_path, pictures, capsys, write):
    source = write(pictures, [{"caption": "x", "short": "y"}, {"caption": "x"}, {"caption": "x"}])
    assert make(tmp_path / "set", *source, "--caption-columns", "caption,short", "--captions", "each") == 0
    assert "rows without column 'short': 2 of 3" in capsys.readouterr().out
    assert captions(tmp_path / "set") == ["x", "x", "x", "y"]


@pytest.mark.parametrize("write", [*OF_OBJECTS, *OF_TABLES])
@pytest.mark.parametrize("nothing", [None, "", " "])
def test_rows_without_text_in_a_column_are_counted(tmp_path, pictures, capsys, write, nothing):
    source = write(pictures, [{"caption": "x", "short": text} for text in ("y", nothing, nothing)])
    assert make(tmp_path / "set", *source, "--caption-columns", "short,caption", "--captions", "each") == 0
    assert "rows without text in column 'short': 2 of 3" in capsys.readouterr().out
    assert captions(tmp_path / "set") == ["x", "x", "x", "y"]


@pytest.mark.parametrize("write", OF_OBJECTS)
@pytest.mark.parametrize(
    "twice",
    [
        '"caption": "x", "caption": "y"',
        '"caption": "x", "n": {"w": 1, "w": 2}',
        '"w": 1, "w": 1, "caption": "x"',
    ],
)
def test_a_key_given_twice_is_a_problem_of_its_row(tmp_path, pictures, capsys, write, twice):
    """The last one was taken, without a word."""
    source = write(pictures, [{"caption": "x"}, {"caption": "TWICE"}, {"caption": "z"}])
    for path in [source[1], pictures / "b.json"]:
        if path.is_file() and path.suffix != ".tar":
            path.write_text(path.read_text().replace('"caption": "TWICE"', twice))
    if write is write_tars:
        members = {"0.png": picture("red"), "0.json": f"{{{twice}}}".encode()}
        members |= {"1.png": picture("lime"), "1.txt": b"x", "2.png": picture("blue"), "2.txt": b"z"}
        write_tar(source[1], members)
    key = "caption" if twice.count("caption") == 2 else "w"
    assert f"a key occurs twice: '{key}'; to leave" in fails(capsys, make(tmp_path / "set", *source))
    assert make(tmp_path / "set", *source, "--on-error", "skip") == 0
    assert captions(tmp_path / "set") == ["x", "z"]
    assert "twice" in (tmp_path / "set" / "left_out.jsonl").read_text()


@pytest.mark.parametrize("option", ["--jsonl", "--csv"])
@pytest.mark.parametrize(
    ("pack", "kind"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")]
)
def test_a_compressed_table_is_refused_by_name(tmp_path, pictures, capsys, option, pack, kind):
    """The advice was to leave out its first line."""
    path = tmp_path / "list.gz"
    path.write_bytes(pack(b'{"image": "a.png", "caption": "x"}\n'))
    sentence = fails(capsys, make(tmp_path / "set", option, path, "--image-root", pictures))
    assert f"compressed with {kind}; unpack it first" in sentence and "skip" not in sentence


def test_a_mark_in_names_of_classes_is_removed(tmp_path, capsys):
    """A prompt was "a \\ufefftench"."""
    for name in ("a", "b"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / "classes" / name / "x.png").write_bytes(picture("red"))
    (tmp_path / "names.json").write_text('\ufeff{"a": "\ufefftench", "\ufeffb": "gold\ufefffish"}')
    options = ("--class-names", tmp_path / "names.json", "--class-template", "a {}")
    assert make(tmp_path / "set", "--class-folder", tmp_path / "classes", *options) == 0
    assert captions(tmp_path / "set") == ["a gold\ufefffish", "a tench"]


def test_names_of_classes_given_twice_are_refused(tmp_path, capsys):
    (tmp_path / "names.json").write_text('{"n01": "tench", "n01": "goldfish"}')
    options = ("--class-names", tmp_path / "names.json", "--class-template", "a {}")
    assert "names.json: a key occurs twice: 'n01'" in fails(
        capsys, make(tmp_path / "set", "--class-folder", tmp_path, *options)
    )


def test_columns_of_one_name_are_told(tmp_path, pictures, capsys):
    (pictures / "list.csv").write_text("image,caption,note,note\na.png,x,1,2\n")
    assert make(tmp_path / "set", "--csv", pictures / "list.csv") == 0
    assert "of which the last is kept: 'note'" in capsys.readouterr().err


@pytest.mark.parametrize("write", [*OF_OBJECTS, write_parquet, write_dataset])
@pytest.mark.parametrize("choice", ["each", "first", "random"])
def test_blank_captions_of_a_list_are_counted(tmp_path, pictures, capsys, write, choice):
    """They were left out without a word."""
    lists = (["x", "", "y"], [None, "z"], ["\u200b", " ", "w"])
    source = write(pictures, [{"caption": texts} for texts in lists])
    assert make(tmp_path / "set", *source, "--captions", choice) == 0
    note = "captions without text that column 'caption' has beside others, left out: 4"
    assert note in capsys.readouterr().out
    assert len(captions(tmp_path / "set")) == (4 if choice == "each" else 3)


@pytest.mark.parametrize("write", [*OF_OBJECTS, write_parquet, write_dataset])
@pytest.mark.parametrize(("value", "found"), [(None, "is null"), ("", "is empty"), ("\u200b", "is empty")])
def test_a_caption_that_is_null_is_named_so(tmp_path, pictures, capsys, write, value, found):
    """The message was: no caption in 'caption'; found 'caption'."""
    source = write(pictures, [{"caption": text} for text in ("x", value, "y")])
    capsys.readouterr()
    assert f"no caption in 'caption': 'caption' {found}" in fails(capsys, make(tmp_path / "set", *source))


def test_a_text_file_beside_the_columns_is_told(tmp_path, pictures, capsys):
    """The .txt is read, as documented, and the option that had no effect is named."""
    source = write_folder(pictures, [{"caption": f"json {n}", "short": n} for n in NAMES])
    for name in NAMES[:2]:
        (pictures / f"{name}.txt").write_text(f"text {name}")
    assert make(tmp_path / "set", *source, "--caption-columns", "short") == 0
    assert "captions read from .txt, where --caption-columns has no effect: 2" in capsys.readouterr().out
    assert captions(tmp_path / "set") == ["c", "text a", "text b"]
    assert make(tmp_path / "other", *source) == 0
    assert "--caption-columns" not in capsys.readouterr().out


def test_a_text_member_beside_the_columns_is_told(tmp_path, pictures, capsys):
    members = {"a.png": picture("red"), "a.txt": b"text", "a.json": b'{"short": "x"}'}
    source = ("--tars", write_tar(pictures / "a.tar", members))
    assert make(tmp_path / "set", *source, "--caption-columns", "short") == 0
    assert "captions read from .txt, where --caption-columns has no effect: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("members", "used", "unused"),
    [
        ({"txt": b"x", "json": b'{"caption": "y"}'}, "txt", "json"),
        ({"caption": b"x", "text": b"y"}, "text", "caption"),
        ({"json": b'{"caption": "x"}', "cls": b"3"}, "json", "cls"),
    ],
)
def test_members_beside_the_caption_are_told(tmp_path, capsys, members, used, unused):
    """A caption in the .json beside a .txt was not mentioned; in folders it is."""
    named = {f"0.{kind}": value for kind, value in members.items()}
    path = write_tar(tmp_path / "a.tar", {"0.png": picture("red"), **named})
    assert make(tmp_path / "set", "--tars", path) == 0
    assert f"samples whose .{used} is the caption, and not their .{unused}: 1" in capsys.readouterr().err
    assert make(tmp_path / "again", "--tars", tmp_path / "set") == 0
    assert "is the caption" not in capsys.readouterr().err  # our sets keep their .json


def test_columns_of_a_source_without_any_are_told(tmp_path, capsys):
    source = ("--synthesize", "shapes", "--num-samples", 2)
    assert make(tmp_path / "set", *source, "--caption-columns", "short") == 0
    assert "--caption-columns has no effect" in capsys.readouterr().out


# ---- quoting ---------------------------------------------------------------------------------


def read(folder: Path, name: str, content: bytes) -> list[tuple[str, str]]:
    """(picture, caption) of each row, or ("line", its number) of one that cannot be
    read.
    """
    (folder / name).write_bytes(content)
    rows = []
    for item in table.read(str(folder / name), Layout()).items:
        if item.problem is None:
            rows.append((item.meta["name"][0], item.captions[0]))
        else:
            rows.append(("line", item.problem.split(":")[1]))
    return rows


TSV, CSV = b"image\tcaption\n", b"image,caption\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'a.png\t"one\nb.png\ttwo\nc.png\tthree', ['"one', "two", "three"]),
        (b'a.png\t"one\nb.png\ttwo\nc.png\tthree"\n', ['"one', "two", 'three"']),
        (b'a.png\t"one\r\nb.png\t"two\r\nc.png\tthree\r\n', ['"one', '"two', "three"]),
        (b'a.png\t"one" it says\nb.png\ttwo\nc.png\t"', ['"one" it says', "two", '"']),
        (b'a.png\t5" nail\nb.png\t"a" and "b"\nc.png\t""', ['5" nail', '"a" and "b"', '""']),
        (b'a.png\t"say ""hi"""\nb.png\t"x\ty"\nc.png\t"l1\nl2"\n', ['say "hi"', "x\ty", "l1\nl2"]),
        (b'a.png\t"one"\nb.png\t"two"\nc.png\tthree', ["one", "two", "three"]),
        (b'"a.png"\t"one"\r\n"b.png"\t"two\r\n"\r\n"c.png"\t"three"', ["one", "two", "three"]),
    ],
)
def test_quotes_in_tsv_swallow_nothing(pictures, content, expected):
    """A cell that began with a quote swallowed the lines up to the next quote: 3 rows
    became 1.
    """
    assert read(pictures, "list.tsv", TSV + content) == list(zip(NAMES, expected, strict=True))


def test_quotes_in_the_first_column_of_tsv_swallow_nothing(pictures):
    rows = read(pictures, "list.tsv", b'caption\timage\n"one\ta.png\ntwo\tb.png\nthree"\tc.png\n')
    assert rows == [("a", '"one'), ("b", "two"), ("c", 'three"')]


def test_a_short_row_does_not_end_the_quoting_of_a_tsv(pictures):
    rows = read(pictures, "list.tsv", TSV + b'a.png\t"l1\nl2"\nb.png\nc.png\t"say ""hi"""\n')
    assert rows == [("a", "l1\nl2"), ("line", "4"), ("c", 'say "hi"')]


@pytest.mark.parametrize(
    ("rows", "count"),
    [
        ('a.png\t"one\nb.png\ttwo\n', 1),
        ('a.png\t"one\nb.png\ttwo\nc.png\t"three\n', 2),
        ('a.png\t"one\nb.png\ttwo\nc.png\tthree"\n', 2),
        ('a.png\t"one" more\nb.png\t"two\nc.png\t"three"\n', 2),
    ],
)
def test_quotes_that_are_read_as_characters_are_told(pictures, capsys, rows, count):
    """Of two lines with one quote each, the note counted one."""
    read(pictures, "list.tsv", TSV + rows.encode())
    note = f"quotes are read as characters; rows where they do not pair up: {count}\n"
    assert note in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        b'a.png,"one, ""x""\nfoo, bar"\r\nb.png,two\r\nc.png,"a\r\nb"',
        b'a.png,"one, ""x""\nfoo, bar"\n\nb.png,two\nc.png,"a\r\nb"\n',
        b'"a.png","one, ""x""\nfoo, bar"\n"b.png","two"\n"c.png","a\r\nb"\n',
    ],
)
def test_valid_csv_keeps_its_commas_quotes_and_line_ends(pictures, content):
    rows = read(pictures, "list.csv", CSV + content)
    assert rows == [("a", 'one, "x"\nfoo, bar'), ("b", "two"), ("c", "a\r\nb")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'a.png,"one\nb.png,two\nc.png,three\n', [("line", "2"), ("b", "two"), ("c", "three")]),
        (b'a.png,"one\nb.png,two\nc.png,three"\n', [("line", "2"), ("b", "two"), ("c", 'three"')]),
        (b'a.png,one\nb.png,"two\r\nc.png,"three"', [("a", "one"), ("line", "3"), ("c", "three")]),
        (b'a.png,"one" x\nb.png,two\nc.png,"three', [("line", "2"), ("b", "two"), ("line", "4")]),
        (b"a.png,one\nb.png,two\0\nc.png,three", [("a", "one"), ("line", "3"), ("c", "three")]),
        (b"a.png,\xff\nb.png,two\nc.png,a,b\n", [("line", "2"), ("b", "two"), ("line", "4")]),
        (b"a.png\nb.png,two,\nc.png,three", [("line", "2"), ("line", "3"), ("c", "three")]),
        (
            b"a.png," + b"x" * 2**21 + b"\nb.png,two\nc.png,three",
            [("line", "2"), ("b", "two"), ("c", "three")],
        ),
    ],
)
def test_a_row_that_cannot_be_read_takes_no_other_with_it(pictures, content, expected):
    assert read(pictures, "list.csv", CSV + content) == expected


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("list.csv", b'image,caption\n0.png,"a cat\n1.png,b, with commas\n2.png,c, more"\n3.png,d\n', "234"),
        ("list.csv", b'image,caption\n0.png,"a cat\n\n1.png,b, with commas"\n3.png,d\n', "24"),
        ("list.csv", b'image,caption\n0.png,"a cat\nalone\n1.png,b, with commas"\n3.png,d\n', "234"),
        ("list.csv", b'caption,image\n"a cat,0.png\nb, with commas,1.png\nc",2.png\nd,3.png\n', "23"),
        ("list.csv", b'image,size,caption\n0.png,1,"a\n1.png,"\n3.png,1,d\n', "23"),
        ("list.tsv", b'image\tcaption\n0.png\t"a cat\n1.png\tb\tc"\n3.png\td\n', "3"),
    ],
)
def test_a_quote_swallows_no_row_of_a_wrong_number_of_cells(pictures, name, content, lines):
    """Two of four rows were lost without a word: a swallowed row counted only with the
    right number of cells.
    """
    for number in range(4):
        (pictures / f"{number}.png").write_bytes(picture("red"))
    rows = read(pictures, name, content)
    assert [row[1] for row in rows if row[0] == "line"] == list(lines)
    assert rows[-1] == ("3", "d")


def test_a_quote_over_very_many_lines_is_a_problem_of_its_row(tmp_path):
    path = tmp_path / "list.csv"
    path.write_bytes(b'a.png,"' + b"b.png\n" * 5000 + b'"\nc.png,three\n')
    with path.open("rb") as file:
        first, *_, last = quoted_rows(iterate_lines(file), ",", lambda cells: len(cells) == 2)
    assert first.line == 1 and "lines follow" in first.problem
    assert last.cells == ["c.png", "three"]


def test_rows_without_quoting_are_lines(tmp_path):
    (tmp_path / "list.tsv").write_bytes(b'"a\tb"\r\n\nc\td\n')
    with (tmp_path / "list.tsv").open("rb") as file:
        rows = list(plain_rows(iterate_lines(file), "\t"))
    assert [(row.line, row.cells) for row in rows] == [(1, ['"a', 'b"']), (3, ["c", "d"])]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.csv", CSV + b'a.png,"one" x\nb.png,two\n'),
        ("list.tsv", TSV + b"a.png\tone\ttoo\nb.png\ttwo\n"),
        ("list.jsonl", b'{"image": "a.png", \n{"image": "b.png", "caption": "two"}\n'),
        ("list.jsonl", b'{"image": "a.png", "caption": "\xff"}\n{"image": "b.png", "caption": "two"}\n'),
        ("list.jsonl", b"[1]" + b" " * 2**22 + b'\n{"image": "b.png", "caption": "two"}\n'),
    ],
)
def test_a_row_that_cannot_be_read_is_named_and_can_be_skipped(tmp_path, pictures, capsys, name, content):
    (pictures / name).write_bytes(content)
    source = ("--jsonl" if name == "list.jsonl" else "--csv", pictures / name)
    line = 1 if name == "list.jsonl" else 2
    assert f"{name}:{line}: " in fails(capsys, make(tmp_path / "set", *source))
    assert make(tmp_path / "set", *source, "--on-error", "skip") == 0
    assert captions(tmp_path / "set") == ["two"]
    assert "left out 1 of 2" in capsys.readouterr().out
    assert f"{name}:{line}: " in (tmp_path / "set" / "left_out.jsonl").read_text()


@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("text", ["a caption", 'one, "two"', "two\nlines, yes", '"'])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_one_bad_line_costs_at_most_its_own_row(tmp_path, delimiter, text, quoting):
    """Any line of quotes, delimiters and bytes that are not text, anywhere in the
    file.
    """
    rng = random.Random(0)
    suffix = "csv" if delimiter == "," else "tsv"
    pieces = [b'"', b'""', delimiter.encode(), b"a", b"x.png", b" ", b"\xff", b"\0"]
    for _ in range(60):
        num_rows, lines = rng.randrange(3, 9), []
        for number in range(num_rows):
            row = io.StringIO()
            writer = csv.writer(row, delimiter=delimiter, lineterminator="\n", quoting=quoting)
            writer.writerow([f"{number}.png", f"{text} {number}"])
            lines.append(row.getvalue().encode())
        bad = rng.randrange(num_rows)
        noise = b"".join(rng.choice(pieces) for _ in range(rng.randrange(1, 9)))
        lines[bad] = rng.choice(
            [noise + b"\n", f"{bad}.png{delimiter}".encode() + noise + b"\n", b'"' + lines[bad]]
        )
        path = tmp_path / f"list.{suffix}"
        path.write_bytes(f"image{delimiter}caption\n".encode() + b"".join(lines))
        rows = table.rows_of(path, Layout())
        found = {row.cells[0].strip('"'): row.cells[1] for row in rows if len(row.cells) == 2}
        for number in range(num_rows):
            if number != bad and ("\n" not in text or delimiter == ","):
                # Where TSV turns out to have no quoting, the quotes stay.
                assert f"{number}" in found[f"{number}.png"] and text[:3].strip('"') in found[f"{number}.png"]
