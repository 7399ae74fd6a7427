"""Models in one table: python -m eval.report_table NAME=summary.json [NAME=summary.json ...] [--markdown]

Accuracy in percent with its 95 % interval, per skill and overall (the mean of the skills), then the bounds to read
them by: ceiling (correctly drawn pictures, and those after the image tokenizer's round trip) and chance.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from mmtensorar.files import read_json


def rows(summaries: Mapping[str, dict]) -> list[list[str]]:
    """Header and rows of the table. summaries: model name -> summary.json.

    Raises ValueError when the summaries are not of one suite and detector, whose scores cannot share a column.
    """
    for key in ("suite", "detector"):
        values = {name: summary[key] for name, summary in summaries.items()}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{name} has {value}" for name, value in values.items())
            raise ValueError(f"scores of different {key}s do not belong in one table: {told}")
    skills = list(dict.fromkeys(skill for summary in summaries.values() for skill in summary["skills"]))
    table = [["model", *skills, "overall"]]
    for name, summary in summaries.items():
        cells = [*(_cell(summary["skills"].get(skill)) for skill in skills), _cell(summary["overall"])]
        table.append([f"{name} (PARTIAL)" if summary.get("partial") else name, *cells])

    def images(summary: dict) -> list[str]:
        per_skill = [str(summary["skills"].get(skill, {}).get("num_images", 0)) for skill in skills]
        return [*per_skill, str(summary["num_images"])]

    table += _once("images", summaries, images)
    for label in ("ceiling, as drawn", "ceiling, round trip", "chance"):
        known = {name: summary for name, summary in summaries.items() if label in _bounds(summary)}

        def shares(summary: dict, label: str = label) -> list[str]:
            found = _bounds(summary)[label]
            return [*(_percent(found["skills"].get(skill)) for skill in skills), _percent(found["overall"])]

        table += _once(label, known, shares)
    return table


def _bounds(summary: dict) -> dict[str, dict]:
    """Row label -> bound, of those that the summary has."""
    ceiling = summary.get("ceiling", {})
    bounds = {
        "ceiling, as drawn": ceiling.get("drawn"),
        "ceiling, round trip": ceiling.get("round_trip"),
        "chance": summary.get("chance"),
    }
    return {label: bound for label, bound in bounds.items() if bound}


def _once(label: str, summaries: Mapping[str, dict], cells: Callable[[dict], list[str]]) -> list[list[str]]:
    """One row when all models agree, else one per model."""
    found = {name: cells(summary) for name, summary in summaries.items()}
    if len({tuple(row) for row in found.values()}) == 1:
        return [[label, *next(iter(found.values()))]]
    return [[f"{label} ({name})", *row] for name, row in found.items()]


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
    seed = (
        seeds[0]
        if len(set(seeds)) == 1
        else ", ".join(f"{s} ({name})" for name, s in zip(summaries, seeds, strict=True))
    )
    sampling = {name: _sampling(summary) for name, summary in summaries.items()}
    if len(set(sampling.values())) == 1:
        sampled = next(iter(sampling.values()))
    else:
        sampled = "; ".join(f"{name}: {told}" for name, told in sampling.items())
    pictures = [bound["num_images"] for s in summaries.values() for bound in _bounds(s).values()]
    drawn = f" Ceiling and chance: {pictures[0]} drawn pictures." if pictures else ""
    partial = [
        f"{name} lacks {len(s['partial'])} images or prompts"
        for name, s in summaries.items()
        if s.get("partial")
    ]
    lacking = f" PARTIAL: {'; '.join(partial)}." if partial else ""
    return (
        f"Suite {first['suite']}, detector {first['detector']}, seed {seed}. Sampling: {sampled}. Percent correct [95 % interval, clustered by "
        f"prompt]; overall is the mean of the skills.{drawn}{lacking}"
    )


def _sampling(summary: dict) -> str:
    """Window and sampler settings in words; models are compared fairly only when each has those that suit it."""
    record = summary.get("generation") or {}
    settings = record.get("sampling")
    if not settings:
        return "unknown"
    told = {"K": record.get("window"), **settings}
    return ", ".join(f"{key} {value}" for key, value in told.items() if value not in (None, False))


def render(summaries: Mapping[str, dict], *, markdown: bool = False) -> str:
    """The table and its notes as text. Raises ValueError like `rows`."""
    table = rows(summaries)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]

    def line(row: list[str]) -> list[str]:
        return [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]

    if markdown:
        ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        lines = ["| " + " | ".join(row) + " |" for row in [line(table[0]), ruler, *map(line, table[1:])]]
    else:
        lines = ["  ".join(line(row)) for row in table]
        lines.insert(1, "-" * len(lines[0]))
        lines.insert(2 + len(summaries), "-" * len(lines[0]))
    return "\n".join([*lines, "", notes(summaries)])


def read_summary(path: Path) -> dict:
    """A summary.json. Raises ValueError, naming the file, when it is missing or no summary of an evaluation."""
    summary = read_json(path)
    missing = [key for key in ("suite", "detector", "num_images", "skills", "overall") if key not in summary]
    if missing:
        raise ValueError(f"{path}: not a summary of an evaluation, it has no {', '.join(missing)}")
    try:
        if not isinstance(summary["skills"], dict):
            raise TypeError(f"skills, {summary['skills']!r}")
        rows({"": summary}), notes({"": summary})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, {type(error).__name__} at {error}") from None
    return summary


def named(text: str) -> tuple[str, Path]:
    """`NAME=PATH` -> both; a bare path is named after its folder, or itself if it is one."""
    name, equals, path = text.partition("=")
    if not equals:
        return (Path(text).parent if Path(text).suffix == ".json" else Path(text)).resolve().name, Path(text)
    return name, Path(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.report_table", description="Several models' scores in one table."
    )
    parser.add_argument("summaries", nargs="+", metavar="NAME=summary.json")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(arguments)
    try:
        summaries = {}
        for name, path in map(named, options.summaries):
            if name in summaries:
                raise ValueError(f"two summaries are named {name!r}; name them apart with NAME=FILE")
            summaries[name] = read_summary(path)
        print(render(summaries, markdown=options.markdown))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
