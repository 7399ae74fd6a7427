"""Process helpers: stop signals, run-folder lock, clean exit under a launcher, memory.

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

SAVER_THREAD = "run state"  # name of the thread that writes a run state in the background


# ---- end of a process ----------------------------------------------------------------------------


def exit_process(code: int) -> NoReturn:
    """Wait until the last run state is written, then end this process with an exit
    code.

    After an error in a process group, the process ends by os._exit. Destroying the
    process group could wait for a rank that has ended already. A normal exit while the
    group's threads run may abort ("terminate called without an active exception") with
    another exit code.
    """
    for thread in threading.enumerate():
        if thread.name == SAVER_THREAD:
            thread.join()  # a run state from before the error is worth keeping
    torch = sys.modules.get("torch")  # without it there is no process group
    if code and torch is not None and torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class StopSignals:
    """Handles SIGINT and SIGTERM as a request to stop after the step in progress.

    The handler only records the signal, so that the step ends on every rank before
    anything is saved. A second Ctrl-C raises KeyboardInterrupt if it comes more than a
    second after the first. Earlier ones are copies that launchers send.
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
        """128 + the signal's number, as in shells; SIGTERM if another rank received
        it.
        """
        return 128 + (self.received or signal.SIGTERM)

    def install(self) -> None:
        """Handle both signals from now on.

        They stay installed until the process ends. So a launcher's second signal cannot
        kill a rank that has just finished saving.
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
    operating system releases it when the process ends, even after a crash. On a file
    system without locks nothing is locked. A block that ends with an error and has
    written nothing leaves no folder behind, if there was none before.
    """

    def __init__(
        self,
        folder: Path,
        *,
        timeout_s: float = 0,
        otherwise: str = "choose another run.name",
        leaves_nothing: bool = False,
    ):
        """
        Args:
            folder: the run folder; it is created.
            timeout_s: seconds to wait for another process to release the lock.
            otherwise: advice for the error message, after "stop it, or".
            leaves_nothing: remove the lock file at the end, and the folders that were
                created if they are still empty.
        """
        self.folder, self.timeout_s, self.otherwise = folder, timeout_s, otherwise
        self.leaves_nothing = leaves_nothing
        self._created: list[Path] = []  # folders, the deepest first
        self._file: TextIO | None = None

    def __enter__(self) -> RunFolderLock:
        """Take the lock.

        Raises ValueError when another process still has it after timeout_s seconds.
        """
        self._created = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        file = self._open()
        deadline, announced, attempts = time.monotonic() + self.timeout_s, False, 0
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its owner may have removed the file since it was opened. Some network
                # file systems give a file another number each time, hence a few
                # attempts only.
                attempts += 1
                if self._is_there(file) or attempts == 10:
                    break
                file.close()
                file = self._open()
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

    def _open(self) -> TextIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        return (self.folder / "lock").open("a+", encoding="utf-8")

    def _is_there(self, file: TextIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), (self.folder / "lock").stat())
        except FileNotFoundError:
            return False

    def _is_new_and_empty(self) -> bool:
        if not self._created or not self.folder.is_dir():
            return False
        return [path.name for path in self.folder.iterdir()] == ["lock"]

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            if self.leaves_nothing or (any(error) and self._is_new_and_empty()):
                (self.folder / "lock").unlink(missing_ok=True)
                with suppress(OSError):  # not empty, or another process works next to it
                    for path in self._created:
                        path.rmdir()
            self._file.close()
            if self._file in _locked:
                _locked.remove(self._file)
            self._file = None


def release_in_child() -> None:
    """In a forked child: close the parent's lock files, so that it does not keep them
    locked.
    """
    for file in _locked:
        file.close()
    _locked.clear()


# ---- memory --------------------------------------------------------------------------------------


def give_memory_back() -> None:
    """Return freed memory to the operating system; has an effect with glibc only."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
