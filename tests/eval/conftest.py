"""Test files that import an optional package at their top are left out where it is not
installed.
"""

from importlib.util import find_spec

NEEDS = {"test_fid.py": "scipy", "test_fid_pictures.py": "torch_fidelity"}

collect_ignore = [name for name, package in NEEDS.items() if find_spec(package) is None]


def pytest_terminal_summary(terminalreporter) -> None:
    for name in collect_ignore:
        terminalreporter.write_line(f"SKIPPED tests/eval/{name}: {NEEDS[name]} is not installed")
