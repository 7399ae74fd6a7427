"""Make a model folder of a run state or of its averaged weights, without ranks or
DeepSpeed.
"""

from __future__ import annotations

from pathlib import Path

from mmtensorar.checkpoints import model_folder, sharded_state
from mmtensorar.checkpoints.sharded_state import Piece
from mmtensorar.files import read_text, sha256
from mmtensorar.model import adapters
from mmtensorar.recipe import Recipe


def find(run: Path, step: str) -> Path:
    """The folder of a run state: of a step number, `latest` or `best`.

    Raises ValueError when there is none.
    """
    folder = run / "checkpoints"
    saved = sorted(path.parent for path in folder.glob(f"step_*/{sharded_state.STATE}"))
    if not saved:
        raise ValueError(f"{run}: it has no saved state")
    if step == "latest":
        return folder / f"step_{sharded_state.latest(folder)['step']:06d}"
    if step == "best":
        if not (folder / "best").is_file():
            raise ValueError(
                f"{folder}: there is no best step: no saved state has a validation loss "
                "(set data.validation and train.validate_every)"
            )
        named = folder / read_text(folder / "best").strip()
        if named not in saved:
            raise ValueError(f"{folder / 'best'} names {named.name}, which is missing")
        return named
    wanted = (
        folder / f"step_{int(step):06d}" if step.isascii() and step.isdigit() and len(step) < 20 else None
    )
    if wanted is None or wanted not in saved:
        steps = ", ".join(str(sharded_state.step_of(path)) for path in saved)
        raise ValueError(f"{run}: no saved state of step {step}; available: latest, {steps}")
    return wanted


def export(run: Path, step: str, out: Path, *, average: bool = False) -> int:
    """Write the model folder; returns the step.

    Raises ValueError when the saved state is damaged, or has no average.
    """
    recipe = Recipe.load(run / "recipe.yaml", [])
    if average and recipe.train.ema_decay is None:
        raise ValueError(f"{run}: it keeps no average of the weights (train.ema_decay)")
    folder = find(run, step)
    recorded = sharded_state.recorded(folder)
    for name, expected in recorded["sha256"].items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise ValueError(f"{folder}: {name} is missing or changed; the saved state is damaged")
    model = model_folder.skeleton(recipe)
    trained = [
        (name, parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
    layout = [Piece(name, 0, flat, 0, shape.numel()) for flat, (name, shape) in enumerate(trained)]
    key, shapes = "average" if average else "master", [shape for _, shape in trained]
    values = sharded_state.read(folder, 0, 1, recorded["num_files"], layout, shapes, only=key)
    state_dict = {name: value[key] for (name, _), value in zip(trained, values, strict=True)}
    if recipe.train.parts in adapters.WITH_ADAPTERS:
        model_folder.save_adapters(out, recipe, state_dict, step=recorded["step"])
        return recorded["step"]
    if state_dict.keys() != model.state_dict().keys():  # add frozen parameters, rounded as in training
        initial = model_folder.initial_model(recipe)
        if recipe.train.precision == "bf16":
            for parameter in initial.parameters():
                parameter.data = parameter.data.bfloat16().float()
        state_dict = initial.state_dict() | state_dict
    model_folder.save_state_dict(out, state_dict, recipe, step=recorded["step"])
    return recorded["step"]
