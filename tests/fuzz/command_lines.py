"""Random text in every option of every command:
`python -m tests.fuzz.command_lines --cases 2000`.

A command must end with exit code 0, or with 2 and one `error:` line that is a sentence.
Anything else is a failure: a traceback, a message of Python's own such as
`embedded null byte`, a command that takes longer than TIME_LIMIT_S. Case i of a seed is
always the same.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from mmtensorar import cli

ROOT = Path(__file__).resolve().parents[2]
CKPT, RECIPE = ROOT / "recipes/tiny/weights/base", ROOT / "recipes/tiny/tensorar.yaml"
TIME_LIMIT_S = 60

# {} is random text. No call trains, or loads weights.
CALLS = [
    "generate --ckpt {} --prompt x --out o",
    f"generate --ckpt {CKPT} --prompts-file {{}} --out {{}} --prompt x --class 3",
    f"generate --ckpt {CKPT} --prompt {{}} --seed {{}} --num-images {{}} --precision {{}}",
    f"generate --ckpt {CKPT} --prompt x --temperature {{}} --top-k {{}} --cfg-scale {{}} --seed -1",
    "recipe {}",
    f"recipe {RECIPE} {{}} tensorar.window=1",
    f"recipe {RECIPE} run.name={{}} tensorar.window=1",
    f"recipe {RECIPE} data.shards={{}} train.init_from={{}} tensorar.window=1",
    f"recipe {RECIPE} {{}}=3 tensorar.window=1",
    f"recipe {RECIPE} tensorar.schedule={{}} train.freeze={{}} optim.lr={{}} run.seed={{}} train.steps=0",
    f"recipe {RECIPE} backbone.name={{}}",
    "plan {} {}",
    f"plan {RECIPE} data.shards={{}} backbone.path=./nowhere",
    "train {} {}",
    f"train {RECIPE} {{}} train.steps=0",
    "convert {} {} --kind {}",
    f"convert --original {CKPT} {{}} --kind janus",
    "export {} --out {} --step {}",
    "merge {} {}",
    "image-tokenizer roundtrip {} --tokenizer ./nowhere --out {}",
    "shards make --workers 1 --folder {} --out {}",
    "shards make --workers 1 --jsonl {} --out o/{} --image-root {} --caption-columns {}",
    "shards make --workers 1 --csv {} --out o/c --image-column {}",
    "shards make --workers 1 --parquet {} --out o/p",
    "shards make --workers 1 --tars {} --out o/t",
    "shards make --workers 1 --class-folder {} --class-template {} --out o/k",
    "shards make --workers 1 --synthesize {} --out {} --num-samples 2",
    "shards make --folder folder --out o/q --image-size {} --min-side {} --max-aspect {} --seed {}",
    "shards make --folder folder --out o/q --bytes-per-shard {} --validation-share {} --quality {}",
    "shards encode-codes {} --image-tokenizer ./nowhere --batch-size {}",
    "shards encode-text {} --text-encoder ./nowhere",
    "shards check {} --report {} --repair {}",
    "shards inspect {} --html {}",
    "eval geneval --images {} --suite shapes --num-bound-images 0 --out {}",
    "eval geneval --ckpt {} --suite {}",
    "eval geneval score --detections {} --out {}",
    "eval geneval compare {} {} --out {}",
    "eval geneval watch {} --once --pause {}",
    "eval dpg --images {} --bench {}",
    "eval dpg score --answers {} --questions {} --out {}",
    "eval dpg grids {} --out {}",
    "eval fid --images {} --ref {}",
    "eval fid score --features {} --split-size {} --out {}",
    "study run {} --dry-run --budget {} --arms {}",
    "study report {} --results {}",
    "study check {} --arm {}",
    "{} {}",
    "shards {}",
]
ODD = [
    *(
        "\u0663",
        "\u00b2",
        "\uff11",
        "1_000",
        "0x10",
        "0o17",
        "1e400",
        "nan",
        "inf",
        "9" * 5000,
        "-1",
        "2**63",
    ),
    *(",", "1,", "0.5.5", " 1", "=", "a=b", "=b", "a=", "[", "{}", "{0}", "'", "\\", "%s", "%", "$HOME", "~"),
    *(
        "a\nb",
        "\x1b[31m",
        "\ufeffa",
        "a/" * 3000,
        "a" * 300,
        "x\0y",
        "\ud800",
        "\udcff",
        "http://",
        "http://[::1",
    ),
    *("s3://", "file:///x", "hf://x", "--", "---", "-", "--out", "/", ".", "..", "/dev/null", "~nobody/x"),
]
# Parts of Python's own messages, which do not say what to do.
BAD = ("[Errno", "codec can't", "Traceback", "embedded null", "NoneType", "object is not", "object has no")


class Failure(NamedTuple):
    """A command line and what went wrong with it."""

    words: list[str]
    what: str


def write_files(folder: Path) -> list[str]:
    """Write files and links that no command can use; returns their names, and names of
    nothing.
    """
    (folder / "folder" / "inside").mkdir(parents=True)
    (folder / "broken").symlink_to(folder / "gone")
    (folder / "loop").symlink_to(folder / "loop")
    contents = {
        "empty": b"",
        "text": b"x",
        "bytes.yaml": b"\xff\xfe\0a",
        "half.yaml": b'train: {steps: "\\ud800"}\n',
        "half.json": b'{"a": "\\ud800"}',
        "half.jsonl": b'{"image": "\\ud800", "caption": "\\ud800"}\n',
        "zero.jsonl": b'{"image": "a\\u0000", "caption": "x"}\n',
        "deep.json": b"[" * 100_000,
        "long.json": b"9" * 10_000,
        "table.csv": b"image,caption\n\xff,\0\n",
        "x.parquet": b"PAR1junk",
        "x.tar": bytes(range(256)) * 8,
        "x.npz": b"PK\3\4junk",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    names = [path.name for path in sorted(folder.iterdir())]
    return [*names, "folder/", "text/", "text/x", "nowhere", *(str(folder / name) for name in names)]


def random_text(rng: random.Random, names: list[str]) -> str:
    """A file's name, odd text, or random bytes as the shell passes them."""
    kind = rng.randrange(8)
    if kind == 0:
        content = bytes(rng.randrange(1, 256) for _ in range(rng.randrange(1, 20)))
        return content.decode("utf-8", "surrogateescape")
    if kind == 1:
        return "".join(chr(rng.randrange(1, 0xD800)) for _ in range(rng.randrange(1, 20)))
    return rng.choice(ODD if kind < 5 else names)


def judge(words: list[str]) -> str | None:
    """What is wrong with how a command ends; None when nothing is."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(words)
    except SystemExit as ended:
        code = ended.code
    except Exception:  # this is what the fuzzer looks for
        return traceback.format_exc()
    err.flush()
    printed = err.buffer.getvalue().decode()
    if code == 0:
        return None
    if code != 2 or printed.count("error: ") < 1:
        return f"exit code {code!r}: {printed[-500:]}"
    if any(part in printed for part in BAD):
        return f"Python's own words: {printed[-500:]}"
    return f"{len(printed)} characters of error" if len(printed) > 6000 else None


@contextlib.contextmanager
def in_work_folder() -> Iterator[list[str]]:
    """Work in a temporary folder with the files of `write_files`, without the
    network.
    """
    before = os.getcwd()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),
    ):
        os.chdir(folder)
        try:
            yield write_files(Path(folder).resolve())
        finally:
            os.chdir(before)


def fuzz(seed: int, cases: range) -> list[Failure]:
    """Try the cases; returns the failures."""

    def too_long(number: int, frame: object) -> None:
        raise RuntimeError(f"longer than {TIME_LIMIT_S} seconds")

    failures = []
    with in_work_folder() as names:
        handler = signal.signal(signal.SIGALRM, too_long)
        for case in cases:
            rng = random.Random(f"{seed}/{case}")
            call = CALLS[case % len(CALLS)]
            words = [
                word.replace("{}", random_text(rng, names)) if "{}" in word else word for word in call.split()
            ]
            signal.alarm(TIME_LIMIT_S)
            if what := judge(words):
                failures.append(Failure(words, what))
            signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    return failures


def main(arguments: list[str] | None = None) -> int:
    """Try cases and print the failures; exit code 1 when there are any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1000)
    options = parser.parse_args(arguments)
    failures = fuzz(options.seed, range(options.cases))
    for words, what in failures:
        print(ascii([word[:100] for word in words]), what.encode("ascii", "backslashreplace").decode())
    print(f"{options.cases} cases, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
