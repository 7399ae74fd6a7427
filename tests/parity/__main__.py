"""Run every call of every fixture and compare the outputs; see
tests/parity/__init__.py.

Exit codes: 0, all calls passed (optional ones may be skipped) and all scores are equal;
1, a call failed or a score differs; 2, something cannot be run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import lzma
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from tests.parity import Unsupported, evaluators, read_tensors, tensors_file

FORMAT = 1
FAMILIES = ("janus", "llamagen", "open_magvit2")
# comparison -> the numbers that its rule must have
COMPARISONS = {"equal": (), "allclose": ("atol", "rtol"), "max_abs_diff": ("max",)}


class BadManifest(Exception):
    """One sentence on what cannot be run."""


class Case(NamedTuple):
    path: Path
    manifest: dict
    tensors: dict[str, Tensor]

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.stem}"


class Result(NamedTuple):
    """One output compared with its record.

    difference: the largest absolute difference, nan where it cannot be computed.
    """

    output: str
    comparison: str
    difference: float
    problem: str | None


# ---- reading -------------------------------------------------------------------------------------


def read_cases(folder: Path) -> list[Case]:
    """The cases of a folder, checked as far as is possible without running them.

    Raises BadManifest.
    """
    if not folder.is_dir():
        raise BadManifest(f"{folder}: no such folder")
    cases = []
    for path in sorted(folder.glob("*.json")):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise BadManifest(f"{path}: cannot be read as JSON ({error})") from None
        # Other files, such as facts.json, are not cases. A file with tensors next to it
        # must be a case.
        if isinstance(manifest, dict) and ("calls" in manifest or tensors_file(path).is_file()):
            cases.append(read_case(path, manifest))
    if not cases:
        raise BadManifest(f"{folder}: no case in it (a NAME.json with calls)")
    return cases


def read_case(path: Path, manifest: dict) -> Case:
    if manifest.get("format") != FORMAT:
        raise BadManifest(f"{path}: format is {manifest.get('format')!r}, expected {FORMAT}")
    if manifest.get("family") not in FAMILIES:
        raise BadManifest(
            f"{path}: family is {manifest.get('family')!r}, expected one of {', '.join(FAMILIES)}"
        )
    stored = tensors_file(path)
    try:
        tensors = read_tensors(stored)
    except (SafetensorError, lzma.LZMAError, OSError) as error:
        raise BadManifest(f"{stored}: cannot be read as safetensors ({error})") from None
    if not isinstance(manifest.get("calls"), list) or not manifest["calls"]:
        raise BadManifest(f"{path}: calls is empty, missing or no list")
    for number, call in enumerate(manifest["calls"]):
        check_call(call, number, path, tensors)
    return Case(path, manifest, tensors)


def check_call(call: object, number: int, path: Path, tensors: dict[str, Tensor]) -> None:
    """Check one call of a manifest: its id, and that its inputs and outputs are
    recorded.

    number: the place of the call in the manifest's list. Raises BadManifest.
    """
    if not (isinstance(call, dict) and isinstance(call.get("id"), str)):
        raise BadManifest(f"{path}: call {number} has no id")
    where, stored = f"{path}: call {call['id']}", tensors_file(path).name
    if not (isinstance(call.get("outputs"), dict) and call["outputs"]):
        raise BadManifest(f"{where} has no outputs to compare")
    for name, rule in call["outputs"].items():
        check_rule(rule, f"{where}: {name}")
        if not list(matching(name, tensors)):
            raise BadManifest(f"{where}: {name} is not in {stored}")
    if not isinstance(call.get("inputs", []), (list, dict)):
        raise BadManifest(f"{where}: inputs is {call['inputs']!r}, expected names")
    for name in call.get("inputs", ()):
        if name not in tensors:
            raise BadManifest(f"{where}: {name} is not in {stored}")


def check_rule(rule: object, where: str) -> None:
    comparison = rule.get("compare") if isinstance(rule, dict) else None
    if comparison not in COMPARISONS:
        raise BadManifest(f"{where}: compare is {comparison!r}, expected one of {', '.join(COMPARISONS)}")
    for key in COMPARISONS[comparison]:
        number = rule.get(key)
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < math.inf:
            raise BadManifest(f"{where}: {key} is {number!r}, expected a number of 0 or more")


def matching(name: str, tensors: dict[str, Tensor]) -> Iterator[str]:
    """Recorded tensors that an output's name stands for: the tensor itself, or with a
    trailing * all that begin with it.
    """
    if name.endswith("*"):
        yield from (stored for stored in sorted(tensors) if stored.startswith(name[:-1]))
    elif name in tensors:
        yield name


# ---- running -------------------------------------------------------------------------------------


def build(case: Case):
    """The adapter and the subject of a case. Raises BadManifest."""
    adapter = importlib.import_module(f"tests.parity.{case.manifest['family']}")
    weights = {
        name.removeprefix("weights/"): value.float() if value.is_floating_point() else value
        for name, value in case.tensors.items()
        if name.startswith("weights/")
    }
    try:
        return adapter, adapter.load(case.manifest, weights)
    except KeyError as error:
        raise BadManifest(f"{case.path}: no model can be built without {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise BadManifest(f"{case.path}: no model can be built from it ({error})") from None


def inputs_of(case: Case, call: dict) -> dict[str, Tensor]:
    """All inputs, and the recorded outputs that the call's arguments name, in a
    sentence or alone.
    """
    named = set(re.findall(r"outputs/[\w/.]+", json.dumps(call.get("args", {}))))
    return {
        name: value for name, value in case.tensors.items() if name.startswith("inputs/") or name in named
    }


def compare(output: str, found: Tensor | None, expected: Tensor, rule: dict) -> Result:
    comparison = rule["compare"]
    if found is None:
        return Result(output, comparison, math.nan, "the adapter did not return it")
    if found.shape != expected.shape:
        return Result(
            output, comparison, math.nan, f"shape {list(found.shape)}, recorded {list(expected.shape)}"
        )
    found, expected = found.detach().double(), expected.double()
    # Equal infinities have no difference; a nan is never within a limit.
    difference = torch.where(found == expected, 0, (found - expected).abs())
    largest = difference.max().item() if difference.numel() else 0.0
    limit = {
        "equal": lambda: torch.zeros_like(expected),
        "allclose": lambda: rule["atol"] + rule["rtol"] * expected.abs(),
        "max_abs_diff": lambda: torch.full_like(expected, rule["max"]),
    }[comparison]()
    # Compared with an infinite record the relative limit would be infinite too, and
    # every number would pass.
    limit = torch.where(expected.isfinite(), limit, 0)
    outside = int((~(difference <= limit)).sum())
    return Result(
        output, comparison, largest, f"{outside} of {found.numel()} values outside" if outside else None
    )


def run_call(case: Case, adapter, subject, call: dict) -> list[Result] | None:
    """The comparisons of a call; None when it is optional and our implementation does
    not expose it.
    """
    recorded = [
        (name, rule) for pattern, rule in call["outputs"].items() for name in matching(pattern, case.tensors)
    ]
    try:
        found = adapter.run(subject, call, inputs_of(case, call))
    except Unsupported as reason:
        if call.get("optional"):
            return None
        found, problem = {}, f"not supported: {reason}"
    except Exception as error:
        # Whatever error our code raises, it is the failure of this call; the other
        # calls still run.
        found, problem = {}, f"{type(error).__name__}: {error}"
    else:
        return [compare(name, found.get(name), case.tensors[name], rule) for name, rule in recorded]
    return [Result(name, rule["compare"], math.nan, problem) for name, rule in recorded]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.parity",
        description="Compare our models with tensors recorded from the original code.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FIXTURE_DIR")
    options = parser.parse_args(arguments)
    counts = {"pass": 0, "FAIL": 0, "skipped": 0}
    try:
        readers = {folder: evaluators.reader(folder) for folder in options.folders}
        cases = [case for folder, read in readers.items() if read is None for case in read_cases(folder)]
        for case in cases:
            adapter, subject = build(case)
            for call in case.manifest["calls"]:
                results = run_call(case, adapter, subject, call)
                counts[report(f"{case.name} {call['id']}", results)] += 1
        unequal = sum(compare_scores(folder, read) for folder, read in readers.items() if read is not None)
    except BadManifest as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if cases:
        print(
            f"{counts['pass']} calls passed, {counts['FAIL']} failed, "
            f"{counts['skipped']} optional ones skipped"
        )
    return 1 if counts["FAIL"] or unequal else 0


def compare_scores(folder: Path, read) -> int:
    """Print how many values of an evaluator's folder are equal, and every value that is
    not.

    Returns the number of unequal values.
    """
    try:
        found = list(read(folder))
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise BadManifest(f"{folder}: cannot be scored ({type(error).__name__}: {error})") from None
    if not found:
        raise BadManifest(f"{folder}: nothing in it to compare")
    different = [(name, problem) for name, problem in found if problem]
    for name, problem in different:
        print(f"    {name}: {problem}")
    print(f"{folder.name}: {len(found) - len(different)} of {len(found)} equal")
    return len(different)


def report(name: str, results: list[Result] | None) -> str:
    """Print the line of a call, and one line per output that failed.

    Returns the verdict.
    """
    if results is None:
        print(f"{name:<50} {'optional, not exposed':<30} {'':>10}  skipped")
        return "skipped"
    verdict = "FAIL" if any(result.problem for result in results) else "pass"
    comparisons = ", ".join(dict.fromkeys(result.comparison for result in results))
    differences = [result.difference for result in results]
    largest = math.nan if any(map(math.isnan, differences)) else max(differences)
    print(f"{name:<50} {comparisons:<30} {largest:>10.2e}  {verdict}")
    for result in results:
        if result.problem:
            print(f"    {result.output}: {result.comparison}, {result.difference:.2e}: {result.problem}")
    return verdict


if __name__ == "__main__":
    sys.exit(main())
