"""The folder that `generate` writes: names of pictures and traces, and
prompts.jsonl.

    00012_3.png                    picture number 12 of the folder, of seed 3
    00012_3.windows.safetensors    its trace (--trace), not a picture:
    00012_3.revisions.png          its revisions in one strip
    prompts.jsonl                  one line per picture

Numbers above 99999 have more digits. Several processes may write into one folder at the
same time: each picture gets a number of its own, and no file is ever replaced.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mmtensorar.files import MAX_LINE, end_last_line, publish

RECORD = "prompts.jsonl"
WINDOWS, REVISIONS = ".windows.safetensors", ".revisions.png"
# Endings that a picture may have been converted to.
PICTURES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
PICTURES += (".mpo",)
NUMBERED = re.compile(r"([0-9]{5,})_([0-9]+)\.")  # how the names of pictures and traces begin
LONG_NUMBER = re.compile(r"^[0-9]{6,}(?![0-9A-Za-z])")
RECORDED = re.compile(rb'"file": "([0-9]{5,200})_[0-9]+\.')  # as long as names of files


# ---- reading -------------------------------------------------------------------------------------


def is_revisions(path: Path) -> bool:
    """Whether a file is the strip of revisions of a picture, which is not a picture
    itself.

    It has the name that `generate` gives, or its picture is next to it. Both may have
    been renamed, or converted to another kind of picture.
    """
    name, dot, kind = path.stem.rpartition(".")
    if f"{dot}{kind}" != Path(REVISIONS).stem or path.suffix.lower() not in PICTURES:
        return False
    endings = (*PICTURES, *map(str.upper, PICTURES))
    return NUMBERED.match(path.name) is not None or any(
        path.with_name(name + ending).is_file() for ending in endings
    )


def in_order(path: Path) -> tuple[str, ...]:
    """The key that sorts paths by their names, and numbers above 99999 after all
    smaller ones.
    """
    return tuple(LONG_NUMBER.sub(_behind_five_digits, part) for part in path.parts)


def _behind_five_digits(number: re.Match) -> str:
    # "~" comes after all that may follow a number of five digits.
    return f"99999~{int(number[0]):040d}"


# ---- writing -------------------------------------------------------------------------------------


class PictureFolder:
    """Adds pictures to a folder; see the top. It is created, and so is prompts.jsonl.

    Numbers continue after the largest in the folder or in prompts.jsonl. A last line of
    prompts.jsonl that a killed process left incomplete is removed, which is printed.
    Raises ValueError when prompts.jsonl is another file of that name.
    """

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._read = 0  # bytes of prompts.jsonl
        with self._record() as record:
            end_last_line(record, self.path / RECORD, "file")
            self._next = 1 + self._largest()
            self._read_lines(record)

    def add(self, finished: Mapping[str, Path], seed: int, row: Mapping[str, object]) -> Path:
        """Give a picture and the files of its trace their names, and append its line to
        prompts.jsonl.

        Args:
            finished: ending (.png) -> the file, under a `files.temporary_name` of the
                folder. The picture comes last: a process that is killed leaves no
                picture without its trace.
            seed: of the picture.
            row: the line, without the name of the file.

        Returns the picture's path.
        """
        with self._record() as record:
            self._read_lines(record)
            number = self._next
            while (path := self._name(finished, f"{number:05d}_{seed}")) is None:
                number += 1  # a process that has not written its line yet, or a person, took it
            line = json.dumps({"file": path.name, **row}, ensure_ascii=False) + "\n"
            record.write(line.encode())
            record.flush()
            self._read_lines(record)
        return path

    def _name(self, finished: Mapping[str, Path], name: str) -> Path | None:
        """Give the files a name; None, and no file has it, when one of the names is
        taken.
        """
        named: dict[Path, Path] = {}
        try:
            for ending, temporary in finished.items():
                path = self.path / (name + ending)
                publish(temporary, path)
                named[path] = temporary
        except FileExistsError:
            for path, temporary in named.items():
                if temporary.exists():
                    path.unlink()
                else:  # a file system without hard links: it was renamed
                    path.rename(temporary)
            return None
        return path

    def _largest(self) -> int:
        """The largest number in the folder; -1 without any."""
        with os.scandir(self.path) as entries:
            matches = (NUMBERED.match(entry.name) for entry in entries)
            return max((int(match[1]) for match in matches if match), default=-1)

    @contextmanager
    def _record(self) -> Iterator:
        """prompts.jsonl, open for reading and appending; the other processes wait until
        it is closed.
        """
        with (self.path / RECORD).open("a+b") as record:
            try:
                fcntl.flock(record, fcntl.LOCK_EX)
            except OSError:
                pass  # this file system has no locks; names are taken atomically all the same
            yield record

    def _read_lines(self, record) -> None:
        """Count further than all numbers in the lines that were added, by this process
        or another.
        """
        record.seek(self._read)
        while line := record.readline(MAX_LINE):
            self._next = max(self._next, *(1 + int(match[1]) for match in RECORDED.finditer(line)), 0)
        self._read = record.tell()
