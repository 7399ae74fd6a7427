"""The DeepSpeed engine: its settings, how it is started, and what training reads from
it.

Only this file and engine_private.py import DeepSpeed. Code that uses undocumented
attributes of DeepSpeed is in engine_private.py.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    # Without this DeepSpeed looks for an accelerator at import and may settle on a
    # wrong one.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from mmtensorar import ranks
from mmtensorar.checkpoints import model_folder
from mmtensorar.files import iterate_lines, write_text
from mmtensorar.model import adapters, loss
from mmtensorar.processes import give_memory_back
from mmtensorar.recipe import Recipe
from mmtensorar.training import engine_private, optimizers
from mmtensorar.training.distributed import on_all_ranks
from mmtensorar.training.run_log import Event

# ---- before the start ----------------------------------------------------------------------------


def check_machine(recipe: Recipe, device: torch.device) -> None:
    """Raise ValueError when the recipe needs something that this machine lacks.

    It loads nothing.
    """
    if recipe.train.loss_kernel == "liger" and not loss.has_liger():
        raise ValueError("train.loss_kernel liger needs liger-kernel: pip install 'mmtensorar[liger]'")
    if recipe.train.loss_kernel == "liger" and device.type != "cuda":
        raise ValueError("train.loss_kernel liger needs a GPU; auto uses it where there is one")
    optimizers.check(recipe.optim, device)
    if "wandb" in recipe.train.monitors and ranks.is_first() and importlib.util.find_spec("wandb") is None:
        raise ValueError("train.monitors wandb needs wandb: pip install wandb")
    if recipe.train.parts == "qlora":
        adapters.bitsandbytes_for("train.parts qlora")


def micro_batch_size(recipe: Recipe, world_size: int) -> int:
    """Samples per rank and forward pass.

    Raises ValueError when the batch does not divide evenly.
    """
    num_parts = world_size * recipe.train.grad_accum
    if recipe.data.batch_size % num_parts:
        raise ValueError(
            f"data.batch_size {recipe.data.batch_size} must be a multiple of ranks x train.grad_accum = "
            f"{world_size} x {recipe.train.grad_accum} = {num_parts}"
        )
    return recipe.data.batch_size // num_parts


def settings(recipe: Recipe, world_size: int) -> dict:
    """The DeepSpeed configuration of a recipe; zero.extra is merged into
    zero_optimization last.
    """
    zero: dict[str, Any] = {"stage": recipe.zero.stage}
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
        # Use the recipe's optimizer also with offloading, where DeepSpeed would replace
        # it with its own.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,  # run_log.py prints
    }


# ---- start ---------------------------------------------------------------------------------------


def start(recipe: Recipe, world_size: int, device: torch.device) -> Any:
    """Build the model, spread it over the ranks and wrap it in a DeepSpeed engine.

    The process group must exist (distributed.start_process_group). Raises
    ValueError, on every rank, when the model's files are missing or do not fit the
    recipe.
    """
    engine_private.adopt_process_group(device)
    config = settings(recipe, world_size)
    if recipe.zero.stage == 3:
        model: Any = partitioned_model(recipe, config, device)
    else:
        model = on_all_ranks(lambda: model_folder.model_to_train(recipe), device)
    model.backbone.activation_checkpointing = recipe.train.activation_checkpointing
    model.train()
    if recipe.train.compile:
        for layer in model.backbone.layers:
            layer.compile()
    steps = recipe.train.steps
    assert steps is not None, "train.epochs was turned into steps before"
    schedule: Any = partial(optimizers.schedule, optim=recipe.optim, steps=steps)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizers.build(
            recipe.optim, optimizers.groups(model, recipe.optim), device, DeepSpeedCPUAdam
        ),
        config=config,
        lr_scheduler=schedule,
    )
    if world_size == 1 and recipe.zero.stage == 0:
        engine_private.skip_allreduce(engine)
    engine_private.undo_first_step(engine)
    return engine


def partitioned_model(recipe: Recipe, config: dict, device: torch.device) -> nn.Module:
    """The initial model under ZeRO-3. No rank ever holds all of its parameters.

    Rank 0 reads one tensor after the other from the files; each is broadcast and cut.
    So a rank holds one module plus its own share, and rank 0 also a memory-mapped file.
    Modules are not constructed inside zero.Init, because a child's parameters would be
    empty before its parent's initialisation code runs.
    """
    engine_private.adopt_process_group(device)
    rank = torch.distributed.get_rank()
    model = on_all_ranks(lambda: model_folder.skeleton(recipe), device)
    value_of = on_all_ranks(lambda: model_folder.initial_values(recipe) if rank == 0 else None, device)
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32

    def broadcast(name: str, value: Tensor) -> Tensor:
        """Fill value with the tensor of that name, which rank 0 reads."""
        read = on_all_ranks(lambda: value_of(name) if value_of is not None else None, device)
        if read is not None:
            value.copy_(read)
        torch.distributed.broadcast(value, 0)
        return value

    # Buffers are small and stay complete, in the dtype they were built with; those not
    # in the files are computed.
    persistent = model.state_dict().keys()
    for name, buffer in list(model.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        value = buffer.to(device)
        model.get_submodule(parent)._buffers[leaf] = broadcast(name, value) if name in persistent else value

    filled: dict[int, nn.Parameter] = {}  # by identity: a tied parameter stays one parameter
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for _, module in reversed(list(model.named_modules())):
        parameters = list(module._parameters.items())
        for leaf, parameter in parameters:
            if parameter is None:
                continue
            if id(parameter) not in filled:
                value = torch.empty(parameter.shape, dtype=dtype, device=device)
                value = broadcast(names[id(parameter)], value)
                filled[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            module._parameters[leaf] = filled[id(parameter)]
        if parameters:
            deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype)
            # The complete tensors are freed now, but the memory between the shares that
            # stay would not be returned to the system by itself.
            give_memory_back()
    return model


# ---- while it trains -----------------------------------------------------------------------------


def norm_before_step(engine: Any) -> float | None:
    """Norm of the summed gradients before the update, in float32 training without ZeRO.

    There DeepSpeed keeps no norm. None in all other cases; use `norm_after_step` then.
    """
    if engine.bfloat16_enabled() or engine.zero_optimization_stage():
        return None
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def norm_after_step(engine: Any) -> float:
    """Norm of the gradients of the last update before clipping, measured by
    DeepSpeed.
    """
    return float(engine.get_global_grad_norm() or 0.0)


def learning_rates(engine: Any) -> tuple[float, float]:
    """Learning rates of the next update: of the backbone and of the codec.

    The codec's parameter groups come last.
    """
    rates = engine.get_lr()
    return rates[0], rates[-1]


@contextmanager
def gathered_model(engine: Any) -> Iterator[Any]:
    """The plain model in eval mode with all parameters on this rank, for sampling
    during training.

    Under ZeRO-3 this gathers everything, so it needs memory for the complete model.
    Every rank must enter and leave. In between, ranks do not wait for each other.
    """
    # With DeepSpeed's hooks, its trace of a step would also hold the thousands of calls
    # of sampling, and each call would search the rest of the trace: minutes a grid.
    if engine.zero_optimization_partition_weights():
        gathered: Any = deepspeed.zero.unwrap_model_for_generation(engine)
    else:
        gathered = nullcontext()
    engine.module.eval()
    try:
        with gathered, torch.no_grad():
            yield engine.module
    finally:
        engine.module.train()


def full_state_dict(engine: Any, *, trained_only: bool = False) -> dict[str, Tensor] | None:
    """All weights on the CPU in float32, the optimizer's master copy; None except on
    rank 0.

    Every rank must call it, since ZeRO gathers each parameter from all of them.
    trained_only: without frozen parameters.
    """
    rank = torch.distributed.get_rank()
    state, masters = {}, engine_private.masters_of(engine)
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if trained_only and not parameter.requires_grad:
            continue
        value = masters.get(id(parameter))
        if value is None and parameter.requires_grad:
            value = safe_get_full_fp32_param(parameter)
        if value is None:  # no master copy: float32 training without ZeRO, or a frozen parameter
            partitioned = engine_private.is_partitioned(parameter)
            with deepspeed.zero.GatheredParameters([parameter], enabled=partitioned):
                value = parameter.detach().float().cpu().clone()
        if rank == 0:
            value = value.detach().float().cpu()
            state[name] = value.reshape(engine_private.full_shape(parameter)).clone()
    if rank:
        return None
    persistent = engine.module.state_dict().keys()
    state.update({name: value.cpu() for name, value in engine.module.named_buffers() if name in persistent})
    return state


# ---- monitors ------------------------------------------------------------------------------------


def monitor(names: Sequence[str], run_dir: Path, start_step: int) -> Callable[[list[Event]], None] | None:
    """DeepSpeed's monitors for W&B and CSV files, as a function that records a step's
    events.

    Args:
        names: train.monitors of the recipe. None is returned when neither wandb nor csv
            is among them.
        run_dir: the run folder; the files are in run_dir/csv, and W&B's group is named
            after it.
        start_step: steps done. Rows of later steps, left by a run that was stopped
            after its last run state was saved, are dropped from the CSV files.
    """
    if not set(names) & {"wandb", "csv"}:
        return None
    folder = run_dir / "csv"
    for path in list(folder.glob("*.csv")):
        with path.open("rb") as file:
            header, *lines = [line.text for line in iterate_lines(file)] or [""]
        if not header.startswith("step,"):
            if "step,".startswith(header):  # torn when the run was killed; else somebody else's
                path.unlink()
            continue
        numbered = [(line.partition(",")[0], line) for line in lines]
        kept = [line for number, line in numbered if number.isdigit() and int(number) <= start_step]
        write_text(path, "\n".join([header, *kept]) + "\n")
    master = engine_private.monitor_of(
        {
            "wandb": {"enabled": "wandb" in names, "project": "mmtensorar", "group": run_dir.name},
            "csv_monitor": {"enabled": "csv" in names, "output_path": str(run_dir), "job_name": "csv"},
        }
    )
    engine_private.skip_csv_headers(master, [path.stem for path in folder.glob("*.csv")])

    def write(events: list[Event]) -> None:
        if "csv" in names:  # its header is what follows the last slash of a name
            events = [(name.replace("/", "_"), value, step) for name, value, step in events]
        master.write_events(events)

    return write
