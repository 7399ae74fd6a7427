"""Measuring a run: time by part of a step, the rate of a matrix product, peak
memory.
"""

from __future__ import annotations

import time
from typing import Any

import torch

MATRIX_SIDES = {"cuda": (8192,), "cpu": (256, 1024)}
LONG_S = 0.5  # a product that takes longer is not worth waiting for


class Stopwatch:
    """Measures the time of named parts, lap by lap.

    On a GPU the laps are CUDA events in the stream of its work, so that measuring does
    not make the CPU wait for the GPU.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = [("", self._now())]

    def lap(self, name: str) -> None:
        """End a lap: the time since the previous one belongs to this name."""
        self.marks.append((name, self._now()))

    def restart(self) -> None:
        """Forget the laps, and the time since the last one."""
        self.marks = [("", self._now())]

    def seconds(self) -> dict[str, float]:
        """Name -> seconds, summed over the laps since the last call."""
        if self.on_gpu:
            self.marks[-1][1].synchronize()
        totals: dict[str, float] = {}
        for (_, began), (name, ended) in zip(self.marks, self.marks[1:], strict=False):
            lap = began.elapsed_time(ended) / 1000 if self.on_gpu else ended - began
            totals[name] = totals.get(name, 0.0) + lap
        del self.marks[:-1]
        return totals

    def _now(self) -> Any:
        """Seconds, or on a GPU an event."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the fastest of three.

    MFU is measured against it. On a CPU a small product comes first, since in bfloat16
    some CPUs take half a minute for the large one. It is the only one where the large
    one would take longer than LONG_S.
    """
    rate = 0.0
    for side in MATRIX_SIDES[device.type]:
        if rate and 2 * side**3 / rate > LONG_S:
            break
        a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
        seconds = []
        for _ in range(4):  # the first one includes start-up costs
            watch = Stopwatch(device)
            torch.mm(a, b)
            watch.lap("product")
            seconds.append(watch.seconds()["product"])
        rate = 2 * side**3 / min(seconds[1:])
    return rate


def slow_bfloat16(device: torch.device, bf16_rate: float) -> str | None:
    """A warning when a CPU is less than half as fast in bfloat16 as in float32.

    CPUs without AVX-512 bf16 instructions are up to 70 times slower in bfloat16.
    Returns None on a GPU, and where bfloat16 is fast enough.

    bf16_rate: `matmul_rate` in bfloat16.
    """
    if device.type != "cpu":
        return None
    fp32_rate = matmul_rate(device, torch.float32)
    if bf16_rate >= fp32_rate / 2:
        return None
    return (
        f"warning: this CPU multiplies matrices {fp32_rate / bf16_rate:.0f} times more slowly in bfloat16 "
        "than in float32; set train.precision=fp32"
    )


def peak_memory_gib() -> float:
    """Peak GPU memory of this process in GiB; without a GPU its peak resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
