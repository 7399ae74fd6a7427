"""Process helpers: stop signals, the run-folder lock, a clean exit under a launcher,
returning freed memory.

Imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TextIO

import torch

CHECKPOINT_THREAD = "checkpoint"  # name of the thread that writes a run state in the background


# ---- end of a process ----------------------------------------------------------------------------


def exit_process(code: int) -> NoReturn:
    """End this process with an exit code, after its output was flushed and its last run
    state written.

    After an error the process group is left as it is: to destroy it could wait for a
    rank that has ended already, and an interpreter that ends while the group's threads
    run may abort ("terminate called without an active exception") with another exit
    code.
    """
    for thread in threading.enumerate():
        if thread.name == CHECKPOINT_THREAD:
            thread.join()  # a run state from before the error is worth keeping
    if code and torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class StopSignals:
    """SIGINT and SIGTERM as a request to stop after the step in progress.

    The handler only records the signal, so that the step ends on every rank before
    anything is saved. A second Ctrl-C more than a second after the first raises
    KeyboardInterrupt: launchers pass a Ctrl-C on as further signals, so only a later
    one is meant by a person.
    """

    def __init__(self, announce: Callable[[str], None] = print):
        """announce: receives one sentence when the first signal arrives."""
        self.announce = announce
        self.received: int | None = None  # number of the first signal
        self._received_at = 0.0

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as shells have it; of SIGTERM when only
        another rank received one.
        """
        return 128 + (self.received or signal.SIGTERM)

    def install(self) -> None:
        """Handle both signals from now on.

        The handlers stay until the process ends, so that a launcher's repeated signal
        cannot kill a rank that has just finished saving.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT and time.monotonic() - self._received_at > 1:
            raise KeyboardInterrupt
        if not self.requested:
            self.received, self._received_at = number, time.monotonic()
            self.announce(
                "stopping after the step in progress and saving; Ctrl-C again quits at once, without saving"
            )


# ---- run-folder lock -----------------------------------------------------------------------------

_locked: list[TextIO] = []  # the open lock files of this process


class RunFolderLock:
    """Only one process at a time works in a run folder.

        with RunFolderLock(folder): ...

    The lock is on FOLDER/lock, which holds the owner's process id and host. The
    operating system frees it when the process ends, however it ends. On a file system
    without locks nothing is locked.
    """

    def __init__(self, folder: Path, *, timeout_s: float = 0, otherwise: str = "choose another run.name"):
        """
        Args:
            folder: the run folder; it is created.
            timeout_s: seconds to wait for another process to release the lock.
            otherwise: advice for the error message, after "stop it, or".
        """
        self.folder, self.timeout_s, self.otherwise = folder, timeout_s, otherwise
        self._file: TextIO | None = None

    def __enter__(self) -> RunFolderLock:
        """Take the lock.

        Raises ValueError when another process still has it after timeout_s seconds.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = (self.folder / "lock").open("a+", encoding="utf-8")
        deadline, announced = time.monotonic() + self.timeout_s, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                owner = file.read(200).strip() or "unknown"
                problem = f"{self.folder}: another process works in this folder ({owner})"
                if time.monotonic() >= deadline:
                    file.close()
                    raise ValueError(f"{problem}; stop it, or {self.otherwise}") from None
                if not announced:
                    print(f"{problem}; waiting up to {self.timeout_s:g} s for it to end", flush=True)
                announced = True
                time.sleep(1)
            except OSError:  # this file system has no locks
                file.close()
                return self
        self._file = file
        _locked.append(file)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
            if self._file in _locked:
                _locked.remove(self._file)
            self._file = None


def release_in_child() -> None:
    """In a forked child: close the parent's lock files, so that the locks end with the
    parent.
    """
    for file in _locked:
        file.close()
    _locked.clear()


# ---- memory --------------------------------------------------------------------------------------


def give_memory_back() -> None:
    """Return freed memory to the operating system where the C library can (glibc);
    others keep it for reuse.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
