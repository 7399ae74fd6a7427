"""Run commands of this project as a user would."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "results.jsonl"  # the rows of a grid, in docs/study/GRID


def run(*command: object, log: Path | None = None) -> None:
    """`python COMMAND` in the project's folder, its output written to a log.

    Raises ValueError with the end of its output when it fails.
    """
    with ExitStack() as stack:
        output = stack.enter_context(
            tempfile.TemporaryFile("w+")
            if log is None
            else log.open("w+", encoding="utf-8", errors="replace")
        )
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
        output.seek(0)
        if done.returncode:
            where = "" if log is None else f" (full output: {log})"
            printed = output.read().strip()[-1000:]
            raise ValueError(f"python {' '.join(map(str, command))}: {printed}{where}")
