"""The generate command: a seed gives one image, the trace is read correctly, mistakes
are one sentence.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmtensorar import generate, pipeline
from mmtensorar.pipeline import Generator
from mmtensorar.recipe import SamplerSettings
from mmtensorar.sampling.trace import revisions
from tests.helpers import fork_server

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def generator(ckpt):
    return Generator.load(ckpt, device="cpu")


def same(a: Image.Image, b: Image.Image) -> bool:
    return bool((np.asarray(a) == np.asarray(b)).all())


def test_same_seed_same_images(generator):
    first, again = (generator.images(PROMPTS, [0, 1]) for _ in range(2))
    assert all(map(same, first, again))
    assert not same(first[0], generator.images(PROMPTS, [2, 1])[0])


def test_the_random_numbers_of_a_row_do_not_depend_on_its_batch(generator):
    """These prompts have one length, so not even the padding differs."""
    prompts, seeds = [*PROMPTS, "a green circle"], [7, 8, 9]
    together = generator.decode(prompts, seeds).codes
    alone = torch.cat([generator.decode([p], [s]).codes for p, s in zip(prompts, seeds, strict=True)])
    assert torch.equal(together, alone)


def test_settings_come_from_the_recipe_unless_given(generator):
    assert generator.sampling() == SamplerSettings(cfg_scale=2.0, top_k=20)
    given = generator.sampling(top_k=0, top_p=None, greedy_drafts=True)
    assert given == SamplerSettings(cfg_scale=2.0, greedy_drafts=True)
    with pytest.raises(ValueError, match="cfg_scale: .* got -1"):
        generator.sampling(cfg_scale=-1.0)


def test_a_number_per_factor_on_the_command_line(ckpt, capsys, tmp_path):
    """Janus has one factor: a list of two numbers is refused before any image is
    made.
    """
    command = ["--ckpt", str(ckpt), "--device", "cpu", "--prompt", "a red circle", "--out", str(tmp_path)]
    assert generate.main([*command, "--cfg-scale", "1.9,2.0"]) == 2
    assert (
        "cfg_scale has 2 numbers (1.9, 2.0); expected one number, or one per factor"
        in capsys.readouterr().err
    )


def test_bf16_runs_on_the_cpu(ckpt):
    generator = Generator.load(ckpt, device="cpu", precision="bf16")
    assert next(generator.model.parameters()).dtype == torch.float32
    assert generator.images(PROMPTS[:1], [0])[0].size == (8, 8)


def test_the_last_revision_is_the_image(generator):
    decoded = generator.decode(PROMPTS, [0, 1], keep_trace=True)
    assert torch.equal(revisions(decoded.trace)[:, -1], decoded.codes)


def test_command_line_writes_images_trace_and_record(ckpt, generator, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a blue square\n\n")
    command = [
        "--ckpt",
        str(ckpt),
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
        "--num-images",
        "2",
        "--seed",
        "3",
    ]
    command += ["--prompt", "a red circle", "--prompts-file", str(tmp_path / "prompts.txt"), "--trace"]
    assert generate.main(command) == 0
    assert "4 images in " in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()]
    assert [(row["file"], row["prompt"], row["seed"]) for row in rows] == [
        ("00000_3.png", "a red circle", 3),
        ("00001_4.png", "a red circle", 4),
        ("00002_3.png", "a blue square", 3),
        ("00003_4.png", "a blue square", 4),
    ]
    assert rows[0]["settings"]["top_k"] == 20 and rows[0]["window"] == 3
    assert rows[0]["settings"]["device"] == "cpu" and rows[0]["settings"]["attn_implementation"] == "sdpa"
    image = Image.open(tmp_path / "out" / "00002_3.png")
    assert image.text == {"prompt": "a blue square", "seed": "3"}
    assert same(image, generator.images(["a blue square"], [3])[0])
    windows = load_file(tmp_path / "out" / "00002_3.windows.safetensors")["windows"]
    assert windows.shape == (16, 3, 1)
    assert same(generator.pictures(windows[None, :, 0])[0], image)
    strip = Image.open(tmp_path / "out" / "00002_3.revisions.png")
    assert strip.size == (3 * 8 + 2 * 2, 8)
    assert same(strip.crop((20, 0, 28, 8)), image)
    assert generate.main(command[:-1]) == 0
    assert (tmp_path / "out" / "00004_3.png").is_file(), "a folder in use is added to"


@pytest.mark.launch
@pytest.mark.parametrize("ranks", [False, True], ids=["two_commands", "two_ranks"])
def test_two_processes_at_once(ckpt, generator, tmp_path, ranks):
    """Two commands once counted from the same number, and replaced each other's
    pictures.

    Two ranks of one command share the pictures; in batches, as one process makes them.
    """
    out = tmp_path / "out"
    command = ["-m", "mmtensorar.generate", "--ckpt", ckpt, "--device", "cpu", "--out", out, "--trace"]
    command += ["--num-images", 4, "--batch-size", 2, "--prompt", "a red circle", "--prompt"]
    running = []
    for rank, prompt in enumerate(["a blue square", "a blue square" if ranks else "a green star"]):
        env = fork_server.environment(**{"RANK": str(rank), "WORLD_SIZE": "2"} if ranks else {})
        running.append(fork_server.shared().start(*command, prompt, env=env))
    for run in running:
        done = run.communicate(timeout_s=240)
        assert done.returncode == 0, done.stderr
        assert f"{4 if ranks else 8} images in {out}" in done.stdout
    rows = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    num_images = 8 if ranks else 16
    assert sorted(row["file"][:5] for row in rows) == [f"{number:05d}" for number in range(num_images)]
    assert len(list(out.iterdir())) == 3 * num_images + 1
    made = sorted((row["prompt"], row["seed"]) for row in rows)
    prompts = (
        ["a red circle", "a blue square"]
        if ranks
        else ["a red circle"] * 2 + ["a blue square", "a green star"]
    )
    assert made == sorted((prompt, seed) for prompt in prompts for seed in range(4))
    expected = generator.images(["a red circle"] * 4, [0, 1, 2, 3], batch_size=2)
    for row in rows:
        image = Image.open(out / row["file"])
        assert image.text == {"prompt": row["prompt"], "seed": str(row["seed"])}
        assert row["prompt"] != "a red circle" or same(image, expected[row["seed"]])


def test_an_interrupted_command_leaves_what_is_finished(ckpt, tmp_path, monkeypatch, capsys):
    """After it the same command adds all its images; nothing is replaced and no number
    used twice.
    """
    command = ["--ckpt", str(ckpt), "--device", "cpu", "--out", str(tmp_path), "--batch-size", "2"]
    command += ["--num-images", "3", "--prompt", "a red circle"]
    save, saved = pipeline.save_png, []

    def interrupted(image, path, **text):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path)
        save(image, path, **text)

    monkeypatch.setattr(pipeline, "save_png", interrupted)
    assert generate.main(command) == 130
    assert "lists the images made so far" in capsys.readouterr().err
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert sorted(before) == ["00000_0.png", "00001_1.png"]
    monkeypatch.undo()
    assert generate.main(command) == 0
    names = ["00000_0.png", "00001_1.png", "00002_0.png", "00003_1.png", "00004_2.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "prompts.jsonl"]
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())


def test_classes_from_the_command_line_and_from_python(class_ckpt, tmp_path):
    """--class takes several numbers and may be repeated; file names and the record
    contain the class.
    """
    command = ["--ckpt", str(class_ckpt), "--device", "cpu", "--out", str(tmp_path), "--trace"]
    assert generate.main([*command, "--class", "3", "6", "--class", "0"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [(row["file"], row["class"], "prompt" in row) for row in rows] == [
        ("00000_0.png", 3, False),
        ("00001_0.png", 6, False),
        ("00002_0.png", 0, False),
    ]
    images = Generator.load(class_ckpt, device="cpu").images([3, 6, 0], seeds=[0, 0, 0])
    for row, image in zip(rows, images, strict=True):
        written = Image.open(tmp_path / row["file"])
        assert written.text == {"class": str(row["class"]), "seed": "0"} and same(written, image)
    assert not same(images[0], images[1])


@pytest.mark.parametrize(
    "kind, arguments, sentence",
    [
        (
            "text",
            ["--class", "3"],
            "is text-conditional: it takes prompts (--prompt), not class numbers such as 3",
        ),
        (
            "class",
            ["--prompt", "a cat"],
            "is class-conditional: it takes class numbers (--class), 0 to 6, not prompts",
        ),
        ("class", ["--class", "3", "7"], "7 is not a class number of this backbone (expected 0 to 6)"),
        ("class", ["--class", "-1"], "-1 is not a class number of"),
        ("class", ["--class", "3", "--prompt", "a cat"], "--class and prompts were given"),
    ],
)
def test_the_error_names_the_prompts_that_a_model_takes(
    ckpt, class_ckpt, tmp_path, capsys, kind, arguments, sentence
):
    folder = {"text": ckpt, "class": class_ckpt}[kind]
    assert (
        generate.main(["--ckpt", str(folder), "--device", "cpu", "--out", str(tmp_path / "out"), *arguments])
        == 2
    )
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


SHIPPED = str(Path(__file__).parents[1] / "recipes/tiny/weights/base")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--ckpt", "nowhere", "--prompt", "a"], "nowhere"),
        (["--ckpt", "nowhere"], "no prompts: give --prompt"),
        (["--ckpt", "nowhere", "--prompts-file", "none.txt"], "none.txt"),
        (["--ckpt", "nowhere", "--prompts-file", os.devnull], "null: no prompts in it"),
        (["--ckpt", "nowhere", "--prompt", "a", "--seed", "-1"], "seed is -1"),
        (["--ckpt", SHIPPED, "--prompt", "a", "--device", "tpu9"], "device is 'tpu9'"),
    ],
)
def test_mistakes_are_sentences(capsys, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert generate.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error
