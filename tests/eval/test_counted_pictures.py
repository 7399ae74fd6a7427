"""Which files of a folder are pictures: strips of `generate --trace` are not; and their
order.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import gallery, layout
from eval.dpg_bench import pictures
from eval.fid import sources
from eval.geneval import evaluate, suites
from mmtensorar import generate, picture_folder
from mmtensorar.data.pictures import SUFFIXES


def write(path: Path, value: int = 0, size: tuple[int, int] = (4, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def of_fid(folder: Path) -> list[int]:
    found = sources.find(folder)
    values = np.concatenate(list(found.batches(2)))[:, 0, 0, 0].tolist()
    assert found.num == len(values)
    return values


def test_traces_of_generate_are_not_counted(ckpt, tmp_path, capsys):
    """FID once counted each strip as a picture, of another size or, with a window of
    one, of the same.
    """
    command = ["--ckpt", str(ckpt), "--device", "cpu", "--out", str(tmp_path), "--num-images", "3"]
    assert generate.main([*command, "--prompt", "a red circle", "--trace"]) == 0
    assert len(list(tmp_path.glob("*.png"))) == 6
    capsys.readouterr()
    assert len(of_fid(tmp_path)) == 3
    noted = capsys.readouterr().err
    assert f"note: {tmp_path}: left out 3 ({layout.STRIP}): 00000_0.revisions.png, 00001_1.rev" in noted


@pytest.mark.parametrize(
    "names, strips",
    [
        (["00000_0.png", "00001_0.png"], ["00000_0.revisions.png"]),
        (["99999_7.png", "100000_7.png"], ["99999_7.revisions.png", "100000_7.revisions.png"]),
        (["a/cat.png", "a/b/cat.png", "dog.png"], ["a/b/cat.revisions.png"]),
        (["00001_0.png"], ["00000_0.revisions.png"]),
    ],
)
def test_fid_leaves_strips_out(tmp_path, capsys, names, strips):
    for number, name in enumerate([*names, *strips]):
        write(tmp_path / name, number)
    assert sorted(of_fid(tmp_path)) == list(range(len(names)))
    assert f"left out {len(strips)} ({layout.STRIP}): " in capsys.readouterr().err


@pytest.mark.parametrize("num_prompts, num_images", [(1, 1), (2, 4), (3, 2)])
def test_fid_leaves_the_grids_of_genevals_script_out(tmp_path, capsys, num_prompts, num_images):
    for prompt in range(num_prompts):
        for image in range(num_images):
            write(layout.image_path(tmp_path, prompt, image), 10 * prompt + image)
        write(tmp_path / f"{prompt:05d}" / "grid.png", 200)
    write(tmp_path / "grid.png", 99)
    expected = [10 * prompt + image for prompt in range(num_prompts) for image in range(num_images)]
    assert sorted(of_fid(tmp_path)) == [*expected, 99]
    assert f"left out {num_prompts} (GenEval's grid " in capsys.readouterr().err


def test_every_kind_of_picture_may_be_a_strip():
    assert set(SUFFIXES) <= set(picture_folder.PICTURES)


@pytest.mark.parametrize("ending", [".jpg", ".JPEG", ".webp", ".bmp", ".tif"])
@pytest.mark.parametrize("name", ["00000_0", "cat"])
def test_strips_are_left_out_after_a_conversion(tmp_path, capsys, name, ending):
    write(tmp_path / f"{name}{ending}", 7)
    write(tmp_path / f"{name}.revisions{ending}", 200)
    (value,) = of_fid(tmp_path)
    assert abs(value - 7) < 3
    assert f"left out 1 ({layout.STRIP}): {name}.revisions{ending}" in capsys.readouterr().err


def test_pictures_with_such_a_name_and_no_trace_are_counted(tmp_path, capsys):
    write(tmp_path / "plan.revisions.png", 0)
    write(tmp_path / "plan2.png", 1)
    assert of_fid(tmp_path) == [0, 1] and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "names",
    [
        ["99998_0.png", "99999_0.png", "100000_0.png", "100001_3.png"],
        ["00000_0.png", "99999_11.png", "99999_2.png", "100000_0.png", "1000000_0.png"],
        ["a/99999_0.png", "a/100000_0.png", "b/00000_0.png"],
        ["0.png", "00.png", "10.png", "9.png", "a/0.png", "b.png"],
    ],
)
def test_fid_reads_in_the_order_of_numbers(tmp_path, names):
    """99999 comes before 100000; other names stay in the order of the alphabet."""
    for number, name in reversed(list(enumerate(names))):
        write(tmp_path / name, number)
    assert of_fid(tmp_path) == list(range(len(names)))


@pytest.mark.parametrize("extra", ["00000.revisions.png", "00000_0.png", "00001.jpg", "copy.webp"])
def test_geneval_and_the_gallery_name_what_they_leave_out(tmp_path, capsys, extra):
    """Only NNNNN.png is a picture in GenEval's layout; others were passed over without
    a word.
    """
    suite = suites.load("shapes", 1)
    for index, metadata in enumerate(suite.prompts):
        write(layout.image_path(tmp_path, index, 0), size=(64, 64))
        layout.files.write_json_lines(tmp_path / f"{index:05d}" / "metadata.jsonl", [metadata])
    write(tmp_path / "00002" / "samples" / extra)
    results, problems = evaluate.score(suite, tmp_path, num_images=1)
    assert len(results) == 6 and not problems
    assert f"): 00002/samples/{extra}\n" in capsys.readouterr().err
    assert len(gallery.read(tmp_path)[1]) == 6
    assert f"): 00002/samples/{extra}\n" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_dpg_bench_leaves_strips_out(tmp_path, capsys, suffix):
    """Before .webp in the alphabet, a strip was once taken for the item's picture."""
    for number, name in enumerate(["a", "7"]):
        write(tmp_path / f"{name}{suffix}", 100 + number)
        write(tmp_path / f"{name}.revisions.png", 200)
    unknown = set()
    found, problems = pictures.survey(tmp_path, ["a", "7"], num_samples=1, single=True, unknown=unknown)
    assert [item.samples(1)[0].getpixel((0, 0))[0] for item in found] == [100, 101] and not problems
    assert f"left out 2 ({layout.STRIP}): 7.revisions.png, a.revisions.png" in capsys.readouterr().err
    assert not unknown
