"""Studies: mistakes in a grid, one arm from training to its row, intervals, pages made
from stored rows.
"""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("deepspeed")

from data_tools.sources import shapes
from eval import intervals
from mmtensorar.pipeline import Generator
from mmtensorar.recipe import Recipe, RecipeError
from study import (
    __main__,
    across,
    commands,
    features,
    job,
    report,
    runner,
    scores,
    start,
    timing,
    worlds,
)
from study.features import quarters
from study.grid import USUAL, Grid
from study.results import missing, read
from study.worlds import _classes, photographs
from tests.helpers.models import window_logits
from tests.helpers.runs import finish_ranks, fork_ranks

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [("circles", "a red circle"), ("circles", "a blue circle"), ("squares", "a red square")]


class World:
    """The shards of the training test; a picture is right when its mean is above
    grey.
    """

    def __init__(self, folder: Path):
        self.shards = folder / "shards"

    def sets(self, folder: Path) -> tuple[Path, Path]:
        return self.shards, self.shards

    FEATURES = "made-up features"

    def prepare(self, folder: Path) -> None:
        pass

    def prompts(self) -> list[tuple[str, str]]:
        return PROMPTS

    def features(self, folder: Path, image_tokenizer, codes) -> np.ndarray:
        return quarters(image_tokenizer, codes)

    def judge(self, folder: Path, image_tokenizer) -> str:
        return "a look at the ground"

    def correct(self, folder: Path, number: int, images) -> list[bool]:
        return [bool(np.asarray(image).mean() > 127) for image in images]


@pytest.fixture
def forked_commands(monkeypatch) -> None:
    """Commands that the study starts as `python COMMAND` are forked instead."""

    def run(words, *, stdout, **_) -> subprocess.CompletedProcess:
        done = finish_ranks(fork_ranks(*words[1:]), timeout_s=240)
        stdout.write(done.stdout + done.stderr)
        stdout.flush()
        return done

    monkeypatch.setattr(commands, "subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))


@pytest.fixture
def grid_file(bench, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(worlds, "load", lambda name: World(bench))
    (tmp_path / "base").mkdir()
    for part, place in {"backbone": "janus", "image_tokenizer": "janus/vq"}.items():
        (tmp_path / "base" / part).symlink_to(bench / place)
    content = {
        "world": "shapes",
        "recipe": str(bench / "recipe.yaml"),
        "base": str(tmp_path / "base"),
        "control": "plain",
        "samplings": {"greedy": {"greedy_drafts": True}, "sharp": {"top_p": 0.5}},
        "arms": {
            "base": {"about": "not trained"},
            "plain": {"about": "control", "settings": ["tensorar.window=1"]},
            "k3": {
                "about": "K=3",
                "settings": ["train.steps=2"],
                "samplings": ["greedy"],
                "samplings_once": ["sharp"],
            },
            "own": {"about": "once", "num_seeds": 1},
            "gone": {"about": "what was tried", "removed": "it was worse"},
        },
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.parametrize(
    "key, value, problem",
    [
        ("world", "moon", "world is 'moon'; expected one of digits, photographs, shapes"),
        ("control", "none", "arms has no 'none'"),
        ("samplings", {"greedy": {"heat": 1}}, "samplings.greedy.heat: unknown key"),
        (
            "arms",
            {"base": {"about": "", "samplings": ["x"]}, "plain": {"about": ""}},
            "arms.base.samplings: unknown x",
        ),
        (
            "arms",
            {"base": {"about": "", "samplings_once": ["y"]}, "plain": {"about": ""}},
            "arms.base.samplings_once: unknown y",
        ),
        ("equal_time", "more", "arms has no 'more'"),
        ("samplings", {"greedy": {"temperature": -1}}, "samplings.greedy.temperature: expected .* got -1"),
        (
            "arms",
            {"base": {"about": "", "settings": ["train.steps=1"]}, "plain": {"about": ""}},
            "arms.base: .*not trained",
        ),
        (
            "arms",
            {"base": {"abuot": ""}, "plain": {"about": ""}},
            r"arms.base.abuot +unknown key; did you mean arms.base.about\?",
        ),
        (
            "arms",
            {"base": {"about": ""}, "plain": {"about": "", "num_seeds": "one"}},
            "arms.plain.num_seeds +expected an integer",
        ),
        ("arms", {"base": {"about": ""}, "plain": {}}, "arms.plain.about +missing"),
        ("samplings", {"greedy": {"lookahead": 0}, "sharp": {}}, "samplings.greedy.lookahead: expected"),
        ("base", None, "expected one of base and from_nothing"),
        (
            "from_nothing",
            {"image_tokenizer": {"image_size": 16}, "backbone": {}},
            "from_nothing.image_tokenizer.num_embeddings",
        ),
        (
            "arms",
            {"base": {"about": ""}, "plain": {"about": "", "settings": ["tensorar.windw=1"]}},
            "did you mean tensorar.window",
        ),
    ],
)
def test_mistakes_in_a_grid_are_named(grid_file, key, value, problem):
    content = yaml.safe_load(grid_file.read_text())
    grid_file.write_text(yaml.safe_dump(content | {key: value}, sort_keys=False))
    with pytest.raises(RecipeError, match=problem):
        Grid.load(grid_file)


@pytest.mark.parametrize("path", sorted((ROOT / "study/grids").glob("*.yaml")), ids=lambda path: path.name)
def test_every_grid_of_the_repository_loads(path):
    grid = Grid.load(path)
    assert grid.control in grid.arms and (grid.base is None or (ROOT / grid.base).is_dir())


@pytest.mark.launch
def test_an_arm_is_trained_and_measured(bench, grid_file, forked_commands, tmp_path):
    """Rows are complete, and the probe of a model without drafts equals its validation
    loss.
    """
    torch.set_num_threads(1)
    grid = Grid.load(grid_file)
    folder, took = job.train(grid, "k3", 5, tmp_path)
    assert took["steps"] == 2 and took["train_seconds"] > 0
    assert Recipe.load(folder / "recipe.yaml").run.seed == 5
    rows = job.measure(grid, "k3", 5, folder, tmp_path)
    assert [(row["sampling"], row["made_of"]["sampler"]["greedy_drafts"]) for row in rows] == [
        (USUAL, False),
        ("greedy", True),
    ]
    for row in rows:
        assert {len(digits) for digits in row["verdicts"].values()} == {2} and len(row["revised"]) == 2
        shares = [sum(map(int, digits)) / 2 for digits in row["verdicts"].values()]
        assert row["score"] == pytest.approx(
            {
                "circles": (shares[0] + shares[1]) / 2,
                "squares": shares[2],
                "overall": (shares[0] + shares[1] + 2 * shares[2]) / 4,
            }
        )
    probed = rows[0]["probe"]
    assert probed["draft_error"][0] == 0 and all(0 < error <= 1 for error in probed["draft_error"][1:])
    assert json.loads(json.dumps(rows)) == [json.loads(json.dumps(row)) for row in rows]
    # Computed here: the nats of the final prediction when no draft is visible.
    generator = Generator.load(folder)
    from mmtensorar.data import loader
    from mmtensorar.model.windows import slide

    recipe = Recipe.load(grid.recipe, [f"data.validation={bench / 'shards'}", "train.validate_every=1"])
    (_, number, batch), *_ = loader.validation_batches(
        recipe, generator.caption_encoder, rank=0, world_size=1
    )
    windows, valid = slide(batch.codes, 3)
    with torch.no_grad():
        hidden = generator.model.hidden(
            windows[:, :-1], valid[:-1] & (torch.arange(3) < 1), batch.condition, batch.uncond
        )
        logits = window_logits(generator.model, hidden, windows[..., :0])[:, :, 0]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.codes.flatten())
    assert number == 4 and probed["none nats"][0] == pytest.approx(expected.item(), rel=1e-3)


def test_an_arm_is_checked_against_its_stored_score(bench, grid_file, tmp_path, monkeypatch, capsys):
    """The arm is trained again; here the job is a stand-in with prepared pictures."""
    results = tmp_path / "results.jsonl"
    results.write_text(
        "".join(json.dumps(row(arm, 0, {"0": "10", "1": "11", "2": "10"})) + "\n" for arm in ("plain", "k3"))
    )
    for digits, code, said in (
        ("10", 0, "k3, seed 0: stored 62.5 [38.0 87.0], now 62.5: within"),
        ("00", 1, "now 12.5: outside"),
    ):

        def job_of(*command, log, digits=digits):
            command[-1].write_text(
                json.dumps(row("k3", 0, {"0": digits, "1": "11" if digits == "10" else "10", "2": digits}))
                + "\n"
            )

        monkeypatch.setattr(commands, "run", job_of)
        arguments = [
            "check",
            str(grid_file),
            "--arm",
            "k3",
            "--results",
            str(results),
            "--out",
            str(tmp_path / f"check{code}"),
        ]
        assert __main__.main(arguments) == code and said in capsys.readouterr().out
    assert __main__.main([*arguments[:3], "own", *arguments[4:6], "--out", str(tmp_path / "check2")]) == 2
    assert "no row of own, seed 0" in capsys.readouterr().err


@pytest.mark.launch
def test_steps_are_timed_in_turns(bench, grid_file, tmp_path):
    before = dict(os.environ)
    seconds = timing.steps_in_turns(Grid.load(grid_file), ["plain", "k3"], tmp_path, 3)
    assert {name: len(own) for name, own in seconds.items()} == {"plain": 3, "k3": 3} and min(
        map(min, seconds.values())
    ) > 0
    assert os.environ == before
    # A slow second round is slow for both arms.
    found = timing.relative_to_control(
        Grid.load(grid_file), {"plain": [1.0, 9.0, 1.0], "k3": [1.5, 13.5, 2.0]}
    )
    assert found == {
        "plain": {"seconds": 1.0, "over_control": 1.0},
        "k3": {"seconds": 2.0, "over_control": 1.5},
    }


def grounds() -> tuple[list, list]:
    """Pictures of one colour with a little noise; the class is the colour."""
    rng = np.random.default_rng(0)

    def drawn(number: int) -> list:
        classes = rng.integers(2, size=number)
        noise = rng.integers(60, size=(number, 16, 16, 3), dtype=np.uint8)
        return [
            (int(c), Image.fromarray(n + np.uint8(180) * np.uint8(c)))
            for c, n in zip(classes, noise, strict=True)
        ]

    return drawn(40), drawn(20)


@pytest.mark.launch
def test_a_base_is_made_from_nothing(grid_file, forked_commands, tmp_path, monkeypatch):
    """From the pictures of a world of classes to codes, an image tokenizer and a
    trained LlamaGen.

    Nothing is made twice.
    """
    world = _classes.Classes("grounds", 16, ["dark", "bright"], grounds, num_prompts=3)
    monkeypatch.setattr(worlds, "load", lambda name: world)
    monkeypatch.setattr(features, "STEPS", 60)
    content = yaml.safe_load(grid_file.read_text())
    content["recipe"] = str(ROOT / "study/recipes/classes.yaml")
    del content["base"]
    content["from_nothing"] = {
        "image_tokenizer": {
            "image_size": 16,
            "num_embeddings": 8,
            "channel_multiplier": [1, 1, 1],
            "latent_channels": 32,
            "steps": 2,
            "warmup_steps": 1,
            "batch_size": 4,
        },
        "backbone": dict(
            condition="class",
            dim=16,
            num_layers=1,
            num_heads=2,
            num_kv_heads=2,
            ffn_dim=16,
            vocab_size=8,
            num_tokens=16,
            num_classes=2,
        ),
        "settings": ["train.steps=1", "data.batch_size=8", "optim.warmup_steps=0"],
    }
    content["arms"] = {
        "base": {"about": "not trained"},
        "plain": {"about": "control", "settings": ["tensorar.window=1"]},
    }
    grid_file.write_text(yaml.safe_dump(content, sort_keys=False))
    grid, out = Grid.load(grid_file), tmp_path / "out"
    (out / "data").mkdir(parents=True)
    start.prepare(grid, out)
    folder = start.folder(grid, out)
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    start.prepare(grid, out)
    again = {
        path: path.stat().st_mtime_ns
        for path in out.rglob("*")
        if path.is_file() and path.name != "from_nothing.json"
    }
    assert again == {path: when for path, when in made.items() if path.name != "from_nothing.json"}
    content["from_nothing"]["settings"].append("optim.lr=1e-3")
    other = grid_file.with_name("other.yaml")
    other.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ValueError, match="made with another from_nothing"):
        start.prepare(Grid.load(other), out)
    generator = Generator.load(folder)
    assert generator.image_tokenizer.grid == (4, 4) and not (out / "start").exists()
    assert world.prompts() == [("dark", "0")] * 3 + [("bright", "1")] * 3
    images = [image for _, image in grounds()[1]]
    expected = [number == 1 for number, _ in grounds()[1]]
    assert world.correct(out / "data", 4, images) == expected and world.correct(out / "data", 0, images) == [
        not each for each in expected
    ]
    assert world.classifier(out / "data")[1] == 1
    codes = torch.randint(8, (3, 16, 1))
    assert world.features(out / "data", generator.image_tokenizer, codes).shape == (3, features.WIDTH)
    rows = job.measure(grid, "base", 0, folder, out)
    assert set(rows[0]["score"]) == {"overall", "dark", "bright"} and rows[0]["probe"]["none nats"][0] > 0


def test_pictures_of_the_shapes_world_are_judged_by_their_prompt(tmp_path):
    world = worlds.load("shapes")
    prompts = {prompt: number for number, (_, prompt) in enumerate(world.prompts())}
    drawn = [item for item in shapes.items(3000, seed=5, size=64) if item.captions[0] in prompts][:5]
    assert len(drawn) == 5
    for item in drawn:
        image = item.picture()
        number = prompts[item.captions[0]]
        assert world.correct(tmp_path, number, [image, Image.new("RGB", (64, 64), "grey")]) == [
            True,
            False,
        ], item.captions


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "photographs"])
def test_every_world_has_pictures_of_every_class(name, monkeypatch):
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    monkeypatch.setattr(photographs, "NUM_TRAIN", 200)
    monkeypatch.setattr(photographs, "NUM_VALIDATION", 200)
    world = worlds.load(name)
    train, validation = world.pictures()
    for part in (train, validation):
        assert {number for number, _ in part} == set(range(len(world.names)))
        assert all(image.size == (world.size, world.size) and image.mode == "RGB" for _, image in part)
    again = world.pictures()[1]
    assert all(
        a[0] == b[0] and a[1].tobytes() == b[1].tobytes() for a, b in zip(validation, again, strict=True)
    )


def row(arm: str, seed: int, verdicts: dict[str, str], sampling: str = USUAL, **probe) -> dict:
    score = {"overall": np.mean([int(digit) for digits in verdicts.values() for digit in digits])}
    probe = {"none nats": [1.0], **probe}
    settings = {"plain": ["tensorar.window=1"], "k3": ["train.steps=2"]}.get(arm, [])
    facts = {
        "settings": settings,
        "steps": 3,
        "train_seconds": 1.0,
        "step_seconds": 0.3,
        "seconds_per_image": 0.1,
        "passes_per_image": 16,
        "threads": 1,
        "torch": "2",
        "device": "cpu",
    }
    return {
        "arm": arm,
        "seed": seed,
        "sampling": sampling,
        "verdicts": verdicts,
        "score": score,
        "frechet": 0.5,
        "probe": probe,
        "revised": [],
        **facts,
    }


@pytest.mark.slow
def test_the_page_is_made_from_stored_rows_alone(grid_file, tmp_path):
    pytest.importorskip("matplotlib")
    rows = []
    for seed in range(3):
        rows.append(row("plain", seed, {"0": "11", "1": "10", "2": "01"}))
        drafted = {"own nats": [0.9, 2.0, 3.0], "true nats": [0.1, 1.0, 1.0], "draft_error": [0, 0.5, 0.7]}
        rows.append(row("k3", seed, {"0": "11", "1": "11", "2": "00"}, **drafted))
        rows.append(row("k3", seed, {"0": "11", "1": "11", "2": "01"}, "greedy", **drafted))
    rows += [row("gone", 0, {"0": "10", "1": "10", "2": "10"}, sampling) for sampling in (USUAL, "greedy")]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(each) + "\n" for each in rows))
    (tmp_path / report.STEP_TIMES).write_text(
        '{"plain": {"seconds": 0.5, "over_control": 1.0}, "k3": {"seconds": 0.75, "over_control": 1.5}}'
    )
    assert __main__.main(["report", str(grid_file), "--results", str(results)]) == 0
    page = (tmp_path / "README.md").read_text()
    assert (
        "| `k3`: K=3 | 3 | 50.0 [" in page
        and "minus `plain`, points | minus" not in page
        and "Not run yet: `base`, `own`." in page
    )
    assert "| 3 | 1.50 | 1.50 |" in page
    line = next(line for line in page.splitlines() if line.startswith("| `k3` | +"))
    # With circles, one prompt gains half of its pictures in every seed; with squares,
    # the only prompt loses half.
    assert line == "| `k3` | +25.0 [-24.0 +74.0] | -50.0 [-50.0 -50.0] |"
    # Greedy drafts gain half of the pictures of one prompt out of three; it is the only
    # prompt of its group.
    assert (
        "| `k3` | greedy | 3 | 75.0 [75.0 75.0] | +25.0 [+25.0 +25.0] | 0.500 ±0.000 |" in page
        and (tmp_path / "scores.png").is_file()
    )
    assert (
        "| `gone`: what was tried (removed: it was worse) | 1 | 50.0 [" in page
        and "| `gone` | greedy | 1 |" in page
    )
    # Also compared with an arm that trained longer.
    content = yaml.safe_load(grid_file.read_text())
    content["arms"]["long"] = {"about": "control, longer", "settings": ["tensorar.window=1", "train.steps=6"]}
    grid_file.write_text(yaml.safe_dump(content | {"equal_time": "long"}, sort_keys=False))
    rows += [row("long", seed, {"0": "11", "1": "11", "2": "11"}) for seed in range(3)]
    results.write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert __main__.main(["report", str(grid_file), "--results", str(results)]) == 0
    page = (tmp_path / "README.md").read_text()
    cells = [
        cell.strip()
        for cell in next(line for line in page.splitlines() if line.startswith("| `k3`: K=3")).split("|")
    ]
    assert "minus `long`, points" in page and [cell.split()[0] for cell in cells[4:6]] == ["-12.5", "-50.0"]


def test_worlds_are_compared_in_one_table(grid_file, tmp_path, capsys):
    """Gains and gaps of the arms that both worlds have, from the stored rows alone."""
    pytest.importorskip("matplotlib")
    other = grid_file.with_name("other.yaml")
    other.write_text(grid_file.read_text())
    folder = tmp_path / "pages"
    for grid, right in ((grid_file, "11"), (other, "00")):
        rows = [row("plain", 0, {"0": "10", "1": "10", "2": "10"})]
        for arm, own in (("base", None), ("k3", 1.0), ("own", 1.5)):
            bits = [(own or 0) * np.log(2), 2.0, 3.0]
            drafted = (
                {"none nats": [1.0]}
                if own is None
                else {"none nats": bits, "own nats": bits, "draft_error": [0, 0.5, 0.7]}
            )
            rows.append(row(arm, 0, {"0": "10", "1": "10", "2": right if arm == "own" else "10"}, **drafted))
        (folder / grid.stem).mkdir(parents=True)
        (folder / grid.stem / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert __main__.main(["across", str(grid_file), str(other), "--folder", str(folder)]) == 0
    page = (folder / "README.md").read_text()
    assert (
        "| `own`: once | +25.0 [+25.0 +25.0] | 1.00 | -25.0 [-25.0 -25.0] | 1.00 |" in page
        and (folder / "costs.png").is_file()
    )
    found = across.points(
        [across.load(path, read(folder / path.stem / "results.jsonl")) for path in (grid_file, other)]
    )
    assert [(point.arm, point.gain) for point in found] == [("k3", 0), ("own", 25), ("k3", 0), ("own", -25)]
    # Bits of the final token with self-drafts, 1 and 1.5, minus the control's one nat.
    assert [point.cost for point in found[:2]] == pytest.approx([1 - 1 / np.log(2), 1.5 - 1 / np.log(2)])
    assert (
        __main__.main(["across", str(grid_file), "--folder", str(folder)]) == 2
        and "expected two or more" in capsys.readouterr().err
    )
    (folder / "other" / "results.jsonl").write_text(
        json.dumps(row("base", 0, {"0": "1", "1": "1", "2": "1"})) + "\n"
    )
    assert __main__.main(["across", str(grid_file), str(other), "--folder", str(folder)]) == 2
    assert "other.yaml: no result of the control, plain" in capsys.readouterr().err


def test_a_frechet_distance_is_divided_by_the_controls_of_the_same_seed(grid_file):
    """The spread of the logarithms over seeds is pooled over the arms, because one arm
    gives too few values.
    """
    distances = {"plain": [1.0, 2.0, 4.0], "base": [2.0, 4.0, 8.0], "k3": [0.5, 2.0, 8.0], "own": [3.0]}
    rows = [
        row(arm, seed, {"0": "1", "1": "1", "2": "1"}) | {"frechet": value}
        for arm, own in distances.items()
        for seed, value in enumerate(own)
    ]
    known = scores.Scores(Grid.load(grid_file), scores.collect(rows), ["a", "a", "b"])
    # Four degrees of freedom are too few.
    assert known.ratio("base") == "2.00" and known.ratio("own") == "3.00"
    rows += [
        row("gone", seed, {"0": "1", "1": "1", "2": "1"}) | {"frechet": value}
        for seed, value in enumerate([1.0, 2.0, 4.0])
    ]
    known = scores.Scores(Grid.load(grid_file), scores.collect(rows), ["a", "a", "b"])
    # Logarithms base 2: 1, 1, 1; -1, 0, 1; 0, 0, 0: a variance of 2 over six degrees of
    # freedom.
    half = 2.4469 * (2 / 6) ** 0.5
    for arm, exponent, number in (("base", 1, 3), ("k3", 0, 3), ("own", np.log2(3), 1)):
        value, low, high = known.distances[arm]
        assert np.log2([value, low, high]) == pytest.approx(
            [exponent, exponent - half / number**0.5, exponent + half / number**0.5], rel=1e-4, abs=1e-4
        )


def test_intervals_include_the_variation_of_seeds_and_prompts():
    """Prompts that differ widen an interval.

    Seeds widen it if they differ by more than the chance of sampling.
    """
    groups = ["a"] * 40 + ["b"] * 40

    def half(values: np.ndarray) -> float:
        found = intervals.over_seeds(values, groups, intervals.pooled_spreads([values] * 3, groups))[
            "overall"
        ]
        assert found.value == pytest.approx(0.5) and found.high - found.value == pytest.approx(
            found.value - found.low
        )
        return found.high - found.value

    assert half(np.full((3, 80), 0.5)) == 0
    # Student's t of 3 x 2 degrees of freedom.
    assert half(np.repeat([[0.4], [0.5], [0.6]], 80, axis=1)) == pytest.approx(
        2.4469 * 0.1 / 3**0.5, rel=1e-4
    )
    assert half(np.tile([0.0, 1.0] * 40, (3, 1))) == pytest.approx(1.96 * (40 * 0.25 / 39 / 40 / 2) ** 0.5)
    few = np.repeat([[0.4], [0.6]], 80, axis=1)  # two seeds of one arm show nothing about the spread
    assert intervals.over_seeds(few, groups, intervals.pooled_spreads([few], groups))[
        "overall"
    ].high == pytest.approx(0.5)
    with pytest.raises(ValueError, match="verdicts on 80 prompts; expected 79"):
        intervals.over_seeds(np.zeros((1, 80)), groups[1:], intervals.pooled_spreads([], groups[1:]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed_spread, prompt_spread", [(0.0, 0.15), (0.02, 0.15), (0.06, 0.15), (0.035, 0.35)]
)
def test_intervals_have_the_stated_coverage(seed_spread, prompt_spread):
    """Simulated studies of eight arms and three seeds with a known truth: about 95 % of
    the intervals contain it.
    """
    rng, held, groups = np.random.default_rng(0), [], ["a"] * 30 + ["b"] * 30
    for _ in range(60):
        hard = rng.normal(0, prompt_spread, (8, 1, 60))
        levels = np.clip(0.5 + rng.normal(0, seed_spread, (8, 3, 1)) + hard, 0, 1)
        shares = rng.binomial(2, levels) / 2
        spread = intervals.pooled_spreads(list(shares), groups)
        found = [intervals.over_seeds(values, groups, spread)["overall"] for values in shares]
        held += [each.low <= 0.5 <= each.high for each in found]
    assert 0.92 <= np.mean(held) <= 0.99, np.mean(held)


def test_a_study_runs_only_what_is_missing(grid_file, tmp_path, monkeypatch, capsys):
    """Arms run in order, and only those that lack a row and are not removed."""
    monkeypatch.setattr(runner, "worker_environments", lambda num_workers: [{}])
    results, asked = tmp_path / "results.jsonl", []
    results.write_text(json.dumps(row("base", 0, {"0": "1"})) + "\n")

    class Job:
        pid, returncode = 0, 0

        def __init__(self, command, **options):
            name, seed, target = command[4], int(command[5]), Path(command[7])
            asked.append((name, seed))
            target.write_text(json.dumps(row(name, seed, {"0": "1"})) + "\n")

        def poll(self):
            return 0

    monkeypatch.setattr(runner.subprocess, "Popen", Job)
    monkeypatch.setattr(runner.time, "sleep", lambda seconds: None)
    assert (
        __main__.main(
            ["run", str(grid_file), "--seeds", "1", "--out", str(tmp_path / "out"), "--results", str(results)]
        )
        == 0
    )
    assert asked == [("plain", 0), ("k3", 0), ("own", 0)]
    assert [each["arm"] for each in read(results)] == ["base", "plain", "k3", "own"]
    # Sampler settings without a row are missing, and rows of other settings do not
    # belong to this grid.
    rows, grid = read(results), Grid.load(grid_file)
    assert missing(grid, rows, list(grid.arms), 1) == [(0, "k3")]
    rows.append(row("k3", 0, {"0": "1"}, "greedy"))
    assert missing(grid, rows, list(grid.arms), 1) == [(0, "k3")]
    rows.append(row("k3", 0, {"0": "1"}, "sharp"))
    # `own` has one seed, and `sharp` uses the first seed only.
    assert missing(grid, rows, list(grid.arms), 2) == [(1, "base"), (1, "plain"), (1, "k3")]
    rows += [row("k3", 1, {"0": "1"}), row("k3", 1, {"0": "1"}, "greedy")]
    assert missing(grid, rows, list(grid.arms), 2) == [(1, "base"), (1, "plain")]
    with pytest.raises(
        ValueError, match="arms.k3 was run with .*steps=3.*, the grid has .*steps=2.*another name"
    ):
        missing(grid, [rows[-1] | {"settings": ["train.steps=3"]}], ["k3"], 2)


def test_rows_that_were_made_of_other_settings_are_refused(grid_file):
    grid, made = Grid.load(grid_file), row("k3", 1, {"0": "1"}, "greedy")
    made_of = grid.made_of("k3", "greedy")
    assert made_of["train"]["steps"] == 2 and made_of["sampler"]["greedy_drafts"]
    assert missing(grid, [made | {"made_of": made_of}], ["k3"], 2)
    earlier = made_of | {"sampler": made_of["sampler"] | {"stride": 1}}  # a setting that was removed
    assert missing(grid, [made | {"made_of": earlier}], ["k3"], 2)
    for changed in (
        {"num_images": 9},
        {"sampler": made_of["sampler"] | {"top_k": 3}},
        {"optim": made_of["optim"] | {"lr": 1.0}},
    ):
        with pytest.raises(
            ValueError, match=f"arms.k3, sampling 'greedy', was run with another {next(iter(changed))} than"
        ):
            missing(grid, [made | {"made_of": made_of | changed}], ["k3"], 2)


def test_unknown_arms_and_rows_of_another_base_are_refused(grid_file, tmp_path, capsys):
    for named, problem in (
        ("nobody", "unknown nobody"),
        ("gone", "gone cannot be run any more, its setting was removed: it was worse"),
    ):
        for command in ("run", "time"):
            assert (
                __main__.main([command, str(grid_file), "--arms", named]) == 2
                and problem in capsys.readouterr().err
            )
    assert (
        __main__.main(
            [
                "run",
                str(grid_file),
                "--dry-run",
                "--out",
                str(tmp_path / "none"),
                "--results",
                str(tmp_path / "none.jsonl"),
            ]
        )
        == 0
    )
    assert "own, seed 0\nbase, seed 1" in capsys.readouterr().out and not (tmp_path / "none.jsonl").exists()
    # Rows of another base are not mixed with the rows of this base.
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps(row("plain", 0, {"0": "1"}) | {"base": "another"}) + "\n")
    assert (
        __main__.main(["run", str(grid_file), "--out", str(tmp_path / "other"), "--results", str(results)])
        == 2
    )
    assert "start from other weights (of plain: another)" in capsys.readouterr().err
