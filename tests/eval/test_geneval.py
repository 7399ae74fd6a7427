"""Evaluation from pictures or a model folder to table and gallery; no test needs a trained model."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import gallery, layout, report_table
from eval.geneval import __main__ as geneval
from eval.geneval import ceiling, report, suites
from mmtensorar import files
from mmtensorar.checkpoints import model_folder, sharded_state
from mmtensorar.training import run_log
from worlds.shapes.draw import SKILLS, draw, sample_scene

ROOT = Path(__file__).resolve().parents[2]
NUM_IMAGES = 2


def draw_folder(folder: Path, *, wrong: int = 0) -> Path:
    """Two prompts per skill with two correct pictures; in the first `wrong` prompts one picture is
    empty.
    """
    for index in range(2 * len(SKILLS)):
        rng = np.random.default_rng(index)
        scene = sample_scene(rng, SKILLS[index // 2])
        for image in range(NUM_IMAGES):
            path = layout.image_path(folder, index, image)
            path.parent.mkdir(parents=True, exist_ok=True)
            empty = index < wrong and image == 1
            (Image.new("RGB", (64, 64), (140, 140, 140)) if empty else draw(scene, rng)).save(path)
        files.write_text(folder / f"{index:05d}" / "metadata.jsonl", json.dumps(scene.metadata) + "\n")
    return folder


def run(*arguments) -> int:
    return geneval.main([str(argument) for argument in (*arguments, "--suite", "shapes")])


@pytest.fixture
def images(tmp_path) -> Path:
    return draw_folder(tmp_path / "images", wrong=3)


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> dict[str, Path]:
    """Two scored folders by name."""
    folder = tmp_path_factory.mktemp("scored")
    folders = {"good": draw_folder(folder / "good"), "worse": draw_folder(folder / "worse", wrong=3)}
    for path in folders.values():
        assert run("--images", path, "--num-bound-images", 60) == 0
    return folders


# ---- suites --------------------------------------------------------------------------------------


def test_the_shapes_suite_is_fixed_and_even():
    prompts = suites.load("shapes").prompts
    assert [prompt["tag"] for prompt in prompts] == [skill for skill in SKILLS for _ in range(20)]
    for skill in SKILLS:
        captions = [prompt["prompt"] for prompt in prompts if prompt["tag"] == skill]
        assert len(set(captions)) == 20
        fewer = [p["prompt"] for p in suites.load("shapes", 5).prompts if p["tag"] == skill]
        assert fewer == captions[:5], "a smaller suite is the beginning of the larger one"


def test_more_prompts_than_the_grammar_has_is_an_error():
    assert len(suites.load("shapes", 32).prompts) == 6 * 32
    with pytest.raises(ValueError, match="about 32 captions for single_object"):
        suites.load("shapes", 33)


@pytest.mark.launch
def test_an_unknown_suite_ends_before_torch_is_imported():
    code = (
        "import sys; from eval.geneval.__main__ import main; "
        "code = main(['--ckpt', 'nowhere', '--suite', 'shape']); "
        "sys.exit(100 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: unknown suite 'shape'; known: shapes, geneval\n"


# ---- scoring images ------------------------------------------------------------------------------


def test_drawn_pictures_are_scored(scored):
    summary = json.loads((scored["worse"] / "summary.json").read_text())
    assert summary["num_images"] == 24 and summary["correct_images"] == 21 and summary["num_prompts"] == 12
    assert [summary["skills"][skill]["accuracy"] for skill in SKILLS] == [0.5, 0.75, 1, 1, 1, 1]
    assert summary["overall"]["accuracy"] == pytest.approx(5.25 / 6)
    assert summary["detector"] == "shapes-exact" and summary["suite"] == "shapes"
    assert summary["ceiling"]["drawn"]["overall"] == 1 and summary["chance"]["overall"] < 0.2
    rows = [row for _, row in files.read_json_lines(scored["worse"] / "results.jsonl")]
    assert [row["filename"] for row in rows if not row["correct"]] == [
        f"0000{i}/samples/00001.png" for i in range(3)
    ]
    assert rows[1]["reason"].endswith(">=1, found 0") and rows[1]["detections"] == []


def test_scoring_twice_gives_the_same_files(images):
    run("--images", images, "--num-bound-images", 0)
    first = (images / "results.jsonl").read_bytes(), (images / "summary.json").read_bytes()
    run("--images", images, "--num-bound-images", 0)
    assert first == ((images / "results.jsonl").read_bytes(), (images / "summary.json").read_bytes())


def remove_image(folder: Path) -> str:
    path = layout.image_path(folder, 4, 0)
    path.unlink()
    return str(path.relative_to(folder))


def remove_prompt(folder: Path) -> str:
    (folder / "00004").rename(folder / "elsewhere")
    return ": 00004 is missing"


def cut_image(folder: Path) -> str:
    path = layout.image_path(folder, 4, 1)
    path.write_bytes(path.read_bytes()[:200])
    return str(path.relative_to(folder))


def write_text_as_image(folder: Path) -> str:
    path = layout.image_path(folder, 4, 1)
    path.write_text("not a picture")
    return str(path.relative_to(folder))


def remove_metadata(folder: Path) -> str:
    path = folder / "00004" / "metadata.jsonl"
    path.unlink()
    return str(path)


def ask_for_a_bench(folder: Path) -> str:
    path = folder / "00004" / "metadata.jsonl"
    path.write_text(
        json.dumps({"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"})
    )
    return f"{path}: include 0: expected a class that suite shapes detects"


@pytest.mark.parametrize(
    "damage", [remove_image, remove_prompt, cut_image, write_text_as_image, remove_metadata, ask_for_a_bench]
)
def test_damage_is_an_error_that_names_the_file(images, capsys, damage):
    """The official scorer ignores missing pictures, which raises the score of a run that failed
    half-way.
    """
    named = damage(images)
    assert run("--images", images) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.rpartition("error: ")[1] and named in error
    assert not (images / "summary.json").exists()


def test_fewer_images_than_asked_for_is_an_error(images, capsys):
    assert run("--images", images, "--num-images", 4) == 2
    error = capsys.readouterr().err
    assert (
        "00000/samples/00002.png is missing, 00000/samples/00003.png is missing" in error
        and "more\n" in error
    )
    assert run("--images", images, "--num-images", 1) == 2
    assert "00000/samples/00001.png is one too many" in capsys.readouterr().err


def test_a_number_that_two_files_have_is_an_error(images, capsys):
    """One of the two files was once ignored silently."""
    shutil.copy(layout.image_path(images, 1, 0), images / "00001" / "samples" / "0.png")
    shutil.copytree(images / "00002", images / "2")
    assert run("--images", images) == 2
    error = capsys.readouterr().err
    assert (
        "00001/samples/00000.png has the number of 0.png" in error
        or "0.png has the number of 00000.png" in error
    )
    assert "2 has the number of 00002" in error


def test_a_partial_score_is_allowed_and_marked_everywhere(images, capsys):
    """The summary lists what is missing or unreadable, and every print of the score is marked."""
    cut_image(images)
    remove_image(images)
    (images / "00007").rename(images / "elsewhere")
    assert run("--images", images, "--allow-partial", "--num-bound-images", 0) == 0
    printed = capsys.readouterr().out
    assert "(PARTIAL)" in printed and "PARTIAL: images lacks 3 images or prompts" in printed
    summary = json.loads((images / "summary.json").read_text())
    assert len(summary["partial"]) == 3 and summary["num_images"] == 24 - 2 - 2
    assert "(PARTIAL)" in (images / "report.html").read_text()
    assert (
        report_table.main([f"a={images / 'summary.json'}"]) == 0 and "a (PARTIAL)" in capsys.readouterr().out
    )


def test_a_missing_folder_is_an_error(tmp_path, capsys):
    assert run("--images", tmp_path / "none") == 2
    assert capsys.readouterr().err == f"error: no folder {tmp_path / 'none'}\n"


# ---- from a checkpoint ---------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_generation_resumes_and_refuses_other_settings(ckpt, tmp_path, capsys):
    """Missing images are made again exactly; a folder with other settings is not changed."""
    command = (
        "--ckpt",
        ckpt,
        "--out",
        tmp_path / "out",
        "--num-prompts",
        1,
        "--num-images",
        2,
        "--batch-size",
        4,
    )
    command = (*command, "--device", "cpu", "--num-bound-images", 6)
    assert run(*command) == 0
    made = files_of(tmp_path / "out")
    assert list(made)[:3] == ["00000/samples/00000.png", "00000/samples/00001.png", "00001/samples/00000.png"]
    assert len(made) == 12
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["num_images"] == 12 and summary["seed"] == 0 and summary["checkpoint"] == str(ckpt)
    assert list(summary["ceiling"]) == ["drawn", "round_trip"] and "chance" in summary

    layout.image_path(tmp_path / "out", 3, 1).unlink()
    (tmp_path / "out" / "00005" / "samples" / "00000.png").unlink()
    untouched = layout.image_path(tmp_path / "out", 0, 0).stat().st_mtime_ns
    assert run(*command) == 0
    assert "2 images made" in capsys.readouterr().out
    assert files_of(tmp_path / "out") == made
    assert layout.image_path(tmp_path / "out", 0, 0).stat().st_mtime_ns == untouched

    assert run(*command, "--seed", 1) == 2
    assert "seed 0 there, 1 now" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == made


def test_ranks_share_the_images(ckpt, tmp_path, monkeypatch):
    """The first rank scores, and waits for the images of the other ranks before that."""
    command = (
        "--ckpt",
        ckpt,
        "--num-prompts",
        1,
        "--num-images",
        1,
        "--device",
        "cpu",
        "--num-bound-images",
        0,
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    out, waited = tmp_path / "shared", []

    def another_rank(seconds):
        waited.append(len(files_of(out)))
        monkeypatch.setenv("RANK", "1")
        assert run(*command, "--out", out) == 0 and not (out / "summary.json").exists()
        monkeypatch.setenv("RANK", "0")

    monkeypatch.setattr(time, "sleep", another_rank)
    monkeypatch.setenv("RANK", "0")
    assert run(*command, "--out", out) == 0
    assert waited == [3] and len(files_of(out)) == 6
    summary = json.loads((out / "summary.json").read_text())
    assert summary["seed"] == 0 and summary["num_images"] == summary["images_expected"] == 6


def test_images_of_unknown_origin_are_not_mixed_in(ckpt, images, capsys):
    assert run("--ckpt", ckpt, "--out", images, "--device", "cpu") == 2
    assert "their origin is unknown" in capsys.readouterr().err


def test_a_missing_model_folder_is_an_error(tmp_path, capsys):
    assert run("--ckpt", tmp_path / "none") == 2
    assert "error: no model folder at" in capsys.readouterr().err


# ---- ceiling, table, gallery ---------------------------------------------------------------------


def test_ceiling_command(tmp_path, capsys):
    assert ceiling.main(["--num-images", "60", "--out", str(tmp_path / "ceiling.json")]) == 0
    bounds = json.loads((tmp_path / "ceiling.json").read_text())
    assert all(
        bounds["chance"]["skills"][skill] < bounds["ceiling"]["drawn"]["skills"][skill] for skill in SKILLS
    )
    assert "chance" in capsys.readouterr().out
    assert ceiling.main(["--image-tokenizer", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_table_lists_scores_by_skill(scored, capsys):
    summaries = [f"{name}={folder / 'summary.json'}" for name, folder in scored.items()]
    assert report_table.main(summaries) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", *SKILLS, "overall"]
    assert lines[2].split()[0] == "good" and lines[3].split()[1] == "50.0"
    assert lines[5].split() == ["images", *["4"] * 6, "24"]
    assert lines[6].startswith("ceiling, as drawn") and lines[7].startswith("chance")
    assert "seed unknown" in lines[-1]
    assert report_table.main([*summaries, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| model ")


@pytest.mark.parametrize(
    "damage", [{"skills": {"colors": {}}}, {"overall": 0.5}, {"skills": []}, {"ceiling": {"drawn": {"x": 1}}}]
)
def test_a_damaged_summary_is_one_sentence(scored, tmp_path, capsys, damage):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(json.loads((scored["good"] / "summary.json").read_text()) | damage))
    assert report_table.main([str(path)]) == 2
    assert f"error: {path}: damaged" in capsys.readouterr().err


def test_table_keeps_detectors_apart(scored, tmp_path, capsys):
    summary = json.loads((scored["good"] / "summary.json").read_text()) | {"detector": "other"}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert report_table.main([f"a={scored['good'] / 'summary.json'}", f"b={tmp_path / 'summary.json'}"]) == 2
    assert "a has shapes-exact, b has other" in capsys.readouterr().err
    assert report_table.main([f"a={tmp_path / 'none.json'}"]) == 2
    assert "none.json is missing" in capsys.readouterr().err


def test_gallery(scored, tmp_path):
    out = tmp_path / "gallery.png"
    command = [
        str(scored["good"]),
        f"second={scored['worse']}",
        "--out",
        str(out),
        "--num-images",
        "2",
        "--scale",
        "1",
    ]
    assert gallery.main(command) == 0
    sheet = Image.open(out)
    cell = 64 + 2 * gallery.FRAME + gallery.GAP
    x, y = gallery.CAPTION_WIDTH, 2 * gallery.FONT_SIZE
    block = 2 * cell + gallery.BETWEEN
    assert sheet.size == (x + 2 * block, y + 12 * cell)
    # Second picture of the first prompt: correct in the first folder, empty in the second.
    assert sheet.getpixel((x + cell, y)) == gallery.GREEN
    assert sheet.getpixel((x + block + cell, y)) == gallery.RED


def test_gallery_takes_the_first_prompts_of_each_skill():
    prompts = [{"tag": tag} for tag in "aaabbb"]
    assert gallery.pick(prompts, 5) == [0, 1, 3, 4]
    with pytest.raises(ValueError, match="at least one per skill, 2"):
        gallery.pick(prompts, 1)


def test_gallery_without_enough_images_is_an_error(scored, tmp_path, capsys):
    assert gallery.main([str(scored["good"]), "--out", str(tmp_path / "g.png")]) == 2
    assert "holds 2 images per prompt; 4 asked for" in capsys.readouterr().err


def test_the_report_shows_bars_and_pictures_and_runs_no_code(scored, tmp_path):
    """Names and reasons come from other people's files: on the page they are only text, whatever
    they contain.
    """
    text = (scored["worse"] / "report.html").read_text()
    for skill in (*SKILLS, "overall"):
        assert f"<td>{skill}<td" in text
    assert text.count("<figure class=fail>") == 3 and text.count("<figure class=pass>") >= 6
    assert "found 0" in text and "<script" not in text and "http" not in text
    rows = [row for _, row in files.read_json_lines(scored["worse"] / "results.jsonl")]
    summary = json.loads((scored["worse"] / "summary.json").read_text())
    evil = [row | {"prompt": "<script>alert(1)</script>", "reason": "<img src=x onerror=y>"} for row in rows]
    page = report.page(summary | {"detector": "<b>"}, evil, Path(summary["images"]))
    assert "<script>alert" not in page and "<img src=x" not in page and "&lt;b&gt;" in page


def test_boxes_are_drawn_at_their_coordinates():
    image = Image.new("RGB", (44, 22), "white")
    box = {"label": "star", "box": [11, 11, 22, 22], "score": 0.9, "color": "red"}
    picture = report.drawn(image, [box, box | {"score": 0.2, "box": [30, 0, 44, 22]}])
    assert picture.size == (report.SIDE, report.SIDE // 2)
    assert picture.getpixel((55, 80)) == (0, 208, 255), "the left edge, five times as far"
    assert picture.getpixel((160, 60)) == (255, 255, 255), "too unsure to count"


# ---- watching a run ------------------------------------------------------------------------------


def save_checkpoint(run_dir: Path, model, step: int) -> None:
    """Save a checkpoint as training does, without training."""
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    named = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    layout = [
        sharded_state.Piece(name, 0, flat, 0, value.numel()) for flat, (name, value) in enumerate(named)
    ]
    sharded_state.write(
        folder, 0, layout, [value.shape for _, value in named], [{"master": value} for _, value in named]
    )
    recorded = {
        "format": sharded_state.FORMAT,
        "step": step,
        "num_files": 1,
        "sha256": sharded_state.digests(folder, 1),
    }
    (folder / sharded_state.STATE).write_text(json.dumps(recorded))
    (run_dir / "checkpoints" / "latest").write_text(folder.name)


def test_model_folders_of_a_run_are_scored_as_they_appear(ckpt, tmp_path, capsys):
    loaded, run_dir = model_folder.load(ckpt), tmp_path / "run"
    run_dir.mkdir()
    model_folder.saved_recipe(ckpt).save(run_dir / "recipe.yaml")
    few = ["--suite", "shapes", "--num-prompts", "1", "--num-images", "1", "--num-bound-images", "0"]
    for step in (2, 10):
        save_checkpoint(run_dir, loaded.model, step)
        assert run("watch", run_dir, "--once", *few) == 0
    assert run("watch", run_dir, "--once", *few) == 0, "nothing newer"
    shutil.rmtree(run_dir / "checkpoints" / "step_000010")
    assert run("watch", run_dir, "--once", *few) == 0, "an older one than was scored is passed over"
    found = run_log.read_log(run_dir / "scores.jsonl")
    assert [row["step"] for row in found] == [2, 10]
    assert all(
        row["num_images"] == 6 and len(row["skills"]) == 6 and 0 <= row["overall"] <= 1 for row in found
    )
    assert sorted(path.name for path in (run_dir / "scores").iterdir()) == ["step_000002", "step_000010"]
    assert (run_dir / "scores" / "step_000002" / "report.html").is_file() and any(
        (run_dir / "tensorboard").iterdir()
    )
    capsys.readouterr()
    assert run("watch", tmp_path) == 2 and "not a run folder" in capsys.readouterr().err
