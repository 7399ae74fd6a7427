"""Finding the files of released models: what is downloaded, from where, and what is
refused.
"""

import json

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from mmtensorar import backbones
from mmtensorar.backbones import llamagen
from mmtensorar.checkpoints import released
from tests.helpers.fakes import tiny_llamagen


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose repositories are folders. It records all requests."""
    asked = []

    def list_repo_files(repo):
        asked.append(("list", repo))
        return [path.name for path in (tmp_path / repo).iterdir()]

    def snapshot_download(repo, allow_patterns=None, local_files_only=False):
        asked.append(("folder", repo, allow_patterns))
        return str(tmp_path / repo)

    def hf_hub_download(repo, name):
        asked.append(("file", repo, name))
        return str(tmp_path / repo / name)

    for function in (list_repo_files, snapshot_download, hf_hub_download):
        monkeypatch.setattr(released, function.__name__, function)
    monkeypatch.chdir(tmp_path / "..")  # otherwise the ids would be folders in the current folder
    return asked


def repository(tmp_path, name: str, *files: str):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    "files, patterns",
    [
        (
            ["config.json", "model.safetensors", "pytorch_model.bin", "extra.safetensors"],
            ["*.json", "*.jinja", "model*.safetensors"],
        ),
        (
            ["config.json", "model.safetensors.index.json", "model-1-of-1.safetensors"],
            ["*.json", "*.jinja", "model*.safetensors"],
        ),
        (
            ["config.json", "pytorch_model.bin.index.json", "pytorch_model-1-of-1.bin"],
            ["*.json", "*.jinja", "pytorch_model*.bin"],
        ),
        (["README.md", "imagenet_256_L.ckpt"], ["*.json", "*.jinja", "imagenet_256_L.ckpt"]),
    ],
)
def test_only_the_needed_files_of_a_repository_are_downloaded(files, patterns, tmp_path, hub):
    repository(tmp_path, "owner/name", *files)
    found = released.locate("owner/name", key="backbone.path")
    assert hub == [("list", "owner/name"), ("folder", "owner/name", patterns)]
    assert found == tmp_path / "owner/name" / (patterns[-1] if patterns[-1] in files else "")
    assert released.locate("owner/name", key="backbone.path", weights=False) == tmp_path / "owner/name"
    assert hub[2:] == [("folder", "owner/name", ["*.json", "*.jinja"])]


def test_a_repository_of_several_weights_files_is_not_downloaded(tmp_path, hub):
    """It was once downloaded completely, tens of GB, and then refused."""
    repository(tmp_path, "owner/name", "c2i_B_256.pt", "c2i_L_256.pt")
    with pytest.raises(
        ValueError, match=r"SRC: owner/name has c2i_B_256\.pt, c2i_L_256\.pt; .* owner/name/c2i_B_256\.pt"
    ):
        released.locate("owner/name", key="SRC")
    assert hub == [("list", "owner/name")]
    assert released.locate("owner/name/c2i_L_256.pt", key="SRC") == tmp_path / "owner/name/c2i_L_256.pt"
    assert hub[1:] == [("file", "owner/name", "c2i_L_256.pt")]


def test_without_network_earlier_downloads_are_used(tmp_path, hub, monkeypatch):
    repository(tmp_path, "owner/name", "config.json", "model.safetensors")

    def down(repo):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(released, "list_repo_files", down)
    assert released.locate("owner/name", key="backbone.path") == tmp_path / "owner/name"

    def absent(repo, **options):
        raise LocalEntryNotFoundError("nothing in the cache\nand more lines")

    monkeypatch.setattr(released, "snapshot_download", absent)
    with pytest.raises(ValueError, match=r"^backbone\.path: owner/name .*: nothing in the cache$"):
        released.locate("owner/name", key="backbone.path")


@pytest.mark.parametrize("path", ["owner/name", "owner/name/gpt.safetensors"])
def test_llamagen_takes_a_repository_or_a_file_of_one(path, tmp_path, hub):
    """The other backbones accept both too. Our config.json next to the file is used."""
    backbone = tiny_llamagen(num_tokens=16)
    folder = repository(tmp_path, "owner/name")
    backbone.save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "gpt.safetensors")
    section = llamagen.Config(name="llamagen", path=path)
    loaded = backbones.load(section)
    assert all(torch.equal(value, backbone.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_damaged_config_is_not_treated_as_missing(tmp_path):
    """It was once ignored, and the sizes were guessed from the tensors."""
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: expected one JSON object"):
        released.saved_config(llamagen.Architecture, tmp_path, "llamagen")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert released.saved_config(llamagen.Architecture, tmp_path, "llamagen") is None
