"""What commands print about a set of one sample: no "1 samples", no "1 shards"."""

import json
import re

import pytest
from PIL import Image

from mmtensorar import cli

THINGS = (
    "samples|shards|images|pictures|items|classes|captions|problems|files|rows|readers|runs|prompts|steps"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with one picture, in which the commands run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "pictures" / "cat" / "a.png")
    (tmp_path / "pictures" / "cat" / "a.txt").write_text("a cat")
    (tmp_path / "list.jsonl").write_text(json.dumps({"image": "pictures/cat/a.png", "caption": "a cat"}))
    (tmp_path / "pictures" / "cat" / "notes.pdf").write_text("one file that is no picture")
    return tmp_path


@pytest.mark.parametrize("source", ["--folder pictures", "--jsonl list.jsonl", "--class-folder pictures"])
def test_one_sample_is_not_plural(folder, capsys, source):
    for command in (
        f"shards make {source} --workers 1 --image-size 32 --out set --dry-run",
        f"shards make {source} --workers 1 --image-size 32 --out set",
        f"shards make {source} --workers 1 --image-size 32 --out set",
        "shards check set --workers 1",
        "shards check set --workers 1 --repair again",
        "shards inspect set",
    ):
        assert cli.main(command.split()) == 0
    out, err = capsys.readouterr()
    assert "1 sample" in out and not re.findall(rf".*\b1 (?:{THINGS})\b.*", out + err)
