"""Sampling settings are declared once; options, checks and records are derived from the
declaration.
"""

import argparse
import ast
from pathlib import Path
from typing import Annotated

import pytest
from annotated_types import Ge, Le
from pydantic import Field

from mmtensorar.recipe import SamplerSettings
from mmtensorar.sampling import settings
from mmtensorar.sampling.settings import merge

Share = Annotated[float, Ge(0), Le(1)]


def parse(*arguments: str) -> dict:
    """The sampling settings of a command line."""
    parser = argparse.ArgumentParser()
    settings.add_generation(parser)
    return settings.given_settings(parser.parse_args(arguments))


def test_every_setting_has_an_option():
    """Options have no default of their own: a setting that is not given comes from the
    recipe.
    """
    assert parse() == dict.fromkeys(SamplerSettings.model_fields)
    assert all(
        field.description for field in SamplerSettings.model_fields.values()
    )  # becomes the option's help
    given = parse("--cfg-scale", "1.9,2", "--top-k", "3", "--no-greedy-drafts", "--lookahead", "4")
    assert {name: value for name, value in given.items() if value is not None} == {
        "cfg_scale": [1.9, 2.0],
        "top_k": 3,
        "greedy_drafts": False,
        "lookahead": 4,
    }
    assert parse("--lookahead", "auto")["lookahead"] == "auto"


def test_a_new_setting_is_one_field(monkeypatch):
    class More(SamplerSettings):
        min_p: Share | list[Share] = Field(0.0, description="drop tokens below this share")

    monkeypatch.setattr(settings, "SamplerSettings", More)
    monkeypatch.setattr(settings, "SAMPLING", tuple(More.model_fields))
    assert parse("--min-p", "0.1,0.2")["min_p"] == [0.1, 0.2]
    with pytest.raises(SystemExit):
        parse("--min-p", "2")
    assert [each.min_p for each in merge(More(), {"min_p": [0.1, 0.2]}).per_factor(2)] == [0.1, 0.2]
    with pytest.raises(ValueError, match="min_p: .* got -1"):
        merge(More(), {"min_p": -1})


@pytest.mark.parametrize(
    "arguments",
    [
        ["--temperature", "0"],
        ["--top-k", "1.5"],
        ["--top-p", "0.9,2"],
        ["--lookahead", "0"],
        ["--lookahead", "2,3"],
        ["--cfg-scale", "much"],
    ],
)
def test_an_invalid_option_is_reported_at_once(arguments, capsys):
    """The error comes before the model is loaded, not after."""
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_given_settings_replace_the_recipes():
    recipe = SamplerSettings(cfg_scale=2.0, top_k=20)
    assert merge(recipe, {}) == recipe
    given = {"top_k": 0, "top_p": None, "greedy_drafts": True}
    assert merge(recipe, given) == SamplerSettings(cfg_scale=2.0, top_k=0, greedy_drafts=True)


@pytest.mark.parametrize(
    "given, problem",
    [
        ({"temperature": 0}, "temperature: expected .* > 0.* got 0"),
        ({"temperature": float("nan")}, "temperature: expected .* got nan"),
        ({"top_k": -1}, "top_k: expected .* got -1"),
        ({"top_k": 1.5}, "top_k: expected .* got 1.5"),
        ({"top_p": 0}, "top_p: expected .* got 0"),
        ({"top_p": 1.1}, "top_p: expected .* got 1.1"),
        ({"cfg_scale": -1}, "cfg_scale: expected .* got -1"),
        ({"cfg_scale": True}, "cfg_scale: expected .* got True"),
        ({"lookahead": 0}, "lookahead: expected .* got 0"),
        ({"temperature": [1.0, 0]}, r"temperature: expected .* > 0.* got \[1.0, 0\]"),
        ({"heat": 1}, "heat: unknown key; .*temperature, top_k"),
    ],
)
def test_settings_out_of_range_are_refused(given, problem):
    with pytest.raises(ValueError, match=problem) as raised:
        merge(SamplerSettings(), given)
    assert "\n" not in str(raised.value)


def test_every_factor_has_its_own_settings():
    """A list has one number per factor, a single number is for all factors; a list of
    another length is refused.
    """
    both = SamplerSettings(temperature=[0.5, 2.0], top_k=3, top_p=[0.9, 1], greedy_drafts=True)
    assert both.per_factor(2) == [
        SamplerSettings(temperature=0.5, top_k=3, top_p=0.9, greedy_drafts=True),
        SamplerSettings(temperature=2.0, top_k=3, top_p=1, greedy_drafts=True),
    ]
    with pytest.raises(ValueError, match=r"temperature has 2 numbers \(0.5, 2.0\)"):
        both.per_factor(1)


def test_settings_are_read_without_torch():
    """Commands report a mistyped option before they import torch, which takes
    seconds.
    """
    tree = ast.parse(Path(settings.__file__).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    ours = {name for name in modules | names if name.startswith("mmtensorar")}
    assert ours == {"mmtensorar.recipe", "mmtensorar.words"}
    assert not any("torch" in name for name in modules | names)


def test_records_of_earlier_versions_compare_equal():
    """An evaluation that an earlier version started can resume, although its record
    names removed settings.
    """
    today = SamplerSettings(top_k=20).model_dump(mode="json")
    assert settings.without_removed(today | {"greedy": False, "stride": 1}) == settings.without_removed(today)
    assert settings.without_removed(today | {"stride": 2}) != settings.without_removed(today)
