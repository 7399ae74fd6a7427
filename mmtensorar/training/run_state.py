"""The run state, from which a run resumes, on the same number of ranks or another.

All ranks write it. It is a folder runs/NAME/checkpoints/step_XXXXXX; its files are
described in checkpoints/sharded_state.py.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtensorar.checkpoints import sharded_state
from mmtensorar.files import sha256, write_text
from mmtensorar.processes import SAVER_THREAD
from mmtensorar.training import engine_private
from mmtensorar.training.distributed import on_all_ranks
from mmtensorar.training.ema import Average
from mmtensorar.words import sentence_of

PATIENCE_S = 900  # seconds that rank 0 waits for the next file of another rank

# ---- saving --------------------------------------------------------------------------------------


class Saver:
    """Writes run states to folder/step_XXXXXX.

    The file folder/latest names the last complete one.
    """

    def __init__(
        self,
        engine: Any,
        folder: Path,
        fingerprints: Mapping[str, str],
        *,
        keep_last: int,
        keep_best: bool,
        background: bool,
    ):
        """
        Args:
            engine: the DeepSpeed engine.
            folder: runs/NAME/checkpoints.
            fingerprints: of the run's inputs: {"shards": Manifest.fingerprint, "start":
                model_folder.start_fingerprint}.
            keep_last: number of the newest run states that are kept.
            keep_best: also keep the one with the lowest validation loss; the file
                folder/best names it.
            background: copy the state to host memory and write it while training
                continues.
        """
        self.engine, self.folder, self.fingerprints = engine, folder, dict(fingerprints)
        self.keep_last, self.keep_best, self.background = keep_last, keep_best, background
        self.shapes = [flat.shape for flat in engine_private.flat_tensors(engine)]
        self.pieces = engine_private.pieces_of(engine)
        assert all(
            piece.flat_start + piece.number <= self.shapes[piece.flat].numel() for piece in self.pieces
        )
        # Without ZeRO all ranks have the same state.
        self.num_files = torch.distributed.get_world_size() if engine.zero_optimization_stage() else 1
        self.thread: threading.Thread | None = None
        self.failure: Exception | None = None  # of this rank's last write
        self.failed_before: ValueError | None = None

    def save(
        self, step: int, counted: Mapping[str, object], average: Average | None, device: torch.device
    ) -> None:
        """Write a run state, or begin to. Every rank calls it.

        If writing the previous one failed, this call waits until this one is complete.
        Raises ValueError, on every rank, when it cannot be written either.

        Args:
            step: number of finished steps.
            counted: what else is recorded in state.json: num_skipped, validation_loss,
                validation.
            average: the moving average of the weights, if the run has one.
            device: this rank's device.
        """
        self.look_back(device)
        failed_before, self.failed_before = self.failed_before, None
        rank, target = torch.distributed.get_rank(), self.folder / f"step_{step:06d}"

        def prepare() -> None:
            shutil.rmtree(target, ignore_errors=True)  # left by a run that was killed while it wrote
            target.mkdir(parents=True)

        def check_visible() -> None:
            if not target.is_dir():
                raise ValueError(
                    f"rank {rank} does not see {target}, which rank 0 has made: run.out must be a folder "
                    "that all nodes share"
                )

        on_all_ranks(lambda: prepare() if rank == 0 else None, device)
        on_all_ranks(check_visible, device)
        state = _state(self.engine, average)
        recorded: dict[str, object] = {
            "format": sharded_state.FORMAT,
            "step": step,
            "num_files": self.num_files,
            **counted,
            **self.fingerprints,
            "world_size": torch.distributed.get_world_size(),
            "zero_stage": self.engine.zero_optimization_stage(),
        }
        if self.background and failed_before is None:
            arguments = (rank, target, sharded_state.copied(state) if rank < self.num_files else [], recorded)
            self.thread = threading.Thread(target=self._write, args=arguments, name=SAVER_THREAD)
            self.thread.start()
            return
        self._write(rank, target, state, recorded)
        self.finish(device)
        if failed_before is not None and rank == 0:
            print(f"note: the run state of step {step} is complete", flush=True)

    def look_back(self, device: torch.device) -> None:
        """Wait for the write in progress.

        If it failed, print that, and the next save waits. Every rank calls it.
        """
        try:
            self.finish(device)
        except ValueError as error:
            self.failed_before = error
            if torch.distributed.get_rank() == 0:
                print(
                    f"note: {error}; training continues, and waits for the next one (train.save_every)",
                    flush=True,
                )

    def finish(self, device: torch.device) -> None:
        """Wait for the write in progress.

        Every rank calls it; raises ValueError on every rank if it failed.
        """
        self.wait()

        def report() -> None:
            failure, self.failure = self.failure, None
            if failure is not None:
                reason = sentence_of(failure)
                raise ValueError(f"{self.folder}: a run state could not be written ({reason})") from failure

        on_all_ranks(report, device)

    def wait(self) -> None:
        """Wait for this rank's write in progress, without looking at its result."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _write(self, rank: int, target: Path, state: sharded_state.State, recorded: dict) -> None:
        try:
            if rank < self.num_files:
                sharded_state.write(target, rank, self.pieces, self.shapes, state)
            if rank == 0:
                self._complete(target, recorded)
        except Exception as error:  # any: this may be another thread, and `finish` reports it
            self.failure = error
            with suppress(OSError):
                (target / f"rank_{rank:05d}.failed").touch()

    def _complete(self, target: Path, recorded: dict) -> None:
        """On rank 0: wait for the other ranks' files, then make this run state the
        latest.

        Deletes the run states that are not kept.

        Raises OSError when another rank failed, or wrote nothing for PATIENCE_S
        seconds.
        """
        pause_s, waited_s, missing = 0.001, 0.0, sharded_state.missing(target, self.num_files)
        while missing:
            # Ranks exchange nothing but files here: collectives of this thread would
            # mix with those of training.
            if failed := sorted(path.stem for path in target.glob("*.failed")):
                raise OSError(f"{failed[0]} could not write its files")
            if waited_s > PATIENCE_S:
                raise OSError(f"rank {missing[0]} has written nothing for {PATIENCE_S} seconds")
            time.sleep(pause_s)
            pause_s, waited_s = min(1.0, pause_s * 2), waited_s + pause_s
            still_missing = sharded_state.missing(target, self.num_files)
            missing, waited_s = still_missing, 0.0 if len(still_missing) < len(missing) else waited_s
        recorded["sha256"] = sharded_state.digests(target, self.num_files)
        write_text(target / sharded_state.STATE, json.dumps(recorded) + "\n")
        write_text(self.folder / "latest", target.name)
        with suppress(OSError):  # the run state is complete, whatever could not be deleted
            self._tidy(recorded["step"])

    def _tidy(self, step: int) -> None:
        """Delete the run states that are not kept, also those of later steps.

        Later steps exist when a run was set back to an earlier one.
        """
        complete: dict[Path, dict] = {}  # oldest first
        for path in sorted(
            self.folder.glob(f"step_*/{sharded_state.STATE}"),
            key=lambda path: sharded_state.step_of(path.parent),
        ):
            with suppress(ValueError):
                complete[path.parent] = sharded_state.recorded(path.parent)
        complete = {path: state for path, state in complete.items() if state["step"] <= step}
        kept = set(list(complete)[-max(1, self.keep_last) :])
        best = self._best(complete) if self.keep_best else None
        if best is not None:
            write_text(self.folder / "best", best.name)
            kept.add(best)
        else:
            (self.folder / "best").unlink(missing_ok=True)
        for path in self.folder.glob("step_*"):
            if path not in kept and path.is_dir():
                # Renamed first, so that a half-deleted folder never looks like a run
                # state.
                doomed = path.with_name(f"deleted_{path.name}")
                path.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
        for path in self.folder.glob("deleted_*"):  # left by a run that was killed here
            shutil.rmtree(path, ignore_errors=True)

    @staticmethod
    def _best(complete: Mapping[Path, dict]) -> Path | None:
        """The run state with the lowest validation loss, None when no loss is known."""
        if not complete:
            return None
        # A run may resume with another validation set; losses of different sets cannot
        # be compared.
        current = complete[max(complete, key=sharded_state.step_of)].get("validation")
        losses: dict[Path, float] = {
            path: state["validation_loss"]
            for path, state in complete.items()
            if state.get("validation_loss") is not None and state.get("validation") == current
        }
        return min(losses, key=losses.__getitem__) if losses else None


def _state(engine: Any, average: Average | None) -> sharded_state.State:
    """The tensors of this rank's run state: master copy, moments and average of each
    flat tensor.

    They are not copied.
    """
    moments, state = engine_private.base_optimizer(engine).state, []
    for number, flat in enumerate(engine_private.flat_tensors(engine)):
        values = {"master": flat.detach(), **moments.get(flat, {})}
        if average is not None:
            values["average"] = average.averages[number]
        state.append(values)
    return state


# ---- resuming ------------------------------------------------------------------------------------


def latest_step(folder: Path) -> int | None:
    """Step of the run state that `latest` names, None when the run has none yet."""
    return latest_state(folder).get("step")


def latest_state(folder: Path) -> dict:
    """What was recorded with the last run state; empty when the run has none yet."""
    has_any = (folder / "latest").is_file() or any(folder.glob(f"step_*/{sharded_state.STATE}"))
    return sharded_state.latest(folder) if has_any else {}


INPUTS = {"start": "the weights that it started from", "shards": "its training data"}


def check_recorded(
    folder: Path, expected: Mapping[str, object], settings: Mapping[str, str] | None = None
) -> dict:
    """What was recorded with the last run state.

    Args:
        folder: checkpoints/ of a run folder.
        expected: fingerprints of the inputs, see Saver.
        settings: the setting of each input, and its folder, for the message.

    Raises ValueError when it was saved with other inputs.
    """
    recorded = sharded_state.latest(folder)
    for key, value in expected.items():
        if recorded.get(key) != value:
            named = f" ({settings[key]})" if settings and key in settings else ""
            raise ValueError(
                f"cannot resume {folder.parent}: {INPUTS.get(key, key)}{named} changed since step "
                f"{recorded.get('step')}: put back the earlier files; {how_to_start_from(folder.parent)}"
            )
    return recorded


def how_to_start_from(run: Path) -> str:
    """Advice for a run that cannot be resumed: how a new one starts from its
    weights.
    """
    if (run / "model").is_dir():
        return f"to start a new run from its model: another run.name, and train.init_from={run / 'model'}"
    return (
        f"to start a new run from its weights: mmtensorar export {run} --out FOLDER, then another run.name "
        "and train.init_from=FOLDER"
    )


def resume(engine: Any, folder: Path, fingerprints: Mapping[str, str], average: Average | None = None) -> int:
    """Load the latest run state into the engine and the average; return its step.

    The number of ranks and the ZeRO stage may differ from those that wrote it. Raises
    ValueError, on every rank, when it is damaged, or was written from other shards or
    weights.
    """
    recorded = check_recorded(folder, fingerprints)
    step, device = recorded["step"], engine.device
    target = folder / f"step_{step:06d}"
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    on_all_ranks(lambda: _check_files(folder, target, recorded, rank, world_size), device)
    shapes = [flat.shape for flat in engine_private.flat_tensors(engine)]
    pieces = engine_private.pieces_of(engine)
    state = on_all_ranks(
        lambda: sharded_state.read(target, rank, world_size, recorded["num_files"], pieces, shapes), device
    )
    optimizer = engine_private.base_optimizer(engine)
    with engine_private.loading_flat_tensors(engine) as flats:
        for number, (flat, values) in enumerate(zip(flats, state, strict=True)):
            flat.data.copy_(values.pop("master"))
            if average is not None:
                average.averages[number].copy_(values.pop("average"))
            _load_moments(optimizer, flat, values)
    engine_private.set_step(engine, step)
    return step


def _check_files(folder: Path, target: Path, recorded: dict, rank: int, world_size: int) -> None:
    """Raise ValueError when a file is not the one that was written.

    The ranks share the work of hashing.
    """
    for name in sorted(recorded["sha256"])[rank::world_size]:
        path = target / name
        if not path.is_file() or sha256(path) != recorded["sha256"][name]:
            problem = "is not the file that was written" if path.is_file() else "is missing"
            raise ValueError(
                f"cannot resume {folder.parent}: the run state {target} is damaged ({name} {problem}); "
                + sharded_state.recovery_hint(folder, target.name)
            )


def _load_moments(optimizer: Any, flat: Tensor, values: Mapping[str, Any]) -> None:
    """Put the saved moments of a flat tensor into the optimizer's state."""
    moments = optimizer.state.get(flat, {})
    is_paged = getattr(optimizer, "is_paged", False)
    for key, value in values.items():
        is_tensor = isinstance(value, Tensor)
        if key not in moments and is_paged and is_tensor and value.shape == flat.shape:
            # A buffer of bitsandbytes; with any other, all moments would stay on the
            # GPU.
            moments[key] = optimizer.get_state_buffer(flat, dtype=value.dtype)
        if is_tensor and isinstance(moments.get(key), Tensor) and moments[key].shape == value.shape:
            moments[key].copy_(value)  # in place: DeepSpeed and bitsandbytes keep references to some
        else:
            moments[key] = value.to(flat.device) if is_tensor else value
    optimizer.state[flat] = moments
