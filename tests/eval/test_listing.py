"""Evaluators list folders like the data tools: links are followed, hidden files are
left out, and whatever is not scored is counted and named. FID counted the copies in
.ipynb_checkpoints, and none of them looked behind a link.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import layout
from eval.dpg_bench import pictures
from eval.fid import sources

NUM = 4


def save(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (number, 0, 0)).save(path)


def any_folder(root: Path, numbers) -> None:
    for number in numbers:
        save(root / f"{number}.png", number)


def laid_out(root: Path, numbers) -> None:
    for number in numbers:
        save(layout.image_path(root, number, 0), number)


def seen_by_fid(root: Path) -> list[int]:
    return [int(batch[0, 0, 0, 0]) for batch in sources.find(root).batches(1)]


def seen_by_dpg(root: Path) -> list[int]:
    found, problems = pictures.survey(root, list(map(str, range(NUM))), num_samples=1, single=True)
    assert not problems
    return [item.samples(1)[0].getpixel((0, 0))[0] for item in found]


def seen_in_layout(root: Path) -> list[int]:
    """What GenEval scores, DPG-Bench of generated pictures, FID of a model and the
    gallery.
    """
    found, problems = layout.survey(root)
    assert not problems
    return [layout.open_image(path).getpixel((0, 0))[0] for images in found for path in images]


EVALUATORS = {
    "fid": (any_folder, seen_by_fid),
    "dpg": (any_folder, seen_by_dpg),
    "layout": (laid_out, seen_in_layout),
}


@pytest.fixture(params=EVALUATORS)
def evaluator(request):
    return EVALUATORS[request.param]


def test_hidden_copies_are_not_scored(tmp_path, evaluator, capsys):
    write, seen = evaluator
    write(tmp_path / "b", range(NUM))
    for folder in (".ipynb_checkpoints", ".cache/deep"):
        shutil.copytree(tmp_path / "b", tmp_path / "b" / folder)
    for path in [path for path in (tmp_path / "b").rglob("*.png") if ".c" not in str(path)]:
        shutil.copy(path, path.with_name(f"._{path.name}"))
    assert seen(tmp_path / "b") == list(range(NUM))
    assert "(hidden): ." in capsys.readouterr().err


def test_linked_files_and_the_folder_itself_behind_a_link(tmp_path, evaluator):
    write, seen = evaluator
    write(tmp_path / "c", range(NUM))
    (tmp_path / "b").mkdir()
    for path in (tmp_path / "c").iterdir():  # pictures, or folders of prompts
        (tmp_path / "b" / path.name).symlink_to(path)
    (tmp_path / "a").symlink_to("b")
    assert seen(tmp_path / "b") == seen(tmp_path / "a") == list(range(NUM))


@pytest.mark.parametrize("circle", [False, True])
def test_fid_reads_behind_links_once(tmp_path, capsys, circle):
    any_folder(tmp_path / "b", (0, 1))
    any_folder(tmp_path / "c", (2, 3))
    (tmp_path / "b" / "more").symlink_to("../c")
    if circle:
        (tmp_path / "b" / "z").symlink_to(".")
        (tmp_path / "c" / "back").symlink_to("../b")
    assert seen_by_fid(tmp_path / "b") == [0, 1, 2, 3]
    err = capsys.readouterr().err
    assert "followed" in err and ("listed already): more/back, z" in err) == circle


def test_circles_of_links_in_the_layout(tmp_path):
    laid_out(tmp_path / "b", range(NUM))
    (tmp_path / "b" / "00001" / "samples" / "up").symlink_to("../..")
    (tmp_path / "b" / "self").symlink_to(".")
    assert seen_in_layout(tmp_path / "b") == list(range(NUM))


def test_what_is_not_scored_is_named(tmp_path, capsys):
    any_folder(tmp_path / "b", range(NUM))
    save(tmp_path / "b" / "deep" / "9.png", 9)
    (tmp_path / "b" / "notes.md").write_text("x")
    (tmp_path / "b" / "lost.png").symlink_to("gone")
    assert seen_by_dpg(tmp_path / "b") == list(range(NUM))
    err = capsys.readouterr().err
    assert "left out 1 (in a sub-folder): deep/9.png" in err and "): notes.md" in err
    assert "left out 1 (a link without a target): lost.png" in err
    assert seen_by_fid(tmp_path / "b") == [*range(NUM), 9]
    err = capsys.readouterr().err
    assert "): notes.md" in err and "a link without a target" in err


@pytest.mark.parametrize(
    "name",
    [
        "00000/samples/00000.jpg",
        "00000/samples/first.png",
        "00000/grid.png",
        "other/x.webp",
        "00000/samples/a/0.png",
    ],
)
def test_pictures_outside_of_the_layout_are_named(tmp_path, capsys, name):
    laid_out(tmp_path, range(NUM))
    save(tmp_path / name, 9)
    assert seen_in_layout(tmp_path) == list(range(NUM))
    assert f"left out 1 (not NNNNN/samples/NNNNN.png): {name}" in capsys.readouterr().err


def test_prompts_of_dpg_leave_out_hidden_files(tmp_path, capsys):
    """macOS' ._1.txt is not UTF-8, and would be a prompt without a picture."""
    (tmp_path / "prompts" / ".ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "prompts" / "1.txt").write_text("one")
    (tmp_path / "prompts" / ".ipynb_checkpoints" / "1.txt").write_text("one")
    (tmp_path / "prompts" / "._1.txt").write_bytes(b"\x00\x05\x16\xff")
    (tmp_path / "prompts" / "2.md").write_text("x")
    assert pictures.read_prompts(tmp_path) == [{"item_id": "1", "prompt": "one"}]
    err = capsys.readouterr().err
    assert "left out 2 (hidden)" in err and "left out 1 (of another kind): 2.md" in err


def test_order_is_that_of_sorted_paths(tmp_path):
    names = ["b/1.png", "a.png", "a/2.png", "a-b/3.png", "B.png"]
    for number, name in enumerate(names):
        save(tmp_path / name, number)
    expected = [names.index(str(path.relative_to(tmp_path))) for path in sorted(tmp_path.rglob("*.png"))]
    assert seen_by_fid(tmp_path) == expected and np.unique(expected).size == 5
