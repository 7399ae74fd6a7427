"""The step log of a run: one terminal line, one JSON line, TensorBoard curves and sample grids."""

from __future__ import annotations

import json
import os
import time
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


class StepLog:
    """Writes a run's numbers; only rank 0 owns one.

    folder: the run folder; log.jsonl, tensorboard/ and samples/ are made inside.
    start_step: steps already done. Rows past it, left by a run that was stopped after its
    last checkpoint, are dropped, so that the log holds each step once.
    """

    def __init__(self, folder: str | Path, *, num_steps: int, start_step: int = 0, log_every: int = 10):
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
        self.curves = self._open_curves(start_step)
        self.started = time.monotonic()
        self.first_step = start_step

    def _open_curves(self, start_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("note: tensorboard is not installed, so no curves are written; log.jsonl has the numbers", flush=True)
            return None
        # purge_step hides the points that an earlier, stopped run wrote after its last checkpoint.
        return SummaryWriter(self.folder / "tensorboard", purge_step=start_step + 1 if start_step else None)

    def step(self, row: dict) -> None:
        """Record one optimiser step.

        row: step (int, 1 is the first), loss (nats per token), loss_per_offset (list, offset 0
        first), lr, grad_norm, data_share (of the step's time, waiting for data, rank 0), tokens_per_s (image tokens, all
        ranks), memory_gib (peak, rank 0); num_skipped (damaged samples so far), validation_loss and
        validation_loss_per_offset where there are any.
        """
        # JSON has no NaN or infinity; such a value becomes null rather than an unreadable line.
        self.file.write(json.dumps({key: _finite(value) for key, value in row.items()}) + "\n")
        self.file.flush()
        step = row["step"]
        if self.curves is not None:
            for key, value in row.items():
                if key == "step":
                    continue
                if isinstance(value, list):
                    for offset, item in enumerate(value):
                        self.curves.add_scalar(f"{key}/{offset}", item, step)
                else:
                    self.curves.add_scalar(key, value, step)
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
            f"grad norm {row['grad_norm']:.3f}  {row['tokens_per_s']:.0f} tokens/s  {row['memory_gib']:.1f} GiB  "
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


def _finite(value):
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
