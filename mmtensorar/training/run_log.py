"""The step log of a run: one terminal line, one JSON line, TensorBoard curves and sample grids."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

STOPPED = "stopped.json"


def peak_memory_gib() -> float:
    """Peak accelerator memory of this process in GiB; on CPU its peak resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def read_log(path: str | Path) -> list[dict]:
    """Rows of a log.jsonl. A torn last line (the run was killed while writing) is left out."""
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is not JSON") from None
    return rows


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large matrix product here, the fastest of three: what a step's are measured against."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(4):  # the first one starts things up
        watch = Stopwatch(device)
        a @ b
        watch.lap("product")
        seconds.append(watch.seconds()["product"])
    return 2 * side**3 / min(seconds[1:])


class Stopwatch:
    """Where the time goes, lap by lap; on a GPU by events among its work, so that nothing waits for the clock."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks = [("", self._now())]

    def lap(self, name: str) -> None:
        """The time since the lap before was this."""
        self.marks.append((name, self._now()))

    def seconds(self) -> dict[str, float]:
        """Name -> seconds of the laps since the last call."""
        if self.on_gpu:
            self.marks[-1][1].synchronize()
        found: dict[str, float] = {}
        for (_, began), (name, ended) in zip(self.marks, self.marks[1:], strict=False):
            found[name] = found.get(name, 0.0) + (
                began.elapsed_time(ended) / 1000 if self.on_gpu else ended - began
            )
        del self.marks[:-1]
        return found

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


Event = tuple[str, float, int]  # name, value, step


class StepLog:
    """Writes a run's numbers; only rank 0 owns one.

    folder: the run folder; log.jsonl, tensorboard/ and samples/ are made inside. curves: whether tensorboard/ is. monitor: where
    else each step's numbers go.
    start_step: steps already done. Rows past it, left by a run that was stopped after its
    last checkpoint, are dropped, so that the log holds each step once.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        num_steps: int,
        start_step: int = 0,
        log_every: int = 10,
        curves: bool = True,
        monitor: Callable[[list[Event]], None] | None = None,
    ):
        self.folder = Path(folder)
        self.num_steps = num_steps
        self.log_every = log_every
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("log.jsonl", "skipped.jsonl"):
            path = self.folder / name
            kept = [row for row in read_log(path) if row["step"] <= start_step] if start_step else []
            if kept or path.is_file():
                partial = path.with_suffix(".jsonl.partial")
                partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
                os.replace(partial, path)
        (self.folder / STOPPED).unlink(missing_ok=True)
        self.file = (self.folder / "log.jsonl").open("a", encoding="utf-8")
        self.curves = self._open_curves(start_step) if curves else None
        self.monitor = monitor
        self.started = time.monotonic()
        self.first_step = start_step

    def _open_curves(self, start_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print(
                "note: tensorboard is not installed, so no curves are written; log.jsonl has the numbers",
                flush=True,
            )
            return None
        # purge_step hides the points that an earlier, stopped run wrote after its last checkpoint.
        return SummaryWriter(self.folder / "tensorboard", purge_step=start_step + 1 if start_step else None)

    def step(self, row: dict) -> None:
        """Record one optimiser step.

        row: step (int, 1 is the first), loss (nats per token), loss_per_offset (list, offset 0
        first), lr, grad_norm, tokens_per_s (image tokens, all ranks), memory_gib (peak, rank 0). Of rank 0's time: seconds (a
        dictionary: data, forward, backward, step, validation and sample, and save of the checkpoint before), data_share, and mfu, the
        share of a matrix product's rate at which the model's FLOPs were done, without those done again. num_skipped
        (damaged samples so far), validation_loss, validation_loss_per_offset, validation_accuracy_per_offset and
        revised_per_offset where there are any.
        """
        # JSON has no NaN or infinity; such a value becomes null rather than an unreadable line.
        self.file.write(json.dumps({key: _finite(value) for key, value in row.items()}) + "\n")
        self.file.flush()
        step = row["step"]
        events = [event for key, value in row.items() if key != "step" for event in _events(key, value, step)]
        if self.curves is not None:
            for event in events:
                self.curves.add_scalar(*event)
        if self.monitor is not None:
            self.monitor(events)
        if step % self.log_every == 0 or step in (1, self.num_steps) or "validation_loss" in row:
            print(self.line(row), flush=True)

    def skipped(self, step: int, sentence: str) -> None:
        """Record a damaged sample whose place another one took, in skipped.jsonl."""
        with (self.folder / "skipped.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "problem": sentence}) + "\n")

    def stopped(self, step: int, reason: str, samples: list[str]) -> None:
        """Record what a run stopped at before its end, and on which samples."""
        content = {"step": step, "reason": reason, "samples": samples}
        (self.folder / STOPPED).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def line(self, row: dict) -> str:
        """The terminal line of a row."""
        step = row["step"]
        per_step_s = (time.monotonic() - self.started) / max(1, step - self.first_step)
        left_min = per_step_s * (self.num_steps - step) / 60
        offsets = " ".join(f"{value:.3f}" for value in row["loss_per_offset"])
        validated = f"  validation loss {row['validation_loss']:.4f}" if "validation_loss" in row else ""
        return (
            f"step {step}/{self.num_steps}  loss {row['loss']:.4f}  per offset [{offsets}]  lr {row['lr']:.2e}  "
            f"grad norm {row['grad_norm']:.3f}  {row['tokens_per_s']:.0f} tokens/s  MFU {row['mfu']:.1%}  {row['memory_gib']:.1f} GiB  "
            f"{left_min:.0f} min left{validated}"
        )

    def images(self, step: int, images: list[Image.Image]) -> Path:
        """Save pictures as one grid, samples/step_N.png; returns its path."""
        grid = image_grid(images)
        path = self.folder / "samples" / f"step_{step}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grid.save(path)
        if self.curves is not None:
            import numpy as np

            self.curves.add_image("samples", np.asarray(grid), step, dataformats="HWC")
        return path

    def close(self) -> None:
        self.file.close()
        if self.curves is not None:
            self.curves.close()


def image_grid(images: list[Image.Image]) -> Image.Image:
    """Pictures of one size -> one picture, as square a grid as their number allows, row by row."""
    num, (width, height) = len(images), images[0].size
    columns = int(num**0.5)
    columns += columns * columns < num
    rows = -(-num // columns)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for place, image in enumerate(images):
        grid.paste(image, (place % columns * width, place // columns * height))
    return grid


def _events(key: str, value: float | list | dict, step: int) -> list[Event]:
    """A number, or one for each part of a list or dictionary."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        return [(f"{key}/{part}", each, step) for part, each in value.items()]
    return [(key, value, step)]


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
