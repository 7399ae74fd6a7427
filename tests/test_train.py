"""The training entry, run as a user runs it: resuming is exact, ZeRO-3 equals plain training, errors are sentences."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mmtensorar import metrics
from mmtensorar.checkpoint import check_files

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "mmtensorar" / "train.py"
SIDE, NUM_CODES = 4, 32  # 4x4 tokens out of 32 codes

pytest.importorskip("deepspeed")


def write_tiny_janus(folder: Path) -> None:
    """A random Janus of width 32 with a word-level text tokenizer, in the released layout."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import JanusConfig, JanusForConditionalGeneration, PreTrainedTokenizerFast

    special = ["<unk>", "<｜▁pad▁｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<begin_of_image>", "<end_of_image>"]
    words = special + ["a", "red", "blue", "green", "circle", "square", "User", "Assistant", ":", "<", ">", "|"]
    text_tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    text_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text_tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=text_tokenizer,
        unk_token="<unk>",
        pad_token="<｜▁pad▁｜>",
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
    ).save_pretrained(folder)
    config = JanusConfig(
        text_config=dict(
            model_type="llama",
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
        ),
        # transformers derives the code grid from image_size // patch_size.
        vision_config=dict(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4, projection_dim=32
        ),
        vq_config=dict(
            embed_dim=8,
            num_embeddings=NUM_CODES,
            latent_channels=8,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            image_token_embed_dim=32,
            projection_dim=32,
            num_hidden_layers=0,
        ),
    )
    torch.manual_seed(0)
    model = JanusForConditionalGeneration(config)
    model.save_pretrained(folder)
    model.model.vqmodel.save_pretrained(folder / "vq")


CAPTIONS = [["a red circle", "a blue square"], ["a green circle", "a red square"]]


def write_shards(folder: Path, image_tokenizer, captions_of_shards: list[list[str]] = CAPTIONS) -> None:
    """Two shards of two samples: with batch 4 every step sees the whole set, however ranks share it."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    shards = []
    for number, captions in enumerate(captions_of_shards):
        path = folder / f"{number:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for i, caption in enumerate(captions):
                codes, image = io.BytesIO(), io.BytesIO()
                drawn = [rng.integers(size, size=(1, SIDE * SIDE)) for size in image_tokenizer.factor_sizes]
                np.save(codes, np.stack(drawn, axis=-1).astype(np.uint16))
                from PIL import Image

                Image.new("RGB", (8, 8)).save(image, "JPEG")
                members = {
                    "jpg": image.getvalue(),
                    "txt": caption.encode(),
                    "json": json.dumps({"source": "test", "size": [8, 8], "licence": "none"}).encode(),
                    "codes.npy": codes.getvalue(),
                }
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{number}{i}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        import hashlib

        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shards.append({"name": path.name, "num_samples": len(captions), "sha256": digest})
    manifest = {
        "format": 1,
        "shards": shards,
        "num_samples": 4,
        "image_size": image_tokenizer.image_size,
        "codes": {
            "image_tokenizer": image_tokenizer.name,
            "weight_hash": image_tokenizer.weight_hash,
            "grid": list(image_tokenizer.grid),
            "factor_sizes": list(image_tokenizer.factor_sizes),
            "crops": 1,
        },
        "source": "test",
        "seed": 0,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    """A folder with a tiny backbone, shards and a recipe."""
    from mmtensorar import image_tokenizers
    from mmtensorar.recipe import Recipe

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("train")
    write_tiny_janus(folder / "janus")
    recipe = {
        "run": {"name": "unnamed", "out": str(folder / "runs")},
        "backbone": {"name": "janus", "path": str(folder / "janus")},
        "image_tokenizer": {"name": "janus_vq", "path": str(folder / "janus" / "vq")},
        "tensorar": {"window": 3, "num_heads": 2},
        "data": {"shards": str(folder / "shards"), "batch_size": 4, "shuffle": 0, "uncond_rate": 0.5},
        "optim": {"lr": 1e-2, "warmup_steps": 1},
        "train": {"steps": 4, "grad_accum": 2, "log_every": 1, "save_every": 2},
        "zero": {"stage": 0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_shards(folder / "shards", image_tokenizers.load(Recipe.load(folder / "recipe.yaml", []).image_tokenizer))
    return folder


def environment() -> dict:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    # More threads than cores make gloo's ranks wait on each other.
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def run(bench: Path, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TRAIN)]
    if ranks > 1:
        launcher = Path(sys.executable).with_name("deepspeed")
        port = 29600 + os.getpid() % 1000
        command = [str(launcher), "--num_accelerators", str(ranks), "--master_port", str(port), str(TRAIN)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [*command, str(bench / "recipe.yaml"), *arguments],
        env=environment() | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=240,  # the first ever DeepSpeed run compiles a CPU operator
        cwd=bench,
    )


def rows(bench: Path, name: str) -> list[dict]:
    return metrics.read_log(bench / "runs" / name / "log.jsonl")


def numbers(row: dict) -> tuple:
    """What must repeat exactly; speed and memory need not."""
    return row["step"], row["loss"], row["loss_per_offset"], row["lr"], row["grad_norm"]


@pytest.fixture(scope="module")
def whole_run(bench):
    done = run(bench, "run.name=whole")
    assert done.returncode == 0, done.stderr[-3000:]
    return rows(bench, "whole")


def test_resumed_run_equals_uninterrupted_run(bench, whole_run):
    """Stopped after step 2 and continued, steps 3 and 4 repeat bit for bit: data, noise, weights, moments, rate."""
    runs = bench / "runs"
    shutil.copytree(runs / "whole", runs / "cut")
    shutil.rmtree(runs / "cut" / "model")
    shutil.rmtree(runs / "cut" / "checkpoints" / "step_000004")
    (runs / "cut" / "checkpoints" / "latest").write_text("step_000002")
    recipe = yaml.safe_load((runs / "cut" / "recipe.yaml").read_text())
    recipe["run"]["name"] = "cut"
    (runs / "cut" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run(bench, "run.name=cut", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "after step 2" in done.stdout
    assert [numbers(row) for row in rows(bench, "cut")] == [numbers(row) for row in whole_run]


def test_run_folder_is_complete(bench, whole_run):
    folder = bench / "runs" / "whole"
    assert [row["step"] for row in whole_run] == [1, 2, 3, 4]
    assert len(whole_run[0]["loss_per_offset"]) == 3
    assert check_files(folder / "model")["step"] == 4
    assert (folder / "recipe.yaml").is_file() and any((folder / "tensorboard").iterdir())


def test_finished_run_is_not_overwritten(bench, whole_run):
    done = run(bench, "run.name=whole")
    assert done.returncode == 2
    assert "holds a finished run" in done.stderr and "Traceback" not in done.stderr


def test_zero_3_on_two_ranks_equals_one_rank(bench):
    """Same samples per step, no randomness per rank: only bfloat16 rounding and the order of sums may differ."""
    # Adam's first update is lr times the sign of the gradient: without a large eps it turns rounding noise in a
    # gradient near zero into a full step, and the comparison is of noise.
    plain = ["optim.eps=0.01", "tensorar.window=1", "data.uncond_rate=0", "train.grad_accum=1", "train.save_every=0"]
    one = run(bench, "run.name=one", *plain)
    assert one.returncode == 0, one.stderr[-3000:]
    two = run(bench, "run.name=two", "zero.stage=3", *plain, "train.sample_every=4", "train.sample_prompts=[a red circle]", ranks=2)
    assert two.returncode == 0, (two.stdout + two.stderr)[-3000:]
    for a, b in zip(rows(bench, "one"), rows(bench, "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.01), (a, b)
        # Adam hides a wrong factor on the gradient; the norm does not.
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.05), (a, b)
    assert (bench / "runs" / "two" / "samples" / "step_4.png").is_file()
    assert check_files(bench / "runs" / "two" / "model")["step"] == 4


def test_signal_saves_and_stops(bench):
    """SIGTERM ends the step, saves and says how to go on."""
    process = subprocess.Popen(
        [sys.executable, str(TRAIN), str(bench / "recipe.yaml"), "run.name=stopped", "train.steps=100000", "train.save_every=0"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=bench,
    )
    try:
        deadline = time.monotonic() + 240
        while not rows(bench, "stopped"):
            assert process.poll() is None and time.monotonic() < deadline, "training did not start"
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    assert "stopped by a signal" in out
    last = rows(bench, "stopped")[-1]["step"]
    assert (bench / "runs" / "stopped" / "checkpoints" / "latest").read_text() == f"step_{last:06d}"
    assert not (bench / "runs" / "stopped" / "model").exists()
