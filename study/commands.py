"""Commands of this project, run as a user would."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*command: object, log: Path | None = None) -> None:
    """`python COMMAND` in the project's folder, what it prints into a log. Raises ValueError with what it said last when it fails."""
    with ExitStack() as stack:
        told = stack.enter_context(
            tempfile.TemporaryFile("w+")
            if log is None
            else log.open("w+", encoding="utf-8", errors="replace")
        )
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, stdout=told, stderr=subprocess.STDOUT, check=False
        )
        told.seek(0)
        if done.returncode:
            where = "" if log is None else f" (all of it in {log})"
            raise ValueError(f"python {' '.join(map(str, command))}: {told.read().strip()[-1000:]}{where}")
