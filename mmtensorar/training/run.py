"""A training run: the state that train.py's loop works on, and how its parts are set
up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from mmtensorar import image_tokenizers, ranks
from mmtensorar.checkpoints import model_folder
from mmtensorar.data import loader
from mmtensorar.model import adapters
from mmtensorar.model.conditions import CaptionEncoder
from mmtensorar.processes import RunFolderLock, StopSignals
from mmtensorar.recipe import Recipe
from mmtensorar.training import engine_private, run_state
from mmtensorar.training.distributed import barrier, gather_lists, on_all_ranks, print_on_first
from mmtensorar.training.ema import Average
from mmtensorar.training.engine import full_state_dict, monitor
from mmtensorar.training.plan import SampleFlops
from mmtensorar.training.resume import differences, recipe_of_run
from mmtensorar.training.run_log import STOPPED, StepLog
from mmtensorar.training.run_state import Saver
from mmtensorar.training.stopwatch import Stopwatch, matmul_rate, slow_bfloat16

LOCK_TIMEOUT_S = 120  # with train.resume auto


@dataclass
class TrainingRun:
    """Everything one rank of a run works with, and its counters."""

    recipe: Recipe  # with train.steps set
    rank: int
    world_size: int
    device: torch.device
    signals: StopSignals

    engine: Any  # DeepSpeed's
    image_tokenizer: Any
    caption_encoder: CaptionEncoder
    batches: Iterator[loader.Batch]  # micro batches, without end
    average: Average | None  # of the weights, with train.ema_decay
    saver: Saver
    log: StepLog | None  # rank 0's
    flops: SampleFlops | None  # rank 0's
    matmul_rate: float  # FLOP/s of a matrix product, all ranks together
    watch: Stopwatch
    epoch_samples: int

    step: int = 0  # steps done, or in progress
    num_skipped: int = 0  # damaged samples so far
    num_cut: int = 0  # prompts so far that were longer than the limit
    num_named: int = field(default=0, init=False)  # of these, those printed by this process
    stopped: bool = field(default=False, init=False)  # a rank received a stop signal

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.recipe.run_dir

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return num_steps(self.recipe)

    @property
    def is_last_step(self) -> bool:
        """Whether the step in progress is the last one of this process."""
        return self.stopped or self.step == self.num_steps

    def last_saved(self) -> str:
        """Wait for the write in progress, and return 'the last run state is of step N'.

        Every rank calls it.
        """
        with suppress(ValueError):
            self.saver.finish(self.device)
        saved = run_state.latest_step(self.folder / "checkpoints")
        return f"the last run state is of step {saved}" if saved else "no run state was saved yet"

    def fail(self, reason: str, names: list[str]) -> NoReturn:
        """End the run with FloatingPointError, on every rank.

        Records reason and the names of the step's samples in stopped.json. Every rank
        calls it. names: of this rank's samples.
        """
        samples = gather_lists(names)
        if self.log is not None:
            self.log.stopped(self.step, reason, samples)
        raise FloatingPointError(
            f"{reason}; {self.last_saved()}, the step's samples are in {self.folder / STOPPED}. Look "
            "at them, or resume (--resume) with a lower optim.lr or optim.grad_clip, or a higher "
            "train.max_grad_norm"
        )


# ---- set-up --------------------------------------------------------------------------------------


def with_steps(recipe: Recipe) -> Recipe:
    """The recipe with train.steps, computed from train.epochs when it has none."""
    if recipe.train.steps is not None:
        return recipe
    train = recipe.train.model_copy(update={"steps": loader.steps_of(recipe), "epochs": None})
    return recipe.model_copy(update={"train": train})


def num_steps(recipe: Recipe) -> int:
    """train.steps of a recipe from `with_steps`."""
    assert recipe.train.steps is not None
    return recipe.train.steps


def print_without_effect(recipe: Recipe) -> None:
    """Print a note for each setting without effect, or with an unusual one."""
    if recipe.optim.warmup_steps >= num_steps(recipe):
        print_on_first(
            f"note: optim.warmup_steps is {recipe.optim.warmup_steps}, train.steps is {recipe.train.steps}: "
            "the learning rate never reaches optim.lr"
        )
    if bool(recipe.train.sample_every) != bool(recipe.train.sample_prompts):
        print_on_first(
            "note: train.sample_every and train.sample_prompts have an effect only together: there will be "
            "no sample images"
        )


def lock_run_folder(recipe: Recipe, stack: ExitStack, device: torch.device) -> None:
    """Lock the run folder until the stack is closed.

    Every rank calls it; rank 0 holds the lock.
    """
    # After an elastic restart the lock of a rank 0 that died may linger; wait for it.
    timeout_s = LOCK_TIMEOUT_S if recipe.train.resume == "auto" else 0
    lock = RunFolderLock(recipe.run_dir, timeout_s=timeout_s)
    on_all_ranks(lambda: stack.enter_context(lock) if ranks.is_first() else None, device)


def check_fit(recipe: Recipe, image_tokenizer: Any, model: Any) -> None:
    """Raise ValueError when the backbone predicts other codes than the image
    tokenizer's.
    """
    image_tokenizers.check_fit(
        image_tokenizer,
        model.backbone,
        image_tokenizer_path=recipe.image_tokenizer.path,
        backbone_path=recipe.backbone.path,
    )


def print_model(recipe: Recipe, model: Any) -> None:
    """On rank 0, print the trained parameters and the implementation of attention."""
    print_on_first(adapters.table(model, shape_of=engine_private.full_shape))
    print_on_first(f"attention: {recipe.backbone.attn_implementation}")


def print_changes(recipe: Recipe, start_step: int) -> None:
    """On rank 0, print that the run resumes, and which settings have changed."""
    print_on_first(f"continuing {recipe.run_dir} after step {start_step}")
    if ranks.is_first():
        before = recipe_of_run(recipe.run_dir).model_dump(mode="json")
        for change in differences(before, recipe.model_dump(mode="json")):
            print_on_first(f"note: from here {change}")


def open_log(recipe: Recipe, start_step: int, device: torch.device) -> StepLog | None:
    """The step log, on rank 0.

    It saves the recipe in the run folder. Every rank calls it.
    """
    first, folder = ranks.is_first(), recipe.run_dir
    record_events = on_all_ranks(
        lambda: monitor(recipe.train.monitors, folder, start_step) if first else None, device
    )
    if not first:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    recipe.save(folder / "recipe.yaml")
    return StepLog(
        folder,
        num_steps=num_steps(recipe),
        start_step=start_step,
        log_every=recipe.train.log_every,
        curves="tensorboard" in recipe.train.monitors,
        monitor=record_events,
    )


def measure_rate(precision: str, world_size: int, device: torch.device) -> float:
    """Measure and print the FLOP/s of a matrix product on all ranks together.

    Prints a warning when a CPU is much slower in bfloat16 than in float32.

    precision: train.precision.
    """
    barrier()  # ranks that share a machine share its rate
    half = precision == "bf16"
    rate = matmul_rate(device, torch.bfloat16 if half else torch.float32)
    if half and (warning := slow_bfloat16(device, rate)):
        print_on_first(warning)
    print_on_first(f"a matrix product runs at {world_size * rate / 1e12:.3g} TFLOP/s on all ranks")
    return world_size * rate


# ---- steps ---------------------------------------------------------------------------------------


@contextmanager
def memory_errors_named(step: int, batch: loader.Batch) -> Iterator[None]:
    """Turn a full memory, of a GPU or the host, into an OSError.

    It gives the size of the batch and the sample with the longest prompt, to which all
    others are padded.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        rows, length = batch.condition.mask.shape
        longest = batch.names[int(batch.condition.mask.sum(1).argmax())]
        raise OSError(
            f"out of memory at step {step}, with {rows} samples at a time, padded to the {length} prompt "
            f"tokens of {longest}; increase train.grad_accum, set train.activation_checkpointing, or lower "
            "backbone.max_prompt_tokens"
        ) from error


# ---- end -----------------------------------------------------------------------------------------


def export(run: TrainingRun, folder: Path) -> None:
    """Write the weights, or with adapters what was trained, as a model folder.

    Every rank calls it.
    """
    recipe, step = run.recipe, run.step
    with_adapters = recipe.train.parts in adapters.WITH_ADAPTERS
    state_dict = full_state_dict(run.engine, trained_only=with_adapters)
    if state_dict is not None and with_adapters:
        model_folder.save_adapters(folder, recipe, state_dict, step=step)
    elif state_dict is not None:
        model_folder.save_state_dict(folder, state_dict, recipe, step=step)
    barrier()
