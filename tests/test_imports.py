"""Who may import whom: the layers of the package, read from the source with `ast`."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def imported(path: Path) -> set[str]:
    """Every absolute module name that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def violations(path: Path, forbidden: tuple[str, ...]) -> list[str]:
    return [n for n in imported(path) if any(n == f or n.startswith(f + ".") for f in forbidden)]


def test_only_the_engine_imports_deepspeed():
    for path in (ROOT / "mmtensorar").rglob("*.py"):
        if path.name != "engine.py":
            assert not violations(path, ("deepspeed",)), path


def test_the_package_never_imports_eval_or_data_tools():
    for path in (ROOT / "mmtensorar").rglob("*.py"):
        assert not violations(path, ("eval", "data_tools")), path


def test_data_tools_never_import_training_or_eval():
    for path in (ROOT / "data_tools").rglob("*.py"):
        assert not violations(
            path, ("eval", "mmtensorar.train", "mmtensorar.tensorar", "mmtensorar.engine")
        ), path


def test_backbones_and_image_tokenizers_know_nothing_above_them():
    above = tuple(
        f"mmtensorar.{n}" for n in ("tensorar", "decode", "data", "train", "engine", "checkpoint", "generate")
    )
    for folder, other in (("backbones", "image_tokenizers"), ("image_tokenizers", "backbones")):
        for path in (ROOT / "mmtensorar" / folder).rglob("*.py"):
            assert not violations(path, above + (f"mmtensorar.{other}",)), path


def test_index_arithmetic_and_shards_stand_alone():
    for name in ("windows", "tars", "order", "metrics"):
        assert not violations(ROOT / "mmtensorar" / f"{name}.py", ("mmtensorar",)), name
    found = {name for name in imported(ROOT / "mmtensorar" / "shards.py") if name.startswith("mmtensorar")}
    assert found == {"mmtensorar", "mmtensorar.tars"}


def test_scoring_knows_no_model():
    for name in (
        "geneval/score",
        "geneval/recorded",
        "geneval/prompts",
        "geneval/compare",
        "dpg_bench/score",
        "fid/score",
    ):
        assert not violations(ROOT / "eval" / f"{name}.py", ("mmtensorar", "torch")), name
