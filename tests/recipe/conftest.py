"""A small recipe that names no file that exists."""

from pathlib import Path

import pytest

MINIMAL = """
run: {name: test}
backbone: {name: janus, path: models/janus}
image_tokenizer: {name: janus_vq, path: models/janus}
tensorar: {window: 4}
data: {shards: data/train, batch_size: 4}
train: {steps: 3}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The minimal recipe in a file `minimal.yaml`."""
    file = tmp_path / "minimal.yaml"
    file.write_text(MINIMAL)
    return file
