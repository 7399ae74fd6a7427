"""All of DeepSpeed: its settings, the start of training, saving and resuming. Nothing else imports it."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
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

from mmtensorar import adapters, checkpoint, optimizers  # noqa: E402
from mmtensorar.ema import Average  # noqa: E402
from mmtensorar.recipe import Recipe  # noqa: E402
from mmtensorar.shards import sha256  # noqa: E402

STATE = "state.json"


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


def master_weights(engine) -> list[Tensor]:
    """The float32 weights that this rank's optimiser changes: under ZeRO its pieces, flat."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    if stage:
        return list(engine.optimizer.single_partition_of_fp32_groups)
    if engine.bfloat16_enabled():
        return [master for group in engine.optimizer.fp32_groups for master in group]
    return [parameter.data for parameter in engine.module.parameters() if parameter.requires_grad]


def _partitioned_model(recipe: Recipe, config: dict, device: torch.device):
    """The initial model with its parameters cut over the ranks, never whole on any device.

    Rank 0 holds the weights in host memory; the other ranks build the modules on the meta
    device. One module's parameters at a time are broadcast and partitioned, so a rank's
    accelerator sees one module plus its own share. Modules are not constructed inside zero.Init,
    because a child's parameters would be empty before its parent's initialisation code runs.
    """
    rank = torch.distributed.get_rank()
    source = together(lambda: checkpoint.model_to_train(recipe) if rank == 0 else None, device)

    def shapes():
        with torch.device("meta"):
            model = checkpoint.build(recipe, weights=False, device="meta")
            adapters.prepare(model, recipe)
            return model

    model = together(shapes, device)
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32

    # Buffers are small (rotary frequencies, masks) and stay whole, in the dtype they were built with.
    buffers = [dict(source.named_buffers()) if rank == 0 else None]
    torch.distributed.broadcast_object_list(buffers, 0)
    for name, value in buffers[0].items():
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = value.to(device)

    weights = dict(source.named_parameters()) if rank == 0 else {}
    done: dict[int, torch.nn.Parameter] = {}  # by identity: a tied parameter stays one parameter
    for prefix, module in reversed(list(model.named_modules())):
        own = list(module._parameters.items())
        for leaf, parameter in own:
            if parameter is None:
                continue
            if id(parameter) not in done:
                name = f"{prefix}.{leaf}" if prefix else leaf
                value = torch.empty(parameter.shape, dtype=dtype, device=device)
                if rank == 0:
                    # named_parameters lists a tied parameter under its first name only.
                    value.copy_(weights[name] if name in weights else source.get_parameter(name).detach())
                torch.distributed.broadcast(value, 0)
                done[id(parameter)] = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
            module._parameters[leaf] = done[id(parameter)]
        if own:
            deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype)
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


def _must_match(engine, fingerprints: Mapping[str, str]) -> dict:
    """What a run and its continuation have in common besides the recipe."""
    return {
        "world_size": torch.distributed.get_world_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "grad_accum": engine.gradient_accumulation_steps(),
        **fingerprints,
    }


def save(
    engine,
    folder: Path,
    fingerprints: Mapping[str, str],
    *,
    step: int,
    keep_last: int,
    state: Mapping[str, int],
    average: Average | None = None,
) -> None:
    """Write folder/step_XXXXXX for resuming and delete all but the newest keep_last. Every rank calls it.

    fingerprints: of the run's inputs, {"shards": Manifest.fingerprint, "start": checkpoint.start_fingerprint}. state: what else
    the run counts.
    """
    tag = f"step_{step:06d}"
    recorded = {"step": step, **state, **_must_match(engine, fingerprints)}
    if average is not None:
        (folder / tag).mkdir(parents=True, exist_ok=True)
        average.save(folder / tag / _average_file())
    engine.save_checkpoint(str(folder), tag=tag, client_state={"step": step}, save_latest=False)
    barrier()
    recorded["sha256"] = _digests(folder / tag)
    if torch.distributed.get_rank() == 0:
        (folder / tag / STATE).write_text(json.dumps(recorded) + "\n", encoding="utf-8")
        # `latest` moves only after every rank's files and state.json are there.
        partial = folder / "latest.partial"
        partial.write_text(tag, encoding="utf-8")
        os.replace(partial, folder / "latest")
        for old in sorted(folder.glob("step_*"))[: -max(1, keep_last)]:
            if old.name != tag:
                shutil.rmtree(old)
    barrier()


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of each file of a checkpoint but its state.json, on every rank; the ranks share the work."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != STATE)
    found: list[dict[str, str]] = [{}] * world_size
    torch.distributed.all_gather_object(found, {name: sha256(folder / name) for name in names[rank::world_size]})
    return {name: digest for each in found for name, digest in each.items()}


def _average_file() -> str:
    return f"average_rank_{torch.distributed.get_rank():05d}.safetensors"


def latest_step(folder: Path) -> int | None:
    """Step of the checkpoint that `latest` names, None when the run has none yet."""
    return latest_state(folder).get("step")


def latest_state(folder: Path) -> dict:
    """What was recorded with the checkpoint that `latest` names, nothing when the run has none yet."""
    latest = folder / "latest"
    return _recorded(folder, latest) if latest.is_file() else {}


def _recorded(folder: Path, latest: Path) -> dict:
    tag = latest.read_text(encoding="utf-8").strip()
    path = folder / tag / STATE
    if not path.is_file():
        raise ValueError(f"{latest} names {tag!r}, but {path} is missing: the checkpoint is incomplete")
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        recorded = None
    if not isinstance(recorded, dict) or not isinstance(recorded.get("step"), int):
        raise ValueError(f"{path}: expected JSON with a step, the checkpoint is damaged")
    return recorded


def check_recorded(folder: Path, expected: Mapping[str, object]) -> int:
    """Step of the checkpoint that `latest` names. Raises ValueError when it was written under other conditions."""
    recorded = _recorded(folder, folder / "latest")
    for key, value in expected.items():
        if recorded.get(key) != value:
            raise ValueError(
                f"cannot resume {folder.parent}: saved with {key} {recorded.get(key)}, this run has {value}; delete the "
                "folder or choose another run.name, and to go on from its model set train.init_from"
            )
    return recorded["step"]


def resume(engine, folder: Path, fingerprints: Mapping[str, str], average: Average | None = None) -> int:
    """Load the checkpoint that `latest` names into the engine and the average; returns its step.

    Raises ValueError when it is damaged, or was written with another number of ranks, ZeRO stage or accumulation, or
    from other shards or weights: then neither the parts nor the order of the data would continue it.
    """
    step = check_recorded(folder, _must_match(engine, fingerprints))
    tag = f"step_{step:06d}"
    # DeepSpeed's files are pickles: nothing is read of one that is not as it was written.
    found, expected = _digests(folder / tag), _recorded(folder, folder / "latest").get("sha256")
    if expected is None:  # written before hashes were
        expected = found
    changed = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if changed:
        raise ValueError(_damaged(folder, tag, f"{changed[0]} is not the file that was written"))
    try:
        loaded, client = engine.load_checkpoint(str(folder), tag=tag)
    except (RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(_damaged(folder, tag, f"{type(error).__name__}: {error}".splitlines()[0])) from error
    if loaded is None:
        raise ValueError(_damaged(folder, tag, "files are missing"))
    if average is not None:
        average.load(folder / tag / _average_file())
    return client["step"]


def _damaged(folder: Path, tag: str, reason: str) -> str:
    older = sorted(path.name for path in folder.glob("step_*") if path.name != tag)
    remedy = f"write {older[-1]} into {folder / 'latest'} to go on from there" if older else "no older one is left"
    return f"cannot resume {folder.parent}: the checkpoint {folder / tag} is damaged ({reason}); {remedy}"
