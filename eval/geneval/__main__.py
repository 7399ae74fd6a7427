"""Score a model, or pictures, on a suite of GenEval-style prompts.

    python -m eval.geneval --ckpt runs/NAME/model [--suite shapes]     generates, then scores
    python -m eval.geneval --images FOLDER [--suite shapes]            scores pictures in GenEval's layout

--out receives results.jsonl (one line per picture), summary.json, report.html and, with
--ckpt, the pictures. An interrupted generation resumes when the same command is given
again; scoring starts over. Under a launcher (torchrun) every rank generates its share,
and the first rank scores.

Other commands, one module each: `score` (recorded.py) scores recorded detections,
`compare` compares models on the same prompts, `watch` scores the saved steps of a run
while it trains, `self-test` and `convert-detector` are about suite geneval's detector,
and `python -m eval.geneval.ceiling` measures the bounds of suite shapes.
"""

from __future__ import annotations

import importlib
import sys

from eval import harness
from eval.geneval.evaluate import evaluate, parse

COMMANDS = {
    "score": "recorded",
    "compare": "compare",
    "convert-detector": "convert_detector",
    "self-test": "check_detector",
    "watch": "watch",
}


@harness.command
def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        # Some import torch, which takes seconds.
        return importlib.import_module(f"eval.geneval.{COMMANDS[arguments[0]]}").main(arguments[1:])
    evaluate(parse(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
