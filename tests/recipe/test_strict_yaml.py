"""Values of recipes and of key=value are what a person reads, and what is written reads
back unchanged.
"""

import math

import pytest

from mmtensorar.recipe import Recipe, RecipeError
from mmtensorar.recipe.strict_yaml import dump, load


@pytest.mark.parametrize(
    "text, value",
    [
        ("0042", 42),  # PyYAML alone: 34, an octal number
        ("-007", -7),
        ("08", 8),  # PyYAML alone: text, since 8 is not an octal digit
        ("010", 10),
        ("+12", 12),
        ("0x10", 16),
        ("2e-5", 2e-5),  # PyYAML alone: text, since it has no decimal point
        ("1e3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("1:30", "1:30"),  # PyYAML alone: 90, a number of base 60
        ("190:20:30", "190:20:30"),
        ("1:30.5", "1:30.5"),
        ("2024-01-31", "2024-01-31"),  # PyYAML alone: a date
        ("yes", "yes"),  # PyYAML alone: a boolean
        ("Off", "Off"),
        ("no", "no"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("=", "="),  # PyYAML alone: an error
        ("'0042'", "0042"),
        ("4 2", "4 2"),
        ("1,000", "1,000"),
        ("\u0663", "\u0663"),  # an Arabic three
        ('"\\ud83d\\ude00"', "\U0001f600"),  # as JSON writes it
    ],
)
def test_a_value_is_what_a_person_reads(text, value):
    found = load(text)
    assert found == value and type(found) is type(value)
    assert load(f"a: [{text or 'null'}]") == {"a": [value]} or "," in text


@pytest.mark.parametrize(
    "text, instead",
    [
        ("0o17", "write 15"),
        ("-0O17", "write -15"),
        ("0b101", "write 5"),
        ("1_000", "write 1000"),
        ("-1_000.5", "write -1000.5"),
        ("0X1F", "write 31"),
        ("+0x1f", "write 31"),
        ("0x1_0", "write 16"),
        ("1_0e3", "write 10e3"),
    ],
)
def test_what_two_programs_read_differently_is_refused(text, instead):
    """YAML 1.1 and 1.2 disagree about these, and so do people."""
    with pytest.raises(ValueError, match=instead) as caught:
        load(f"first: 1\nvalue: {text}\n")
    assert "line 2" in str(caught.value)
    assert load(f"'{text}'") == text


@pytest.mark.parametrize(
    "text",
    [
        '"\\ud800"',
        '"a\\udcffb"',
        '"\\0"',
        '"\\UFFFFFFFF"',
        "a\0b",
        "a\udcffb",
        "!!int 1:30",
        "!!float one",
        "!!bool yes",
        "!!python/object:os.system x",
        "9" * 5000,
        "0x" + "f" * 4000,  # of more than 4,300 digits in base 10
        "[" * 1500,
        "{a: 1, a: 2}",
        "@a",
        "*a",
    ],
)
def test_what_is_not_a_value_is_one_sentence(text):
    with pytest.raises(ValueError) as caught:
        load(text)
    sentence = str(caught.value)
    assert type(caught.value) is ValueError and len(sentence) < 300 and "\n" not in sentence


@pytest.mark.parametrize(
    "value",
    ["yes", "no", "0042", "1:30", "2024-01-31", "1e5", "1_000", "0o17", "0b1", "0x10", "", ".", "~", "null"]
    + ["true", "=", "<<", "1.", "+1", "a: b", "#x", "\u00e9", "\U0001f600", "\x85", "a\u2028b", "a\nb"]
    + [1e16, 2e-5, math.inf, 10**20, True, None, -1],
)
def test_what_is_written_reads_back_unchanged(value):
    """The recipe of a run is saved, and compared on resume."""
    assert load(dump({"a": [value], "b": value})) == {"a": [value], "b": value}


@pytest.mark.parametrize(
    "override, value",
    [
        ("run.seed=0042", 42),
        ("run.seed=1e3", 1000),
        ("run.name=1e3_a", "1e3_a"),
        ("run.name=2024-01-31", "2024-01-31"),
        ("run.name=no", "no"),
        ("train.compile=yes", True),  # nobody reads anything else
        ("train.sample_prompts=[12:30, on, '1_000']", ["12:30", "on", "1_000"]),
        ("optim.lr=0002e-5", 2e-5),
    ],
)
def test_the_command_line_reads_alike(path, override, value):
    section, _, key = override.partition("=")[0].partition(".")
    assert getattr(getattr(Recipe.load(path, [override]), section), key) == value


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=0o17",
        "train.steps=1_000",
        "run.seed=1:30",
        "run.seed=\u0663",
        "run.name=\udcff",
        "run.name=a\0",
        'train.sample_prompts=["\\ud800"]',
        "run.name=a #1",
        "zero.extra.a=&a [*a]",
        "zero.extra=" + "[" * 1500,
    ],
)
def test_a_wrong_value_of_the_command_line_is_named(path, override):
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, [override])
    first, line = str(caught.value).splitlines()
    assert first == "the command line: 1 problem" and line.split()[0] == override.partition("=")[0]
