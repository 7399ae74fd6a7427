"""The imports of the product's modules, read from the source without importing them."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOP = ("mmtensorar", "data_tools", "worlds", "eval", "study")


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the product."""
    found = {}
    for top in TOP:
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(path: Path) -> set[str]:
    """Every absolute name that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names
