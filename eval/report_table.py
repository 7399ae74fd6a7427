"""Models in one table:
python -m eval.report_table NAME=summary.json [NAME=summary.json ...] [--markdown]

Accuracy in percent with its 95 % interval, per skill and overall (the mean of the
skills). Below are the bounds to compare them with: the ceiling (correctly drawn
pictures, and the same after the image tokenizer's round trip) and chance.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from eval import layout, tables
from eval.geneval import suites
from mmtensorar.cli import Parser, command
from mmtensorar.files import read_json
from mmtensorar.words import counted


def rows(summaries: Mapping[str, dict]) -> list[list[str]]:
    """Header and rows of the table. summaries: model name -> summary.json.

    Raises ValueError when the summaries differ in suite or detector: such scores cannot
    share a column.
    """
    for key in ("suite", "detector"):
        values = {name: summary[key] for name, summary in summaries.items()}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{name} has {value}" for name, value in values.items())
            raise ValueError(f"scores of different {key}s do not belong in one table: {listed}")
    skills = list(dict.fromkeys(skill for summary in summaries.values() for skill in summary["skills"]))
    table = [["model", *skills, "overall"]]
    for name, summary in summaries.items():
        cells = [*(_cell(summary["skills"].get(skill)) for skill in skills), _cell(summary["overall"])]
        table.append([marked(name, summary), *cells])

    def images(summary: dict) -> list[str]:
        per_skill = [str(summary["skills"].get(skill, {}).get("num_images", 0)) for skill in skills]
        return [*per_skill, str(summary["num_images"])]

    table += _rows_of("images", summaries, images)
    for label in ("ceiling, as drawn", "ceiling, round trip", "chance"):
        measured = {name: summary for name, summary in summaries.items() if label in _bounds(summary)}

        def shares(summary: dict, label: str = label) -> list[str]:
            bound = _bounds(summary)[label]
            return [*(_percent(bound["skills"].get(skill)) for skill in skills), _percent(bound["overall"])]

        table += _rows_of(label, measured, shares)
    return table


def marked(name: str, summary: dict) -> str:
    """A model's name, with a mark when its pictures are not a whole set."""
    return f"{name} (PARTIAL)" if missing(summary) else name


def missing(summary: dict) -> list[str]:
    """What keeps a summary's pictures from being a whole set: every prompt, as many
    pictures as asked for.

    These are the numbers of the evaluation, by kind. Summaries of earlier versions have
    sentences instead, or only the numbers of what was scored.
    """
    if partial := summary.get("partial"):
        if kinds := summary.get("partial_numbers"):
            return [counted(number, kind) for kind, number in kinds.items()]
        return [*partial[:3], *([f"and {len(partial) - 3} more"] if len(partial) > 3 else [])]
    lacks = []
    record = summary.get("generation") or {}
    num_prompts = summary.get("prompts_expected") or record.get("num_prompts")
    if summary["suite"] in suites.SUITES:
        suite = suites.load(summary["suite"])
        lacks += [f"no {skill}" for skill in suite.skills if skill not in summary["skills"]]
        num_prompts = num_prompts or len(suite.prompts)
    num_images = summary.get("images_expected")
    if not num_images and num_prompts and record.get("num_images"):
        num_images = num_prompts * record["num_images"]
    for key, expected in (("num_prompts", num_prompts), ("num_images", num_images)):
        if expected and summary.get(key, expected) < expected:
            noun = key.removeprefix("num_")
            lacks.append(f"{expected - summary[key]} of {expected} {noun} missing")
    return lacks


def _of_suite(summary: dict) -> str | None:
    """A sentence when fewer prompts were asked for than the suite has; None when all
    were.
    """
    if summary["suite"] not in suites.SUITES:
        return None
    num_asked, num_all = summary.get("prompts_expected"), len(suites.load(summary["suite"]).prompts)
    return f"{num_asked} of the suite's {num_all} prompts" if num_asked and num_asked < num_all else None


def _bounds(summary: dict) -> dict[str, dict]:
    """Row label -> bound, for the bounds that the summary has."""
    ceiling = summary.get("ceiling", {})
    bounds = {
        "ceiling, as drawn": ceiling.get("drawn"),
        "ceiling, round trip": ceiling.get("round_trip"),
        "chance": summary.get("chance"),
    }
    return {label: bound for label, bound in bounds.items() if bound}


def _rows_of(
    label: str, summaries: Mapping[str, dict], cells_of: Callable[[dict], list[str]]
) -> list[list[str]]:
    """One row when all models agree, else one per model."""
    cells = {name: cells_of(summary) for name, summary in summaries.items()}
    if len({tuple(row) for row in cells.values()}) == 1:
        return [[label, *next(iter(cells.values()))]]
    return [[f"{label} ({name})", *row] for name, row in cells.items()]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _cell(score: dict | None) -> str:
    if score is None:
        return "-"
    low, high = score["interval"]
    return f"{_percent(score['accuracy'])} [{100 * low:.0f}-{100 * high:.0f}]"


def notes(summaries: Mapping[str, dict]) -> str:
    """What the numbers are, in one paragraph."""
    first = next(iter(summaries.values()))
    seeds = [str(s["seed"]) if s.get("seed") is not None else "unknown" for s in summaries.values()]
    seed = ", ".join(f"{seed} ({name})" for name, seed in zip(summaries, seeds, strict=True))
    if len(set(seeds)) == 1:
        seed = seeds[0]
    sampling = {name: _sampling(summary) for name, summary in summaries.items()}
    sampled = "; ".join(f"{name}: {settings}" for name, settings in sampling.items())
    if len(set(sampling.values())) == 1:
        sampled = next(iter(sampling.values()))
    num_drawn = [bound["num_images"] for s in summaries.values() for bound in _bounds(s).values()]
    incomplete = [f"{name}: {', '.join(found)}" for name, s in summaries.items() if (found := missing(s))]
    fewer = [f"{name}: {sentence}" for name, s in summaries.items() if (sentence := _of_suite(s))]
    changed = [
        f"{name}: {counted(len(texts), 'prompt')}"
        for name, s in summaries.items()
        if (texts := s.get("changed_prompts"))
    ]
    sentences = [
        f"Suite {first['suite']}, detector {first['detector']}, seed {seed}.",
        f"Sampling: {sampled}.",
        "Percent correct [95 % interval, clustered by prompt]; overall is the mean of the skills.",
    ]
    if num_drawn:
        numbers = " or ".join(map(str, sorted(set(num_drawn))))
        sentences.append(f"Ceiling and chance: {numbers} drawn pictures.")
    if fewer:
        sentences.append(f"NOT the whole suite ({'; '.join(fewer)}).")
    if changed:
        sentences.append(
            f"NOT the suite's texts ({'; '.join(changed)}); "
            "scored by what they ask for, as GenEval's script does."
        )
    if incomplete:
        sentences.append(f"PARTIAL: {'; '.join(incomplete)}.")
    return " ".join(sentences)


def _sampling(summary: dict) -> str:
    """Window and sampling settings in words: a comparison is fair when each model has
    those that suit it.
    """
    record = summary.get("generation") or {}
    settings = record.get("sampling")
    if not settings:
        return "unknown"
    named = {"K": record.get("window"), **settings}
    return ", ".join(f"{key} {value}" for key, value in named.items() if value not in (None, False))


def render(summaries: Mapping[str, dict], *, markdown: bool = False) -> str:
    """The table and its notes as text. Raises ValueError like `rows`."""
    table = rows(summaries)
    if markdown:
        return "\n".join([tables.markdown(table), "", notes(summaries)])
    head, *body = tables.text(table)
    ruler = "-" * len(head)
    models, others = body[: len(summaries)], body[len(summaries) :]
    return "\n".join([head, ruler, *models, ruler, *others, "", notes(summaries)])


def read_summary(path: Path) -> dict:
    """A summary.json of eval.geneval.

    Raises ValueError naming the file when it is missing or invalid.
    """
    summary = read_json(path)
    missing = [key for key in ("suite", "detector", "num_images", "skills", "overall") if key not in summary]
    if missing:
        raise ValueError(f"{path}: not a summary of eval.geneval, it has no {', '.join(missing)}")
    if isinstance(record := summary.get("generation"), dict):
        layout.check_record(record, f"{path}: generation")
    try:
        if not isinstance(summary["skills"], dict):
            raise TypeError(f"skills, {summary['skills']!r}")
        rows({"": summary}), notes({"": summary})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, {type(error).__name__} at {error}") from None
    return summary


def by_name(arguments: Sequence[str], what: str) -> dict[str, Path]:
    """`NAME=PATH` arguments; a bare path is named after its folder, or after itself if
    it is a folder.

    what: the plural of the arguments, for the message. Raises ValueError for a name
    given twice.
    """
    paths: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals:
            path = argument
            folder = Path(path).parent if Path(path).suffix == ".json" else Path(path)
            name = folder.resolve().name
        if name in paths:
            raise ValueError(f"two {what} are named {name!r}; name them apart with NAME=PATH")
        paths[name] = Path(path)
    return paths


@command
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m eval.report_table",
        description="Scores of several models in one table.",
        example="plain=runs/eval/plain/summary.json --markdown",
    )
    parser.add_argument("summaries", nargs="+", metavar="[NAME=]summary.json")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    options = parser.parse_args(arguments)
    paths = by_name(options.summaries, "summaries")
    print(render({name: read_summary(path) for name, path in paths.items()}, markdown=options.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
