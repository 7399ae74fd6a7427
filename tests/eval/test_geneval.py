"""Evaluation from pictures or a model folder to table and gallery; no test needs a
trained model.
"""

import json
import shutil
import subprocess
import sys
import time
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import gallery, harness, layout, report_table
from eval.geneval import __main__ as geneval
from eval.geneval import ceiling, evaluate, report, suites
from mmtensorar import files
from mmtensorar.checkpoints import model_folder, sharded_state
from mmtensorar.processes import RunFolderLock
from mmtensorar.training import run_log
from worlds.shapes.draw import SKILLS, Scene, draw, sample_scene
from worlds.shapes.prompts import PROMPT_SEED

ROOT = Path(__file__).resolve().parents[2]
NUM_IMAGES = 2


@cache
def scene_of(prompt: str, skill: str) -> Scene:
    """The scene of a prompt of the suite."""
    for number in count():
        rng = np.random.default_rng([PROMPT_SEED, SKILLS.index(skill), number])
        if (scene := sample_scene(rng, skill)).caption == prompt:
            return scene
    raise AssertionError


def draw_prompt(folder: Path, index: int, scene: Scene, num_images: int, num_empty: int = 0) -> None:
    """Correct pictures of a scene; the last num_empty are empty."""
    rng = np.random.default_rng(index)
    for image in range(num_images):
        path = layout.image_path(folder, index, image)
        path.parent.mkdir(parents=True, exist_ok=True)
        empty = image >= num_images - num_empty
        (Image.new("RGB", (64, 64), (140, 140, 140)) if empty else draw(scene, rng)).save(path)
    files.write_text(folder / f"{index:05d}" / "metadata.jsonl", json.dumps(scene.metadata) + "\n")


def draw_folder(folder: Path, *, wrong: int = 0, per_skill: int = 2, num_images: int = NUM_IMAGES) -> Path:
    """The suite's first prompts of each skill; in the first `wrong` prompts one picture
    is empty.
    """
    for index, metadata in enumerate(suites.load("shapes", per_skill).prompts):
        scene = scene_of(metadata["prompt"], metadata["tag"])
        draw_prompt(folder, index, scene, num_images, num_empty=int(index < wrong))
    return folder


def run(*arguments) -> int:
    """Of pictures that `draw_folder` drew, unless the arguments ask for other
    numbers.
    """
    numbers = ("--num-prompts", 2, "--num-images", NUM_IMAGES) if "--images" in arguments else ()
    return geneval.main([str(argument) for argument in (*numbers, *arguments, "--suite", "shapes")])


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
        "code = main(['--ckpt', 'recipes/tiny/weights/base', '--suite', 'shape']); "
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
    """The official scorer ignores missing pictures, which raises the score of a run
    that failed half-way.
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
    """The summary lists what is missing or unreadable, and every print of the score is
    marked.
    """
    cut_image(images)
    remove_image(images)
    (images / "00007").rename(images / "elsewhere")
    assert run("--images", images, "--allow-partial", "--num-bound-images", 0) == 0
    printed = capsys.readouterr().out
    numbers = "1 missing prompt, 1 missing image, 1 unreadable image"
    assert "(PARTIAL)" in printed and f"PARTIAL: images: {numbers}." in printed
    assert numbers in (images / "report.html").read_text()
    summary = json.loads((images / "summary.json").read_text())
    assert len(summary["partial"]) == 3 and summary["num_images"] == 24 - 2 - 2
    assert "(PARTIAL)" in (images / "report.html").read_text()
    assert (
        report_table.main([f"a={images / 'summary.json'}"]) == 0 and "a (PARTIAL)" in capsys.readouterr().out
    )


def add_image(folder: Path) -> tuple[str, str]:
    shutil.copy(layout.image_path(folder, 3, 0), layout.image_path(folder, 3, 7))
    return "1 surplus image", "00003/samples/00007.png is one too many"


def cut_one_and_lose_many(folder: Path) -> tuple[str, str]:
    cut_image(folder)
    for number in (*range(4), *range(5, 12)):
        shutil.rmtree(folder / f"{number:05d}" / "samples")
        (folder / f"{number:05d}" / "samples").mkdir()
    return "22 missing images, 1 unreadable image", "00004/samples/00001.png: unreadable image"


def lose_prompts_and_images(folder: Path) -> tuple[str, str]:
    for number in (1, 2):
        shutil.rmtree(folder / f"{number:05d}")
    layout.image_path(folder, 0, 1).unlink()
    return "2 missing prompts, 1 missing image", "00000/samples/00001.png is missing"


def give_a_number_twice(folder: Path) -> tuple[str, str]:
    shutil.copy(layout.image_path(folder, 3, 0), folder / "00003" / "samples" / "0.png")
    return "1 duplicate number", "00003/samples/00000.png has the number of 0.png"


@pytest.mark.parametrize(
    "change", [add_image, cut_one_and_lose_many, lose_prompts_and_images, give_a_number_twice]
)
def test_what_keeps_a_set_from_being_whole_is_counted_by_kind_and_named(images, capsys, change):
    """One picture too many was "lacks 1 image", a damaged one was named in the summary
    only, and missing prompts and pictures were added up.
    """
    numbers, named = change(images)
    assert run("--images", images, "--allow-partial", "--num-bound-images", 0) == 0
    printed, noted = capsys.readouterr()
    assert f"PARTIAL: images: {numbers}." in printed and "lacks" not in printed
    assert named in next(line for line in noted.splitlines() if line.startswith(f"note: {images}: "))
    assert report_table.main([f"a={images / 'summary.json'}"]) == 0
    assert f"PARTIAL: a: {numbers}." in capsys.readouterr().out


@pytest.mark.parametrize("indices, text", [([0], "a lovely photo"), ([2, 3, 5], ""), ([1, 11], "x" * 500)])
def test_prompts_with_another_text_are_scored_and_named(images, capsys, indices, text):
    """As GenEval's own script does, which never reads the text: but in silence the
    score was that of the suite's prompts.
    """
    prompts = suites.load("shapes", 2).prompts
    for index in indices:
        changed = prompts[index] | {"prompt": text}
        files.write_text(images / f"{index:05d}" / "metadata.jsonl", json.dumps(changed) + "\n")
    assert run("--images", images, "--num-bound-images", 0) == 0
    printed, noted = capsys.readouterr()
    assert "PARTIAL" not in printed and "21" not in noted
    number = "1 prompt" if len(indices) == 1 else f"{len(indices)} prompts"
    assert f"NOT the suite's texts (images: {number})" in printed
    for index in indices:
        assert f"{index:05d}/metadata.jsonl has the prompt {json.dumps(text)[:60]}" in noted
        assert f'not "{prompts[index]["prompt"]}"' in noted
    summary = json.loads((images / "summary.json").read_text())
    assert len(summary["changed_prompts"]) == len(indices) and summary["correct_images"] == 21


def test_a_text_that_another_prompt_has_is_changed_too(images, capsys):
    """Two prompts may ask for the same in two texts: one text twice is another set."""
    suite = suites.load("shapes")
    same = [prompt for prompt in suite.prompts if prompt["include"] == suite.prompts[3]["include"]]
    assert len(same) > 1, "prompts 3 and 7 ask for a ring"
    given = [(str(number), same[0]) for number in range(len(same))]
    assert len(evaluate.changed_texts(suite, given)) == len(same) - 1
    assert not evaluate.changed_texts(suite, [*enumerate(reversed(suite.prompts))])
    assert not evaluate.changed_texts(suite, [("0", same[0] | {"tag": "counting", "prompt": "?"})])


# ---- whole sets ----------------------------------------------------------------------------------


def three_of_one_skill(folder: Path) -> str:
    draw_folder(folder, per_skill=3, num_images=1)
    for index in range(3, 18):
        shutil.rmtree(folder / f"{index:05d}")
    return "00003 is missing"


def one_picture_each(folder: Path) -> str:
    draw_folder(folder, num_images=1)
    return "00000/samples/00001.png is missing"


def a_skill_is_missing(folder: Path) -> str:
    draw_folder(folder)
    for number in (10, 11):
        shutil.rmtree(folder / f"{number:05d}")
    return "00010 is missing"


def prompts_of_other_origin(folder: Path) -> str:
    """As many prompts and pictures as asked for, and the right skills."""
    for index in range(12):
        draw_prompt(folder, index, sample_scene(np.random.default_rng(index), SKILLS[index // 2]), NUM_IMAGES)
    return "/metadata.jsonl: not a prompt of suite shapes"


def one_prompt_twice(folder: Path) -> str:
    draw_folder(folder)
    shutil.rmtree(folder / "00005")
    shutil.copytree(folder / "00004", folder / "00005")
    return "00005/metadata.jsonl: not a prompt of suite shapes, or one that other folders have"


def a_prompt_too_many(folder: Path) -> str:
    draw_folder(folder)
    draw_prompt(folder, 12, sample_scene(np.random.default_rng(0), SKILLS[0]), NUM_IMAGES)
    return "00012/samples/00000.png is one too many"


def its_record_says_so(folder: Path) -> str:
    """A folder of `--ckpt --num-prompts 2` that lost its end: the largest number is not
    the expected one.
    """
    draw_folder(folder)
    record = {"suite": "shapes", "num_prompts": 12, "num_images": NUM_IMAGES, "sampling": {}}
    record["prompts_sha256"] = harness.prompts_hash(suites.load("shapes", 2).prompts)
    files.write_text(folder / layout.RECORD, json.dumps(record))
    shutil.rmtree(folder / "00011")
    return "(12 prompts, 2 images each); --allow-partial scores it all the same"


NOT_WHOLE = [three_of_one_skill, one_picture_each, a_skill_is_missing, prompts_of_other_origin]
NOT_WHOLE += [one_prompt_twice, a_prompt_too_many, its_record_says_so]


@pytest.mark.parametrize("make", NOT_WHOLE)
def test_a_set_is_whole_when_it_has_every_prompt_and_picture(tmp_path, capsys, make):
    """Three pictures of one skill once gave an `overall` without a word.

    Now a set that is not whole is refused, and marked wherever it is printed when it is
    scored all the same.
    """
    named = make(tmp_path / "set")
    numbers = () if make is its_record_says_so else ("--num-prompts", 2, "--num-images", NUM_IMAGES)
    command = ("--suite", "shapes", "--images", tmp_path / "set", *numbers, "--num-bound-images", 0)
    command = list(map(str, command))
    assert geneval.main(command) == 2
    error = capsys.readouterr().err
    assert "error: not a whole set of suite shapes" in error and named in error
    assert not (tmp_path / "set" / "summary.json").exists()
    assert geneval.main([*command, "--allow-partial"]) == 0
    assert "set (PARTIAL)" in capsys.readouterr().out
    assert json.loads((tmp_path / "set" / "summary.json").read_text())["partial"]
    assert "(PARTIAL)" in (tmp_path / "set" / "report.html").read_text()
    assert report_table.main([str(tmp_path / "set" / "summary.json")]) == 0
    assert "set (PARTIAL)" in capsys.readouterr().out
    other = shutil.copytree(tmp_path / "set", tmp_path / "other")
    assert geneval.main(["compare", str(tmp_path / "set"), f"b={other}"]) == 0
    assert "minus set (PARTIAL)" in (printed := capsys.readouterr().out) and printed.count("b (PARTIAL)") == 2


def test_without_numbers_the_whole_suite_is_expected(tmp_path, capsys):
    draw_folder(tmp_path / "few")
    assert geneval.main(["--images", str(tmp_path / "few"), "--suite", "shapes"]) == 2
    assert "not a whole set of suite shapes (120 prompts, 4 images each)" in capsys.readouterr().err


def test_a_smaller_suite_that_was_asked_for_is_whole_and_named(images, capsys):
    """The numbers come from the options, or from the folder's generation.json."""
    named = "NOT the whole suite (images: 12 of the suite's 120 prompts)"
    assert run("--images", images, "--num-bound-images", 0) == 0
    assert named in (printed := capsys.readouterr().out) and "PARTIAL" not in printed
    record = {"suite": "shapes", "num_prompts": 12, "num_images": NUM_IMAGES, "sampling": {}}
    record["prompts_sha256"] = harness.prompts_hash(suites.load("shapes", 2).prompts)
    files.write_text(images / layout.RECORD, json.dumps(record))
    command = ["--images", str(images), "--suite", "shapes", "--num-bound-images", "0"]
    assert geneval.main(command) == 0
    assert named in (printed := capsys.readouterr().out) and "PARTIAL" not in printed
    files.write_text(images / layout.RECORD, json.dumps(record | {"prompts_sha256": "of other prompts"}))
    assert geneval.main(command) == 2


@pytest.mark.parametrize(
    "kept, problem",
    [
        ([0, 1, 2], "00003 is missing"),
        (list(range(80)), "00080 is missing"),
        ([*range(552), 551], "00552/metadata.jsonl: not a prompt of suite geneval, or one that other"),
    ],
    ids=["three", "one_skill", "one_twice"],
)
def test_the_official_prompts_must_be_whole_too(tmp_path, capsys, kept, problem):
    prompts = suites.load("geneval").prompts
    for index, prompt in enumerate(kept):
        path = layout.image_path(tmp_path / "official", index, 0)
        path.parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(path)
        (path.parent.parent / "metadata.jsonl").write_text(json.dumps(prompts[prompt]))
    command = ["--images", str(tmp_path / "official"), "--no-self-test", "--num-images", "1"]
    assert geneval.main(command) == 2
    error = capsys.readouterr().err
    assert "not a whole set of suite geneval (553 prompts, 1 image each)" in error and problem in error


@pytest.mark.parametrize(
    "change, lacks",
    [
        ({"skills": ["colors"], "num_prompts": 2, "num_images": 4}, "no single_object, no two_object"),
        ({"num_prompts": 7}, "113 of 120 prompts missing"),
        (
            {"num_prompts": 120, "num_images": 470, "generation": {"num_prompts": 120, "num_images": 4}},
            "10 of 480 images missing",
        ),
        ({"partial": ["00004 is missing", "00005 is missing"]}, "00004 is missing, 00005 is missing."),
        ({"partial": ["a", "b", "c", "d", "e"]}, "a, b, c, and 2 more."),
        ({"suite": "geneval", "num_prompts": 500}, "53 of 553 prompts missing"),
    ],
)
def test_a_summary_of_an_earlier_version_is_marked_by_its_numbers(scored, tmp_path, capsys, change, lacks):
    """It may not name what is missing: a whole set was the largest number that
    existed.
    """
    summary = json.loads((scored["good"] / "summary.json").read_text())
    del summary["prompts_expected"], summary["images_expected"]
    if "skills" in change:
        change = change | {"skills": {skill: summary["skills"][skill] for skill in change["skills"]}}
    elif change.get("suite") == "geneval":
        skills = suites.load("geneval").skills
        change = change | {"skills": dict.fromkeys(skills, summary["skills"]["colors"])}
    (tmp_path / "summary.json").write_text(json.dumps(summary | change))
    assert report_table.main([f"old={tmp_path / 'summary.json'}"]) == 0
    printed = capsys.readouterr().out
    assert "old (PARTIAL)" in printed and f"PARTIAL: old: {lacks}" in printed


def test_results_that_were_cut_are_not_compared(scored, tmp_path, capsys):
    """The comparison would be of the prompts that are left in both."""
    cut = shutil.copytree(scored["good"], tmp_path / "cut")
    lines = (cut / "results.jsonl").read_text().splitlines(keepends=True)
    (cut / "results.jsonl").write_text("".join(lines[:5]))
    assert geneval.main(["compare", str(scored["good"]), str(cut)]) == 2
    assert "results.jsonl has 5 images, and summary.json 24" in capsys.readouterr().err


def test_a_missing_folder_is_an_error(tmp_path, capsys):
    assert run("--images", tmp_path / "none") == 2
    assert capsys.readouterr().err == f"error: --images: {tmp_path / 'none'} does not exist\n"


# ---- from a checkpoint ---------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_generation_resumes_and_refuses_other_settings(ckpt, tmp_path, capsys):
    """Missing images are made again exactly; a folder with other settings is not
    changed.
    """
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
    """The first rank scores, and waits for the images of the other ranks before
    that.
    """
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
    # Second picture of the first prompt: correct in the first folder, empty in the
    # second.
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


@pytest.mark.parametrize("name", ["gallery", "gallery.txt", "gallery.png.tmp"])
def test_a_gallery_of_unknown_kind_is_refused_and_nothing_written(scored, tmp_path, capsys, name):
    assert (
        gallery.main([str(scored["good"]), "--num-images", "1", "--out", str(tmp_path / "new" / name)]) == 2
    )
    assert "expected the name of a picture, such as gallery.png" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_report_shows_bars_and_pictures_and_runs_no_code(scored, tmp_path):
    """Names and reasons come from other people's files: on the page they are only text,
    whatever they contain.
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
        with (run_dir / "scores.jsonl").open("a") as file:
            file.write('{"step": 99, "sui')  # a process was killed while it wrote
    with RunFolderLock(run_dir / "scores"):
        assert run("watch", run_dir, "--once", *few) == 2
        assert "another process works in this folder" in capsys.readouterr().err
    assert run("watch", run_dir, "--once", *few) == 0, "nothing newer"
    shutil.rmtree(run_dir / "checkpoints" / "step_000010")
    assert run("watch", run_dir, "--once", *few) == 0, "an older one than was scored is passed over"
    found = run_log.read_log(run_dir / "scores.jsonl")
    assert [row["step"] for row in found] == [2, 10]
    assert all(
        row["num_images"] == 6 and not row["partial"] and len(row["skills"]) == 6 and 0 <= row["overall"] <= 1
        for row in found
    )
    assert sorted(path.name for path in (run_dir / "scores").iterdir()) == ["step_000002", "step_000010"]
    assert (run_dir / "scores" / "step_000002" / "report.html").is_file() and any(
        (run_dir / "tensorboard").iterdir()
    )
    capsys.readouterr()
    assert run("watch", tmp_path) == 2 and "not a run folder" in capsys.readouterr().err
