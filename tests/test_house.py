"""The project's own rules that no linter checks: function lengths, README, links and
commands in the docs.
"""

import ast
import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from mmtensorar import cli

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("mmtensorar", "data_tools", "worlds", "eval", "study", "benchmarks", "recipes")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MOST_LINES = 80


@pytest.mark.parametrize("folder", PRODUCT)
def test_functions_fit_on_a_screen(folder):
    """A function over 80 lines does two things."""
    long = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MOST_LINES:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not long


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_have_a_target(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def commands(page: Path) -> list[str]:
    """The commands of a page's code blocks: lines that end in a backslash are joined,
    comments dropped.
    """
    found = []
    for block in re.findall(r"^```(?:bash|sh)?\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.replace("[", " ").replace("]", " "), comments=True)
            if words and words[0] == "mmtensorar" and words[1:2] != ["VERB"]:
                found.append(" ".join(words[1:]))
    return found


@pytest.mark.parametrize("command", sorted({c for page in PAGES for c in commands(page)}))
def test_commands_in_the_docs_have_their_options(command):
    """In every `mmtensorar VERB --option` in the docs the verb exists, and its help has
    the option.
    """
    words = command.split()
    verb = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in cli.VERBS), None)
    assert verb, command
    rest = words[len(verb.split()) :]
    subcommand = rest[:1] if rest and re.fullmatch(r"[a-z][a-z-]+", rest[0]) else []
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        cli.load(verb)([*subcommand, "--help"])
    assert ended.value.code == 0
    for option in (word for word in rest if word.startswith("--")):
        assert re.search(rf"{re.escape(option)}\b", out.getvalue()), f"{option} of {verb}"
