"""Run a detector's self-test: python -m eval.geneval self-test [--detector PATH]
[--clip PATH]
"""

from __future__ import annotations

from pathlib import Path

from eval.geneval import self_test, suites
from mmtensorar.cli import Parser, command


@command
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m eval.geneval self-test",
        description="Run detector and colour classifier on drawn pictures of known content.",
        example="--device cuda",
    )
    suites.add_detector(parser)
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU if there is one")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also write the drawings there")
    options = parser.parse_args(arguments)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        for test in self_test.drawings():
            test.image.save(options.out / f"{test.label.replace(' ', '_')}.png")
    choice = suites.DetectorChoice(options.detector, options.clip, options.device)
    detector = suites.load("geneval", None, choice).detector()
    outcome = self_test.run(detector)
    print(f"{detector.name}: {outcome['recognised']} of {outcome['drawings']} drawings recognised")
    for label, best in outcome["found"].items():
        print(f"  {label:<14} best: {best}")
    return 0
