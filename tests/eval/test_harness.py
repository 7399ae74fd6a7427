"""A new evaluator is one folder: options, generation, resuming and the summary come
from eval/harness.py.
"""

import importlib
import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval as evaluators
from eval import harness, layout
from mmtensorar.processes import RunFolderLock
from mmtensorar.seeds import image_seed
from tests.helpers import fork_server

ROOT = Path(__file__).resolve().parents[2]
CKPT = ROOT / "recipes/tiny/weights/base"

BRIGHTNESS = '''
"""Mean brightness of the pictures, 0 to 1."""

import sys

import numpy as np

from eval import harness, layout

PROMPTS = [{"prompt": "a red circle"}, {"prompt": "a blue square"}]


@harness.command
def main(arguments=None):
    parser = harness.make_parser("eval.brightness", __doc__, example="--ckpt runs/NAME/model")
    harness.add_options(parser, images="a folder of pictures in GenEval's layout")
    parser.add_argument("--scale", type=int, default=1)
    options = harness.parse(parser, arguments, scale=1)
    pictures = harness.pictures(
        options, "brightness", lambda generator: (PROMPTS, options.num_images or 1), ignored=["num_images"]
    )
    if pictures is None:
        return 0
    paths, problems = layout.survey(
        pictures.folder, num_prompts=pictures.num_prompts, num_images=pictures.num_images
    )
    if problems and not options.allow_partial:
        raise ValueError(layout.listed(pictures.folder, problems))
    means = [np.asarray(layout.open_image(path)).mean() / 255 for own in paths for path in own]
    score = options.scale * float(np.mean(means))
    summary = {"score": score, "partial": problems or None, **harness.origin(pictures.folder)}
    harness.write_summary(pictures.out, summary)
    return 0
'''


@pytest.fixture
def brightness(tmp_path, monkeypatch):
    """The evaluator's main; its folder is added to the package, and removed
    afterwards.
    """
    folder = tmp_path / "evaluators" / "brightness"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "__main__.py").write_text(BRIGHTNESS)
    monkeypatch.setattr(evaluators, "__path__", [*evaluators.__path__, str(folder.parent)])
    yield importlib.import_module("eval.brightness.__main__").main
    for name in [name for name in sys.modules if name.startswith("eval.brightness")]:
        del sys.modules[name]


@pytest.fixture
def images(tmp_path) -> Path:
    """One white and one black picture for both of two prompts."""
    for prompt in range(2):
        for number, value in enumerate((255, 0)):
            path = layout.image_path(tmp_path / "images", prompt, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(path)
    return tmp_path / "images"


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_a_new_evaluator_scores_pictures(brightness, images, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--images", str(images), "--out", str(out), "--cfg-scale", "3", "--num-images", "2"]
    assert brightness(arguments) == 0
    summary = summary_of(out)
    assert summary["score"] == 0.5 and summary["images"] == str(images) and summary["generation"] is None
    assert {"python", "torch"} <= summary["versions"].keys()
    noted = capsys.readouterr().err
    assert "--cfg-scale has no effect" in noted and "--num-images has no effect" in noted


def test_a_new_evaluator_reports_mistakes(brightness, images, capsys):
    layout.image_path(images, 1, 1).unlink()
    for arguments, key in (
        (["--images", str(images)], "00001/samples/00001.png is missing"),
        (["--images", str(images), "--scale", "0"], "--scale is 0"),
        (["--images", str(images), "--num-images", "0"], "--num-images is 0"),
        (["--ckpt", str(images)], "error: "),
    ):
        assert brightness(arguments) == 2
        assert key in capsys.readouterr().err
    with pytest.raises(SystemExit):
        brightness(["--help"])
    assert "python -m eval.brightness --ckpt runs/NAME/model" in capsys.readouterr().out


def test_a_new_evaluator_allows_partial_pictures(brightness, images, tmp_path):
    layout.image_path(images, 1, 1).unlink()
    arguments = ["--images", str(images), "--allow-partial", "--out", str(tmp_path / "out")]
    assert brightness(arguments) == 0
    assert summary_of(tmp_path / "out")["partial"] == ["00001/samples/00001.png is missing"]


def test_a_new_evaluator_generates_and_resumes(brightness, tmp_path, capsys):
    """Existing pictures are kept, a missing picture is made again exactly, other
    settings are refused.
    """
    out = tmp_path / "out"
    arguments = ["--ckpt", str(CKPT), "--out", str(out), "--device", "cpu", "--seed", "7"]
    assert brightness(arguments) == 0
    assert "2 images made" in capsys.readouterr().out
    summary = summary_of(out)
    assert summary["seed"] == 7 and summary["generation"]["suite"] == "brightness"
    lost = layout.image_path(out, 1, 0)
    content = lost.read_bytes()
    lost.unlink()
    assert brightness(arguments) == 0
    assert "1 image made" in capsys.readouterr().out and lost.read_bytes() == content
    assert brightness([*arguments[:-1], "8"]) == 2
    assert "seed 7 there, 8 now" in capsys.readouterr().err


# ---- two at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["--ckpt", "--images"])
@pytest.mark.parametrize("out", ["new", "there", "runs/of/mine"])
def test_a_folder_that_another_evaluator_works_in_is_refused(
    brightness, images, tmp_path, capsys, source, out
):
    """Two evaluators once wrote pictures and results into one folder, each over the
    other's.
    """
    out = tmp_path / out
    if out.name == "there":
        out.mkdir()
        (out / "summary.json").write_text("of an earlier run")
    arguments = [source, str(CKPT if source == "--ckpt" else images), "--out", str(out), "--device", "cpu"]
    with RunFolderLock(out, leaves_nothing=True):
        assert brightness(arguments) == 2
        assert re.search(
            r"another process works in this folder \(.+choose another --out\n", capsys.readouterr().err
        )
        assert {path.name for path in out.iterdir()} <= {"lock", "summary.json"}
    assert brightness(arguments) == 0
    assert summary_of(out)["score"] >= 0 and not (out / "lock").exists()


@pytest.mark.parametrize("name", ["geneval", "dpg_bench", "fid"])
def test_every_evaluator_locks_its_folder(images, tmp_path, capsys, monkeypatch, name):
    """Before a detector or a network is loaded, and in the default folder of results
    too.
    """
    from eval.dpg_bench import judges

    if name == "fid":
        pytest.importorskip("scipy")
    monkeypatch.setattr(judges, "load", lambda name, device=None: None)
    monkeypatch.chdir(tmp_path)
    header = "item_id,proposition_id,dependency,tuple,question_natural_language\n"
    (tmp_path / "dpg_bench.csv").write_text(header + "a,1,0,entity - whole (it),Is it?\n")
    arguments, out = {
        "geneval": (["--no-self-test"], images),
        "dpg_bench": (["--bench", str(tmp_path)], tmp_path / "runs" / "eval" / "images_dpg_bench"),
        "fid": (["--ref", str(images)], tmp_path / "runs" / "eval" / "images_fid"),
    }[name]
    main = importlib.import_module(f"eval.{name}.__main__").main
    with RunFolderLock(out):
        assert main(["--images", str(images), *arguments]) == 2
        assert f"{out.name}: another process works in this folder" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["new", "runs/of/mine", "images"])
def test_a_refused_evaluation_leaves_no_folder(brightness, images, tmp_path, out):
    layout.image_path(images, 1, 1).unlink()
    before = sorted(tmp_path.rglob("*"))
    assert brightness(["--images", str(images), "--out", str(tmp_path / out)]) == 2
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.launch
def test_two_evaluators_at_once(ckpt, tmp_path):
    """Of two processes with different seeds, one fills the folder, and the other is
    refused.
    """
    out = tmp_path / "out"
    command = [
        "-m",
        "eval.geneval",
        "--ckpt",
        ckpt,
        "--suite",
        "shapes",
        "--num-prompts",
        1,
        "--device",
        "cpu",
    ]
    command += ["--num-bound-images", 0, "--out", out, "--num-images", 2, "--batch-size", 2, "--seed"]
    running = {seed: fork_server.shared().start(*command, seed) for seed in (0, 1)}
    done = {seed: run.communicate(timeout_s=240) for seed, run in running.items()}
    assert sorted(each.returncode for each in done.values()) == [0, 2], [
        each.stderr for each in done.values()
    ]
    winner = next(seed for seed in done if done[seed].returncode == 0)
    assert re.search("another process works|images of another run", done[1 - winner].stderr)
    summary = summary_of(out)
    assert summary["seed"] == winner and summary["num_images"] == 12
    seeds = [
        Image.open(layout.image_path(out, prompt, image)).text["seed"]
        for prompt in range(6)
        for image in (0, 1)
    ]
    assert seeds == [str(image_seed(winner, prompt, image)) for prompt in range(6) for image in (0, 1)]


@pytest.mark.parametrize(
    "ours, theirs, refused",
    [
        ({"seed": 0}, {"seed": 0}, False),
        ({"seed": 0}, {"seed": 1}, True),
        ({"suite": "shapes"}, {"suite": "geneval"}, True),
        ({"window": 2, "batch_size": 1}, {"window": 2, "batch_size": 8}, False),
    ],
)
def test_of_two_settings_one_is_recorded(tmp_path, monkeypatch, ours, theirs, refused):
    """Ranks of two runs that start at once: both see no record, and the first to write
    it has the folder.
    """
    publish = harness.publish

    def too_late(temporary, path):
        path.write_text(json.dumps(theirs))
        publish(temporary, path)

    monkeypatch.setattr(harness, "publish", too_late)
    with pytest.raises(ValueError, match="another run") if refused else nullcontext():
        harness.claim(tmp_path, ours)
    assert layout.read_record(tmp_path) == theirs


def test_a_picture_that_another_rank_made_is_kept(brightness, tmp_path, monkeypatch):
    """It may appear while this rank draws it."""
    publish, others = harness.publish, []

    def too_late(temporary, path):
        if path.suffix == ".png":
            path.write_bytes(temporary.read_bytes() + b"other")
            others.append(path)
        publish(temporary, path)

    monkeypatch.setattr(harness, "publish", too_late)
    assert brightness(["--ckpt", str(CKPT), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert len(others) == 2 and all(path.read_bytes().endswith(b"other") for path in others)
    assert not list((tmp_path / "out").rglob(".*"))


def test_stopping_prints_how_to_resume(capsys):
    @harness.command
    def interrupted(arguments=None):
        raise KeyboardInterrupt

    assert interrupted([]) == 130
    assert "resume" in capsys.readouterr().err
