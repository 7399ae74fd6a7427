"""Train a model from a recipe.

    deepspeed mmtensorar/train.py RECIPE.yaml [key=value ...] [--resume]
    mmtensorar train RECIPE.yaml [key=value ...]                    one process

The run folder (run.out/run.name) receives recipe.yaml (resolved), log.jsonl,
tensorboard/, samples/, checkpoints/ (the run state, for resuming) and model/ (the model
folder, for generation).

Read this file downward: prepare, then one_step and after_step until the last step,
then finish. The functions that they call are in mmtensorar/training/.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python puts this file's folder first on the path, where modules of
    # ours would hide installed ones of the same name. The repository root belongs
    # there.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from mmtensorar import train_options

    train_options.check()  # a wrong option ends here, before the imports below take seconds

import math
import os
from contextlib import ExitStack
from typing import NamedTuple

import torch

from mmtensorar import backbones, image_tokenizers, ranks
from mmtensorar.checkpoints import model_folder
from mmtensorar.cli import print_any_text, print_error
from mmtensorar.data import checks, loader
from mmtensorar.processes import StopSignals, exit_process
from mmtensorar.recipe import Recipe
from mmtensorar.seeds import seed_for
from mmtensorar.train_options import read_options
from mmtensorar.training import engine_private, run_state, sample_grid
from mmtensorar.training.distributed import (
    barrier,
    gather_lists,
    mean_over_ranks,
    on_all_ranks,
    print_on_first,
    start_process_group,
    stop_process_group,
)
from mmtensorar.training.ema import Average
from mmtensorar.training.engine import (
    check_machine,
    learning_rates,
    micro_batch_size,
    norm_after_step,
    norm_before_step,
    start,
)
from mmtensorar.training.plan import SampleFlops
from mmtensorar.training.resume import check_inputs, find_progress, nothing_to_do
from mmtensorar.training.run import (
    TrainingRun,
    check_fit,
    export,
    lock_run_folder,
    measure_rate,
    memory_errors_named,
    open_log,
    print_changes,
    print_model,
    print_without_effect,
    with_steps,
)
from mmtensorar.training.run_log import CUT
from mmtensorar.training.step_message import StepMessage
from mmtensorar.training.stopwatch import Stopwatch, peak_memory_gib
from mmtensorar.training.validation import validate
from mmtensorar.words import counted

NUM_NAMED = 10  # prompts printed when they are cut; the file names all


def train(recipe: Recipe, *, resume: bool = False, local_rank: int = 0) -> int:
    """Train in the recipe's run folder; returns the process's exit code.

    The code is 0, or after a signal 128 + its number, as shells have it.

    Args:
        recipe: the settings.
        resume: continue the run in the run folder, if there is one.
        local_rank: number of this rank on its machine, from the launcher.

    Raises:
        ValueError: the recipe, its files or the run folder do not allow the run.
        FloatingPointError: the loss or the gradient is not finite, or the gradient is
            above train.max_grad_norm.
    """
    with ExitStack() as stack:
        run = prepare(recipe, stack, resume=resume, local_rank=local_rank)
        if run is None:
            return 0
        while run.step < run.num_steps and not run.stopped:
            after_step(run, one_step(run))
        return finish(run)


# ---- prepare -------------------------------------------------------------------------------------


def prepare(recipe: Recipe, stack: ExitStack, *, resume: bool, local_rank: int) -> TrainingRun | None:
    """Join the ranks, check everything, and build or load what a run needs.

    Returns None when the run is finished already. Nothing is written before all checks
    have passed.

    stack: receives what must be released when training ends, also after an error.
    """
    # Recipe, ranks, signals.
    recipe = with_steps(model_folder.starting(recipe))
    folder = recipe.run_dir
    rank, world_size, device = start_process_group(local_rank)
    signals = StopSignals(announce=print_on_first)
    signals.install()

    # The machine and the run folder.
    on_all_ranks(lambda: check_machine(recipe, device), device)
    micro_batch_size(recipe, world_size)
    print_without_effect(recipe)
    progress = find_progress(recipe, resume=resume or recipe.train.resume == "auto")
    barrier()  # no rank writes to the run folder before all have looked at it
    lock_run_folder(recipe, stack, device)
    fingerprints = {"start": model_folder.start_fingerprint(recipe)}
    check_inputs(recipe, progress, fingerprints)
    if progress is not None and nothing_to_do(recipe, progress):
        print_on_first(f"{folder} is already at step {progress} of {recipe.train.steps}: nothing to do")
        return None

    # Image tokenizer, shards, model.
    image_tokenizer = image_tokenizers.load(recipe.image_tokenizer)
    caption_encoder = backbones.caption_encoder(recipe.backbone)
    sample_grid.check(recipe, len(image_tokenizer.factor_sizes), caption_encoder)
    fingerprints["shards"] = checks.preflight(recipe, image_tokenizer, caption_encoder, world_size=world_size)
    check_inputs(recipe, progress, fingerprints)
    engine = start(recipe, world_size, device)
    check_fit(recipe, image_tokenizer, engine.module)
    print_model(recipe, engine.module)

    # What the run state holds.
    decay = recipe.train.ema_decay
    average = None if decay is None else Average(engine_private.flat_tensors(engine), decay)
    start_step, counted = 0, {}
    if progress is not None:
        start_step = run_state.resume(engine, folder / "checkpoints", fingerprints, average)
        counted = run_state.latest_state(folder / "checkpoints")
        print_changes(recipe, start_step)
    saver = run_state.Saver(
        engine,
        folder / "checkpoints",
        fingerprints,
        keep_last=recipe.train.keep_last,
        keep_best=recipe.train.keep_best,
        background=recipe.train.save_in_background,
    )
    stack.callback(saver.wait)

    # Batches, log.
    skip = start_step * recipe.train.grad_accum
    return TrainingRun(
        recipe,
        rank,
        world_size,
        device,
        signals,
        engine=engine,
        image_tokenizer=image_tokenizer,
        caption_encoder=caption_encoder,
        batches=loader.stream(recipe, caption_encoder, rank=rank, world_size=world_size, skip_batches=skip),
        average=average,
        saver=saver,
        log=open_log(recipe, start_step, device),
        flops=SampleFlops(recipe, recomputed=False) if rank == 0 else None,
        matmul_rate=measure_rate(recipe.train.precision, world_size, device),
        watch=Stopwatch(device),
        epoch_samples=loader.epoch_samples(recipe.data),
        step=start_step,
        num_skipped=counted.get("num_skipped", 0),
        num_cut=counted.get("num_cut", 0),
    )


# ---- one step ------------------------------------------------------------------------------------


class StepResult(NamedTuple):
    """The numbers of one step, for the log and the checks after it."""

    message: StepMessage
    lr: float
    tensorar_lr: float  # of the codec
    grad_norm: float  # before clipping
    prompt_lens: list[int]  # P of each micro batch
    names: list[str]  # this rank's samples
    skipped: list[str]  # a sentence for each damaged sample that this rank skipped
    cut: list[str]  # a sentence for each of this rank's prompts that was too long


def one_step(run: TrainingRun) -> StepResult:
    """Forward and backward over the step's micro batches, and the update."""
    recipe, device, watch = run.recipe, run.device, run.watch
    run.step += 1
    torch.manual_seed(seed_for(recipe.run.seed, run.rank, run.step))
    lr, tensorar_lr = learning_rates(run.engine)
    total, message, norm = None, None, None
    prompt_lens, names, skipped, cut = [], [], [], []
    for micro in range(recipe.train.grad_accum):
        is_last = micro == recipe.train.grad_accum - 1
        batch = on_all_ranks(lambda: next(run.batches), device)
        watch.lap("data")
        prompt_lens.append(batch.condition.mask.shape[1])
        names += batch.names
        skipped += batch.skipped
        cut += batch.cut

        # Noise is drawn for the step's whole batch, under a seed that depends on the
        # step only. So a sample's noise is the same after resuming, and for any number
        # of ranks and micro batches.
        generator = torch.Generator(device).manual_seed(seed_for(recipe.run.seed, run.step))
        first_row = (micro * run.world_size + run.rank) * len(batch.codes)
        with memory_errors_named(run.step, batch):
            output = run.engine(
                batch.codes.to(device),
                batch.condition.to(device),
                batch.uncond.to(device),
                generator,
                (first_row, recipe.data.batch_size),
            )
        losses = torch.cat([output.loss.detach()[None], output.loss_per_offset.detach()]).float()
        total = losses if total is None else total + losses
        if is_last:
            message = exchange(run, total / recipe.train.grad_accum, len(skipped), len(cut))
            if not message.is_finite:
                run.fail(
                    f"the loss is not finite at step {run.step}: all ranks stop before the update", names
                )
        watch.lap("forward")
        with memory_errors_named(run.step, batch):
            run.engine.backward(output.loss)
        watch.lap("backward")
        norm = norm_before_step(run.engine) if is_last else None
        if norm is None or math.isfinite(norm):  # else `check_gradient` stops the run
            run.engine.step()
        watch.lap("step")
    assert message is not None
    if run.average is not None:
        run.average.update(run.step)
    grad_norm = norm_after_step(run.engine) if norm is None else norm
    return StepResult(message, lr, tensorar_lr, grad_norm, prompt_lens, names, skipped, cut)


def exchange(run: TrainingRun, losses: torch.Tensor, num_skipped: int, num_cut: int) -> StepMessage:
    """Average this step's losses over the ranks, and exchange what each rank reports.

    losses: loss, then loss per offset [K + 1], means of this rank.
    """
    packed = StepMessage.pack(
        losses,
        stop_requested=run.signals.requested,
        save_failed=run.saver.failure is not None,
        num_skipped=num_skipped,
        num_cut=num_cut,
    )
    return StepMessage.unpack(mean_over_ranks(packed).tolist())


# ---- after a step --------------------------------------------------------------------------------


def after_step(run: TrainingRun, result: StepResult) -> None:
    """Check the step, and validate, sample, log and save when the recipe asks for
    it.
    """
    recipe, watch = run.recipe, run.watch
    run.stopped = result.message.stop_requested
    if result.message.save_failed:
        run.saver.look_back(run.device)
    if result.message.any_skipped:
        count_skipped(run, result.skipped)
    if result.message.any_cut:
        cut = gather_lists(result.cut)
        run.num_cut += len(cut)
        name_cut(run, cut)
    check_gradient(run, result)
    watch.lap("step")

    measured = {}
    if is_due(run, recipe.train.validate_every) or (
        recipe.train.validate_every and run.step == run.num_steps
    ):
        measured, cut = validate(run.engine, recipe, run.caption_encoder, run.rank, run.world_size)
        name_cut(run, cut)
        watch.lap("validation")
    if recipe.train.sample_prompts and is_due(run, recipe.train.sample_every):
        grid, revised = sample_grid.sample(run.engine, recipe, run.caption_encoder, run.image_tokenizer)
        if revised:
            measured["revised_per_offset"] = revised
        if run.log is not None:
            run.log.sample_grid(run.step, grid)
        watch.lap("sample")

    seconds = watch.seconds()
    if run.log is not None:
        run.log.step(log_row(run, result, seconds) | measured)
    watch.restart()

    if run.is_last_step or is_due(run, recipe.train.save_every):
        counted = {
            "num_skipped": run.num_skipped,
            "num_cut": run.num_cut,
            "validation_loss": measured.get("validation_loss"),
            "validation": recipe.data.validation,
        }
        run.saver.save(run.step, counted, run.average, run.device)
        watch.lap("save")


def is_due(run: TrainingRun, every: int) -> bool:
    """Whether this step is a multiple of `every`. 0 means never."""
    return every > 0 and run.step % every == 0


def count_skipped(run: TrainingRun, skipped: list[str]) -> None:
    """Print, record and count the damaged samples of all ranks.

    Raises ValueError, on every rank, when there are more than data.max_skipped allows.
    """
    for sentence in gather_lists(skipped):
        run.num_skipped += 1
        print_on_first(f"skipped at step {run.step}: {sentence}")
        if run.log is not None:
            run.log.skipped(run.step, sentence)
    data = run.recipe.data
    if run.num_skipped > data.max_skipped * max(run.epoch_samples, run.step * data.batch_size):
        raise ValueError(
            f"{counted(run.num_skipped, 'damaged sample')} skipped by step {run.step}, more than "
            f"data.max_skipped {data.max_skipped:g} of an epoch of {run.epoch_samples}; {run.last_saved()}. "
            "mmtensorar shards check lists what is damaged"
        )


def name_cut(run: TrainingRun, cut: list[str]) -> None:
    """Record prompts that were too long, of all ranks, and print the first ones."""
    for sentence in cut:
        run.num_named += 1
        if run.num_named <= NUM_NAMED:
            print_on_first(f"step {run.step}: {sentence}")
        elif run.num_named == NUM_NAMED + 1:
            print_on_first(f"note: more prompts are cut; {run.folder / CUT} lists them")
        if run.log is not None:
            run.log.cut(run.step, sentence)


def check_gradient(run: TrainingRun, result: StepResult) -> None:
    """Stop the run when the gradient's norm is not finite or above
    train.max_grad_norm.
    """
    norm, bound = result.grad_norm, run.recipe.train.max_grad_norm
    if not math.isfinite(norm):
        run.fail(f"the gradient is not finite at step {run.step}: all ranks stop", result.names)
    if bound is not None and norm > bound:
        run.fail(
            f"the norm of the gradient at step {run.step} is {norm:.3g}, more than train.max_grad_norm "
            f"{bound:g}",
            result.names,
        )


def log_row(run: TrainingRun, result: StepResult, seconds: dict[str, float]) -> dict:
    """A row of the step log; see StepLog.step. seconds: by part, of this step."""
    recipe = run.recipe
    in_step = sum(seconds[part] for part in ("data", "forward", "backward", "step"))
    assert run.flops is not None
    # Of prompts as long as rank 0's, with their padding.
    lens = result.prompt_lens
    flops = recipe.data.batch_size * sum(map(run.flops, lens)) / len(lens)
    row = {
        "step": run.step,
        "loss": result.message.loss,
        "loss_per_offset": result.message.loss_per_offset,
        "lr": result.lr,
        "tensorar_lr": result.tensorar_lr,
        "grad_norm": result.grad_norm,
        "seconds": seconds,
        "data_share": seconds["data"] / in_step,
        "tokens_per_s": recipe.data.batch_size * run.flops.num_tokens / in_step,
        "mfu": flops / in_step / run.matmul_rate,
        "memory_gib": peak_memory_gib(),
        "prompt_tokens": max(lens),
        "num_skipped": run.num_skipped,
        "num_cut": run.num_cut,
    }
    if recipe.optim.tensorar_lr is None:
        del row["tensorar_lr"]
    if recipe.data.on_error != "skip":
        del row["num_skipped"]
    if not run.num_cut:
        del row["num_cut"]
    return row


# ---- finish --------------------------------------------------------------------------------------


def finish(run: TrainingRun) -> int:
    """Write the model folder if the run is finished; return the process's exit code."""
    run.saver.finish(run.device)
    if run.log is not None:
        run.log.close()
    if run.step >= run.num_steps:
        # Only a finished run gets model/; is_finished looks for it. This is not part of
        # the last step, so that a run which was killed after its last run state was
        # saved gets its model/ when it resumes.
        if run.average is not None:
            with run.average.in_place():
                export(run, run.folder / "model_ema")
        export(run, run.folder / "model")
        barrier()
        if run.num_cut:
            print_on_first(f"prompts that were cut at the limit: {run.num_cut}, in {run.folder / CUT}")
        print_on_first(f"finished {counted(run.step, 'step')}; the model is in {run.folder / 'model'}")
        return 0
    barrier()
    print_on_first(
        f"stopped by a signal after step {run.step}; saved to {run.folder / 'checkpoints'}. Add --resume to "
        "continue"
    )
    # torchrun treats any other code as a failure, and starts the ranks again.
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else run.signals.exit_code


# ---- command -------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code: 2 after an error, 130 after a second
    Ctrl-C.
    """
    options = read_options(arguments)
    print_any_text()
    # Not `cli.command`: there every process prints its error, since it runs on its own.
    # Here all ranks raise an error that rank 0 prints, and a rank's own OSError is
    # printed by that rank.
    try:
        recipe = Recipe.load(options.recipe, options.overrides)
        recipe = recipe.plain() if options.plain else recipe
        code = train(recipe, resume=options.resume, local_rank=options.local_rank)
    except KeyboardInterrupt:
        print("stopped at once; the last run state is kept", file=sys.stderr, flush=True)
        return 130
    except (ValueError, FloatingPointError) as error:
        # Every rank raises the same error; only the first prints it.
        if ranks.is_first():
            print_error(error)
        return 2
    except OSError as error:  # of this rank alone, for example a full disk
        print_error(error)
        return 2
    stop_process_group()
    return code


if __name__ == "__main__":
    exit_process(main())
