"""Every undocumented attribute of DeepSpeed that this project uses.

Tested with DeepSpeed 0.19.8. pyproject.toml caps DeepSpeed below the first minor
version that was not tested. When a new version breaks something here,
tests/training/test_matrix.py fails: it trains, saves and resumes every allowed pair of
ZeRO stage, trained part, precision, optimizer and offloading, and compares the losses
bit for bit.

Terms: a rank's optimizer works on **flat tensors** in float32. Without ZeRO, a flat
tensor is a whole parameter or its float32 master copy. Under ZeRO it holds **pieces**
(parts of parameters, see checkpoints/sharded_state.py), one after the other.

DeepSpeed is imported inside functions, so that this module can be imported and tested
without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmtensorar.checkpoints.sharded_state import Piece

# ---- start ---------------------------------------------------------------------------------------


def adopt_process_group(device: torch.device) -> None:
    """Make DeepSpeed use the process group that exists (training/distributed.py).

    May be called again.

    `deepspeed.ops.__compatible_ops__` says which operators DeepSpeed may compile. On a
    CPU it would compile one for shared-memory collectives and fail where there is no
    C++ compiler; gloo does the same work. If a new version of DeepSpeed drops the name,
    it compiles again.
    """
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)


def skip_allreduce(engine: Any) -> None:
    """For one rank without ZeRO: do not sum the gradients over ranks.

    DeepSpeed would copy all gradients back and forth for a sum over one rank, 5 % of a
    step of 60 M parameters. If a new version drops `enable_backward_allreduce`, only
    this time is lost.
    """
    engine.enable_backward_allreduce = False


def undo_first_step(engine: Any) -> None:
    """In bfloat16 without ZeRO: undo the step that DeepSpeed makes at its start.

    That step creates the moments from zero gradients, which decays the weights
    and puts the bias correction one step ahead. Cleared, torch creates them anew at the
    first real step. If this breaks, the first updates are about a third too small (a
    test compares one rank with two under ZeRO-3).
    """
    if masters := masters_of(engine):
        engine.optimizer.optimizer.state.clear()
        for parameter in engine.module.parameters():
            if id(parameter) in masters:
                masters[id(parameter)].data.copy_(parameter.data)


# ---- parameters ----------------------------------------------------------------------------------


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has cut a parameter over the ranks; its own shape is empty
    then.
    """
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> torch.Size:
    """A parameter's shape before ZeRO-3 cut it."""
    return getattr(parameter, "ds_shape", parameter.shape)


# ---- flat tensors --------------------------------------------------------------------------------


def masters_of(engine: Any) -> dict[int, Tensor]:
    """In bfloat16 without ZeRO: a parameter's id -> its float32 master copy; else
    empty.

    DeepSpeed's accessors (`safe_get_full_fp32_param`) do not know these copies.
    """
    if engine.zero_optimization_stage() or not engine.bfloat16_enabled():
        return {}
    groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {id(p): master for group in groups for p, master in zip(*group, strict=True)}


def flat_tensors(engine: Any) -> list[Tensor]:
    """The float32 tensors that this rank's optimizer updates, in its order."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    if stage:
        return list(engine.optimizer.single_partition_of_fp32_groups)
    if engine.bfloat16_enabled():
        return [master for group in engine.optimizer.fp32_groups for master in group]
    return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]


def pieces_of(engine: Any) -> list[Piece]:
    """The pieces of parameters in this rank's flat tensors; padding is in no piece.

    If DeepSpeed changes how it cuts parameters, saved runs resume with wrong weights on
    other numbers of ranks (a test resumes on other numbers of ranks and stages).
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return _pieces_of_stage_3(engine.optimizer, names)
    if stage:
        return _pieces_of_stages_1_and_2(engine.optimizer, names)
    masters = masters_of(engine)
    owners = {id(masters[key]): name for key, name in names.items() if key in masters}
    return [
        Piece(owners.get(id(tensor)) or names[id(tensor)], 0, flat, 0, tensor.numel())
        for flat, tensor in enumerate(flat_tensors(engine))
    ]


def _pieces_of_stage_3(optimizer: Any, names: dict[int, str]) -> list[Piece]:
    rank, pieces = torch.distributed.get_rank(), []
    for group in optimizer.fp16_groups:
        for parameter in group:
            flat, flat_start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            number = min(size, parameter.ds_numel - rank * size)  # the last rank's piece may be padded
            if number > 0:
                pieces.append(Piece(names[id(parameter)], rank * size, flat, flat_start, number))
    return pieces


def _pieces_of_stages_1_and_2(optimizer: Any, names: dict[int, str]) -> list[Piece]:
    pieces = []
    for flat, group in enumerate(optimizer.bit16_groups):
        for parameter in group:
            if (mapping := parameter._hp_mapping) is not None:  # None: this rank has no piece of it
                source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
                pieces.append(Piece(names[id(parameter)], source.start, flat, target.start, target.numel))
    return pieces


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """torch's optimizer inside DeepSpeed's; its state is keyed by flat tensor."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


# ---- loading -------------------------------------------------------------------------------------


@contextmanager
def loading_flat_tensors(engine: Any) -> Iterator[Sequence[Tensor]]:
    """The flat tensors, to be changed inside this with statement.

    At its end the model's weights are updated from them.

    If this breaks, a resumed run computes its first step with its initial weights.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()
    yield flat_tensors(engine)
    if stage == 3:
        for number, rounded in enumerate(optimizer.fp16_partitioned_groups_flat):
            parameters = optimizer.fp16_partitioned_groups[number]
            if rounded.numel():
                rounded.data.copy_(optimizer.fp32_partitioned_groups_flat[number].data)
                for part, value in zip(parameters, optimizer.unflatten(rounded, parameters), strict=True):
                    part.data = value.data
        optimizer.checkpoint_event_epilogue()
    elif stage:
        optimizer.update_lp_params()
    else:
        masters = masters_of(engine)
        for parameter in engine.module.parameters():
            if id(parameter) in masters:
                parameter.data.copy_(masters[id(parameter)])


def set_step(engine: Any, step: int) -> None:
    """Set the engine's counters and the learning rate to those after a step.

    If a counter is renamed, gradients are accumulated out of phase; if the scheduler's
    attributes are (they are torch's), the learning rate starts from the warm-up again.
    """
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


# ---- monitors ------------------------------------------------------------------------------------


def monitor_of(settings: dict) -> Any:
    """DeepSpeed's monitor.

    settings: its configuration's sections wandb and csv_monitor.
    """
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    return MonitorMaster(get_monitor_config(settings))


def skip_csv_headers(monitor: Any, names: Sequence[str]) -> None:
    """Do not write the header of CSV files that exist.

    If a new version drops `filenames`, resumed files have two headers.
    """
    if monitor.csv_monitor is not None:
        monitor.csv_monitor.filenames += names
