"""A new evaluator is one folder: options, generation, resuming and the summary come from
eval/harness.py.
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval as evaluators
from eval import harness, layout

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
    """The evaluator's main; its folder is added to the package, and removed afterwards."""
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
    """Existing pictures are kept, a missing picture is made again exactly, other settings are refused."""
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


def test_stopping_prints_how_to_resume(capsys):
    @harness.command
    def interrupted(arguments=None):
        raise KeyboardInterrupt

    assert interrupted([]) == 130
    assert "resume" in capsys.readouterr().err
