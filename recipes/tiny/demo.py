"""The embedded world from shards to scores, end to end: what `make demo` runs.

Each stage is a public command, printed before it runs. A stage whose result exists
prints so and reuses it (pictures are scored again). Everything is written to data/ and
runs/ in the checkout.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TINY = "recipes/tiny"
# Name in the table of results -> model folder.
MODELS = {
    "base": f"{TINY}/weights/base",
    "plain fine-tune": "runs/plain/model",
    "TensorAR": "runs/tensorar/model",
}


def run(title: str, *command: str) -> None:
    """Run one stage, which decides itself what it can reuse.

    Ends the demo with the stage's exit code when it fails.
    """
    print(f"\n== {title}\n$ {shlex.join(command)}", flush=True)
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"})
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # The stage received the signal too, and may be saving.
        process.wait()
        print("\nstopped; `make demo` resumes from here", file=sys.stderr)
        sys.exit(130)
    if code:
        failure = f"{title} ended with exit code {code}; the command was: {shlex.join(command)}"
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(code)
    print(f"== {title}: {time.monotonic() - started:.0f} s", flush=True)


def make_shards(num_samples: int) -> None:
    """Draw pictures of the shapes world into data/shapes, and add their image codes."""
    draw = [sys.executable, "data_tools/make_shards.py", "--synthesize", "shapes", "--seed", "1"]
    draw += ["--num-samples", str(num_samples), "--samples-per-shard", "512", "--out", "data/shapes"]
    run("draw the shapes world", *draw)
    encode = [sys.executable, "data_tools/encode_codes.py", "data/shapes"]
    run("encode image codes", *encode, "--image-tokenizer", f"{TINY}/weights/base/image_tokenizer")


def train() -> None:
    """Fine-tune the tiny Janus twice: plainly, and with TensorAR."""
    for name in ("plain", "tensorar"):
        launch = ["deepspeed", "--num_accelerators", "2", "mmtensorar/train.py"]
        run(f"fine-tune: {TINY}/{name}.yaml", *launch, f"{TINY}/{name}.yaml", "--resume")


def evaluate() -> Path:
    """Generate and score pictures of all models; returns the path of the gallery."""
    folders = {name: f"runs/eval/{name.split()[0].lower()}" for name in MODELS}
    for name, model in MODELS.items():
        score = [sys.executable, "-m", "eval.geneval", "--ckpt", model, "--suite", "shapes"]
        run(f"generate and score: {name}", *score, "--out", folders[name])
    print()
    summaries = [f"{name}={folder}/summary.json" for name, folder in folders.items()]
    run("results", sys.executable, "-m", "eval.report_table", *summaries)
    gallery = "runs/eval/gallery.png"
    pictures = [f"{name}={folder}" for name, folder in folders.items()]
    run("gallery", sys.executable, "-m", "eval.gallery", *pictures, "--out", gallery)
    return ROOT / gallery


def main() -> int:
    parser = argparse.ArgumentParser(
        description="The embedded world from shards to scores, end to end.",
        epilog="example:\n  python recipes/tiny/demo.py --num-samples 1024",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--num-samples", type=int, default=4096, help="pictures to draw for fine-tuning (default 4096)"
    )
    options = parser.parse_args()
    make_shards(options.num_samples)
    train()
    print(f"\ngallery: {evaluate()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
