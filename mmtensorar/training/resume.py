"""Whether a run may start or resume in its run folder, with these settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmtensorar.checkpoints import model_folder
from mmtensorar.recipe import Recipe, fixed_on_resume
from mmtensorar.training import run_state


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


def recipe_of_run(folder: Path) -> Recipe:
    """The recipe that a run folder was last trained with."""
    return Recipe.load(folder / "recipe.yaml", [])


def find_progress(recipe: Recipe, *, resume: bool) -> int | None:
    """Step after which the run in the run folder resumes; None to start a new run.

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
                f"cannot resume {folder}: it holds a finished model but no checkpoints/; "
                f"{run_state.how_to_start_from(folder)}"
            )
        return None
    changed = differences(fixed_on_resume(recipe_of_run(folder)), fixed_on_resume(recipe))
    if changed:
        raise ValueError(
            f"cannot resume {folder}: the recipe changed ({'; '.join(changed)}); "
            f"{run_state.how_to_start_from(folder)}"
        )
    return step


def check_inputs(recipe: Recipe, progress: int | None, fingerprints: Mapping[str, str]) -> None:
    """Raise ValueError, naming setting and folders, when the run that resumes was saved
    with other weights or shards.

    Args:
        progress: of `find_progress`; None: nothing is checked.
        fingerprints: see `run_state.Saver`; those that are known so far.
    """
    if progress is None:
        return
    start = "train.init_from" if recipe.train.init_from else "backbone.path"
    shards = recipe.data.shards
    settings = {
        "start": f"{start}: {recipe.train.init_from or recipe.backbone.path}",
        "shards": f"data.shards: {shards if isinstance(shards, str) else ', '.join(shards)}",
    }
    run_state.check_recorded(recipe.run_dir / "checkpoints", fingerprints, settings)


def is_finished(folder: Path) -> bool:
    """Whether a run folder holds the model of a finished run."""
    return (folder / "model" / model_folder.INDEX).is_file()


def nothing_to_do(recipe: Recipe, progress: int) -> bool:
    """Whether the run has reached train.steps and its model folder is of that step."""
    folder, steps = recipe.run_dir, recipe.train.steps
    assert steps is not None
    return (
        progress >= steps
        and is_finished(folder)
        and model_folder.read_index(folder / "model")["step"] == progress
    )
