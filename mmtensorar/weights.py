"""Files of released models: find the folder, read config.json, fill a module from safetensors.

Only JSON and safetensors are read, so nothing in a downloaded folder can run code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = "model.safetensors"


def locate(path: str, *, key: str, weights: bool = True) -> Path:
    """The local folder of a path or Hugging Face id, downloading the id's files when needed.

    key: the recipe's name for the setting. weights: False fetches the JSON files only.
    Raises ValueError naming key and path when there is neither.
    """
    if (folder := Path(path)).is_dir():
        return folder
    # An id is owner/name; everything else can only have been meant as a folder.
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ValueError(f"{key}: no folder {path}")
    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", *(["*.safetensors"] if weights else [])]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{key}: {path} is no folder, nor a Hugging Face id that can be had now ({reason})") from None


def read_config(folder: Path, *model_types: str, key: str) -> dict:
    """config.json of a folder. Raises ValueError when it is missing, is not JSON, or is of another model_type."""
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{key}: {folder} has no config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path}: not JSON") from None
    found = settings.get("model_type") if isinstance(settings, dict) else None
    if found not in model_types:
        raise ValueError(f"{path}: model_type is {found!r}, expected {' or '.join(map(repr, model_types))}")
    return settings


@torch.no_grad()
def fill(state: Mapping[str, Tensor], folder: Path, rename: Callable[[str], str]) -> None:
    """Copy a checkpoint's tensors into state, in place, a file at a time; other tensors are never read.

    state: our names -> tensors that receive the values. rename: our name -> the name in the files.
    Raises ValueError naming the file and the tensors that are missing or have another shape.
    """
    files = _files(folder)
    wanted = {rename(name): value for name, value in state.items()}
    if missing := sorted(wanted.keys() - files.keys()):
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, among them {', '.join(missing[:10])}")
    for path in sorted({files[name] for name in wanted}):
        with _open(path) as file:
            for name in (name for name in wanted if files[name] == path):
                value = file.get_tensor(name)
                if value.shape != wanted[name].shape:
                    raise ValueError(
                        f"{path}: {name} has shape {list(value.shape)}, config.json expects {list(wanted[name].shape)}"
                    )
                wanted[name].copy_(value)


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file, for a folder with one file or an index of several."""
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            raise ValueError(f"{index}: no weight_map in it") from None
        if outside := [name for name in names.values() if Path(name).name != name]:
            raise ValueError(f"{index}: names a file outside the folder, {outside[0]!r}")
        return {tensor: folder / name for tensor, name in names.items()}
    path = folder / WEIGHTS
    with _open(path) as file:
        return dict.fromkeys(file.keys(), path)


def _open(path: Path):
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error})") from None
