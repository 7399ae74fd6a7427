"""Train a model from a recipe.

    deepspeed mmtensorar/train.py RECIPE.yaml [key=value ...] [--resume]
    python mmtensorar/train.py RECIPE.yaml [key=value ...]          one process

The run folder (run.out/run.name) receives recipe.yaml (resolved), log.jsonl, tensorboard/,
samples/, checkpoints/ (for resuming) and model/ (consolidated, for generation).
"""

from __future__ import annotations

import sys
from pathlib import Path

# The launcher puts this file's folder first on the path, where modules of ours would hide
# installed ones of the same name; the repository root belongs there.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse  # noqa: E402
import hashlib  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import time  # noqa: E402
from contextlib import suppress  # noqa: E402
from typing import NoReturn  # noqa: E402

import torch  # noqa: E402

from mmtensorar import backbones, image_tokenizers
from mmtensorar.checkpoints import model_folder
from mmtensorar.data import loader
from mmtensorar.image_tokenizers import to_images  # noqa: E402
from mmtensorar.model import adapters
from mmtensorar.processes import hold, leave  # noqa: E402
from mmtensorar.recipe import Recipe  # noqa: E402
from mmtensorar.sampling.decode import decode
from mmtensorar.sampling.trace import revised_per_offset
from mmtensorar.training import engine as deep  # noqa: E402
from mmtensorar.training import plan, run_state  # noqa: E402
from mmtensorar.training.ema import Average  # noqa: E402
from mmtensorar.training.run_log import (  # noqa: E402
    STOPPED,
    StepLog,
    Stopwatch,
    matmul_rate,
    peak_memory_gib,
)

# Settings that may change between a run and its continuation: none of them alters a past step. (Other train.steps do
# stretch the rest of the learning rate's cosine; a run extended so is not one that was planned longer. Another rate is what
# a run needs that stopped at a spike. Both are said.)
FREE_ON_RESUME = {
    "run": {"name", "out"},
    "data": {"num_workers", "validation", "validation_batch_size", "max_skipped", "cache", "cache_gb"},
    "optim": {"lr", "tensorar_lr", "final_lr_ratio", "grad_clip"},
    "train": {
        "steps",
        "grad_accum",
        "max_grad_norm",
        "log_every",
        "save_every",
        "save_in_background",
        "keep_last",
        "keep_best",
        "resume",
        "validate_every",
        "sample_every",
        "sample_prompts",
        "activation_checkpointing",
        "compile",
        "monitors",
    },
    "zero": None,
    "sampler": None,
}


def seed_for(*parts: int) -> int:
    """A 63-bit seed from integers such as (seed, rank, step); neighbours are unrelated."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def fixed_part(recipe: Recipe) -> dict:
    """The settings that a continued run must share with the run it continues."""
    settings = recipe.model_dump(mode="json")
    for section, keys in FREE_ON_RESUME.items():
        for key in list(settings[section]) if keys is None else keys:
            settings[section].pop(key, None)
    return settings


def differences(old: dict, new: dict, where: str = "") -> list[str]:
    """'key: old -> new' for each leaf in which two nested dictionaries differ."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{where}{key}.")
        elif a != b:
            found.append(f"{where}{key}: {a!r} -> {b!r}")
    return found


def find_progress(recipe: Recipe, *, resume: bool) -> int | None:
    """Step at which to continue the run in the run folder; None to start at the beginning.

    Raises ValueError when the folder holds a run and resume is False, or when it holds a run
    of another recipe.
    """
    folder = recipe.run_dir
    finished = folder / "model" / model_folder.INDEX
    step = run_state.latest_step(folder / "checkpoints")
    if not resume:
        if finished.is_file():
            raise ValueError(
                f"{folder} holds a finished run: choose another run.name, delete the folder, or add --resume to train on"
            )
        if step is not None:
            raise ValueError(
                f"{folder} holds a run stopped at step {step}: add --resume to continue it, or choose another run.name"
            )
        return None
    if step is None:
        if finished.is_file():
            raise ValueError(
                f"cannot resume {folder}: it holds a finished model but no checkpoints/; choose another run.name"
            )
        return None
    changed = differences(fixed_part(Recipe.load(folder / "recipe.yaml", [])), fixed_part(recipe))
    if changed:
        raise ValueError(f"cannot resume {folder}: the recipe changed ({'; '.join(changed)})")
    return step


def train(recipe: Recipe, *, resume: bool = False, local_rank: int = 0) -> int:
    """Train, in the recipe's run folder; returns the process's exit code: 0, or after a signal, as shells have it, 128 + its number."""
    # ---- recipe ------------------------------------------------------------------------------
    resume = resume or recipe.train.resume == "auto"
    recipe = model_folder.starting(recipe)
    if recipe.train.steps is None:
        recipe = recipe.model_copy(
            update={
                "train": recipe.train.model_copy(update={"steps": loader.steps_of(recipe), "epochs": None})
            }
        )
    folder = recipe.run_dir

    # ---- process group -----------------------------------------------------------------------
    rank, world_size, device = deep.start_process_group(local_rank)
    first = rank == 0

    def say(sentence: str) -> None:
        if first:
            print(sentence, flush=True)

    # A signal only sets a flag; the step in progress ends on every rank before anything is saved.
    signals: list[tuple[int, float]] = []  # which, and when it came

    def on_signal(received: int, frame) -> None:
        # Launchers pass a Ctrl-C on as further signals, so only a later one is a second thought.
        if signals and received == signal.SIGINT and time.monotonic() - signals[0][1] > 1:
            raise KeyboardInterrupt
        if not signals:
            say("stopping after the step in progress and saving; Ctrl-C again quits at once, without saving")
        signals.append((received, time.monotonic()))

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    deep.together(lambda: deep.check(recipe, device), device)
    deep.micro_batch_size(recipe, world_size)
    if recipe.optim.warmup_steps >= recipe.train.steps:
        say(
            f"note: optim.warmup_steps is {recipe.optim.warmup_steps}, train.steps is {recipe.train.steps}: "
            "the learning rate never reaches optim.lr"
        )
    progress = find_progress(recipe, resume=resume)
    deep.barrier()  # nobody writes to the run folder before everybody has looked at it
    # A rank 0 that was killed on another node may be thought alive for a while.
    patience_s = 120 if recipe.train.resume == "auto" else 0
    lock = deep.together(lambda: hold(folder, patience_s) if first else None, device)
    fingerprints = {"start": model_folder.start_fingerprint(recipe)}
    exported = (folder / "model" / model_folder.INDEX).is_file() and model_folder.read_index(
        folder / "model"
    )["step"]
    if progress is not None:
        run_state.check_recorded(folder / "checkpoints", fingerprints)
    if progress is not None and progress >= recipe.train.steps and exported == progress:
        say(f"{folder} is already at step {progress} of {recipe.train.steps}: nothing to do")
        return 0
    image_tokenizer = image_tokenizers.load(recipe.image_tokenizer)
    fingerprints["shards"] = loader.preflight(recipe, image_tokenizer, world_size=world_size)

    # ---- model -------------------------------------------------------------------------------
    engine = deep.start(recipe, world_size, device)
    backbone, num_factors = engine.module.backbone, len(image_tokenizer.factor_sizes)
    paths = dict(image_tokenizer_path=recipe.image_tokenizer.path, backbone_path=recipe.backbone.path)
    image_tokenizers.check_fit(image_tokenizer, backbone, **paths)
    # Settings per factor are checked now, not at the first sample grid or by whoever loads the finished model.
    recipe.sampler.per_factor(num_factors)

    if bool(recipe.train.sample_every) != bool(recipe.train.sample_prompts):
        say(
            "note: train.sample_every and train.sample_prompts have an effect only together: there will be no sample images"
        )
    say(adapters.table(engine.module))
    if hasattr(recipe.backbone, "attn_implementation"):
        say(f"attention: {recipe.backbone.attn_implementation}")

    # ---- data --------------------------------------------------------------------------------
    caption_encoder = backbones.caption_encoder(recipe.backbone)

    # ---- resume ------------------------------------------------------------------------------
    average = (
        None if recipe.train.ema_decay is None else Average(deep.flat_tensors(engine), recipe.train.ema_decay)
    )
    start_step = (
        run_state.resume(engine, folder / "checkpoints", fingerprints, average) if progress is not None else 0
    )
    if start_step:
        say(f"continuing {folder} after step {start_step}")
        if first:
            before = Recipe.load(folder / "recipe.yaml", []).model_dump(mode="json")
            for change in differences(before, recipe.model_dump(mode="json")):
                say(f"note: from here {change}")
    batches = loader.stream(
        recipe,
        caption_encoder,
        rank=rank,
        world_size=world_size,
        skip_batches=start_step * recipe.train.grad_accum,
    )
    num_skipped = run_state.latest_state(folder / "checkpoints").get("num_skipped", 0) if start_step else 0
    epoch = loader.epoch_samples(recipe)
    saver = run_state.Saver(
        engine,
        folder / "checkpoints",
        fingerprints,
        keep_last=recipe.train.keep_last,
        keep_best=recipe.train.keep_best,
        background=recipe.train.save_in_background,
    )
    monitor = deep.together(
        lambda: deep.monitor(recipe.train.monitors, folder, start_step) if first else None, device
    )
    log = None
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        recipe.save(folder / "recipe.yaml")
        log = StepLog(
            folder,
            num_steps=recipe.train.steps,
            start_step=start_step,
            log_every=recipe.train.log_every,
            curves="tensorboard" in recipe.train.monitors,
            monitor=monitor,
        )
        shapes = plan.shapes(recipe)

    def last_checkpoint() -> str:
        """Said on all ranks alike, once what is being written stands or has failed."""
        with suppress(ValueError):
            saver.finish(device)
        saved = run_state.latest_step(folder / "checkpoints")
        return f"the last checkpoint is of step {saved}" if saved else "no checkpoint was saved yet"

    def stop(reason: str, step: int, names: list[str]) -> NoReturn:
        """End the run, on all ranks alike, and leave the names of the step's samples to look at."""
        samples = deep.from_all_ranks(names)
        if log is not None:
            log.stopped(step, reason, samples)
        raise FloatingPointError(
            f"{reason}; {last_checkpoint()}, the step's samples are in {folder / STOPPED}. Look at them, or go on with "
            "--resume and a lower optim.lr, optim.grad_clip or (a higher) train.max_grad_norm"
        )

    # ---- loop --------------------------------------------------------------------------------
    deep.barrier()  # ranks that share a machine share its rate
    rate = (
        matmul_rate(device, torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32)
        * world_size
    )
    say(f"a matrix product runs at {rate / 1e12:.3g} TFLOP/s on all ranks")
    watch = Stopwatch(device)
    step, stopped = start_step, False
    while step < recipe.train.steps and not stopped:
        step += 1
        torch.manual_seed(seed_for(recipe.run.seed, rank, step))
        lr, *_, tensorar_lr = 2 * engine.get_lr()  # by group: the codec's come last
        total, sentences, names = None, [], []
        for micro in range(recipe.train.grad_accum):
            batch = deep.together(lambda: next(batches), device)
            watch.lap("data")
            sentences += batch.skipped
            names += batch.names
            condition = batch.condition.to(device)
            # Drawn for the step's whole batch, by place in the run, so that neither resuming nor the number of ranks nor of
            # micro batches changes a sample's noise.
            generator = torch.Generator(device).manual_seed(seed_for(recipe.run.seed, step))
            rows = ((micro * world_size + rank) * len(batch.codes), recipe.data.batch_size)
            output = engine(batch.codes.to(device), condition, batch.uncond.to(device), generator, rows)
            losses = torch.cat([output.loss.detach()[None], output.loss_per_offset.detach()]).float()
            total = losses if total is None else total + losses
            if micro == recipe.train.grad_accum - 1:
                # One message per step: the losses, whether any rank was asked to stop or could not write its part of a
                # checkpoint, and how many samples were skipped. It comes before the update, so a bad loss never reaches the weights.
                others = total.new_tensor(
                    [float(bool(signals)), float(saver.failure is not None), float(len(sentences))]
                )
                message = torch.cat([total / recipe.train.grad_accum, others])
                message = deep.mean_over_ranks(message).tolist()
                if not all(math.isfinite(value) for value in message):
                    stop(
                        f"the loss is not finite at step {step}: all ranks stop before the update",
                        step,
                        names,
                    )
            watch.lap("forward")
            engine.backward(output.loss)
            watch.lap("backward")
            norm = deep.grad_norm(engine) if micro == recipe.train.grad_accum - 1 else None
            if norm is not None and not math.isfinite(norm):
                break
            engine.step()
            watch.lap("step")
        if average is not None:
            average.update(step)
        loss, *loss_per_offset, asked, unsaved, skips = message
        stopped = asked > 0
        if unsaved:
            saver.look_back(device)
        if skips:
            for sentence in deep.from_all_ranks(sentences):
                num_skipped += 1
                say(f"skipped at step {step}: {sentence}")
                if log is not None:
                    log.skipped(step, sentence)
            allowed = recipe.data.max_skipped * max(epoch, step * recipe.data.batch_size)
            if num_skipped > allowed:
                raise ValueError(
                    f"{num_skipped} damaged samples were skipped by step {step}, more than data.max_skipped "
                    f"{recipe.data.max_skipped:g} of an epoch of {epoch}; {last_checkpoint()}. "
                    "data_tools/check_shards.py lists what is damaged"
                )
        grad_norm = norm if norm is not None else float(engine.get_global_grad_norm() or 0.0)
        if not math.isfinite(grad_norm):
            stop(f"the gradient is not finite at step {step}: all ranks stop", step, names)
        if recipe.train.max_grad_norm is not None and grad_norm > recipe.train.max_grad_norm:
            bound = f"train.max_grad_norm {recipe.train.max_grad_norm:g}"
            stop(
                f"the norm of the gradient at step {step} is {grad_norm:.3g}, more than {bound}", step, names
            )

        # ---- log -----------------------------------------------------------------------------
        watch.lap("step")
        prompt_len = batch.condition.mask.shape[1]
        validated, sampled = {}, {}
        if recipe.train.validate_every and (
            step % recipe.train.validate_every == 0 or step == recipe.train.steps
        ):
            validated = validate(engine, recipe, caption_encoder, rank, world_size, device)
            watch.lap("validation")
        if (
            recipe.train.sample_every
            and recipe.train.sample_prompts
            and step % recipe.train.sample_every == 0
        ):
            # Every rank decodes the same images: under ZeRO-3 each layer's weights are gathered
            # from all ranks, so rank 0 alone would wait for ever.
            pixels, revised = sample(engine, recipe, caption_encoder, image_tokenizer, device)
            sampled = {"revised_per_offset": revised} if revised else {}
            if log is not None:
                log.images(step, to_images(pixels))
            watch.lap("sample")
        seconds = watch.seconds()
        in_step = sum(seconds[part] for part in ("data", "forward", "backward", "step"))
        if log is not None:
            log.step(
                {
                    "step": step,
                    "loss": loss,
                    "loss_per_offset": loss_per_offset,
                    "lr": lr,
                    **({"tensorar_lr": tensorar_lr} if recipe.optim.tensorar_lr is not None else {}),
                    "grad_norm": grad_norm,
                    "seconds": seconds,
                    "data_share": seconds["data"] / in_step,
                    "tokens_per_s": recipe.data.batch_size * backbone.num_tokens / in_step,
                    "mfu": plan.flops_per_step(recipe, shapes, prompt_len=prompt_len, recomputed=False)[1]
                    / in_step
                    / rate,
                    "memory_gib": peak_memory_gib(),
                    **({"num_skipped": num_skipped} if recipe.data.on_error == "skip" else {}),
                    **validated,
                    **sampled,
                }
            )

        # ---- save ----------------------------------------------------------------------------
        last = step == recipe.train.steps or stopped
        if last or (recipe.train.save_every and step % recipe.train.save_every == 0):
            counted = {"num_skipped": num_skipped, "validation_loss": validated.get("validation_loss")}
            saver.save(step, counted | {"validation": recipe.data.validation}, average, device)
            watch.lap("save")

    # ---- finish ------------------------------------------------------------------------------
    saver.finish(device)
    if log is not None:
        log.close()
    if step >= recipe.train.steps:
        # A stopped run gets no model/: its presence says that the run is finished. Outside the loop, so that a run
        # killed between its last checkpoint and this line gets it when it is resumed.
        if average is not None:
            with average.in_place():
                export(engine, recipe, folder / "model_ema", step)
        export(engine, recipe, folder / "model", step)
    deep.barrier()
    deep.forget_swap(recipe)
    deep.barrier()
    if lock is not None:
        lock.close()
    if step < recipe.train.steps:
        say(
            f"stopped by a signal after step {step}; saved to {folder / 'checkpoints'}. Add --resume to continue"
        )
        if "TORCHELASTIC_RUN_ID" in os.environ:
            return 0  # torchrun takes any other code for a failure, and starts the ranks again
        return 128 + (
            signals[0][0] if signals else signal.SIGTERM
        )  # none came here when another rank was asked
    say(f"finished {step} steps; the model is in {folder / 'model'}")
    return 0


def export(engine, recipe: Recipe, folder: Path, step: int) -> None:
    """Write the engine's weights as a consolidated checkpoint, or its adapters. Every rank calls it."""
    with_adapters = recipe.train.parts in adapters.WITH_ADAPTERS
    state_dict = deep.full_state_dict(engine, trained_only=with_adapters)
    if state_dict is not None and with_adapters:
        model_folder.save_adapters(folder, recipe, state_dict, step=step)
    elif state_dict is not None:
        model_folder.save(folder, None, recipe, state_dict=state_dict, step=step)
    deep.barrier()


def validate(
    engine, recipe: Recipe, caption_encoder, rank: int, world_size: int, device: torch.device
) -> dict:
    """Loss and accuracy of each offset over all of data.validation, the same for any number of ranks; a row's validation_...

    Raises ValueError, on every rank, naming a sample that is damaged.
    """
    totals = None
    engine.eval()
    batches = loader.validation_batches(recipe, caption_encoder, rank=rank, world_size=world_size)
    while (
        found := deep.together(lambda: next(batches, None), device)
    ) is not None:  # all ranks have equally many
        number, num_samples, batch = found
        condition = batch.condition.to(device)
        generator = torch.Generator(device).manual_seed(seed_for(0, number))
        with torch.no_grad():
            output = engine(batch.codes.to(device), condition, batch.uncond.to(device), generator)
        parts = [
            output.loss[None],
            output.loss_per_offset,
            output.accuracy_per_offset,
            output.loss.new_ones(1),
        ]
        losses = torch.cat(parts).double() * num_samples
        totals = losses if totals is None else totals + losses
    engine.train()
    *sums, count = deep.mean_over_ranks(totals).tolist()
    loss, *per_offset = (value / count for value in sums)
    window = len(per_offset) // 2
    return {
        "validation_loss": loss,
        "validation_loss_per_offset": per_offset[:window],
        "validation_accuracy_per_offset": per_offset[window:],
    }


def sample(
    engine, recipe: Recipe, caption_encoder, image_tokenizer, device: torch.device
) -> tuple[torch.Tensor, list[float]]:
    """One image per train.sample_prompts: pixels [N, 3, H, W] in [-1, 1], on the CPU; and the share of tokens revised per offset.

    Same noise at every call.
    """
    condition = caption_encoder(list(recipe.train.sample_prompts))
    condition = condition.to(device)
    generator = torch.Generator(device).manual_seed(recipe.run.seed)
    with deep.whole(engine) as model:
        decoded = decode(model, condition, recipe.sampler, generator=generator, keep_trace=True)
    with torch.no_grad():
        return image_tokenizer.decode(decoded.codes.cpu()).float().cpu(), revised_per_offset(decoded.trace)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a model from a recipe.")
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=100")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="the control: the same without TensorAR (window 1), as run NAME_plain",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in the run folder, if there is one"
    )
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    options = parser.parse_intermixed_args(arguments)
    try:
        recipe = Recipe.load(options.recipe, options.overrides)
        if options.plain:
            plain = ["tensorar.window=1", "tensorar.offset_weights=null", f"run.name={recipe.run.name}_plain"]
            recipe = Recipe.load(options.recipe, [*options.overrides, *plain])
        code = train(recipe, resume=options.resume, local_rank=options.local_rank)
    except KeyboardInterrupt:
        print("stopped at once; the last checkpoint stands", file=sys.stderr, flush=True)
        return 130
    except (ValueError, FloatingPointError) as error:
        # These come on every rank alike; one of them says so.
        if deep.is_first():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:  # a full disk, say: of this rank alone
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    deep.stop_process_group()
    return code


if __name__ == "__main__":
    leave(main())
