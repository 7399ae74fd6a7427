"""Files of released models: find them, read config.json, fill a module from safetensors or from PyTorch's own files.

PyTorch files (.pt, .pth, .ckpt, .bin) are read with weights_only, so nothing in a downloaded file can run code.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

WEIGHTS = "model.safetensors"
TORCH_WEIGHTS = "pytorch_model.bin"
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
WEIGHTS_SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")
SHARD_BYTES = 2 * 10**9


def locate(path: str, *, key: str, weights: bool = True) -> Path:
    """A model on this machine, fetched from Hugging Face when it is not here: a folder, or a weights file.

    path: a folder or file; a Hugging Face id; or an id with a file's name behind it (OWNER/NAME/FILE), which fetches no
    other file. A folder whose only weights are one file of another name than usual stands for that file. key: the
    recipe's name for the setting. weights: False looks for no weights, and fetches none. Raises ValueError naming key
    and path when there is no such thing, or several files could be meant.
    """
    found = Path(path)
    if not found.exists():
        found = _fetch(path, key, weights)
    if not weights or found.is_file():
        return found
    chosen = _weights_among([file.name for file in found.iterdir()], where=found, key=key)
    return found if _usual(chosen) else found / chosen


def _fetch(path: str, key: str, weights: bool) -> Path:
    """A file or folder of the hub. Looks at a repository's list first, so that nothing is fetched in vain."""
    of_file = Path(path).suffix in WEIGHTS_SUFFIXES
    # Everything else can only have been meant as a folder or file.
    if path.count("/") != 1 + of_file or path.startswith((".", "/", "~")):
        raise ValueError(f"{key}: no {'file' if of_file else 'folder'} {path}")
    try:
        if of_file:
            return Path(hf_hub_download(*path.rsplit("/", 1)))
        try:
            names = list_repo_files(path) if weights else None
        except Exception as error:  # any: the network library's own; what was fetched before will do
            if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
                raise
            return Path(snapshot_download(path, local_files_only=True))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise _not_to_be_had(path, key, error) from None
    patterns = ["*.json", "*.jinja"]  # chat templates are in either
    if names is not None:
        chosen = _weights_among([name for name in names if "/" not in name], where=path, key=key)
        patterns.append(chosen.replace(".", "*.") if _usual(chosen) else chosen)
    try:
        return Path(snapshot_download(path, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise _not_to_be_had(path, key, error) from None


def _not_to_be_had(path: str, key: str, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(f"{key}: {path} is not here, nor to be had from Hugging Face now ({reason})")


def _usual(name: str) -> bool:
    return name in (WEIGHTS, TORCH_WEIGHTS)


def _weights_among(names: Sequence[str], *, where: Path | str, key: str) -> str:
    """model.safetensors or pytorch_model.bin when either is there, whole or in parts; else the only weights file."""
    for name in (WEIGHTS, TORCH_WEIGHTS):
        if name in names or f"{name}.index.json" in names:
            return name
    files = sorted(name for name in names if Path(name).suffix in WEIGHTS_SUFFIXES)
    if len(files) == 1:
        return files[0]
    if not files:
        raise ValueError(f"{key}: {where} has no {WEIGHTS}, nor another weights file")
    raise ValueError(
        f"{key}: {where} has {', '.join(files)}; give one of these files as the path, {where}/{files[0]}"
    )


def read_config(folder: Path, *model_types: str, key: str) -> dict:
    """config.json of a folder. Raises ValueError when it is missing, is not JSON, or is of another model_type."""
    if folder.is_file():
        raise ValueError(f"{key}: {folder} is a file; expected a folder with config.json")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{key}: {folder} has no config.json")
    settings = _settings(folder)
    found = settings.get("model_type") if isinstance(settings, dict) else None
    if found not in model_types:
        expected = " or ".join(map(repr, model_types))
        raise ValueError(f"{folder / 'config.json'}: model_type is {found!r}, expected {expected}")
    return settings


def _settings(folder: Path) -> Any:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path}: not JSON") from None


def parse_config(architecture: type[BaseModel], settings: Mapping[str, Any], folder: Path):
    """The settings of a folder's config.json as an architecture. Raises ValueError naming the first that is wrong."""
    try:
        return architecture.model_validate(
            {key: value for key, value in settings.items() if key != "model_type"}
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{folder / 'config.json'}: {where + ': ' if where else ''}{first['msg']}") from None


def hub_config(kind: type, settings: dict[str, Any], folder: Path):
    """A config.json's settings as a configuration of transformers. Raises ValueError naming the file."""
    try:
        return kind.from_dict(settings)
    except Exception as error:  # any: settings from outside go through code that expects good ones
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{folder / 'config.json'}: no {kind.__name__} ({reason[:300]})") from None


def own_config(architecture: type[BaseModel], source: Path, model_type: str):
    """The config.json in a folder or beside a file as an architecture; None when there is none, or it is another model's.

    Official checkpoints come without one, or with one that says something else. Raises ValueError naming the file when
    it is not JSON, or a setting is wrong.
    """
    folder = source if source.is_dir() else source.parent
    if not (folder / "config.json").is_file():
        return None
    settings = _settings(folder)
    if not isinstance(settings, dict) or settings.get("model_type") != model_type:
        return None
    return parse_config(architecture, settings, folder)


# ---- tensors -------------------------------------------------------------------------------------


class Checkpoint:
    """The tensors of a file or folder by name; their values are read when they are asked for, a file at a time.

    shapes: name -> shape. others: what else a PyTorch file holds beside its state dict (steps, args), by its key.
    """

    def __init__(self, path: Path, wrappers: Sequence[str] = (), *, optional: bool = False):
        """path: a weights file, or a folder with model.safetensors or pytorch_model.bin, each whole or in parts.

        wrappers: keys of a PyTorch file that may hold the state dict, the first that is there winning; without any of
        them the file is the state dict itself. optional: a folder without weights, or without all
        those of its index, is one without tensors. Raises
        ValueError naming a file that is missing or cannot be read.
        """
        self.path = path
        self.shapes: dict[str, list[int]] = {}
        self.others: dict[str, Any] = {}
        self._wrappers = wrappers
        self._files: dict[str, Path] = {}
        self._opened: tuple[Path, Callable[[str], Tensor]] | None = None
        for file, names in _parts(path, optional=optional).items():
            if file.suffix in TORCH_SUFFIXES:
                state, others = _read_torch(file, wrappers)
                self.others.update(others)
                shapes = {name: list(value.shape) for name, value in state.items()}
            else:
                with _open(file) as opened:
                    shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}
            if lost := sorted(set(names or ()) - shapes.keys()):
                raise ValueError(f"{file}: {_some(lost, 'missing')}, though the index names them there")
            self.shapes.update(shapes)
            self._files.update(dict.fromkeys(shapes, file))

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, value) of the named tensors, file after file."""
        names = set(names)
        for file in sorted({self._files[name] for name in names}):
            here = sorted(name for name in names if self._files[name] == file)
            if file.suffix in TORCH_SUFFIXES:
                state, _ = _read_torch(file, self._wrappers)
                yield from ((name, state[name]) for name in here)
            else:
                with _open(file) as opened:
                    yield from ((name, opened.get_tensor(name)) for name in here)

    def value(self, name: str) -> Tensor:
        """One tensor. The file stays open for the next, so in order of the files is quickest."""
        file = self._files[name]
        if self._opened is None or self._opened[0] != file:
            torch_file = file.suffix in TORCH_SUFFIXES
            self._opened = (
                file,
                _read_torch(file, self._wrappers)[0].__getitem__ if torch_file else _open(file).get_tensor,
            )
        return self._opened[1](name)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name]

    @property
    def files(self) -> list[Path]:
        return sorted(set(self._files.values()))


@contextmanager
def without_values() -> Iterator[None]:
    """Modules made inside have parameters on the meta device, so that no memory is used; buffers, which files may lack, are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(
                parameter.to("meta"), requires_grad=parameter.requires_grad
            )

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


class Unread(NamedTuple):
    """A model without values and the files that hold them, to be copied without ever being in memory at once.

    model: on the meta device. rename: the name of a tensor of the model -> its name in source. saved_name: -> its name
    in a folder that the model saves. ignore: see `fill`.
    """

    model: nn.Module
    source: Checkpoint
    rename: Callable[[str], str]
    saved_name: Callable[[str], str]
    ignore: Callable[[str], Any] | None = None

    def check(self) -> None:
        """Raises ValueError like `fill`."""
        _match(self.model.state_dict(), self.source, self.rename, self.ignore)

    def value(self, name: str) -> Tensor:
        """A tensor of the model, by its name there."""
        return self.source.value(self.rename(name))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in a saved folder, value) of all tensors, file after file."""
        saved = {self.rename(name): self.saved_name(name) for name in self.model.state_dict()}
        return ((saved[name], value) for name, value in self.source.read(saved))


@torch.no_grad()
def fill(
    state: Mapping[str, Tensor],
    source: Path | Checkpoint,
    rename: Callable[[str], str] = str,
    *,
    ignore: Callable[[str], bool] | None = None,
) -> None:
    """Copy a checkpoint's tensors into state, in place; values that state has no place for are never read.

    state: our names -> tensors that receive the values. rename: our name -> the name in the files. ignore: whether a
    tensor that state has no place for is one to pass over; None passes over all of them. Raises ValueError naming the
    file and the tensors that are missing, unexpected or of another shape; then state is as it was.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    wanted = _match(state, checkpoint, rename, ignore)
    for name, value in checkpoint.read(wanted):
        wanted[name].copy_(value)


def _match(
    state: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    rename: Callable[[str], str],
    ignore: Callable[[str], Any] | None,
) -> dict[str, Tensor]:
    """Names in the checkpoint -> the tensors of state. Raises ValueError like `fill`."""
    wanted = {rename(name): value for name, value in state.items()}
    problems = []
    if missing := sorted(wanted.keys() - checkpoint.shapes.keys()):
        problems.append(_some(missing, "missing"))
    if ignore is not None:
        if unexpected := sorted(
            name for name in checkpoint.shapes.keys() - wanted.keys() if not ignore(name)
        ):
            problems.append(_some(unexpected, "unexpected"))
    if problems:
        raise ValueError(f"{checkpoint.path}: {'; '.join(problems)}")
    different = [
        f"{checkpoint.file(name)}: {name} has shape {checkpoint.shapes[name]}, expected {list(value.shape)}"
        for name, value in wanted.items()
        if checkpoint.shapes[name] != list(value.shape)
    ]
    if different:
        more = f" (and {len(different) - 10} more)" if len(different) > 10 else ""
        raise ValueError("; ".join(different[:10]) + more)
    return wanted


def write(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write model.safetensors, or shards of SHARD_BYTES and an index; no more than a shard is in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = size = 0

    def end_shard() -> None:
        nonlocal shard, size, total
        save_file(shard, folder / f"{len(shards)}.partial", {"format": "pt"})
        shards.append(list(shard))
        shard, size, total = {}, 0, total + size

    for name, value in tensors:
        if shard and size + value.nbytes > SHARD_BYTES:
            end_shard()
        # A copy: in a PyTorch file several tensors may be views of one storage, which safetensors refuses.
        shard[name] = value.detach().clone(memory_format=torch.contiguous_format)
        size += value.nbytes
    end_shard()
    if len(shards) == 1:
        (folder / "0.partial").rename(folder / WEIGHTS)
        return
    places = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.partial").rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def weight_hash(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and float32 values: the same weights in any file layout."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode() + str(list(value.shape)).encode())
        digest.update(value.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _some(names: list[str], what: str) -> str:
    plural = "tensors are" if len(names) > 1 else "tensor is"
    return f"{len(names)} {plural} {what}, {'among them ' if len(names) > 10 else ''}{', '.join(names[:10])}"


def _parts(path: Path, *, optional: bool) -> dict[Path, list[str] | None]:
    """File -> names that an index says are in it (None without an index), for a file or a folder."""
    if path.is_file():
        return {path: None}
    for name in (WEIGHTS, TORCH_WEIGHTS):
        index = path / f"{name}.index.json"
        if index.is_file():
            parts = _indexed(index)
            # A download of *.json alone, for a configuration, brings the index too.
            return {} if optional and not all(file.is_file() for file in parts) else parts
        if (path / name).is_file():
            return {path / name: None}
    if optional:
        return {}
    raise ValueError(f"{path / WEIGHTS} is missing")


def _indexed(index: Path) -> dict[Path, list[str]]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        parts: dict[Path, list[str]] = {}
        for tensor, name in names.items():
            if Path(name).name != name:
                raise ValueError(f"{index}: names a file outside the folder, {name!r}")
            parts.setdefault(index.parent / name, []).append(tensor)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index}: no weight_map in it") from None
    return parts


def _open(path: Path):
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error})") from None


def _read_torch(path: Path, wrappers: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict in a PyTorch file and what else is in it; values stay on disk until they are used."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        # Training checkpoints hold their command line as a Namespace: a plain record, which runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # An unpickler that meets a text file may also stumble over its bytes.
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        struct.error,
    ) as error:
        # torch's message is a page; what matters in it is the class that the file wants.
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it holds a {refused[1]}"
            if refused
            else (str(error).strip() or type(error).__name__).splitlines()[0]
        )
        raise ValueError(f"{path}: cannot be read as PyTorch weights ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, expected a state dict")
    others = {}
    for key in wrappers:
        if isinstance(content.get(key), dict):
            others = {name: value for name, value in content.items() if name != key}
            content = content[key]
            break
    odd = [
        str(name)
        for name, value in content.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if odd:
        looked = f", nor is one under {', '.join(wrappers)}" if wrappers else ""
        raise ValueError(f"{path}: no state dict: it has {', '.join(odd[:10])}{looked}")
    return content, others
