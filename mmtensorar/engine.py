"""All of DeepSpeed: its settings, the start of training, saving and resuming. Nothing else imports it."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

if not torch.cuda.is_available():
    # Without this DeepSpeed looks for an accelerator at import and may settle on a wrong one.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed.ops.adam import DeepSpeedCPUAdam  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param  # noqa: E402
from torch import Tensor  # noqa: E402

from mmtensorar import checkpoint, optimizers, pieces  # noqa: E402
from mmtensorar.ema import Average  # noqa: E402
from mmtensorar.metrics import Event  # noqa: E402
from mmtensorar.pieces import Piece  # noqa: E402
from mmtensorar.processes import give_memory_back  # noqa: E402
from mmtensorar.recipe import Recipe  # noqa: E402
from mmtensorar.shards import sha256  # noqa: E402

FAILED = ".failed"


def start_process_group(local_rank: int) -> tuple[int, int, torch.device]:
    """Join the ranks; returns (rank, world size, this rank's device).

    NCCL on GPUs, gloo on CPU. Started without a launcher, the process is a world of one.
    """
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": str(max(0, local_rank)), "MASTER_ADDR": "127.0.0.1"}
    alone = "RANK" not in os.environ
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if alone and "MASTER_PORT" not in os.environ:
        # A fixed port would make two runs on one machine collide.
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    os.environ.setdefault("MASTER_PORT", "29500")
    device = torch.device("cpu")
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        # Ranks of one machine that each take all cores wait on each other: two ranks on two cores ran at 1,000 to
        # 3,100 tokens/s so, one process at 5,500.
        # DeepSpeed's launcher and torchrun name the number of ranks here differently.
        num_local = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_local))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if device.type == "cpu":
        # DeepSpeed would compile it here, and fail where there is no C++ compiler; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return torch.distributed.get_rank(), torch.distributed.get_world_size(), device


def is_first() -> bool:
    """Whether this process is rank 0 (True before the ranks have joined a group by other means)."""
    return os.environ.get("RANK", "0") == "0"


def stop_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def barrier() -> None:
    torch.distributed.barrier()


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of values [N] over all ranks, float32, in place."""
    torch.distributed.all_reduce(values)
    return values.div_(torch.distributed.get_world_size())


Result = TypeVar("Result")


def together(work: Callable[[], Result], device: torch.device) -> Result:
    """What work returns. A ValueError or OSError of it on any rank is a ValueError on every rank, so that none waits for ever."""
    result, failure = None, None
    try:
        result = work()
    except (ValueError, OSError) as error:
        failure = str(error)
    failed = torch.tensor([float(failure is not None)], device=device)
    torch.distributed.all_reduce(failed)
    if failed.item():
        sentences = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(sentences, failure)
        raise ValueError("; ".join(dict.fromkeys(sentence for sentence in sentences if sentence)))
    return result


def from_all_ranks(items: list[str]) -> list[str]:
    """The items of all ranks, rank after rank, on every rank."""
    gathered: list[list[str]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, items)
    return sum(gathered, [])


def grad_norm(engine) -> float | None:
    """Norm of the reduced gradients before an update, where DeepSpeed keeps none: float32 without ZeRO. Else None."""
    if engine.bfloat16_enabled() or engine.zero_optimization_stage():
        return None
    return float(torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))


def micro_batch_size(recipe: Recipe, world_size: int) -> int:
    """Samples per rank and forward pass. Raises ValueError when the batch does not divide evenly."""
    parts = world_size * recipe.train.grad_accum
    if recipe.data.batch_size % parts:
        raise ValueError(
            f"data.batch_size {recipe.data.batch_size} must be a multiple of ranks x train.grad_accum = "
            f"{world_size} x {recipe.train.grad_accum} = {parts}"
        )
    return recipe.data.batch_size // parts


def settings(recipe: Recipe, world_size: int) -> dict:
    """The DeepSpeed configuration of a recipe; zero.extra is merged into zero_optimization last."""
    zero = {"stage": recipe.zero.stage}
    if recipe.zero.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": recipe.zero.offload_optimizer}
    if recipe.zero.offload_params != "none":
        zero["offload_param"] = {"device": recipe.zero.offload_params}
    zero.update(recipe.zero.extra)
    return {
        "train_batch_size": recipe.data.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size(recipe, world_size),
        "gradient_accumulation_steps": recipe.train.grad_accum,
        "gradient_clipping": recipe.optim.grad_clip,
        "bf16": {"enabled": recipe.train.precision == "bf16"},
        "zero_optimization": zero,
        # The optimizer is the recipe's, also with offloading: DeepSpeed would put its own in its place.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,  # metrics.py prints
    }


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int, final_lr_ratio: float) -> float:
    """Factor on the base rate at a step counted from 0: linear warm-up, then a cosine to final_lr_ratio."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return final_lr_ratio + (1 - final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def start(recipe: Recipe, world_size: int, device: torch.device):
    """Build the model, spread it over the ranks and return the DeepSpeed engine around it."""
    config = settings(recipe, world_size)
    if recipe.zero.stage == 3:
        model = _partitioned_model(recipe, config, device)
    else:
        model = together(lambda: checkpoint.model_to_train(recipe), device)
    model.backbone.activation_checkpointing = recipe.train.activation_checkpointing
    model.train()
    if recipe.train.compile:
        for layer in model.backbone.layers:
            layer.compile()

    optim = recipe.optim
    optimizer = optimizers.build(optim, optimizers.groups(model, optim), device, DeepSpeedCPUAdam)

    def factor(step: int) -> float:
        return learning_rate_factor(
            step, steps=recipe.train.steps, warmup_steps=optim.warmup_steps, final_lr_ratio=optim.final_lr_ratio
        )

    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=config,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
    )
    if masters := _masters(engine):
        # Here DeepSpeed makes the moments by a step with zero gradients, which decays the weights and puts the bias
        # correction one step ahead. Undo it: torch makes them anew at the first real step.
        engine.optimizer.optimizer.state.clear()
        for parameter in engine.module.parameters():
            if id(parameter) in masters:
                masters[id(parameter)].data.copy_(parameter.data)
    return engine


def _masters(engine) -> dict[int, Tensor]:
    """In bfloat16 without ZeRO: a parameter's id -> its float32 master copy, which DeepSpeed's accessors do not know."""
    if engine.zero_optimization_stage() or not engine.bfloat16_enabled():
        return {}
    groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {id(p): master for group in groups for p, master in zip(*group, strict=True)}


def flat_tensors(engine) -> list[Tensor]:
    """What this rank's optimiser works on: float32, under ZeRO flat pieces of many parameters, otherwise whole parameters."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    if stage:
        return list(engine.optimizer.single_partition_of_fp32_groups)
    if engine.bfloat16_enabled():
        return [master for group in engine.optimizer.fp32_groups for master in group]
    return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]


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
        for flat, tensor in enumerate(flat_tensors(engine)):
            found.append(Piece(masters.get(id(tensor)) or names[id(tensor)], 0, flat, 0, tensor.numel()))
    return found


def _named_masters(engine) -> list[tuple[str, Tensor]]:
    masters = _masters(engine)
    return [(name, masters[id(p)]) for name, p in engine.module.named_parameters() if id(p) in masters]


def _partitioned_model(recipe: Recipe, config: dict, device: torch.device):
    """The initial model with its parameters cut over the ranks, never whole anywhere.

    Rank 0 reads one tensor after the other from the files, and each is broadcast and cut, so a rank holds one module plus
    its own share (and rank 0 a mapped file). Modules are not constructed inside zero.Init, because a child's parameters
    would be empty before its parent's initialisation code runs.
    """
    rank = torch.distributed.get_rank()
    model = together(lambda: checkpoint.skeleton(recipe), device)
    value_of = together(lambda: checkpoint.initial_values(recipe) if rank == 0 else None, device)
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32

    def spread(name: str, value: torch.Tensor) -> torch.Tensor:
        found = together(lambda: value_of(name) if rank == 0 else None, device)
        if rank == 0:
            value.copy_(found)
        torch.distributed.broadcast(value, 0)
        return value

    # Buffers are small and stay whole, in the dtype they were built with; those that are not in files are computed.
    saved = model.state_dict().keys()
    for name, buffer in list(model.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        value = buffer.to(device)
        model.get_submodule(parent)._buffers[leaf] = spread(name, value) if name in saved else value

    done: dict[int, torch.nn.Parameter] = {}  # by identity: a tied parameter stays one parameter
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for _, module in reversed(list(model.named_modules())):
        own = list(module._parameters.items())
        for leaf, parameter in own:
            if parameter is None:
                continue
            if id(parameter) not in done:
                value = spread(names[id(parameter)], torch.empty(parameter.shape, dtype=dtype, device=device))
                done[id(parameter)] = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
            module._parameters[leaf] = done[id(parameter)]
        if own:
            deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype)
            give_memory_back()  # pieces that stay lie between whole tensors that go
    return model


@contextmanager
def whole(engine) -> Iterator:
    """The plain model with all parameters present on this rank, for sampling during training.

    Under ZeRO-3 this gathers everything, so it needs memory for the whole model. Every rank
    must enter and leave.
    """
    parameters = list(engine.module.parameters())
    engine.module.eval()
    try:
        with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_partition_weights()):
            with torch.no_grad():
                yield engine.module
    finally:
        engine.module.train()


def full_state_dict(engine, *, trained_only: bool = False) -> dict[str, Tensor] | None:
    """All weights (or those that are trained) on the CPU in float32: the optimizer's master copy. None except on rank 0.

    Every rank must call it, since ZeRO gathers each parameter from all of them.
    """
    rank = torch.distributed.get_rank()
    state, masters = {}, _masters(engine)
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if trained_only and not parameter.requires_grad:
            continue
        value = masters.get(id(parameter))
        if value is None and parameter.requires_grad:
            value = safe_get_full_fp32_param(parameter)
        if value is None:  # no master copy: float32 training without ZeRO, or a frozen parameter
            partitioned = hasattr(parameter, "ds_id")
            with deepspeed.zero.GatheredParameters([parameter], enabled=partitioned):
                value = parameter.detach().float().cpu().clone()
        if rank == 0:
            state[name] = value.detach().float().cpu().reshape(getattr(parameter, "ds_shape", parameter.shape)).clone()
    if rank:
        return None
    persistent = engine.module.state_dict().keys()
    state.update({name: value.cpu() for name, value in engine.module.named_buffers() if name in persistent})
    return state


def monitor(names: Sequence[str], run_dir: Path, start_step: int) -> Callable[[list[Event]], None] | None:
    """DeepSpeed's monitor for W&B and CSV files, as a function that takes a step's events; None when neither is asked for.

    Rows of CSV files past start_step, of a run that was stopped after its last checkpoint, are dropped. Raises ValueError when
    wandb is not installed.
    """
    if not set(names) & {"wandb", "csv"}:
        return None
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise ValueError("train.monitors wandb needs wandb: pip install wandb")
    folder = run_dir / "csv"
    for path in folder.glob("*.csv"):
        header, *rows = path.read_text(encoding="utf-8").splitlines()
        _write_text(path, "\n".join([header, *(row for row in rows if int(row.split(",")[0]) <= start_step)]) + "\n")
    config = {
        "wandb": {"enabled": "wandb" in names, "project": "mmtensorar", "group": run_dir.name},
        "csv_monitor": {"enabled": "csv" in names, "output_path": str(run_dir), "job_name": "csv"},
    }
    master = MonitorMaster(get_monitor_config(config))
    if master.csv_monitor is not None:  # which would write a header into each file again
        master.csv_monitor.filenames += [path.stem for path in folder.glob("*.csv")]
    return master.write_events


class Saver:
    """Writes checkpoints for resuming: folder/step_XXXXXX, see pieces.py, and the file `latest` that names the last whole one.

    keep_last: how many of the newest stay; keep_best: the one of the least validation loss stays too, named by `best`.
    background: training goes on while a copy of the state, in host memory, is written. fingerprints: of the run's inputs,
    {"shards": Manifest.fingerprint, "start": checkpoint.start_fingerprint}.
    """

    def __init__(self, engine, folder: Path, fingerprints: Mapping[str, str], *, keep_last: int, keep_best: bool, background: bool):
        self.engine, self.folder, self.fingerprints = engine, folder, dict(fingerprints)
        self.keep_last, self.keep_best, self.background = keep_last, keep_best, background
        self.shapes, self.pieces = [flat.shape for flat in flat_tensors(engine)], _pieces(engine)
        self.at_work: threading.Thread | None = None
        self.failure: Exception | None = None

    def save(self, step: int, counted: Mapping[str, object], average: Average | None, device: torch.device) -> None:
        """Write a checkpoint, or begin to. counted: what else the run counts. Every rank calls it.

        Raises ValueError, on every rank, when this or the one before could not be written.
        """
        self.finish(device)
        target = self.folder / f"step_{step:06d}"
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(target, ignore_errors=True)  # of a run that was killed while it wrote
            target.mkdir(parents=True)
        barrier()
        state = _state(self.engine, average)
        recorded = {"step": step, **counted, "world_size": torch.distributed.get_world_size(), **self.fingerprints}
        arguments = (target, pieces.copied(state) if self.background else state, recorded)
        if self.background:
            self.at_work = threading.Thread(target=self._write, args=arguments, daemon=True)
            self.at_work.start()
        else:
            self._write(*arguments)
            self.finish(device)

    def finish(self, device: torch.device) -> None:
        """Wait until what is being written stands. Every rank calls it; raises ValueError on every rank when it failed."""
        if self.at_work is not None:
            self.at_work.join()
            self.at_work = None

        def report() -> None:
            failure, self.failure = self.failure, None
            if failure is not None:
                raise ValueError(f"{self.folder}: the checkpoint could not be written ({failure})") from failure

        together(report, device)

    def _write(self, target: Path, state: pieces.State, recorded: dict) -> None:
        rank = torch.distributed.get_rank()
        try:
            pieces.write(target, rank, self.pieces, self.shapes, state)
            if rank == 0:
                self._complete(target, recorded)
        except Exception as error:  # any: this may be another thread, and finish tells it
            self.failure = error
            target.with_suffix(FAILED).touch()

    def _complete(self, target: Path, recorded: dict) -> None:
        """On rank 0: wait for the other ranks' files, then make the checkpoint the latest, and delete what is not kept."""
        pause_s = 0.001
        while pieces.missing(target, recorded["world_size"]):
            # No message passes here: in a thread it would meet the training's own.
            if target.with_suffix(FAILED).exists():
                raise OSError("another rank could not write its files")
            time.sleep(pause_s)
            pause_s = min(1.0, pause_s * 2)
        recorded["sha256"] = pieces.digests(target, recorded["world_size"])
        _write_text(target / pieces.STATE, json.dumps(recorded) + "\n")
        _write_text(self.folder / "latest", target.name)
        done = {path.parent: pieces.recorded(path.parent) for path in sorted(self.folder.glob(f"step_*/{pieces.STATE}"))}
        losses = {path: each["validation_loss"] for path, each in done.items() if each.get("validation_loss") is not None}
        kept = set(list(done)[-max(1, self.keep_last) :])
        if losses and self.keep_best:
            best = min(losses, key=losses.__getitem__)
            _write_text(self.folder / "best", best.name)
            kept.add(best)
        for path in self.folder.glob("step_*"):
            if path not in kept and path.is_dir() and path != target:
                shutil.rmtree(path)


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _base_optimizer(engine) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _state(engine, average: Average | None) -> pieces.State:
    """The live tensors of a rank's training state."""
    moments, found = _base_optimizer(engine).state, []
    for number, flat in enumerate(flat_tensors(engine)):
        values = {"master": flat.detach(), **moments.get(flat, {})}
        if average is not None:
            values["average"] = average.averages[number]
        found.append(values)
    return found


def latest_step(folder: Path) -> int | None:
    """Step of the checkpoint that `latest` names, None when the run has none yet."""
    return latest_state(folder).get("step")


def latest_state(folder: Path) -> dict:
    """What was recorded with the checkpoint that `latest` names, nothing when the run has none yet."""
    return pieces.latest(folder) if (folder / "latest").is_file() else {}


def check_recorded(folder: Path, expected: Mapping[str, object]) -> dict:
    """What was recorded with the checkpoint that `latest` names. Raises ValueError when it was written under other conditions."""
    found = pieces.latest(folder)
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
    rank, world_size, saved_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size(), recorded["world_size"]
    flats = flat_tensors(engine)

    def read() -> pieces.State:
        # The ranks share the work of hashing; a file that one of them refuses stops all.
        for name in sorted(recorded["sha256"])[rank::world_size]:
            if not (target / name).is_file() or sha256(target / name) != recorded["sha256"][name]:
                raise ValueError(_damaged(folder, target.name, f"{name} is not the file that was written"))
        return pieces.read(target, rank, world_size, saved_ranks, _pieces(engine), [flat.shape for flat in flats])

    state = together(read, device)
    moments = _base_optimizer(engine).state
    in_pieces = engine.zero_optimization_partition_weights()
    if in_pieces:
        engine.optimizer.checkpoint_event_prologue()
    for number, (flat, values) in enumerate(zip(flats, state, strict=True)):
        flat.data.copy_(values.pop("master"))
        if average is not None:
            average.averages[number].copy_(values.pop("average"))
        held = moments.get(flat, {})
        for key, value in values.items():
            if isinstance(held.get(key), Tensor) and held[key].shape == value.shape:
                held[key].copy_(value)  # in place: DeepSpeed and bitsandbytes hold on to some
            else:
                held[key] = value.to(flat.device) if isinstance(value, Tensor) and value.ndim else value
        moments[flat] = held
    _publish(engine)
    if in_pieces:
        engine.optimizer.checkpoint_event_epilogue()
    _go_to(engine, step)
    return step


def _publish(engine) -> None:
    """Make the weights that the forward uses those of the flat tensors."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        for flat, rounded, parts in zip(
            optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, optimizer.fp16_partitioned_groups, strict=True
        ):
            if flat.numel():
                rounded.data.copy_(flat.data)
                for part, value in zip(parts, optimizer.unflatten(rounded, parts), strict=True):
                    part.data = value.data
    elif stage:
        optimizer.update_lp_params()
    else:
        masters = _masters(engine)
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
    scheduler._last_lr = scheduler.get_lr()
    for group, lr in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = lr


def _damaged(folder: Path, tag: str, reason: str) -> str:
    older = sorted(path.parent.name for path in folder.glob(f"step_*/{pieces.STATE}") if path.parent.name != tag)
    remedy = f"write {older[-1]} into {folder / 'latest'} to go on from there" if older else "no older one is left"
    return f"cannot resume {folder.parent}: the checkpoint {folder / tag} is damaged ({reason}); {remedy}"
