"""Where the work of making shards is done: in processes of this machine, or on a Ray cluster.

Both call one function on each of many tasks, in any order, and give the results back as they come.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

Result = TypeVar("Result")


def in_processes(function: Callable[..., Result], tasks: Sequence[tuple], workers: int) -> Iterator[Result]:
    """function(*task) for each task, in any order. An error or an interrupt ends all workers at once."""
    if workers == 1 or len(tasks) <= 1:
        yield from (function(*task) for task in tasks)
        return
    with ProcessPoolExecutor(min(workers, len(tasks)), initializer=follow_parent) as pool:
        try:
            for future in as_completed([pool.submit(function, *task) for task in tasks]):
                yield future.result()
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def follow_parent() -> None:
    """In a worker: end without a word at Ctrl-C, and when the parent is gone, however it ended."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
