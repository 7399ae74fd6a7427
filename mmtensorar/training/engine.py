"""All of DeepSpeed: its settings, the start of training, saving and resuming. Nothing else imports it."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
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
from deepspeed.ops.op_builder import AsyncIOBuilder  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param  # noqa: E402
from torch import Tensor  # noqa: E402

from mmtensorar.checkpoints import model_folder
from mmtensorar.files import write_text  # noqa: E402
from mmtensorar.model import adapters, loss
from mmtensorar.processes import give_memory_back  # noqa: E402
from mmtensorar.recipe import Recipe  # noqa: E402
from mmtensorar.training import optimizers  # noqa: E402
from mmtensorar.training.run_log import Event


def start_process_group(local_rank: int) -> tuple[int, int, torch.device]:
    """Join the ranks; returns (rank, world size, this rank's device).

    NCCL on GPUs, gloo on CPU. Started without a launcher, the process is a world of one.
    """
    defaults = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": str(max(0, local_rank)),
        "MASTER_ADDR": "127.0.0.1",
    }
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
    return float(
        torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    )


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
    if recipe.zero.offload_optimizer == "nvme":
        # Buffers for weights, gradients and two moments of the group that is updated.
        zero["offload_optimizer"] |= {"nvme_path": str(_swap_folder(recipe)), "buffer_count": 4}
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


def check(recipe: Recipe, device: torch.device) -> None:
    """Raise ValueError, or OSError, when the recipe asks for what this machine has not; before anything is loaded."""
    if recipe.train.loss_kernel == "liger" and not loss.has_liger():
        raise ValueError("train.loss_kernel liger needs liger-kernel: pip install 'mmtensorar[liger]'")
    if recipe.train.loss_kernel == "liger" and device.type != "cuda":
        raise ValueError("train.loss_kernel liger needs a GPU; auto takes it where there is one")
    if recipe.zero.offload_optimizer == "nvme" and not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError(
            "zero.offload_optimizer nvme needs libaio (Debian's libaio-dev), from which DeepSpeed compiles its reader; cpu needs none"
        )
    if recipe.zero.offload_optimizer == "nvme":
        _swap_folder(recipe).mkdir(parents=True, exist_ok=True)
    optimizers.check(recipe.optim, device)
    if "wandb" in recipe.train.monitors and is_first() and importlib.util.find_spec("wandb") is None:
        raise ValueError("train.monitors wandb needs wandb: pip install wandb")
    if recipe.train.parts == "qlora":
        adapters.bitsandbytes_for("train.parts qlora")


def start(recipe: Recipe, world_size: int, device: torch.device):
    """Build the model, spread it over the ranks and return the DeepSpeed engine around it."""
    config = settings(recipe, world_size)
    if recipe.zero.stage == 3:
        model = _partitioned_model(recipe, config, device)
    else:
        model = together(lambda: model_folder.model_to_train(recipe), device)
    model.backbone.activation_checkpointing = recipe.train.activation_checkpointing
    model.train()
    if recipe.train.compile:
        for layer in model.backbone.layers:
            layer.compile()

    optim = recipe.optim
    optimizer = optimizers.build(optim, optimizers.groups(model, optim), device, DeepSpeedCPUAdam)

    def factor(step: int) -> float:
        return learning_rate_factor(
            step,
            steps=recipe.train.steps,
            warmup_steps=optim.warmup_steps,
            final_lr_ratio=optim.final_lr_ratio,
        )

    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=config,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
    )
    if world_size == 1 and recipe.zero.stage == 0:
        # DeepSpeed would copy all gradients to and fro to sum them over one rank: 5 % of a step of 60 M parameters.
        engine.enable_backward_allreduce = False
    if masters := masters_of(engine):
        # Here DeepSpeed makes the moments by a step with zero gradients, which decays the weights and puts the bias
        # correction one step ahead. Undo it: torch makes them anew at the first real step.
        engine.optimizer.optimizer.state.clear()
        for parameter in engine.module.parameters():
            if id(parameter) in masters:
                masters[id(parameter)].data.copy_(parameter.data)
    return engine


def masters_of(engine) -> dict[int, Tensor]:
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


def flat_shapes(engine) -> list[torch.Size]:
    """The shapes of `flat_tensors`, also of those that are on NVMe, which are empty until they are asked for."""
    return [
        torch.Size([engine.optimizer.fp16_partitioned_groups_flat_numel[number]])
        if on_nvme(engine, number)
        else flat.shape
        for number, flat in enumerate(flat_tensors(engine))
    ]


def on_nvme(engine, number: int) -> bool:
    """Whether that flat tensor and its moments are on NVMe; those of less than 1 MiB stay in memory."""
    return engine.zero_optimization_stage() == 3 and engine.optimizer._swappable_optimizer_subgroup(number)


@contextmanager
def in_memory(engine, number: int, *, changed: bool = False) -> Iterator[None]:
    """That flat tensor and its moments are in memory inside this with statement. changed: they go back as they are at its end."""
    if not on_nvme(engine, number):
        yield
        return
    optimizer = engine.optimizer
    optimizer._optimizer_states_and_gradient_swap_in(number)
    try:
        yield
    finally:
        if changed:
            optimizer._optimizer_states_and_gradient_swap_out(number)
        else:
            optimizer.optimizer_swapper.release_swap_buffers(optimizer.fp32_partitioned_groups_flat[number])
            optimizer.fp32_partitioned_groups_flat[number].grad = None


def _swap_folder(recipe: Recipe) -> Path:
    """A run's own, whatever other runs, of the same name elsewhere too, have on that disk."""
    place = hashlib.sha256(str(recipe.run_dir.resolve()).encode()).hexdigest()[:12]
    return Path(recipe.zero.nvme_path).expanduser() / "mmtensorar_swap" / f"{recipe.run.name}_{place}"


def forget_swap(recipe: Recipe) -> None:
    """Delete what a run that has ended has on its node's NVMe."""
    if recipe.zero.offload_optimizer == "nvme":
        shutil.rmtree(_swap_folder(recipe), ignore_errors=True)


def _partitioned_model(recipe: Recipe, config: dict, device: torch.device):
    """The initial model with its parameters cut over the ranks, never whole anywhere.

    Rank 0 reads one tensor after the other from the files, and each is broadcast and cut, so a rank holds one module plus
    its own share (and rank 0 a mapped file). Modules are not constructed inside zero.Init, because a child's parameters
    would be empty before its parent's initialisation code runs.
    """
    rank = torch.distributed.get_rank()
    model = together(lambda: model_folder.skeleton(recipe), device)
    value_of = together(lambda: model_folder.initial_values(recipe) if rank == 0 else None, device)
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
        with deepspeed.zero.GatheredParameters(
            parameters, enabled=engine.zero_optimization_partition_weights()
        ):
            with torch.no_grad():
                yield engine.module
    finally:
        engine.module.train()


def full_state_dict(engine, *, trained_only: bool = False) -> dict[str, Tensor] | None:
    """All weights (or those that are trained) on the CPU in float32: the optimizer's master copy. None except on rank 0.

    Every rank must call it, since ZeRO gathers each parameter from all of them.
    """
    rank = torch.distributed.get_rank()
    state, masters = {}, masters_of(engine) | _gathered_from_nvme(engine)
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
            state[name] = (
                value.detach().float().cpu().reshape(getattr(parameter, "ds_shape", parameter.shape)).clone()
            )
    if rank:
        return None
    persistent = engine.module.state_dict().keys()
    state.update({name: value.cpu() for name, value in engine.module.named_buffers() if name in persistent})
    return state


def _gathered_from_nvme(engine) -> dict[int, Tensor]:
    """A parameter's id -> all of its float32 master copy on the CPU, of what is on NVMe (read once); empty tensors past rank 0.

    DeepSpeed's accessor would read the whole flat tensor for each parameter in it.
    """
    found: dict[int, Tensor] = {}
    for number in range(len(flat_tensors(engine))):
        if not on_nvme(engine, number):
            continue
        with in_memory(engine, number):
            flat = engine.optimizer.fp32_partitioned_groups_flat[number]
            for parameter in engine.optimizer.fp16_groups[number]:
                _, start, share = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
                own = flat.detach()[start : start + share].to(engine.device)
                parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
                torch.distributed.all_gather(parts, own)
                whole = torch.cat(parts)[: parameter.ds_numel].cpu() if is_first() else own.new_empty(0)
                found[id(parameter)] = whole
    return found


def monitor(names: Sequence[str], run_dir: Path, start_step: int) -> Callable[[list[Event]], None] | None:
    """DeepSpeed's monitor for W&B and CSV files, as a function that takes a step's events; None when neither is asked for.

    Rows of CSV files past start_step, of a run that was stopped after its last checkpoint, are dropped.
    """
    if not set(names) & {"wandb", "csv"}:
        return None
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    folder = run_dir / "csv"
    for path in list(folder.glob("*.csv")):
        header, *rows = path.read_text(encoding="utf-8").splitlines() or [""]
        if not header.startswith("step,"):  # torn when the run was killed
            path.unlink()
            continue
        numbers = [(row.partition(",")[0], row) for row in rows]
        kept = [row for number, row in numbers if number.isdigit() and int(number) <= start_step]
        write_text(path, "\n".join([header, *kept]) + "\n")
    config = {
        "wandb": {"enabled": "wandb" in names, "project": "mmtensorar", "group": run_dir.name},
        "csv_monitor": {"enabled": "csv" in names, "output_path": str(run_dir), "job_name": "csv"},
    }
    master = MonitorMaster(get_monitor_config(config))
    if master.csv_monitor is not None:  # which would write a header into each file again
        master.csv_monitor.filenames += [path.stem for path in folder.glob("*.csv")]

    def write(events: list[Event]) -> None:
        if master.csv_monitor is not None:  # whose header is what follows the last slash
            events = [(name.replace("/", "_"), value, step) for name, value, step in events]
        master.write_events(events)

    return write
