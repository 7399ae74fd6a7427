"""Damage good files in many ways and check that every reader reports it.

    python -m tests.fuzz --seconds 60
    python -m tests.fuzz --subject sources --seconds 60
    python -m tests.fuzz --case 17 --keep failed     one case again, and the set at which a reader failed

The exit code is 1 when a reader failed. See fuzz.py for what a reader must do.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.fuzz.fuzz import SUBJECTS, fuzz, table


def main(arguments: list[str] | None = None) -> int:
    assert __doc__ is not None
    description, _, epilog = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--subject",
        choices=SUBJECTS,
        default="shards",
        help="shard sets, or what they are made from (default: shards)",
    )
    parser.add_argument("--num-cases", type=int, help="(default: as many as fit into --seconds)")
    parser.add_argument("--seconds", type=float, default=60, help="(default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (default: 0)")
    parser.add_argument("--case", type=int, help="run only this case")
    parser.add_argument("--keep", type=Path, help="folder for the sets at which a reader failed")
    options = parser.parse_args(arguments)
    if options.seconds <= 0 or options.seed < 0 or (options.case is not None and options.case < 0):
        parser.error("--seconds must be above 0, --seed and --case at least 0")
    cases, seconds = None, options.seconds
    if options.num_cases is not None:
        cases, seconds = range(options.num_cases), float("inf")
    if options.case is not None:
        cases = range(options.case, options.case + 1)
    began = time.monotonic()
    counts, failures, tried = fuzz(
        options.seed, seconds=seconds, cases=cases, keep=options.keep, subject=SUBJECTS[options.subject]
    )
    rate = tried / (time.monotonic() - began)
    print(f"{tried} cases, {rate:.0f} a second, read {sum(counts.values())} times\n")
    print(table(counts))
    for failure in failures[:20]:
        print(f"\n{failure}", file=sys.stderr)
    print(f"\n{len(failures) or 'no'} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
