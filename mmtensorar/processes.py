"""What is of a process, not of training: how it ends when it is one of several ranks, and its memory."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from contextlib import suppress
from typing import NoReturn

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


def give_memory_back() -> None:
    """Return freed memory to the system, where the C library can do that (glibc); others keep it for later use."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
