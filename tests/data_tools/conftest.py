"""Folders of pictures to make shards from."""

from pathlib import Path

import pytest

from tests.helpers.sources import COLORS, picture


@pytest.fixture
def files(tmp_path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    for color in COLORS:
        (folder / f"{color}.png").write_bytes(picture(color))
    return folder


@pytest.fixture
def captioned(files) -> Path:
    for color in COLORS:
        (files / f"{color}.txt").write_text(f"a {color} picture")
    return files
