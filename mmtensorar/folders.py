"""List folders in one way for everybody: sources of pictures and evaluators.

Imports nothing of ours.

Links are followed. Hidden files and folders (.DS_Store, ._a.jpg, .ipynb_checkpoints,
.git) are left out. Whatever is not read is counted by its reason, and a few names are
printed.
"""

from __future__ import annotations

import heapq
import os
import stat
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HIDDEN = "hidden"
FOLLOWED = "a link out of the folder"


class LeftOut:
    """What a listing does not read: how many for each reason, and the first names.

    It also counts the links that lead out of the folder. These are followed (FOLLOWED).

    folder: names are given below it, if they are in it; a Path or a UPath.
    """

    NUM_NAMES = 3

    def __init__(self, folder: Path | Any):
        self.folder = folder
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, path: Path | Any) -> None:
        """Count one file or folder."""
        self.counts[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < self.NUM_NAMES:
            is_below = path.is_relative_to(self.folder)
            name = path.relative_to(self.folder).as_posix() if is_below else str(path)
            names.append(shown(str(path) if name == "." else name))

    def print(self) -> None:
        """Print a note for each reason: "note: FOLDER: left out 4 (hidden): .a, .b, .c
        and 1 more".
        """
        for reason, count in self.counts.items():
            names, verb = self.names[reason], "followed" if reason == FOLLOWED else "left out"
            more = f" and {count - len(names)} more" if count > len(names) else ""
            print(
                f"note: {shown(str(self.folder))}: {verb} {count} ({reason}): {', '.join(names)}{more}",
                file=sys.stderr,
            )


def shown(name: str) -> str:
    """A file's name for a message: one line, without control characters."""
    return name if name.isprintable() else ascii(name)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out everywhere, by its name."""
    return name.startswith(".")


class FileStatus(NamedTuple):
    """What a listing knows about a file.

    num_bytes: None where a store does not give it. stamp: changes when the file is
    written; empty where nothing is known.
    """

    num_bytes: int | None
    stamp: str


def status_of(status: os.stat_result) -> FileStatus:
    """Bytes and stamp of a file on disk, from its times in nanoseconds."""
    # The second time also changes when a program restores the first one.
    return FileStatus(status.st_size, f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}")


def walk(root: Path, left_out: LeftOut, *, entered: Iterable[Path] = ()) -> dict[Path, FileStatus]:
    """Every plain file below a folder, sorted by the parts of its path.

    Links to files and to folders are followed, out of the folder as well. A folder is
    entered once: first all that are in the root itself, then those that links lead to,
    in the order of their names. So a circle of links ends, and no file is read twice
    because of one. The status is that of the file a link leads to.

    Args:
        left_out: Receives what is not read: hidden entries, links without a target,
            folders that were entered already, devices and pipes; and links out of its
            folder.
        entered: Folders that are not entered.

    Raises ValueError when the root is not a folder, and OSError when a folder cannot be
    read.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    known = {identity(path) for path in entered} | {identity(root)}
    files: dict[Path, FileStatus] = {}
    folders, links = deque([root]), []  # still to be entered; links: a heap of (parts, path)
    while folders or links:
        folder = folders.popleft() if folders else heapq.heappop(links)[1]
        if folder != root:
            if (current := identity(folder)) in known:
                left_out.add("a folder that is listed already", folder)
                continue
            known.add(current)
        for path, status, is_link in _entries(folder, left_out):
            if stat.S_ISREG(status.st_mode):
                files[path] = status_of(status)
            elif is_link:
                heapq.heappush(links, (path.parts, path))
            else:
                folders.append(path)
    return dict(sorted(files.items(), key=lambda pair: pair[0].parts))


def _entries(folder: Path, left_out: LeftOut) -> Iterator[tuple[Path, os.stat_result, bool]]:
    """The files and folders in a folder: path, status, and whether it is a link."""
    root = os.path.realpath(left_out.folder)
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = folder / entry.name
            if is_hidden(entry.name):
                left_out.add(HIDDEN, path)
            elif (status := _status(entry)) is None:
                left_out.add("a link without a target", path)
            elif not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                left_out.add("a device, pipe or socket", path)
            else:
                is_link = entry.is_symlink()
                if is_link and not _is_below(os.path.realpath(path), root):
                    left_out.add(FOLLOWED, path)
                yield path, status, is_link


def _status(entry: os.DirEntry) -> os.stat_result | None:
    """The status of what an entry is or leads to; None for a link that leads
    nowhere.
    """
    try:
        return entry.stat()
    except OSError:
        if entry.is_symlink():
            return None
        raise


def identity(folder: Path) -> object:
    """Equal for two paths of one folder, with and without links."""
    status = os.stat(folder)
    # Some network file systems have no inode numbers.
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
