"""Where the work of making shards runs: in processes of this machine, or on a Ray
cluster.

An executor calls one function on each of many tasks, in any order, and yields the
results as they come.
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
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
# (function, tasks, number of workers) -> function(*task) of each task, in any order
Executor = Callable[[Callable[..., Any], Sequence[tuple], int], Iterator[Any]]


def in_processes(function: Callable[..., Result], tasks: Sequence[tuple], workers: int) -> Iterator[Result]:
    """function(*task) for each task, in any order, in processes of this machine.

    An error or an interrupt ends all workers at once. Raises ValueError when a worker
    was killed.
    """
    if workers == 1 or len(tasks) <= 1:
        yield from (function(*task) for task in tasks)
        return
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(min(workers, len(tasks)), initializer=end_with_parent) as pool:
        try:
            for future in as_completed([pool.submit(function, *task) for task in tasks]):
                yield future.result()
        except BaseException as error:
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise ValueError(
                    "a worker process was killed, perhaps for lack of memory; try fewer --workers"
                ) from error
            raise


def end_with_parent() -> None:
    """In a worker: end silently at Ctrl-C, and when the parent process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---- Ray -------------------------------------------------------------------------------------


class OnRay:
    """An executor on the workers of Ray Data.

    When a worker dies, Ray runs its task again on another one. What a task reads and
    writes must be reachable from all machines of the cluster: in a shared folder, or at
    a URL. This project's code is sent to the cluster, its libraries are not.

    Args:
        address: Address of a cluster; None starts Ray on this machine.
        workers: CPUs that Ray may use on this machine.
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
        # Usage reports to Ray's makers are off unless the user turns them on.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        settings: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
        if address is None:
            settings |= {"num_cpus": workers, "include_dashboard": False}
        else:
            _check_reachable(address)
            settings |= {"address": address, "runtime_env": {"py_modules": _own_packages()}}
        if not ray.is_initialized():
            try:
                ray.init(**settings)
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:300]
                raise ValueError(f"no Ray cluster at {address or 'this machine'} ({reason})") from error
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # our own bar counts images
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)

    def __call__(
        self, function: Callable[..., Result], tasks: Sequence[tuple], workers: int
    ) -> Iterator[Result]:
        """function(*task) for each task, in any order.

        A task's ValueError is raised here.
        """
        if not tasks:
            return
        # One task per block: a block is the unit that Ray gives to a worker, and
        # repeats.
        rows = [{"task": pickle.dumps((function, task))} for task in tasks]
        data = self.ray.data.from_items(rows, override_num_blocks=len(rows)).map(_run_row)
        try:
            for row in data.iter_rows():
                result, error = pickle.loads(row["result"])
                if error is not None:
                    raise ValueError(error)
                yield result
        except self.ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[:500]
            raise ValueError(
                f"Ray failed ({type(error).__name__}: {reason}); the same command resumes from here"
            ) from error


def _own_packages() -> list[str]:
    """Folders of this project's packages, which workers import."""
    import data_tools
    import mmtensorar
    import worlds

    return [str(Path(path).parent) for path in (data_tools.__file__, mmtensorar.__file__, worlds.__file__)]


def _check_reachable(address: str) -> None:
    """Raise ValueError when nothing listens at HOST:PORT: Ray itself would try for many
    minutes.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise ValueError(f"no Ray cluster at {address} ({error})") from None


def _run_row(row: dict[str, bytes]) -> dict[str, bytes]:
    """In a worker: run a task, which the driver has pickled.

    An error comes back as a result: Ray would wrap it, and print its traceback.
    """
    function, task = pickle.loads(row["task"])
    try:
        result, error = function(*task), None
    except ValueError as failure:
        result, error = None, str(failure)
    return {"result": pickle.dumps((result, error))}
