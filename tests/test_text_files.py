"""Every text file is read in one way: UTF-8, no byte-order mark, lines that end at LF
or CRLF only.
"""

import argparse
import ast
import gzip
import io
import json
from pathlib import Path

import pytest

from data_tools import listed_source
from data_tools.sources import Layout, folder, jsonl, table, webdataset
from eval.dpg_bench import answers, pictures, recorded, score
from mmtensorar import generate
from mmtensorar.checkpoints import released
from mmtensorar.data.members import decode_caption
from mmtensorar.data.shards import Manifest
from mmtensorar.files import iterate_lines, read_json, read_json_lines, read_lines, read_text, split_lines
from mmtensorar.recipe.files import read_settings
from tests.helpers.sources import picture, write_tar

ROOT = Path(__file__).resolve().parents[1]
MARK = b"\xef\xbb\xbf"
ODD = "a\u2028b\u2029c\x0bd\x0ce\x1cf\x85g"  # a line to us, seven to str.splitlines


def prompts_file(path: Path, text: bytes):
    path.write_bytes(text)
    return generate.read_prompts(argparse.Namespace(prompt=[], prompts_file=path, classes=None))


def dpg_prompt(path: Path, text: bytes):
    (path.parent / "prompts").mkdir(exist_ok=True)
    (path.parent / "prompts" / f"{path.name}.txt").write_bytes(text)
    return pictures.read_prompts(path.parent)


def dpg_table(path: Path, text: bytes):
    path.write_bytes(text)
    return score.read_rows(path)


def dpg_answers(path: Path, text: bytes):
    path.write_bytes(text)
    return recorded.read_answers(path)


def zipped_answers(path: Path, text: bytes):
    path = path.with_suffix(".gz")
    path.write_bytes(gzip.compress(text))
    return recorded.read_answers(path)


def judges_cache(path: Path, text: bytes):
    path.write_bytes(text)
    return answers.Cache(path)._answers


def recipe(path: Path, text: bytes):
    path.write_bytes(text)
    return read_settings(path)


def class_names(path: Path, text: bytes):
    path.write_bytes(text)
    return listed_source.read_class_names(path)


def json_object(path: Path, text: bytes):
    path.write_bytes(text)
    return read_json(path)


def json_lines(path: Path, text: bytes):
    path.write_bytes(text)
    return [row for _, row in read_json_lines(path)]


def model_config(path: Path, text: bytes):
    (path.parent / "config.json").write_bytes(text)
    return released.read_config(path.parent, None, key="path")


def manifest(path: Path, text: bytes):
    path.write_bytes(text)
    return Manifest.parse(path)


def lines(path: Path, text: bytes):
    path.write_bytes(text)
    return read_lines(path)


def items(source, location: Path, **layout):
    found = list(source.read(str(location), Layout(**layout)).items)
    if problems := [item.problem for item in found if item.problem]:
        raise ValueError(problems[0])
    return [(item.captions, item.meta.get("fields")) for item in found]


def table_source(path: Path, text: bytes, suffix: str):
    for name in "ab":
        (path.parent / f"{name}.png").write_bytes(picture("red"))
    path = path.with_suffix(suffix)
    path.write_bytes(text)
    return items(jsonl if suffix == ".jsonl" else table, path)


def csv_source(path: Path, text: bytes):
    return table_source(path, text, ".csv")


def tsv_source(path: Path, text: bytes):
    return table_source(path, text, ".tsv")


def jsonl_source(path: Path, text: bytes):
    return table_source(path, text, ".jsonl")


def folder_source(path: Path, text: bytes, suffix: str = ".txt"):
    (path.parent / "a.png").write_bytes(picture("red"))
    (path.parent / f"a{suffix}").write_bytes(text)
    return items(folder, path.parent)


def json_beside_a_picture(path: Path, text: bytes):
    return folder_source(path, text, ".json")


def member(path: Path, text: bytes, kind: str):
    names = {"0": "x"} if kind == "cls" else None
    return items(webdataset, write_tar(path, {"a.png": picture("red"), f"a.{kind}": text}), class_names=names)


def text_member(path: Path, text: bytes):
    return member(path, text, "txt")


def json_member(path: Path, text: bytes):
    return member(path, text, "json")


def class_member(path: Path, text: bytes):
    return member(path, text, "cls")


OBJECT = json.dumps({"caption": ODD, "x": "y"}, ensure_ascii=False).encode()
TABLE = f"{','.join(score.COLUMNS)}\na,1,0,global,{ODD}?\na,2,1,global,two?\n".encode()
ANSWER = (
    json.dumps({"item_id": ODD, "image": 0, "answers": {"1": "yes"}}, ensure_ascii=False).encode() + b"\n"
)
CACHED = json.dumps(dict.fromkeys(answers.KEYS, ODD), ensure_ascii=False).encode() + b"\n"
ROWS = [{"image": f"{name}.png", "caption": ODD} for name in "ab"]
# Reader -> a file that it reads.
READERS = {
    prompts_file: f"{ODD}\ntwo\n".encode(),
    dpg_prompt: f"{ODD}\n".encode(),
    dpg_table: TABLE,
    dpg_answers: ANSWER,
    zipped_answers: ANSWER,
    judges_cache: CACHED,
    recipe: "run:\n  name: r\u00e9\n".encode(),
    class_names: b'{"n01": "tench"}',
    json_object: OBJECT,
    json_lines: OBJECT + b"\n" + OBJECT,
    model_config: OBJECT,
    manifest: json.dumps(
        {"format": 1, "shards": [{"name": "a.tar", "num_samples": 1, "sha256": "0" * 64}]}
        | {"num_samples": 1, "image_size": 8, "source": "s", "seed": 0}
    ).encode(),
    lines: f"{ODD}\n\n two".encode(),
    csv_source: f"image,caption\na.png,{ODD}\nb.png,two\n".encode(),
    tsv_source: f"image\tcaption\na.png\t{ODD}\nb.png\ttwo".encode(),
    jsonl_source: "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(),
    folder_source: ODD.encode(),
    json_beside_a_picture: OBJECT,
    text_member: ODD.encode(),
    json_member: OBJECT,
    class_member: b"0",
}
readers = pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)


@readers
def test_marks_and_line_ends_change_nothing(tmp_path, reader):
    """A byte-order mark became part of the first prompt, or of a column's name."""
    text = READERS[reader]
    expected = reader(tmp_path / "file", text)
    for other in (
        MARK + text,
        MARK + MARK + text,
        text.replace(b"\n", b"\r\n"),
        MARK + text.rstrip(b"\n").replace(b"\n", b"\r\n") + b"\r\n",
    ):
        assert reader(tmp_path / "file", other) == expected, other


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("joined", [[b"a", MARK + b"b"], [MARK + b"a", MARK + b"b"], [b"a", b"b", MARK * 2]])
def test_marks_of_joined_files_are_in_no_line(tmp_path, joined, end):
    path = tmp_path / "prompts.txt"
    path.write_bytes(end.join(joined) + end)
    expected = ["a", "b", ""][: len(joined)]
    assert read_lines(path) == expected
    with path.open("rb") as file:
        assert [line.text for line in iterate_lines(file)] == expected


@readers
def test_other_line_ends_of_python_are_characters(tmp_path, reader):
    """Prompts were split at U+2028 and the like."""
    found = repr(reader(tmp_path / "file", READERS[reader]))
    if ODD.encode() in READERS[reader] or b"\\u2028" in READERS[reader]:
        assert repr(ODD)[1:-1] in found


@readers
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_refused_by_its_name(tmp_path, reader, encoding):
    text = READERS[reader].decode().encode(encoding)
    with pytest.raises(ValueError, match="UTF-16|not UTF-8") as raised:
        reader(tmp_path / "file", text)
    assert str(tmp_path) in str(raised.value)


@readers
@pytest.mark.parametrize("bad", [b"\xff", b"\xe9 ", b"\xed\xa0\x80", b"\x00"])
def test_bytes_that_are_not_utf8_are_named(tmp_path, reader, bad):
    with pytest.raises(ValueError, match="not UTF-8|not text in UTF-8") as raised:
        reader(tmp_path / "file", READERS[reader].rstrip(b"\n") + bad + b"\n")
    assert str(tmp_path) in str(raised.value) and "byte" in str(raised.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"one\n\xff", "file: not UTF-8: 0xff (line 2, byte 1)"),
        (b"one\r\ntwo\n a\xc3", "file: not UTF-8: 0xc3 (line 3, byte 3)"),
        (b"\xef\xbb\xbf\n\n\n\0", "file: not text in UTF-8: NUL, as in UTF-16 (line 4, byte 1)"),
    ],
)
def test_line_and_byte_are_counted_from_one(tmp_path, content, expected):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError) as raised:
        read_text(tmp_path / "file")
    assert str(raised.value).endswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("\n", [""]),
        ("one", ["one"]),
        ("one\ntwo\r\n\nthree", ["one", "two", "", "three"]),
        (f"{ODD}\n{ODD}\r\n", [ODD, ODD]),
        ("one\rtwo\nthree", ["one\rtwo", "three"]),
        ("one\r", ["one"]),
    ],
)
def test_lines(text, expected):
    assert split_lines(text, "here") == expected
    streamed = list(iterate_lines(io.BytesIO(text.encode())))
    assert [line.text.rstrip("\r") for line in streamed] == expected
    assert "".join(line.text + line.end for line in streamed) == text


@pytest.mark.parametrize("text", ["one\rtwo", "one\rtwo\rthree\r", "image,caption\ra.png,x\r"])
def test_lines_that_all_end_in_cr_are_refused(tmp_path, text):
    """They would be one prompt, or a header without rows."""
    with pytest.raises(ValueError, match="here: its lines end in CR"):
        split_lines(text, "here")
    for reader in (prompts_file, csv_source):
        with pytest.raises(ValueError, match="file.*lines end in CR"):
            reader(tmp_path / "file", text.encode())


def test_a_long_line_is_one_problem():
    content = b"one\n" + b"x" * 100 + b"\ntwo\n" + b"y" * 31 + b"\n" + b"z" * 32
    found = list(iterate_lines(io.BytesIO(content), 32))
    assert [line.text for line in found] == ["one", "", "two", "y" * 31, ""]
    assert [line.number for line in found if line.problem] == [2, 5]


def test_the_caption_of_a_sample_names_the_encoding():
    with pytest.raises(ValueError, match="here: the caption is not UTF-8 but UTF-16"):
        decode_caption("a circle".encode("utf-16"), "here")


@pytest.mark.parametrize("package", ["mmtensorar", "data_tools", "eval", "study", "worlds"])
def test_nothing_else_reads_text(package):
    """A second reader would read marks, line ends and bad bytes in its own way."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            is_text = name == "open" and any(
                isinstance(a, ast.Constant) and a.value in ("r", "rt") for a in node.args
            )
            call = ast.unparse(node)
            is_method = isinstance(node.func, ast.Attribute) and not call.startswith("files.")
            if is_text or (is_method and name in ("read_text", "splitlines")):
                found.append(f"{path.relative_to(ROOT)}: {call}")
    assert found == ALLOWED.get(package, [])


# Messages of libraries, a log that is shown, and a number that we wrote.
ALLOWED = {
    "mmtensorar": [
        "mmtensorar/checkpoints/released.py: (str(error).strip() or type(error).__name__).splitlines()",
        "mmtensorar/data/url_cache.py: path.read_text()",
    ],
    "study": ["study/runner.py: ended.log.read_text(encoding='utf-8', errors='replace')"],
}
