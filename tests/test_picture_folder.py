"""A folder of generated pictures: numbers of their own for several processes, and
nothing is replaced.
"""

import errno
import fcntl
import json
import os
import random
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from mmtensorar import files
from mmtensorar.picture_folder import REVISIONS, WINDOWS, PictureFolder, in_order, is_revisions

ROOT = Path(__file__).resolve().parents[1]

# Adds pictures as fast as it can; the content names its writer.
WRITER = """
import sys
from contextlib import ExitStack
from pathlib import Path
from mmtensorar.files import temporary_name
from mmtensorar.picture_folder import PictureFolder
out, seed, endings, number = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(","), int(sys.argv[4])
folder = PictureFolder(out)
for picture in range(number):
    with ExitStack() as stack:
        finished = {ending: stack.enter_context(temporary_name(out)) for ending in endings}
        for path in finished.values():
            path.write_text(f"{sys.argv[5]} {picture}")
        folder.add(finished, seed, {"prompt": f"{sys.argv[5]} {picture}", "seed": seed})
"""


def add(folder: PictureFolder, seed: int = 0, *, trace: bool = False, text: str = "picture") -> str:
    endings = [*([WINDOWS, REVISIONS] if trace else []), ".png"]
    with ExitStack() as stack:
        finished = {ending: stack.enter_context(files.temporary_name(folder.path)) for ending in endings}
        for path in finished.values():
            path.write_text(text)
        return folder.add(finished, seed, {"prompt": text, "seed": seed}).name


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]


# ---- two at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "writers",
    [
        [("0", ".png"), ("0", ".png")],
        [("0", ".png"), ("7", ".png")],
        [("3", f"{WINDOWS},{REVISIONS},.png"), ("3", ".png")],
    ],
    ids=["one_seed", "two_seeds", "with_traces"],
)
def test_two_processes_add_to_one_folder(tmp_path, writers):
    """Both once counted from the same number, and the later one replaced pictures of
    the other.

    Now no content is lost, no number occurs twice, and each line has the file with its
    content.
    """
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), seed, endings, "40", name], cwd=ROOT, env=os.environ
        )
        for name, (seed, endings) in zip("ab", writers, strict=True)
    ]
    assert [process.wait(120) for process in running] == [0, 0]
    rows = lines(tmp_path)
    assert sorted(row["prompt"] for row in rows) == sorted(f"{name} {n}" for name in "ab" for n in range(40))
    assert sorted(row["file"][:5] for row in rows) == [f"{number:05d}" for number in range(80)]
    assert all((tmp_path / row["file"]).read_text() == row["prompt"] for row in rows)
    num_files = sum(40 * len(endings.split(",")) for _, endings in writers)
    assert len(list(tmp_path.iterdir())) == num_files + 1, "and no temporary file"


def break_links(patch: pytest.MonkeyPatch) -> None:
    def link(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    patch.setattr(os, "link", link)


def break_locks(patch: pytest.MonkeyPatch) -> None:
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    patch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("broken", [[], [break_links], [break_locks], [break_links, break_locks]])
def test_nothing_is_replaced_on_any_file_system(tmp_path, monkeypatch, broken):
    """exFAT has no hard links, some network file systems no locks.

    A second folder object is a second process that started before the first wrote.
    """
    for change in broken:
        change(monkeypatch)
    one, other = PictureFolder(tmp_path), PictureFolder(tmp_path)
    (tmp_path / "00002_0.png").write_text("of a person")
    named = [add(one, text="a"), add(other, text="b"), add(one, text="c"), add(other, trace=True, text="d")]
    assert named == ["00000_0.png", "00001_0.png", "00003_0.png", "00004_0.png"]
    assert [(tmp_path / row["file"]).read_text() for row in lines(tmp_path)] == ["a", "b", "c", "d"]
    assert (tmp_path / "00002_0.png").read_text() == "of a person"
    (tmp_path / "00005_0.revisions.png").write_text("of a person")
    assert add(one, trace=True) == "00006_0.png" and not (tmp_path / "00005_0.windows.safetensors").exists()
    names = {path.name for path in tmp_path.iterdir()}
    assert not [name for name in names if name.endswith((".tmp", ".taken"))]


@pytest.mark.parametrize("endings", [".png", f"{REVISIONS},.png", f"{WINDOWS},{REVISIONS},.png"])
def test_a_process_is_killed_at_any_moment(tmp_path, endings):
    """Whatever it was doing: every picture is whole, and at most the last one has no
    line.
    """
    command = [sys.executable, "-c", WRITER, str(tmp_path), "0", endings, "1000000", "a"]
    process = subprocess.Popen(command, cwd=ROOT)
    while not (tmp_path / "00020_0.png").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = {path.name: path.read_text() for path in tmp_path.glob("*.png")}
    assert all(content.startswith("a ") for content in before.values())
    named = add(PictureFolder(tmp_path), trace=True)
    recorded = {row["file"] for row in lines(tmp_path)} - {named}
    assert (
        named not in before and len({name for name in before if not is_revisions(Path(name))} - recorded) <= 1
    )
    assert all((tmp_path / name).read_text() == content for name, content in before.items())


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("after", [0, 1])
def test_a_killed_process_leaves_no_empty_picture(tmp_path, monkeypatch, trace, after):
    """It may leave a hidden file, or a trace; the next picture gets the next free
    number.
    """
    folder, published = PictureFolder(tmp_path), []

    def killed(temporary, path):
        if len(published) == after:
            raise SystemExit
        published.append(path)
        files.publish(temporary, path)

    monkeypatch.setattr("mmtensorar.picture_folder.publish", killed)
    finished = {ending: tmp_path / f".{ending}.tmp" for ending in [*([REVISIONS] if trace else []), ".png"]}
    for path in finished.values():
        path.write_text("picture")
    if after < len(finished):
        with pytest.raises(SystemExit):
            folder.add(finished, 0, {})
    monkeypatch.undo()
    pictures = [path for path in tmp_path.glob("*.png") if not is_revisions(path)]
    assert not pictures and not lines(tmp_path)
    assert add(PictureFolder(tmp_path)) == ("00001_0.png" if trace and after else "00000_0.png")


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "present, record, expected",
    [
        ([], "", "00000_5.png"),
        (["00000_0.png", "00007_3.png"], "", "00008_5.png"),
        (["99998_0.png", "99999_0.png"], "", "100000_5.png"),
        (["99999_0.png", "100000_0.png"], "", "100001_5.png"),
        (["1234567_0.png"], "", "1234568_5.png"),
        (["00003_0.windows.safetensors", "00004_0.revisions.png"], "", "00005_5.png"),
        (["00001_0.png"], '{"file": "00009_0.png", "prompt": "removed since"}\n', "00010_5.png"),
        ([], '{"file": "100041_2.png", "prompt": "\\"file\\": \\"900000_2.png\\""}\n', "100042_5.png"),
        (["123_0.png", "picture_1.png", "00000.png", "prompts.txt"], '{"file": "a.png"}\n', "00000_5.png"),
    ],
)
def test_numbers_continue(tmp_path, present, record, expected):
    """After 99999 the count once stayed at 100000, and each picture replaced the one
    before.

    A number whose picture was removed is not used again: prompts.jsonl still has its
    line.
    """
    for name in present:
        (tmp_path / name).write_text(name)
    (tmp_path / "prompts.jsonl").write_text(record)
    folder = PictureFolder(tmp_path)
    assert add(folder, 5) == expected
    number = int(expected.split("_")[0])
    assert add(folder, 5) == f"{number + 1:05d}_5.png"
    assert all((tmp_path / name).read_text() == name for name in present)


def test_names_sort_by_number():
    """99999_0.png comes before 100000_0.png, which the alphabet puts first; other names
    keep their order.
    """
    names = [
        "00000_0.png",
        "00000_11.png",
        "00000_2.png",
        "09999_0.png",
        "1_0.png",
        "99999/samples/00000.png",
    ]
    names += ["99999.png", "99999_3.png", "100000/samples/00000.png", "100000_0.png"]
    names += ["100000_0.revisions.png", "100001_0.png", "1000000_7.png", "a10.png", "a9.png"]
    paths = [Path("folder") / name for name in names]
    paths = [*paths, *(Path("folder/a9.png.d") / name for name in names), Path("folder/b.png")]
    paths += [Path("folder2") / name for name in names]
    shuffled = paths.copy()
    random.Random(0).shuffle(shuffled)
    assert sorted(shuffled, key=in_order) == paths
    ordinary = [path for path in paths if "/100" not in str(path)]
    assert sorted(ordinary) == ordinary


# ---- prompts.jsonl -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tail, kept, noted",
    [
        ('{"file": "00001_0.png", "prompt": "a re', False, True),
        ('{"file": "00001_0.png", "prompt": "b"}', True, False),
        ('{"file": "00001_0.png", "prompt": "\ud55c"}'[:-3], False, True),
        ("", True, False),
    ],
)
def test_a_line_that_was_cut_short_is_removed(tmp_path, capsys, tail, kept, noted):
    """A killed process left it, and the next line was once glued to it, so that neither
    could be read.
    """
    first = '{"file": "00000_0.png", "prompt": "a"}\n'
    (tmp_path / "prompts.jsonl").write_text(first + tail)
    add(PictureFolder(tmp_path), 4)
    rows = lines(tmp_path)
    assert len(rows) == 2 + (kept and bool(tail)) and rows[-1]["seed"] == 4
    assert ("incomplete" in capsys.readouterr().err) == noted


@pytest.mark.parametrize(
    "content",
    [
        "a red circle\na blue star",
        "a red circle\na blue star\n",
        '{"prompt": "a", "file_name": "b"}\n{"prompt": "c"}\n',
        '{"prompt": "a red ci',
        '{"file": "00000_0.png", "prompt": "a"}\na red circle',
        '["file"]\n',
    ],
)
def test_a_file_of_the_same_name_stays_as_it_is(tmp_path, content):
    """`generate --out d --prompts-file d/prompts.jsonl` with a text file of prompts:
    its last line was removed, as if a killed process had left it, and records were
    appended.
    """
    (tmp_path / "prompts.jsonl").write_text(content)
    with pytest.raises(ValueError, match="prompts.jsonl"):
        PictureFolder(tmp_path)
    assert (tmp_path / "prompts.jsonl").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize("content", ["a question", '{"question": "a", "answer": "b"}\nwhat', "yes\nno\n"])
def test_a_file_that_is_no_record_of_answers_or_scores_stays_as_it_is(tmp_path, content):
    """The other records of JSON lines lost a last line in the same way."""
    from eval.dpg_bench.answers import Cache

    path = tmp_path / "answers.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="answers.jsonl"):
        Cache(path)
    assert path.read_text() == content


@pytest.mark.parametrize("name", ["00000_0.revisions.png", "100000_12.revisions.png", "a.revisions.png"])
def test_strips_of_revisions_are_not_pictures(tmp_path, name):
    picture = tmp_path / name.replace(".revisions", "")
    picture.write_text("")
    assert is_revisions(tmp_path / name) and not is_revisions(picture)
    picture.unlink()
    assert is_revisions(tmp_path / name) == name[0].isdigit(), "a picture of this name, without a trace"


@pytest.mark.parametrize("digits", [201, 4400, 9000])
def test_numbers_that_no_name_has_are_not_counted(tmp_path, digits):
    (tmp_path / "prompts.jsonl").write_text(f'{{"file": "{"9" * digits}_0.png"}}\n')
    (tmp_path / "new").touch()
    path = PictureFolder(tmp_path).add({".png": tmp_path / "new"}, 0, {"prompt": "x"})
    assert path.name == "00000_0.png"
