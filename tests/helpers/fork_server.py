"""A process that has imported everything and forks one child for each run that a test
asks for.

Importing torch, transformers, deepspeed and this package takes about 10 seconds. A fork
of a process that has imported them starts in a tenth of a second. The server itself
starts no thread and no process group, so a child is as good as a fresh process.

Run as a module, this file is the server: it reads one JSON request per line from
standard input, and answers every request with one JSON line on standard output. When
its input ends, it kills the runs that are left.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.02
# Launchers set these; a test may itself run under one.
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def environment(**changes: str) -> dict[str, str]:
    """The environment of a run on CPU: this process's own without the variables of
    launchers, plus `changes`.
    """
    kept = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # With more threads than cores, the ranks of gloo wait for each other.
    cpu = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return kept | {"PATH": path} | cpu | changes


class Run:
    """A forked run.

    pid is its process, which leads its own process group; out and err are the files of
    its output.
    """

    def __init__(self, server: ForkServer, command: list[str], pid: int, out: Path, err: Path):
        self.args, self.pid, self.returncode = command, pid, None
        self.out, self.err = out, err
        self._server = server

    def poll(self) -> int | None:
        """The exit code (minus the signal's number after a signal), or None while the
        run lasts.
        """
        if self.returncode is None:
            self.returncode = self._server.ask(poll=self.pid)["code"]
        return self.returncode

    def wait(self, timeout_s: float) -> int:
        """Wait for the exit code. Raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout_s, self.out.read_text(errors="replace"))
            time.sleep(POLL_S)
        return code

    def kill(self) -> None:
        """Kill all processes of the run's group that are left, and collect the run."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(60)

    def communicate(self, *, timeout_s: float) -> subprocess.CompletedProcess:
        """Wait for the end, as subprocess.run does; past the timeout, kill the run and
        raise.
        """
        try:
            code = self.wait(timeout_s)
        finally:
            self.kill()
        out, err = (path.read_text(errors="replace") for path in (self.out, self.err))
        return subprocess.CompletedProcess(self.args, code, out, err)


class ForkServer:
    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="fork_server_")
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.fork_server"],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ask(self, **request) -> dict:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the fork server ended with exit code {self._process.wait()}")
        return json.loads(answer)

    def start(
        self,
        *command: object,
        env: dict[str, str] | None = None,
        cwd: Path = ROOT,
        output_of: Run | None = None,
    ) -> Run:
        """Start `python COMMAND`.

        Args:
            command: a script's path, or -m and a module, or -c and code; then
                arguments.
            env: the whole environment; by default `environment()`.
            cwd: the folder in which it starts.
            output_of: a run whose output files this one writes into too, as ranks under
                a launcher do.
        """
        words = [str(word) for word in command]
        out, err = (self._folder_file(kind) for kind in ("out", "err"))
        if output_of is not None:
            out, err = output_of.out, output_of.err
        pid = self.ask(
            command=words,
            env=environment() if env is None else env,
            cwd=str(cwd),
            out=str(out),
            err=str(err),
        )["pid"]
        return Run(self, words, pid, out, err)

    def _folder_file(self, kind: str) -> Path:
        self._count += 1
        return Path(self._folder.name) / f"{self._count}.{kind}"

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


@functools.cache
def shared() -> ForkServer:
    """The one server of this test process.

    It starts at its first use; conftest.py closes it at the end.
    """
    return ForkServer()


def close_shared() -> None:
    if shared.cache_info().currsize:
        shared().close()
        shared.cache_clear()


# ---- the server's side ---------------------------------------------------------------------------


# Imports of the runs, including late ones: inside functions, or through transformers'
# lazy modules.
IMPORTS = (
    "deepspeed",
    "torch.utils.tensorboard",
    "transformers.models.janus.modeling_janus",
    "transformers.models.t5.modeling_t5",
    "bitsandbytes",
    "peft",
    "mmtensorar.pipeline",
    "mmtensorar.train",
)


def import_everything() -> None:
    for name in IMPORTS:
        with suppress(ImportError):  # an extra that is not installed; runs that need it fail later
            importlib.import_module(name)
    # DeepSpeed asks for the processor's name whenever it loads an operator, which
    # starts a process and takes a second.
    with suppress(ImportError):
        import cpuinfo

        cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    # The garbage collector need not look through what is imported in each run. At the
    # end it must: libraries complain of leaks otherwise.
    gc.freeze()
    atexit.register(gc.unfreeze)


def become(request: dict) -> None:
    """In the child: become the requested run, and end as it ends."""
    os.setsid()
    redirect = {0: (os.devnull, os.O_RDONLY)}
    for number, key in ((1, "out"), (2, "err")):
        redirect[number] = (request[key], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, (path, flags) in redirect.items():
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    first, *arguments = request["command"]
    if first == "-m":
        module, *arguments = arguments
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif first == "-c":
        code, *arguments = arguments
        sys.argv = ["-c", *arguments]
        exec(code, {"__name__": "__main__"})
    else:
        sys.argv = [first, *arguments]
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")


def exit_code(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def serve() -> None:
    import_everything()
    running, codes = set(), {}
    # Reads bytes without Python's buffer: a child must not inherit half a request.
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    while line := requests.readline():
        request = json.loads(line)
        if "poll" in request:
            pid = request["poll"]
            if pid in running and (code := exit_code(pid)) is not None:
                running.remove(pid)
                codes[pid] = code
            answer = {"code": codes.get(pid)}
        else:
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                requests.close()
                become(request)
                return
            running.add(pid)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)
    for pid in running:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
