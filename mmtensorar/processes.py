"""What is of a process, not of training: how it ends when it is one of several ranks, and its memory."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TextIO

import torch

CHECKPOINT_THREAD = "checkpoint"


def leave(code: int) -> NoReturn:
    """End this process with an exit code. Output is flushed.

    After an error the process group still stands, for to take it down could wait for a rank that is gone; and an interpreter
    that ends with its threads alive may abort ("terminate called without an active exception"), with another exit code.
    """
    for thread in threading.enumerate():
        if thread.name == CHECKPOINT_THREAD:
            thread.join()  # what was trained before the error is worth its checkpoint
    if code and torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


_held: list[TextIO] = []


def hold(folder: Path, patience_s: float = 0) -> TextIO | None:
    """Take a run folder for this process as long as the file that is returned stays open, however the process ends.

    None on a file system that knows no locks. Raises ValueError when another process holds the folder for longer than patience_s.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("a+", encoding="utf-8")
    deadline, told = time.monotonic() + patience_s, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "unknown"
            problem = f"{folder}: another process trains in this folder ({holder})"
            if time.monotonic() >= deadline:
                file.close()
                raise ValueError(f"{problem}; stop it, or choose another run.name") from None
            if not told:
                print(f"{problem}; waiting up to {patience_s:g} s for its end", flush=True)
            told = True
            time.sleep(1)
        except OSError:
            file.close()
            return None
    _held.append(file)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def let_go() -> None:
    """In a child process: leave the folders to the process that holds them, so that they are free when that one ends."""
    for file in _held:
        if not file.closed:
            file.close()
    _held.clear()


def give_memory_back() -> None:
    """Return freed memory to the system, where the C library can do that (glibc); others keep it for later use."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
