"""Passes and time of a picture, one token at a time and with lookahead, side by side.

    python benchmarks/passes.py --ckpt recipes/tiny/weights/base --world shapes
    python benchmarks/passes.py --ckpt MODEL --prompts-file prompts.txt --batch-size 8

Every prompt is drawn with each number of steps in turn, from the same seed, so that a
busy machine slows all alike. Equal tokens are counted: in float32 they should be all; in
bfloat16 a pass of several steps rounds differently than a pass of one.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

from tqdm import tqdm

from mmtensorar.cli import Parser, command
from mmtensorar.files import read_lines
from mmtensorar.sampling.settings import LOADING, add_generation, at_least_1, given_settings

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

STEPS = ("1", "4", "8", "16", "32", "auto")
WORLDS = ("shapes", "digits", "photographs")  # of the study


def some(prompts: list[str], count: int) -> list[str]:
    """`count` of the prompts, evenly spread."""
    return [prompts[number * len(prompts) // count] for number in range(count)]


def steps(text: str) -> int | str:
    """The type of --steps."""
    return "auto" if text == "auto" else at_least_1(text)


def parse(arguments: list[str] | None):
    parser = Parser(
        prog="python benchmarks/passes.py",
        description="Count passes and time of a picture with several numbers of steps per pass.",
        example="--ckpt recipes/tiny/weights/base --world shapes --num-prompts 10",
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="model folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--world", choices=WORLDS, help="take the prompts of one of the study's worlds")
    source.add_argument("--prompts-file", type=Path, help="text file with one prompt, or class, per line")
    parser.add_argument("--num-prompts", type=at_least_1, default=50, help="evenly spread (default 50)")
    parser.add_argument(
        "--steps", type=steps, nargs="+", default=[steps(each) for each in STEPS], help="default: all"
    )
    parser.add_argument("--threads", type=at_least_1, help="of torch; default: its own choice")
    add_generation(parser)
    parser.set_defaults(batch_size=1)
    return parser.parse_args(arguments)


def table(generator, prompts: list[str], all_steps: list[int | str], sampling, batch_size: int) -> list[str]:
    """The lines of a Markdown table: a row for each number of steps per pass."""
    passes, seconds, equal = defaultdict(list), defaultdict(list), defaultdict(list)
    batches = [
        range(start, min(start + batch_size, len(prompts))) for start in range(0, len(prompts), batch_size)
    ]
    # One batch that is not counted: first calls are slow.
    for warm_up in (True, False):
        for numbers in tqdm(batches[:1] if warm_up else batches, unit="batch", disable=None):
            plain = None
            for each in all_steps:
                settings = sampling.model_copy(update={"lookahead": each})
                began = time.perf_counter()
                decoded = generator.decode([prompts[number] for number in numbers], list(numbers), settings)
                codes = decoded.codes.cpu()
                took = time.perf_counter() - began
                plain = codes if plain is None else plain
                if not warm_up:
                    passes[each] += decoded.passes
                    seconds[each].append(took / len(numbers))
                    equal[each].append((codes == plain).all(-1).float().mean().item())
    first = statistics.median(seconds[all_steps[0]])
    lines = [
        f"| steps | passes a picture | ms a picture | times as fast as {all_steps[0]} | equal tokens |",
        "|---:|---:|---:|---:|---:|",
    ]
    for each in all_steps:
        median = statistics.median(seconds[each])
        lines.append(
            f"| {each} | {statistics.mean(passes[each]):.1f} | {1000 * median:.0f} | {first / median:.2f} "
            f"| {statistics.mean(equal[each]):.2%} |"
        )
    return lines


@command
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # Imported after the options are checked, since torch takes seconds.
    import torch

    from mmtensorar.pipeline import Generator

    if options.threads:
        torch.set_num_threads(options.threads)
    generator = Generator.load(options.ckpt, **{name: getattr(options, name) for name in LOADING})
    if options.world:
        from study import worlds

        prompts = [prompt for _, prompt in worlds.load(options.world).prompts()]
    else:
        prompts = [line.strip() for line in read_lines(options.prompts_file) if line.strip()]
    sampling = generator.sampling(**given_settings(options))
    backbone, runs_as = generator.model.backbone, ", ".join(generator.runs_as().values())
    print(
        f"{options.ckpt}: {backbone.num_tokens} tokens, window {generator.model.window}, batches of "
        f"{options.batch_size}, {runs_as}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    some_prompts = some(prompts, options.num_prompts)
    print("\n".join(table(generator, some_prompts, options.steps, sampling, options.batch_size)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
