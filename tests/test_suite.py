"""The tests themselves: modules stand alone, and markers are those of
pyproject.toml.
"""

import ast
import tomllib
from pathlib import Path

TESTS = Path(__file__).parent
REASONS = {"launch", "server", "plan", "shipped", "parity", "slow"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_no_test_module_imports_another():
    """Otherwise fixtures are built again in every module, and a file cannot be moved.

    Helpers live in tests/helpers.
    """
    found = {
        (path.name, name)
        for path in TESTS.rglob("test_*.py")
        for name in imported(path)
        if name.startswith("tests.") and ".test_" in name
    }
    assert not found


def test_make_check_leaves_out_marked_tests():
    """A marker unknown to make check would put its tests into the fast tier."""
    settings = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert {marker.partition(":")[0] for marker in settings["markers"]} == REASONS
    (fast,) = [
        line for line in (TESTS.parent / "Makefile").read_text().splitlines() if line.startswith("FAST :=")
    ]
    assert set(fast.removeprefix("FAST := ").replace("not ", "").split(" and ")) == REASONS
