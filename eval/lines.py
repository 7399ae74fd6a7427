"""Files with one JSON object a line, .jsonl or .jsonl.gz, read and written a line at a time."""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

MAX_LINE = 2**24  # characters; a compressed file may hold lines without end


def read(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, object) of each line, the place for messages. Raises ValueError naming file and line of what is damaged."""
    number = 0
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            while line := file.readline(MAX_LINE):
                number += 1
                if len(line) == MAX_LINE:
                    raise ValueError(f"{path} line {number}: longer than {MAX_LINE} characters")
                try:
                    value = json.loads(line)
                except (json.JSONDecodeError, RecursionError):
                    value = None
                if not isinstance(value, dict):
                    raise ValueError(f"{path} line {number}: expected one JSON object")
                yield f"{path} line {number}", value
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path} after line {number}: damaged ({error})") from None
    if not number:
        raise ValueError(f"{path} is empty")


def write(path: Path, rows: Iterable[dict]) -> None:
    """A file that appears whole or not at all, also when rows raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
