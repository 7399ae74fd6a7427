"""Where the work of making shards is done: in processes of this machine, or on a Ray cluster.

Both call one function on each of many tasks, in any order, and give the results back as they come.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_processes(function: Callable[..., Result], tasks: Sequence[tuple], workers: int) -> Iterator[Result]:
    """function(*task) for each task, in any order. An error or an interrupt ends all workers at once."""
    if workers == 1 or len(tasks) <= 1:
        yield from (function(*task) for task in tasks)
        return
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(min(workers, len(tasks)), initializer=follow_parent) as pool:
        try:
            for future in as_completed([pool.submit(function, *task) for task in tasks]):
                yield future.result()
        except BaseException:
            for process in multiprocessing.active_children():
                if process not in others:
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


# ---- Ray -------------------------------------------------------------------------------------


class OnRay:
    """A function on each of many tasks, on the workers of Ray Data. address: of a cluster; None starts Ray on this machine.

    A task whose worker dies is tried again by Ray, elsewhere. What a task reads and writes has to be at a place that all of the
    cluster's machines reach: a shared folder, or a URL. This project's own code is sent to a cluster, its libraries are not.
    """

    def __init__(self, address: str | None, workers: int):
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise ValueError(
                f"--engine ray needs a library: pip install 'mmtensorar[ray]' ({error})"
            ) from None
        self.ray = ray
        os.environ.setdefault(
            "RAY_USAGE_STATS_ENABLED", "0"
        )  # reports to Ray's makers are for the user to allow
        settings: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
        if address is None:
            settings |= {"num_cpus": workers, "include_dashboard": False}
        else:
            _reach(address)
            import data_tools
            import mmtensorar

            modules = [str(Path(module.__file__).parent) for module in (data_tools, mmtensorar)]
            settings |= {"address": address, "runtime_env": {"py_modules": modules}}
        if not ray.is_initialized():
            try:
                ray.init(**settings)
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:300]
                raise ValueError(f"no Ray cluster at {address or 'this machine'} ({reason})") from error
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # ours counts images
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)

    def __call__(
        self, function: Callable[..., Result], tasks: Sequence[tuple], workers: int
    ) -> Iterator[Result]:
        """function(*task) for each task, in any order. A task's ValueError is raised here."""
        if not tasks:
            return
        # A block each: the unit that Ray gives to a worker, and tries again.
        rows = [{"task": pickle.dumps((function, task))} for task in tasks]
        data = self.ray.data.from_items(rows, override_num_blocks=len(rows)).map(_of_row)
        try:
            for row in data.iter_rows():
                result, error = pickle.loads(row["result"])
                if error is not None:
                    raise ValueError(error)
                yield result
        except self.ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[:500]
            raise ValueError(
                f"Ray gave up ({type(error).__name__}: {reason}); the same command goes on from here"
            ) from error


def _reach(address: str) -> None:
    """Raise ValueError when nothing listens at HOST:PORT: Ray itself would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise ValueError(f"no Ray cluster at {address} ({error})") from None


def _of_row(row: dict[str, bytes]) -> dict[str, bytes]:
    """In a worker. A sentence comes back as a result: Ray would wrap the error, and print its traceback."""
    function, task = pickle.loads(row["task"])  # which the driver made
    try:
        result, error = function(*task), None
    except ValueError as failure:
        result, error = None, str(failure)
    return {"result": pickle.dumps((result, error))}
