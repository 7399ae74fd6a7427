"""Allowed imports between rooms, read from the source with `ast`, lazy imports
included.

A room is a package or a single module. `ALLOWED` maps a room to the rooms that it may
import. This also bounds what a room reaches through others, since the list itself has
no circle (a test below).
"""

import pytest

from tests.helpers.imports import MODULES, imported

GROUND = {
    "mmtensorar.files",
    "mmtensorar.folders",
    "mmtensorar.ranks",
    "mmtensorar.seeds",
    "mmtensorar.devices",
    "mmtensorar.processes",
    "mmtensorar.words",
}
RELEASED = {"mmtensorar.checkpoints.released", "mmtensorar.checkpoints.janus_deepseek"}
MODELS = {"mmtensorar.recipe", "mmtensorar.model", "mmtensorar.captions", "mmtensorar.backbones"} | RELEASED
PIPELINE = {"mmtensorar.pipeline", "mmtensorar.sampling", "mmtensorar.cli"} | MODELS | GROUND

# A room may import itself and the rooms listed here. Rooms named in full win over the
# packages that contain them.
ALLOWED: dict[str, set[str]] = {
    **{room: set() for room in GROUND},
    "mmtensorar": set(),
    "mmtensorar.recipe": {"mmtensorar.files"},
    "mmtensorar.picture_folder": {"mmtensorar.files"},
    "mmtensorar.model": {"mmtensorar.recipe"} | GROUND,
    "mmtensorar.checkpoints.released": {"mmtensorar.recipe", "mmtensorar.model"} | GROUND,
    "mmtensorar.checkpoints.janus_deepseek": {"mmtensorar.checkpoints.released"},
    "mmtensorar.captions": {"mmtensorar.recipe", "mmtensorar.model"} | RELEASED | GROUND,
    "mmtensorar.backbones": {"mmtensorar.recipe", "mmtensorar.model", "mmtensorar.captions"}
    | RELEASED
    | GROUND,
    "mmtensorar.image_tokenizers": {"mmtensorar.recipe", "mmtensorar.model"} | RELEASED | GROUND,
    "mmtensorar.sampling": MODELS | GROUND,
    "mmtensorar.data": {"mmtensorar.recipe", "mmtensorar.model", "mmtensorar.captions"} | RELEASED | GROUND,
    "mmtensorar.checkpoints": MODELS | {"mmtensorar.image_tokenizers"} | GROUND,
    "mmtensorar.training": MODELS
    | {"mmtensorar.image_tokenizers", "mmtensorar.sampling", "mmtensorar.data", "mmtensorar.checkpoints"}
    | GROUND,
    "mmtensorar.pipeline": MODELS
    | {"mmtensorar.image_tokenizers", "mmtensorar.sampling", "mmtensorar.checkpoints"}
    | GROUND,
    "worlds": set(),
    "data_tools": {"mmtensorar", "worlds"},
    "eval": {"mmtensorar", "worlds", "data_tools"},
    "study": {"mmtensorar", "worlds", "data_tools", "eval"},
}
# Entry points stand above all rooms of the package: commands, which no room's library
# imports.
ENTRIES = {"train", "train_options", "roundtrip", "generate", "convert", "export", "merge", "cli", "__main__"}


def module_of(name: str) -> str | None:
    """Our module that an imported name is or is in; None for other people's modules."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def edges() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports."""
    return {
        name: {found for full in imported(path) if (found := module_of(full)) and found != name}
        for name, path in MODULES.items()
    }


def room_of(module: str) -> str:
    """The longest name in ALLOWED that a module is or is in."""
    return max((room for room in ALLOWED if module == room or module.startswith(room + ".")), key=len)


def is_entry(module: str) -> bool:
    parts = module.split(".")
    return parts[-1] == "__main__" or (parts[0] == "mmtensorar" and len(parts) == 2 and parts[1] in ENTRIES)


def test_every_import_is_on_the_list():
    refused = []
    for module, targets in edges().items():
        if is_entry(module):
            continue
        room = room_of(module)
        for target in targets:
            inside = any(target == r or target.startswith(r + ".") for r in {room, *ALLOWED[room]})
            if room_of(target) != room and not inside:
                refused.append(f"{module} -> {target}")
            elif is_entry(target) and not is_entry(module) and target != "mmtensorar.cli":
                refused.append(f"{module} -> {target}, an entry point")
    assert not refused, "\n".join(sorted(refused))


def test_no_circle_of_imports():
    """No module reaches itself through any number of imports."""
    graph = edges()
    for start in graph:
        reached, todo = set(), list(graph[start])
        while todo:
            if (module := todo.pop()) not in reached:
                reached.add(module)
                todo += graph[module]
        assert start not in reached, f"{start} imports itself through {sorted(reached)}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_the_engine_imports_deepspeed(module):
    if module not in ("mmtensorar.training.engine", "mmtensorar.training.engine_private"):
        assert not any(name.split(".")[0] == "deepspeed" for name in imported(MODULES[module])), module


def test_scoring_imports_neither_torch_nor_a_model():
    """Scores can be computed and checked where neither torch nor a model is
    installed.
    """
    for name in (
        "geneval.score",
        "geneval.recorded",
        "geneval.prompts",
        "geneval.compare",
        "dpg_bench.score",
        "fid.score",
    ):
        names = imported(MODULES[f"eval.{name}"])
        names = {name for name in names if not name.startswith(("mmtensorar.files", "mmtensorar.cli"))}
        assert not [n for n in names if n.split(".")[0] in ("mmtensorar", "torch")], name
