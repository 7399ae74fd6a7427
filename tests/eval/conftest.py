"""Test files that import an optional package at their top are left out where it is not installed."""

from importlib.util import find_spec

NEEDS = {"test_fid.py": "scipy", "test_fid_pictures.py": "torch_fidelity"}

collect_ignore = [name for name, package in NEEDS.items() if find_spec(package) is None]


def pytest_report_header() -> list[str]:
    return [f"tests/eval/{name} is left out: {NEEDS[name]} is not installed" for name in collect_ignore]
