"""The main job on the embedded world, end to end: what `make demo` runs.

Each stage is a public command, printed before it runs; a stage whose result is there already says so and reuses it (pictures are
scored again). Everything lands in data/ and runs/ under the current folder.
"""

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
CHECKPOINTS = {
    "base": f"{TINY}/weights/base",
    "plain fine-tune": "runs/plain/model",
    "TensorAR": "runs/tensorar/model",
}


def run(title: str, *command: str) -> None:
    """Run one stage; it decides itself what it can reuse. Ends the demo with the stage's exit code when it fails."""
    print(f"\n== {title}\n$ {shlex.join(command)}", flush=True)
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"})
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # The stage got the signal too, and may be saving.
        process.wait()
        print("\nstopped; `make demo` goes on from here", file=sys.stderr)
        sys.exit(130)
    if code:
        print(
            f"error: {title} ended with exit code {code}; the command was: {shlex.join(command)}",
            file=sys.stderr,
        )
        sys.exit(code)
    print(f"== {title}: {time.monotonic() - started:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=4096, help="pictures to draw for fine-tuning")
    args = parser.parse_args()
    os.chdir(ROOT)
    python = sys.executable
    run(
        "draw the shapes world",
        *(python, "data_tools/make_shards.py", "--synthesize", "shapes", "--seed", "1"),
        *("--num-samples", str(args.num_samples), "--samples-per-shard", "512", "--out", "data/shapes"),
    )
    run(
        "encode image codes",
        *(
            python,
            "data_tools/encode_codes.py",
            "data/shapes",
            "--image-tokenizer",
            f"{TINY}/weights/base/image_tokenizer",
        ),
    )
    for name in ("plain", "tensorar"):
        run(
            f"fine-tune: {TINY}/{name}.yaml",
            *(
                "deepspeed",
                "--num_accelerators",
                "2",
                "mmtensorar/train.py",
                f"{TINY}/{name}.yaml",
                "--resume",
            ),
        )
    summaries, folders = [], []
    for name, folder in CHECKPOINTS.items():
        out = f"runs/eval/{name.split()[0].lower()}"
        run(
            f"generate and score: {name}",
            *(python, "-m", "eval.geneval", "--ckpt", folder, "--suite", "shapes", "--out", out),
        )
        summaries.append(f"{name}={out}/summary.json")
        folders.append(f"{name}={out}")
    print()
    run("results", python, "-m", "eval.report_table", *summaries)
    gallery = "runs/eval/gallery.png"
    run("gallery", python, "-m", "eval.gallery", *folders, "--out", gallery)
    print(f"\ngallery: {ROOT / gallery}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
