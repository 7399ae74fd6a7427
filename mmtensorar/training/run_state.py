"""Checkpoints of a run for resuming: written by all ranks, read by as many or others; the files are those of pieces.py."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from mmtensorar.checkpoints import sharded_state
from mmtensorar.checkpoints.sharded_state import Piece
from mmtensorar.files import sha256, write_text
from mmtensorar.processes import CHECKPOINT_THREAD
from mmtensorar.training import engine as deep
from mmtensorar.training.ema import Average

PATIENCE_S = 900  # rank 0 waits so long for another rank's file


class Saver:
    """Writes checkpoints for resuming: folder/step_XXXXXX, see pieces.py, and the file `latest` that names the last whole one.

    keep_last: how many of the newest stay; keep_best: the one of the least validation loss stays too, named by `best`.
    background: training goes on while a copy of the state, in host memory, is written. fingerprints: of the run's inputs,
    {"shards": Manifest.fingerprint, "start": checkpoint.start_fingerprint}.
    """

    def __init__(
        self,
        engine,
        folder: Path,
        fingerprints: Mapping[str, str],
        *,
        keep_last: int,
        keep_best: bool,
        background: bool,
    ):
        self.engine, self.folder, self.fingerprints = engine, folder, dict(fingerprints)
        self.keep_last, self.keep_best, self.background = keep_last, keep_best, background
        self.shapes, self.pieces = deep.flat_shapes(engine), _pieces(engine)
        assert all(
            piece.flat_start + piece.number <= self.shapes[piece.flat].numel() for piece in self.pieces
        )
        # Without ZeRO all ranks hold the same.
        self.num_files = torch.distributed.get_world_size() if engine.zero_optimization_stage() else 1
        self.at_work: threading.Thread | None = None
        self.failure: Exception | None = None
        self.failed_before: ValueError | None = None

    def save(
        self, step: int, counted: Mapping[str, object], average: Average | None, device: torch.device
    ) -> None:
        """Write a checkpoint, or begin to. counted: what else the run counts. Every rank calls it.

        Where the one before could not be written, this one is waited for. Raises ValueError, on every rank, when it cannot be
        written either.
        """
        self.look_back(device)
        failed_before, self.failed_before = self.failed_before, None
        rank, target = torch.distributed.get_rank(), self.folder / f"step_{step:06d}"

        def prepare() -> None:
            shutil.rmtree(target, ignore_errors=True)  # of a run that was killed while it wrote
            target.mkdir(parents=True)

        def look() -> None:
            if not target.is_dir():
                raise ValueError(
                    f"{target} is there for rank 0 and not for rank {rank}: run.out must be a folder that all nodes share"
                )

        deep.together(lambda: prepare() if rank == 0 else None, device)
        deep.together(look, device)
        state = deep.together(lambda: _state(self.engine, average), device)
        recorded = {
            "format": sharded_state.FORMAT,
            "step": step,
            "num_files": self.num_files,
            **counted,
            **self.fingerprints,
        }
        recorded |= {
            "world_size": torch.distributed.get_world_size(),
            "zero_stage": self.engine.zero_optimization_stage(),
        }
        if self.background and failed_before is None:
            arguments = (rank, target, sharded_state.copied(state) if rank < self.num_files else [], recorded)
            self.at_work = threading.Thread(target=self._write, args=arguments, name=CHECKPOINT_THREAD)
            self.at_work.start()
            return
        self._write(rank, target, state, recorded)
        self.finish(device)
        if failed_before is not None and rank == 0:
            print(f"note: the checkpoint of step {step} stands", flush=True)

    def look_back(self, device: torch.device) -> None:
        """Wait until what is being written stands; where it failed say so, and have the next one waited for. Every rank calls it."""
        try:
            self.finish(device)
        except ValueError as error:
            self.failed_before = error
            if torch.distributed.get_rank() == 0:
                print(
                    f"note: {error}; training goes on, and waits for the next one (train.save_every)",
                    flush=True,
                )

    def finish(self, device: torch.device) -> None:
        """Wait until what is being written stands. Every rank calls it; raises ValueError on every rank when it failed."""
        if self.at_work is not None:
            self.at_work.join()
            self.at_work = None

        def report() -> None:
            failure, self.failure = self.failure, None
            if failure is not None:
                raise ValueError(f"{self.folder}: a checkpoint could not be written ({failure})") from failure

        deep.together(report, device)

    def _write(self, rank: int, target: Path, state: sharded_state.State, recorded: dict) -> None:
        try:
            if rank < self.num_files:
                sharded_state.write(target, rank, self.pieces, self.shapes, state)
            if rank == 0:
                self._complete(target, recorded)
        except Exception as error:  # any: this may be another thread, and finish tells it
            self.failure = error
            with suppress(OSError):
                (target / f"rank_{rank:05d}.failed").touch()

    def _complete(self, target: Path, recorded: dict) -> None:
        """On rank 0: wait for the other ranks' files, then make the checkpoint the latest, and delete what is not kept."""
        pause_s, waited_s, left = 0.001, 0.0, sharded_state.missing(target, self.num_files)
        while left:
            # No message passes here: in a thread it would meet the training's own.
            if failed := sorted(path.stem for path in target.glob("*.failed")):
                raise OSError(f"{failed[0]} could not write its files")
            if waited_s > PATIENCE_S:
                raise OSError(f"rank {left[0]} has written nothing for {PATIENCE_S} seconds")
            time.sleep(pause_s)
            pause_s, waited_s = min(1.0, pause_s * 2), waited_s + pause_s
            still = sharded_state.missing(target, self.num_files)
            left, waited_s = still, 0.0 if len(still) < len(left) else waited_s
        recorded["sha256"] = sharded_state.digests(target, self.num_files)
        write_text(target / sharded_state.STATE, json.dumps(recorded) + "\n")
        write_text(self.folder / "latest", target.name)
        with suppress(OSError):  # what stands stands
            self._tidy(recorded["step"])

    def _tidy(self, step: int) -> None:
        """Delete what is not kept; also what is of later steps, from which a run was set back."""
        done: dict[Path, dict] = {}
        for path in sorted(
            self.folder.glob(f"step_*/{sharded_state.STATE}"),
            key=lambda path: sharded_state.step_of(path.parent),
        ):
            with suppress(ValueError):
                done[path.parent] = sharded_state.recorded(path.parent)
        done = {path: each for path, each in done.items() if each["step"] <= step}
        losses = {
            path: each["validation_loss"]
            for path, each in done.items()
            if each.get("validation_loss") is not None
        }
        # A run may go on with another set, whose losses say nothing beside those of this one.
        current = done[max(done, key=sharded_state.step_of)].get("validation") if done else None
        losses = {path: loss for path, loss in losses.items() if done[path].get("validation") == current}
        kept = set(list(done)[-max(1, self.keep_last) :])
        if losses and self.keep_best:
            best = min(losses, key=losses.__getitem__)
            write_text(self.folder / "best", best.name)
            kept.add(best)
        else:
            (self.folder / "best").unlink(missing_ok=True)
        for path in self.folder.glob("step_*"):
            if path not in kept and path.is_dir():
                # Out of the way first, so that nobody takes half a folder for a checkpoint.
                gone = path.with_name(f"deleted_{path.name}")
                path.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
        for path in self.folder.glob("deleted_*"):  # of a run that was killed meanwhile
            shutil.rmtree(path, ignore_errors=True)


def _pieces(engine) -> list[Piece]:
    """Which stretches of which parameters the flat tensors are made of; padding belongs to none."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    stage, optimizer, found = engine.zero_optimization_stage(), engine.optimizer, []
    if stage == 3:
        rank = torch.distributed.get_rank()
        for group in optimizer.fp16_groups:
            for parameter in group:
                flat, flat_start, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
                number = min(share, parameter.ds_numel - rank * share)
                if number > 0:
                    found.append(Piece(names[id(parameter)], rank * share, flat, flat_start, number))
    elif stage:
        for flat, group in enumerate(optimizer.bit16_groups):
            for parameter in group:
                if (mapping := parameter._hp_mapping) is not None:
                    there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                    found.append(Piece(names[id(parameter)], there.start, flat, here.start, here.numel))
    else:
        masters = {id(master): name for name, master in _named_masters(engine)}
        for flat, tensor in enumerate(deep.flat_tensors(engine)):
            found.append(Piece(masters.get(id(tensor)) or names[id(tensor)], 0, flat, 0, tensor.numel()))
    return found


def _named_masters(engine) -> list[tuple[str, Tensor]]:
    masters = deep.masters_of(engine)
    return [(name, masters[id(p)]) for name, p in engine.module.named_parameters() if id(p) in masters]


def _base_optimizer(engine) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _state(engine, average: Average | None) -> sharded_state.State:
    """The live tensors of a rank's training state; of what is on NVMe copies, which are files there, for memory need not hold them.

    Raises OSError when there is no room for them.
    """
    moments, found = _base_optimizer(engine).state, []
    for number, flat in enumerate(deep.flat_tensors(engine)):
        with deep.in_memory(engine, number):
            values = {"master": flat.detach(), **moments.get(flat, {})}
            if deep.on_nvme(engine, number):
                path = Path(engine.optimizer.optimizer_swapper.swap_folder) / "copy"
                values = {
                    key: _on_disk(value, path) if isinstance(value, Tensor) else value
                    for key, value in values.items()
                }
        if average is not None:
            values["average"] = average.averages[number]
        found.append(values)
    return found


def _on_disk(tensor: Tensor, path: Path) -> Tensor:
    """A copy whose memory is a file, which is gone with it. Raises OSError when the disk is full."""
    try:
        with path.open("wb") as file:
            os.posix_fallocate(
                file.fileno(), 0, tensor.numel() * tensor.element_size()
            )  # or to write would kill the process
        copy = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be mapped ({error})") from error
    finally:
        path.unlink(missing_ok=True)
    return copy.copy_(tensor)


def latest_step(folder: Path) -> int | None:
    """Step of the checkpoint that `latest` names, None when the run has none yet."""
    return latest_state(folder).get("step")


def latest_state(folder: Path) -> dict:
    """What was recorded with the last checkpoint, nothing when the run has none yet."""
    has_any = (folder / "latest").is_file() or any(folder.glob(f"step_*/{sharded_state.STATE}"))
    return sharded_state.latest(folder) if has_any else {}


def check_recorded(folder: Path, expected: Mapping[str, object]) -> dict:
    """What was recorded with the checkpoint that `latest` names. Raises ValueError when it was written under other conditions."""
    found = sharded_state.latest(folder)
    for key, value in expected.items():
        if found.get(key) != value:
            raise ValueError(
                f"cannot resume {folder.parent}: saved with {key} {found.get(key)}, this run has {value}; delete the "
                "folder or choose another run.name, and to go on from its model set train.init_from"
            )
    return found


def resume(engine, folder: Path, fingerprints: Mapping[str, str], average: Average | None = None) -> int:
    """Load the checkpoint that `latest` names into the engine and the average; returns its step.

    The number of ranks and the ZeRO stage may be others than those that wrote it. Raises ValueError, on every rank, when it is
    damaged, or was written from other shards or weights.
    """
    recorded = check_recorded(folder, fingerprints)
    step, target, device = recorded["step"], folder / f"step_{recorded['step']:06d}", engine.device
    rank, world_size, num_files = (
        torch.distributed.get_rank(),
        torch.distributed.get_world_size(),
        recorded["num_files"],
    )
    flats = deep.flat_tensors(engine)

    def compare() -> None:
        # The ranks share the work of hashing.
        for name in sorted(recorded["sha256"])[rank::world_size]:
            if not (target / name).is_file() or sha256(target / name) != recorded["sha256"][name]:
                what = "is not the file that was written" if (target / name).is_file() else "is missing"
                raise ValueError(
                    f"cannot resume {folder.parent}: the checkpoint {target} is damaged ({name} {what}); "
                    + sharded_state.recovery_hint(folder, target.name)
                )

    deep.together(compare, device)
    shapes = deep.flat_shapes(engine)
    one_by_one = any(deep.on_nvme(engine, number) for number in range(len(flats)))

    def read(wanted: Collection[int]) -> sharded_state.State:
        return deep.together(
            lambda: sharded_state.read(
                target, rank, world_size, num_files, _pieces(engine), shapes, flats=wanted
            ),
            device,
        )

    state = [] if one_by_one else read(range(len(flats)))
    optimizer = _base_optimizer(engine)
    moments = optimizer.state
    in_pieces = engine.zero_optimization_partition_weights()
    if in_pieces:
        engine.optimizer.checkpoint_event_prologue()
    for number, flat in enumerate(flats):
        values = read([number])[number] if one_by_one else state[number]
        with deep.in_memory(engine, number, changed=True):
            flat.data.copy_(values.pop("master"))
            if average is not None:
                average.averages[number].copy_(values.pop("average"))
            held = moments.get(flat, {})
            for key, value in values.items():
                if (
                    key not in held
                    and getattr(optimizer, "is_paged", False)
                    and isinstance(value, Tensor)
                    and value.shape == flat.shape
                ):
                    held[key] = optimizer.get_state_buffer(
                        flat, dtype=value.dtype
                    )  # or it would all be on the GPU from now on
                if isinstance(held.get(key), Tensor) and held[key].shape == value.shape:
                    held[key].copy_(value)  # in place: DeepSpeed and bitsandbytes hold on to some
                else:
                    held[key] = value.to(flat.device) if isinstance(value, Tensor) else value
            moments[flat] = held
            if in_pieces:
                _publish_flat(engine.optimizer, number)
    if in_pieces:
        engine.optimizer.checkpoint_event_epilogue()
    else:
        _publish(engine)
    _go_to(engine, step)
    return step


def _publish_flat(optimizer, number: int) -> None:
    """Under ZeRO-3, make the weights that the forward uses those of a flat tensor."""
    rounded, parts = optimizer.fp16_partitioned_groups_flat[number], optimizer.fp16_partitioned_groups[number]
    if rounded.numel():
        rounded.data.copy_(optimizer.fp32_partitioned_groups_flat[number].data)
        for part, value in zip(parts, optimizer.unflatten(rounded, parts), strict=True):
            part.data = value.data


def _publish(engine) -> None:
    """Make the weights that the forward uses those of the flat tensors, in the other stages."""
    if engine.zero_optimization_stage():
        engine.optimizer.update_lp_params()
    else:
        masters = deep.masters_of(engine)
        for parameter in engine.module.parameters():
            if id(parameter) in masters:
                parameter.data.copy_(masters[id(parameter)])


def _go_to(engine, step: int) -> None:
    """Set the engine's counters and the learning rate to those after a step."""
    engine.global_steps = step
    engine.global_samples = step * engine.train_batch_size()
    engine.micro_steps = step * engine.gradient_accumulation_steps()
    scheduler = engine.lr_scheduler
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    scheduler._last_lr = [
        lr * factor(step) for lr, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, lr in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = lr
