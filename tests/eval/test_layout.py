"""Folders of generated pictures: their record, gaps in their numbers, and what the
record says is missing.
"""

import json
from pathlib import Path

import pytest
from PIL import Image

from eval import gallery, layout
from eval.dpg_bench import grids, pictures
from eval.fid import sources
from eval.geneval import __main__ as geneval
from mmtensorar import files


def make(root: Path, prompts=range(3), numbers=range(4), record: dict | None = None) -> Path:
    for prompt in prompts:
        for number in numbers:
            path = layout.image_path(root, prompt, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (prompt, number, 0)).save(path)
        row = {"item_id": f"item{prompt}", "prompt": "a red cat", "tag": "color"}
        files.write_text(root / f"{prompt:05d}" / "metadata.jsonl", json.dumps(row) + "\n")
    if record is not None:
        files.write_text(root / layout.RECORD, json.dumps(record))
    return root


def read_by_fid(root: Path, out: Path) -> None:
    sources.find(root)


def read_by_grids(root: Path, out: Path) -> None:
    arguments = [str(root), "--out", str(out)]
    if grids.main(arguments):
        raise ValueError


def read_by_gallery(root: Path, out: Path) -> None:
    gallery.compose({"one": root}, num_prompts=1, num_images=1)


def read_by_dpg(root: Path, out: Path) -> None:
    _, problems = pictures.survey(root, ["item0", "item1", "item2"], num_samples=4, single=False)
    if problems:
        raise ValueError(layout.listed(root, problems))


READERS = [read_by_fid, read_by_grids, read_by_gallery, read_by_dpg]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "key, value",
    [("num_prompts", "6"), ("num_prompts", 6.0), ("num_images", [1]), ("num_images", 0), ("sampling", [1])],
)
def test_a_damaged_record_is_one_sentence(tmp_path, capsys, reader, key, value):
    root = make(tmp_path / "images", record={"num_prompts": 3, "num_images": 4, key: value})
    with pytest.raises(ValueError) as error:
        reader(root, tmp_path / "out")
    said = str(error.value) + capsys.readouterr().err
    assert f"{root / layout.RECORD}: {key} is {json.dumps(value)}; expected " in said


@pytest.mark.parametrize("key, value", [("sampling", [1]), ("seed", "1"), ("checkpoint", 3)])
def test_a_damaged_record_is_reported_before_scoring(tmp_path, capsys, key, value):
    root = make(tmp_path / "images", record={key: value})
    arguments = ["--images", str(root), "--suite", "shapes", "--num-images", "4"]
    assert geneval.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert f"{root / layout.RECORD}: {key} is {json.dumps(value)}; expected " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "stray, said",
    [
        ("20240131/samples/00000.png", "00003 to 20240130 are missing, the folders of 20240128 prompts"),
        ("00001/samples/2024013.png", "00000/samples/00004.png to 2024013.png are missing, 2024010 images"),
        (f"{10**60}/samples/00000.png", "00003 to 9"),
        ("00005/samples/00000.png", "00003 is missing, the folder of prompt 3 of 6"),
    ],
)
def test_a_stray_number_is_a_gap_and_not_millions_of_sentences(tmp_path, stray, said):
    root = make(tmp_path)
    (root / stray).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(root / stray)
    _, problems = layout.survey(root)
    assert any(problem.startswith(said) for problem in problems) and len(problems) < 20


def test_ten_thousand_missing_pictures_have_a_sentence_each(tmp_path):
    _, problems = layout.survey(make(tmp_path, [0], [0]), num_prompts=9000, num_images=500)
    assert len(problems) == 8999 + 499 and "and 9488 more" in layout.listed(tmp_path, problems)


@pytest.mark.parametrize("reader", [read_by_fid, read_by_grids, read_by_gallery])
@pytest.mark.parametrize(
    "record, missing",
    [
        ({"num_prompts": 4, "num_images": 4}, "00003 is missing"),
        ({"num_prompts": 30_000, "num_images": 4}, "00003 to 29999 are missing"),
        ({"num_prompts": 2, "num_images": 4}, "00002/samples/00000.png is one too many"),
    ],
)
def test_the_record_says_how_many_prompts_there_are(tmp_path, capsys, reader, record, missing):
    root = make(tmp_path / "images", record=record)
    with pytest.raises(ValueError) as error:
        reader(root, tmp_path / "out")
    assert missing in str(error.value) + capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("record", [{"num_prompts": 3, "num_images": 4}, {"num_prompts": None}, {}])
def test_whole_folders_are_read(tmp_path, reader, record):
    reader(make(tmp_path / "images", record=record), tmp_path / "out")


def test_a_prompt_of_two_folders_is_named_once(tmp_path, capsys):
    (make(tmp_path) / "0").symlink_to("00000")
    _, problems = layout.survey(tmp_path)
    assert problems == ["00000 has the number of 0"]
    assert "not NNNNN" not in capsys.readouterr().err
