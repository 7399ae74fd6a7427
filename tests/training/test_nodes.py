"""Training on several nodes, which are processes on this machine.

When one node is lost, the other continues. Two hosts train together through the
launcher.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmtensorar.training import run_log
from tests.helpers.fork_server import Run, environment
from tests.helpers.runs import ALIKE, TRAIN, assert_close, fork_ranks, free_port, rows, run

psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.launch
BIN = Path(sys.executable).parent


def end(processes: list[subprocess.Popen | Run]) -> None:
    """Kill processes and everything they started, all at once."""
    tree = []
    for process in processes:
        if process.poll() is None:
            parent = psutil.Process(process.pid)
            tree += [parent, *parent.children(recursive=True)]
    for member in tree:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pass
    for process in processes:
        process.wait(60)


def listens(port: int) -> bool:
    """Whether a server of this machine accepts connections at the port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(
    happened: Callable[[], bool],
    processes: list[subprocess.Popen | Run],
    logs: list[Path],
    *,
    timeout_s: float,
) -> None:
    """Wait for an event.

    Raises AssertionError with the logs when a process fails first, or at the timeout.
    """
    deadline = time.monotonic() + timeout_s
    while not happened():
        failed = [process.returncode for process in processes if process.poll()]
        if failed or time.monotonic() > deadline:
            raise AssertionError(
                f"exit codes {failed}\n" + "\n".join(path.read_text()[-2000:] for path in logs)
            )
        time.sleep(0.05)


def test_a_run_survives_the_loss_of_a_node(bench, tmp_path):
    """torchrun with one to two nodes: when one node is killed, the other restarts alone
    from the last run state. The losses equal those of a run on one node.
    """
    steps, folder = 60, bench / "runs" / "elastic"
    # Drafts sampled from the model would amplify rounding: a token near a tie would be
    # drawn differently.
    settings = [
        "zero.stage=2",
        f"train.steps={steps}",
        "tensorar.schedule=exponential",
        "train.save_every=1",
        *ALIKE,
    ]
    # Both torchruns are forked, so the second one joins at once, well before the last
    # call.
    conditions = "last_call_timeout=8,join_timeout=60,keep_alive_interval=1,keep_alive_max_attempt=3"
    port = free_port()
    command = [
        "-m",
        "torch.distributed.run",
        "--nnodes=1:2",
        "--nproc-per-node=1",
        "--max-restarts=3",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-id=test",
        f"--rdzv-conf={conditions}",
        "--local-addr=127.0.0.1",
        *[str(TRAIN), str(bench / "recipe.yaml"), "run.name=elastic", "train.resume=auto", *settings],
    ]
    nodes, logs = [], []
    latest = folder / "checkpoints" / "latest"
    try:
        for _ in range(2):
            nodes += fork_ranks(*command, cwd=bench)
            logs.append(nodes[-1].out)
            # The node that listens first keeps the rendezvous, so it must be the one
            # that survives.
            wait_for(lambda: listens(port), nodes, logs, timeout_s=120)

        def both_trained() -> bool:
            """On a busy machine the second node joins late, and the first restarts with
            it.
            """
            try:
                step = latest.read_text()
                saved = json.loads((folder / "checkpoints" / step / "state.json").read_text())
            except FileNotFoundError:  # none yet, or replaced by a later one
                return False
            return step >= "step_000003" and saved["world_size"] == 2

        wait_for(both_trained, nodes, logs, timeout_s=120)
        end(nodes[1:])
        wait_for(lambda: (folder / "model" / "checkpoint.json").is_file(), nodes[:1], logs, timeout_s=180)
    finally:
        end(nodes)
    assert "continuing" in logs[0].read_text()
    last = json.loads((folder / "checkpoints" / f"step_{steps:06d}" / "state.json").read_text())
    assert last["world_size"] == 1
    alone = run(bench, "run.name=never_lost", "train.save_every=0", *settings[:3], *ALIKE)
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert [row["step"] for row in rows(bench, "elastic")] == list(range(1, steps + 1))
    assert_close(rows(bench, "elastic")[:20], rows(bench, "never_lost")[:20])


def _namespaces_work() -> bool:
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    made = (
        subprocess.run(
            ["ip", "netns", "add", "mmtensorar_probe"], capture_output=True, check=False
        ).returncode
        == 0
    )
    return (
        made
        and subprocess.run(
            ["ip", "netns", "del", "mmtensorar_probe"], capture_output=True, check=False
        ).returncode
        == 0
    )


@pytest.fixture
def two_hosts():
    """Two network namespaces, each with its own address, connected by a virtual
    cable.
    """
    if not _namespaces_work():
        pytest.skip("network namespaces need root and iproute2")
    names = [f"mmtensorar_{os.getpid()}_{host}" for host in "ab"]
    addresses = ["10.77.0.1", "10.77.0.2"]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield list(zip(names, addresses, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_two_hosts_train_together_through_the_launcher(bench, two_hosts, tmp_path):
    """deepspeed with a hostfile is started on both hosts; only the cable connects
    them.
    """
    (tmp_path / "hostfile").write_text("".join(f"{address} slots=1\n" for _, address in two_hosts))
    hosts, logs = [], []
    # The launcher reserves a few ports after this one.
    port = str(free_port())
    try:
        for number, (name, _) in enumerate(two_hosts):
            logs.append(tmp_path / f"{number}.log")
            command = [
                "ip",
                "netns",
                "exec",
                name,
                str(BIN / "deepspeed"),
                "--hostfile",
                str(tmp_path / "hostfile"),
                "--no_ssh",
            ]
            command += ["--node_rank", str(number), "--master_addr", two_hosts[0][1], "--master_port", port]
            command += [str(TRAIN), str(bench / "recipe.yaml"), "run.name=hosts", "zero.stage=3", *ALIKE]
            variables = environment() | {"GLOO_SOCKET_IFNAME": "eth0"}
            hosts.append(
                subprocess.Popen(
                    command, env=variables, stdout=logs[-1].open("w"), stderr=subprocess.STDOUT, cwd=bench
                )
            )
        wait_for(lambda: all(host.poll() == 0 for host in hosts), hosts, logs, timeout_s=180)
    finally:
        end(hosts)
    folder = bench / "runs" / "hosts"
    assert json.loads((folder / "checkpoints" / "step_000004" / "state.json").read_text())["world_size"] == 2
    assert len(run_log.read_log(folder / "log.jsonl")) == 4
