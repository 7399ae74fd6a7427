"""The step log of a run: terminal lines, JSON lines, TensorBoard curves, sample
grids.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from mmtensorar.files import iterate_lines, write_json_lines, write_text
from mmtensorar.words import time_left

STOPPED = "stopped.json"
CUT = "cut_prompts.jsonl"

Event = tuple[str, float, int]  # name, value, step


def read_log(path: str | Path) -> list[dict]:
    """Rows of a log.jsonl; an empty list when the file is missing.

    An incomplete last line, of a run that was killed while it wrote, is left out.
    Raises ValueError, naming the line, when any other line is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        return []
    with path.open("rb") as file:
        lines = list(iterate_lines(file))
    rows = []
    for number, text, problem, _ in lines:
        try:
            if problem is not None:
                raise ValueError(problem)
            rows.append(json.loads(text))
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is not JSON") from None
    return rows


class StepLog:
    """Records a run's numbers in its run folder. Only rank 0 has one."""

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
        """
        Args:
            folder: the run folder; log.jsonl, tensorboard/ and samples/ are made in it.
            num_steps: steps of the whole run.
            start_step: steps done before. Rows of later steps, left by a run that was
                stopped after its last run state was saved, are dropped, so that the log
                holds each step once.
            log_every: steps between two terminal lines.
            curves: write TensorBoard curves.
            monitor: receives each step's numbers too.
        """
        self.folder = Path(folder)
        self.num_steps = num_steps
        self.log_every = log_every
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("log.jsonl", "skipped.jsonl", CUT):
            path = self.folder / name
            kept = [row for row in read_log(path) if row["step"] <= start_step] if start_step else []
            if kept or path.is_file():
                write_json_lines(path, kept)
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
        # purge_step hides the points that an earlier, stopped run wrote after its last
        # run state.
        return SummaryWriter(self.folder / "tensorboard", purge_step=start_step + 1 if start_step else None)

    def step(self, row: dict) -> None:
        """Record one optimizer step.

        Args:
            row: its keys are
                step: int, the first is 1.
                loss: nats per token.
                loss_per_offset: list, offset 0 first.
                lr, and tensorar_lr when optim.tensorar_lr is set.
                grad_norm: before clipping.
                seconds: rank 0's time for data, forward, backward and step; also for
                    validation, sample and save (of the previous run state).
                data_share: of that time.
                tokens_per_s: image tokens of all ranks.
                mfu: the model's FLOPs, without recomputed ones, divided by those of a
                    matrix product in the same time.
                memory_gib: peak of rank 0.
                prompt_tokens: padded length of rank 0's prompts, of the longest micro batch.
                num_skipped: damaged samples so far, with data.on_error skip.
                num_cut: prompts so far that were longer than the limit, if any.
                validation_loss, validation_loss_per_offset,
                    validation_accuracy_per_offset: after a validation.
                validation_num_cut: prompts that were cut in it, if any.
                revised_per_offset: after a sample grid.
        """
        # JSON has no NaN or infinity; such a value becomes null rather than an
        # unreadable line.
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

    def skipped(self, step: int, problem: str) -> None:
        """Record in skipped.jsonl a damaged sample that another one replaced."""
        with (self.folder / "skipped.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "problem": problem}) + "\n")

    def cut(self, step: int, problem: str) -> None:
        """Record in cut_prompts.jsonl a prompt that was longer than the limit."""
        with (self.folder / CUT).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "problem": problem}) + "\n")

    def stopped(self, step: int, reason: str, samples: list[str]) -> None:
        """Record in stopped.json why a run failed, and the samples of that step."""
        content = {"step": step, "reason": reason, "samples": samples}
        write_text(self.folder / STOPPED, json.dumps(content, indent=1) + "\n")

    def line(self, row: dict) -> str:
        """The terminal line of a row."""
        step = row["step"]
        per_step_s = (time.monotonic() - self.started) / max(1, step - self.first_step)
        left = time_left(per_step_s * (self.num_steps - step))
        offsets = " ".join(f"{value:.3f}" for value in row["loss_per_offset"])
        validated = f"  validation loss {row['validation_loss']:.4f}" if "validation_loss" in row else ""
        return (
            f"step {step}/{self.num_steps}  loss {row['loss']:.4f}  per offset [{offsets}]  "
            f"lr {row['lr']:.2e}  grad norm {row['grad_norm']:.3f}  {row['tokens_per_s']:.0f} tokens/s  "
            f"MFU {row['mfu']:.1%}  {row['memory_gib']:.1f} GiB  {left}{validated}"
        )

    def sample_grid(self, step: int, grid: Image.Image) -> Path:
        """Save a grid of sampled images as samples/step_N.png; returns its path."""
        path = self.folder / "samples" / f"step_{step}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grid.save(path)
        if self.curves is not None:
            import numpy as np

            self.curves.add_image("samples", np.asarray(grid), step, dataformats="HWC")
        return path

    def close(self) -> None:
        """Close the files."""
        self.file.close()
        if self.curves is not None:
            self.curves.close()


def _events(key: str, value: float | list | dict, step: int) -> list[Event]:
    """One event for a number; for a list or dictionary one per element."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        return [(f"{key}/{element}", number, step) for element, number in value.items()]
    return [(key, value, step)]


def _finite(value):
    """The value with null for each number that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
