"""Studies: a grid's mistakes, one arm from training to its row, intervals, and the page from stored rows alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("deepspeed")

from eval.study import __main__ as study
from eval.study import job, report, worlds
from eval.study.grid import USUAL, Grid
from mmtensorar.generate import Generator
from mmtensorar.recipe import Recipe, RecipeError
from tests.test_train import bench  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = [("circles", "a red circle"), ("circles", "a blue circle"), ("squares", "a red square")]


class World:
    """The shards of the training test; a picture is right when its mean is above grey, whatever that shows."""

    def __init__(self, folder: Path):
        self.shards = folder / "shards"

    def sets(self, folder: Path) -> tuple[Path, Path]:
        return self.shards, self.shards

    def prepare(self, folder: Path, image_tokenizer: str) -> None:
        pass

    def prompts(self) -> list[tuple[str, str]]:
        return PROMPTS

    def correct(self, number: int, images) -> list[bool]:
        return [bool(np.asarray(image).mean() > 127) for image in images]


@pytest.fixture
def grid_file(bench, tmp_path, monkeypatch) -> Path:  # noqa: F811
    monkeypatch.setattr(worlds, "load", lambda name: World(bench))
    content = {
        "world": "shapes",
        "recipe": str(bench / "recipe.yaml"),
        "base": str(bench / "runs" / "none"),
        "control": "plain",
        "samplings": {"greedy": {"greedy_drafts": True}},
        "arms": {
            "base": {"about": "not trained"},
            "plain": {"about": "control", "settings": ["tensorar.window=1"]},
            "k3": {"about": "K=3", "settings": ["train.steps=2"], "samplings": ["greedy"]},
            "own": {"about": "calibrated", "settings": [], "calibrated_on": "k3"},
        },
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.parametrize(
    "key, value, problem",
    [
        ("world", "moon", "world is 'moon'; expected one of shapes"),
        ("control", "none", "arms has no 'none'"),
        ("samplings", {"greedy": {"heat": 1}}, "samplings.greedy: unknown heat"),
        ("arms", {"base": {"about": "", "samplings": ["x"]}, "plain": {"about": ""}}, "arms.base.samplings: unknown x"),
        ("arms", {"base": {"about": "", "calibrated_on": "plain"}, "plain": {"about": ""}}, "expected an arm that comes before"),
        ("arms", {"base": {"about": ""}, "plain": {"about": "", "settings": ["tensorar.windw=1"]}}, "did you mean tensorar.window"),
    ],
)
def test_mistakes_in_a_grid_are_named(grid_file, key, value, problem):
    content = yaml.safe_load(grid_file.read_text())
    grid_file.write_text(yaml.safe_dump(content | {key: value}, sort_keys=False))
    with pytest.raises(RecipeError, match=problem):
        Grid.load(grid_file)


@pytest.mark.parametrize("path", sorted((ROOT / "eval/study/grids").glob("*.yaml")), ids=lambda path: path.name)
def test_the_grids_that_are_here_load(path):
    grid = Grid.load(path)
    assert grid.control in grid.arms and (ROOT / grid.base).is_dir()


def test_an_arm_is_trained_and_measured(bench, grid_file, tmp_path):  # noqa: F811
    """Rows are whole, and what they say of a model without drafts is its validation loss."""
    torch.set_num_threads(1)
    grid = Grid.load(grid_file)
    folder, took = job.train(grid, "k3", 5, tmp_path, None)
    assert took["steps"] == 2 and took["train_seconds"] > 0
    assert Recipe.load(folder / "recipe.yaml").run.seed == 5
    rows = job.measure(grid, "k3", 5, folder, tmp_path)
    assert [row["sampling"] for row in rows] == [USUAL, "greedy"]
    for row in rows:
        assert {len(digits) for digits in row["verdicts"].values()} == {2} and len(row["revised"]) == 2
        shares = [sum(map(int, digits)) / 2 for digits in row["verdicts"].values()]
        assert row["score"] == pytest.approx(
            {"circles": (shares[0] + shares[1]) / 2, "squares": shares[2], "overall": (shares[0] + shares[1] + 2 * shares[2]) / 4}
        )
    probed = rows[0]["probe"]
    assert probed["draft_error"][0] == 0 and all(0 < error <= 1 for error in probed["draft_error"][1:])
    assert json.loads(json.dumps(rows)) == [json.loads(json.dumps(row)) for row in rows]
    # By hand: nats of the final prediction when no draft is in view.
    generator = Generator.load(folder)
    from mmtensorar import data
    from mmtensorar.windows import slide

    recipe = Recipe.load(grid.recipe, [f"data.validation={bench / 'shards'}", "train.validate_every=1"])
    (_, number, batch), *_ = data.validation_batches(recipe, generator.caption_encoder, rank=0, world_size=1)
    windows, valid = slide(batch.codes, 3)
    with torch.no_grad():
        hidden = generator.model.hidden(windows[:, :-1], valid[:-1] & (torch.arange(3) < 1), batch.condition, batch.uncond)
        logits = generator.model.logits(hidden, windows[..., :0])[:, :, 0]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.codes.flatten())
    assert number == 4 and probed["none nats"][0] == pytest.approx(expected.item(), rel=1e-3)


def row(arm: str, seed: int, verdicts: dict[str, str], sampling: str = USUAL, **probe) -> dict:
    score = {"overall": np.mean([int(digit) for digits in verdicts.values() for digit in digits])}
    probe = {"none nats": [1.0], **probe}
    facts = {"steps": 3, "train_seconds": 1.0, "step_seconds": 0.3, "seconds_per_image": 0.1, "passes_per_image": 16, "threads": 1, "torch": "2", "device": "cpu"}
    return {"arm": arm, "seed": seed, "sampling": sampling, "verdicts": verdicts, "score": score, "frechet": 0.5, "probe": probe, "revised": [], **facts}


def test_the_page_is_made_from_stored_rows_alone(grid_file, tmp_path):
    pytest.importorskip("matplotlib")
    rows = []
    for seed in range(3):
        rows.append(row("plain", seed, {"0": "11", "1": "10", "2": "01"}))
        drafted = {"own nats": [0.9, 2.0, 3.0], "true nats": [0.1, 1.0, 1.0], "draft_error": [0, 0.5, 0.7]}
        rows.append(row("k3", seed, {"0": "11", "1": "11", "2": "00"}, **drafted))
        rows.append(row("k3", seed, {"0": "11", "1": "11", "2": "01"}, "greedy", **drafted))
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert study.main(["report", str(grid_file), "--results", str(results)]) == 0
    page = (tmp_path / "README.md").read_text()
    assert "| `k3`: K=3 | 3 | 50.0 [" in page and "Not run yet: `base`, `own`." in page
    line = next(line for line in page.splitlines() if line.startswith("| `k3` | +"))
    # Of circles one prompt gains half of its pictures in every seed, of squares the only prompt loses half.
    assert line == "| `k3` | +25.0 [+0.0 +50.0] | -50.0 [-50.0 -50.0] |"
    assert "| `k3` | greedy |" in page and (tmp_path / "scores.png").is_file()


def test_intervals_know_seeds_and_prompts():
    """Seeds that differ widen the interval as prompts that differ do; equal ones leave it a point."""
    groups = ["a"] * 4 + ["b"] * 4
    same = report.interval(np.full((3, 8), 0.5), groups)["overall"]
    assert same == (0.5, 0.5, 0.5)
    seeds = report.interval(np.array([[0.0] * 8, [0.5] * 8, [1.0] * 8]), groups)["overall"]
    prompts = report.interval(np.tile([0.0, 1.0] * 4, (3, 1)), groups)["overall"]
    for found in (seeds, prompts):
        assert found.value == 0.5 and found.low < 0.3 and found.high > 0.7


def test_a_run_takes_up_what_is_missing(grid_file, tmp_path, monkeypatch, capsys):
    """Jobs of the control come first; what is calibrated waits for what it is calibrated on, and gets its errors as rates."""
    monkeypatch.setattr(study, "places", lambda workers: [{}])
    results, asked = tmp_path / "results.jsonl", []
    results.write_text(json.dumps(row("base", 0, {"0": "1"})) + "\n")

    class Job:
        pid, returncode = 0, 0

        def __init__(self, command, **options):
            name, seed, rates, target = command[4], int(command[5]), command[7], Path(command[8])
            asked.append((name, seed, json.loads(rates)))
            drafted = {} if name == "plain" else {"draft_error": [0, 0.5, 0.75]}
            target.write_text(json.dumps(row(name, seed, {"0": "1"}, **drafted)) + "\n")

        def poll(self):
            return 0

    monkeypatch.setattr(study.subprocess, "Popen", Job)
    monkeypatch.setattr(study.time, "sleep", lambda seconds: None)
    assert study.main(["run", str(grid_file), "--seeds", "1", "--out", str(tmp_path / "out"), "--results", str(results)]) == 0
    assert asked == [("plain", 0, None), ("k3", 0, None), ("own", 0, [0.0, 0.5, 0.75])]
    assert [each["arm"] for each in study.read(results)] == ["base", "plain", "k3", "own"]
    assert study.main(["run", str(grid_file), "--arms", "nobody"]) == 2 and "unknown nobody" in capsys.readouterr().err
