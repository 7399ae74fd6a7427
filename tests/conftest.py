"""Fixtures that several files use, and the order of files.

Models are tiny and random: see helpers/fakes.py. Folders that take a second to make are
made once per test process; tests write into them only under names of their own.
"""

import json
from pathlib import Path

import pytest
import torch

from mmtensorar.checkpoints import model_folder
from mmtensorar.recipe import Recipe
from tests.helpers import fork_server
from tests.helpers.fakes import tiny_llamagen, write_tiny_janus, write_tiny_t5
from tests.helpers.runs import write_bench

# Files that take long, longest first: with few test processes, a long file that starts
# last would run alone.
LONG_FILES = (
    "tests/training/test_train.py",
    "tests/test_recipes.py",
    "tests/training/test_matrix.py",
    "tests/training/test_nodes.py",
    "tests/training/test_kill.py",
    "tests/data_tools/test_storage.py",
    "tests/fuzz/test_fuzz.py",
    "tests/study/test_study.py",
    "tests/training/test_plan.py",
    "tests/model/test_loss.py",
    "tests/parity/test_parity.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.nodeid.split("::")[0], len(place)))


def pytest_sessionfinish() -> None:
    fork_server.close_shared()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two test processes share two cores, and sums must not depend on the number of
    threads.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Path:
    """A folder with a tiny Janus, its image tokenizer, shards and a recipe; see
    helpers/runs.py.
    """
    pytest.importorskip("deepspeed")
    torch.set_num_threads(1)
    return write_bench(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory) -> Path:
    """A tiny model folder of window 3 with a codec that is not fresh; images are 8 x 8,
    of 16 tokens.
    """
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("generate")
    write_tiny_janus(folder / "janus")
    settings = {
        "run": {"name": "tiny"},
        "backbone": {"name": "janus", "path": str(folder / "janus")},
        "image_tokenizer": {"name": "janus_vq", "path": str(folder / "janus" / "vq")},
        "tensorar": {"window": 3, "num_heads": 2},
        "data": {"shards": "none", "batch_size": 1},
        "train": {"steps": 1},
        "sampler": {"cfg_scale": 2.0, "top_k": 20},
    }
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    recipe = Recipe.load(folder / "recipe.yaml", [])
    model = model_folder.initial_model(recipe)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    model_folder.save(folder / "model", model, recipe)
    return folder / "model"


@pytest.fixture(scope="session")
def class_ckpt(ckpt, tmp_path_factory) -> Path:
    """The model folder of a LlamaGen with 7 classes, which uses the image tokenizer of
    `ckpt`.
    """
    folder = tmp_path_factory.mktemp("classes")
    torch.manual_seed(0)
    tiny_llamagen(vocab_size=32, num_tokens=16).save_pretrained(folder / "backbone")
    settings = {
        "run": {"name": "classes"},
        "backbone": {"name": "llamagen", "path": str(folder / "backbone")},
        "image_tokenizer": {"name": "janus_vq", "path": str(ckpt / "image_tokenizer")},
        "tensorar": {"window": 1},
        "data": {"shards": "none", "batch_size": 1},
        "train": {"steps": 1},
        "sampler": {"cfg_scale": 2.0},
    }
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    recipe = Recipe.load(folder / "recipe.yaml", [])
    model_folder.save(folder / "model", model_folder.initial_model(recipe), recipe)
    return folder / "model"


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory) -> Path:
    """A tiny T5 text encoder with its text tokenizer."""
    folder = tmp_path_factory.mktemp("t5")
    write_tiny_t5(folder)
    return folder
