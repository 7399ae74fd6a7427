"""Whether a run may start or resume in its run folder, and which settings may change
when it resumes.
"""

from __future__ import annotations

from pathlib import Path

from mmtensorar.checkpoints import model_folder
from mmtensorar.recipe import Recipe
from mmtensorar.training import run_state

# Settings that may change when a run resumes: none of them alters a past step. Another
# train.steps stretches the rest of the learning rate's cosine, so a run that was
# extended differs from one that was planned longer. Another rate is what a run needs
# that stopped at a spike. Each change is printed.
FREE_ON_RESUME: dict[str, set[str] | None] = {
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


def fixed_on_resume(recipe: Recipe) -> dict:
    """The settings that a resumed run must share with the run that it continues."""
    settings = recipe.model_dump(mode="json")
    for section, keys in FREE_ON_RESUME.items():
        for key in list(settings[section]) if keys is None else keys:
            settings[section].pop(key, None)
    return settings


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """'key: old -> new' for each leaf in which two nested dictionaries differ."""
    changes = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changes += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            changes.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return changes


def saved_recipe(folder: Path) -> Recipe:
    """The recipe that a run folder was trained with last."""
    return Recipe.load(folder / "recipe.yaml", [])


def find_progress(recipe: Recipe, *, resume: bool) -> int | None:
    """Step at which to continue the run in the run folder; None to start at the
    beginning.

    Raises ValueError when the folder holds a run and resume is False, or when it holds
    a run of another recipe.
    """
    folder = recipe.run_dir
    finished = is_finished(folder)
    step = run_state.latest_step(folder / "checkpoints")
    if not resume:
        if finished:
            raise ValueError(
                f"{folder} holds a finished run: choose another run.name, delete the folder, or add --resume "
                "to train on"
            )
        if step is not None:
            raise ValueError(
                f"{folder} holds a run stopped at step {step}: add --resume to continue it, or choose "
                "another run.name"
            )
        return None
    if step is None:
        if finished:
            raise ValueError(
                f"cannot resume {folder}: it holds a finished model but no checkpoints/; choose another "
                "run.name"
            )
        return None
    changed = differences(fixed_on_resume(saved_recipe(folder)), fixed_on_resume(recipe))
    if changed:
        raise ValueError(f"cannot resume {folder}: the recipe changed ({'; '.join(changed)})")
    return step


def is_finished(folder: Path) -> bool:
    """Whether a run folder holds the model of a finished run."""
    return (folder / "model" / model_folder.INDEX).is_file()


def nothing_to_do(recipe: Recipe, progress: int) -> bool:
    """Whether the run in the run folder has reached train.steps, and its model is of
    that step.
    """
    folder, steps = recipe.run_dir, recipe.train.steps
    assert steps is not None
    return (
        progress >= steps
        and is_finished(folder)
        and model_folder.read_index(folder / "model")["step"] == progress
    )
