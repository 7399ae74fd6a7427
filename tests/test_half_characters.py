"""JSON may hold half a character (\\\\ud800) or a zero character: every reader names
the file and the place.

Such text ended in `'utf-8' codec can't encode character`, hours later and without a
file's name.
"""

import json

import pytest
from PIL import Image

from data_tools import make_shards
from data_tools.sources._rows import parse_object
from mmtensorar.cli import main
from mmtensorar.files import check_characters, read_json, read_json_lines

TEXTS = ["\ud800", "a red \udcff circle", "\udfff\ud800", "zero \0"]
GOOD = ["\U0001f600", "\uffff", "\u00e9", "\\ud800", ""]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [lambda t: {"a": t}, lambda t: {t: 1}, lambda t: {"a": [1, {"b": [t]}]}])
def test_readers_of_json_name_the_file(tmp_path, text, make):
    path, content = tmp_path / "a.json", json.dumps(make(text))
    path.write_text(content)
    for read in (
        read_json,
        lambda path: list(read_json_lines(path)),
        lambda path: parse_object(content, str(path)),
    ):
        with pytest.raises(ValueError, match=f"{path}.* holds "):
            read(path)


@pytest.mark.parametrize("text", GOOD)
def test_whole_characters_are_read(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"a": text}))
    assert read_json(path) == parse_object(path.read_bytes(), "a") == {"a": text}
    check_characters({"a": [text, 1, None, {"b": text}]}, "a")


@pytest.mark.parametrize(
    "row",
    [
        {"image": "\ud800", "caption": "a"},
        {"image": "a.png", "caption": "a \ud83d circle"},
        {"image": "a.png", "caption": "a", "author": "\udfff"},
        {"image": "a\0.png", "caption": "a"},
    ],
)
def test_a_row_with_half_a_character_is_named(tmp_path, capsys, row):
    """Neither the name of a picture, nor a caption, nor metadata."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    good = {"image": "a.png", "caption": "a"}
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (good, row)))
    arguments = ["--jsonl", str(tmp_path / "list.jsonl"), "--workers", "1", "--image-size", "32"]
    assert make_shards.main([*arguments, "--out", str(tmp_path / "set")]) == 2
    error = capsys.readouterr().err
    assert "list.jsonl:2" in error and " holds " in error and "codec" not in error


@pytest.mark.parametrize("text", ['"\\ud800"', '["\\udc00"]', '{"a": "\\udfff\\ud800"}'])
def test_a_recipe_with_half_a_character_is_named(tmp_path, capsys, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(f'{{"run": {{"name": "a"}},\n "train": {{"sample_prompts": {text}}}}}')
    assert main(["recipe", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: line 2: ") and "half a character" in error
