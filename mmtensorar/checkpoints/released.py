"""Released weights: find, read and write the authors' files (config.json and
tensors).

Weights are safetensors or PyTorch files (.pt, .pth, .ckpt, .bin). PyTorch files are
read with weights_only, so nothing in a downloaded file can run code.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, cast

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
from tqdm import tqdm

from mmtensorar.files import new_path, read_json
from mmtensorar.recipe import first_problem

WEIGHTS = "model.safetensors"
TORCH_WEIGHTS = "pytorch_model.bin"
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
WEIGHTS_SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")
SHARD_BYTES = 2 * 10**9

Sizes = TypeVar("Sizes", bound=BaseModel)  # the settings in a config.json


def locate(path: str, *, key: str, weights: bool = True) -> Path:
    """The folder or weights file of a model on this machine, downloaded from Hugging
    Face if needed.

    A folder whose only weights file has an unusual name stands for that file.

    Args:
        path: a folder or file, a Hugging Face id, or an id followed by a file name
            (OWNER/NAME/FILE), which downloads only that file.
        key: the recipe's name for the setting, for error messages.
        weights: False neither looks for weights nor downloads them.

    Raises ValueError naming key and path when nothing is there, or when several files
    could be meant.
    """
    local = Path(path)
    if not local.exists():
        local = _fetch(path, key, weights)
    if not weights or local.is_file():
        return local
    chosen = _weights_among([file.name for file in local.iterdir()], where=local, key=key)
    return local if _has_usual_name(chosen) else local / chosen


def _fetch(path: str, key: str, weights: bool) -> Path:
    """Download a file or folder of the hub, and of a folder only the files that are
    needed.
    """
    is_file = Path(path).suffix in WEIGHTS_SUFFIXES
    # Anything that cannot be a hub id was meant as a local path.
    if path.count("/") != 1 + is_file or path.startswith((".", "/", "~")):
        raise ValueError(f"{key}: no {'file' if is_file else 'folder'} {path}")
    try:
        if is_file:
            repository, name = path.rsplit("/", 1)
            return Path(hf_hub_download(repository, name))
        try:
            names = list_repo_files(path) if weights else None
        except Exception as error:  # any: without network, use what was downloaded before
            if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
                raise
            return Path(snapshot_download(path, local_files_only=True))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise _download_error(path, key, error) from None
    patterns = ["*.json", "*.jinja"]  # chat templates are in either
    if names is not None:
        chosen = _weights_among([name for name in names if "/" not in name], where=path, key=key)
        patterns.append(chosen.replace(".", "*.") if _has_usual_name(chosen) else chosen)
    try:
        return Path(snapshot_download(path, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise _download_error(path, key, error) from None


def _download_error(path: str, key: str, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(
        f"{key}: {path} is not a local path, and downloading it from the Hugging Face Hub failed: {reason}"
    )


def _has_usual_name(name: str) -> bool:
    return name in (WEIGHTS, TORCH_WEIGHTS)


def _weights_among(names: Sequence[str], *, where: Path | str, key: str) -> str:
    """model.safetensors or pytorch_model.bin, in one file or several; else the only
    weights file.
    """
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


# ---- config.json ---------------------------------------------------------------------------------


def read_config(folder: Path, *model_types: str, key: str) -> dict:
    """config.json of a folder.

    Raises ValueError when it is missing or damaged, or has a model_type that is not in
    model_types.
    """
    if folder.is_file():
        raise ValueError(f"{key}: {folder} is a file; expected a folder with config.json")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{key}: {folder} has no config.json")
    settings = read_json(folder / "config.json")
    if (model_type := settings.get("model_type")) not in model_types:
        expected = " or ".join(map(repr, model_types))
        raise ValueError(f"{folder / 'config.json'}: model_type is {model_type!r}, expected {expected}")
    return settings


def write_config(folder: Path, model_type: str, settings: Mapping[str, Any]) -> None:
    """Write config.json, for `read_config` to read."""
    content = {"model_type": model_type, **settings}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def parse_config(architecture: type[Sizes], settings: Mapping[str, Any], folder: Path) -> Sizes:
    """The settings of a folder's config.json as an architecture.

    Raises ValueError naming the first wrong one.
    """
    try:
        return architecture.model_validate(
            {key: value for key, value in settings.items() if key != "model_type"}
        )
    except ValidationError as error:
        raise ValueError(f"{folder / 'config.json'}: {first_problem(error)}") from None


def hub_config(kind: type, settings: dict[str, Any], folder: Path):
    """The settings of a config.json as a configuration of transformers.

    Raises ValueError naming the file.
    """
    try:
        return kind.from_dict(settings)
    except Exception as error:  # any: unchecked settings go through code that expects valid ones
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{folder / 'config.json'}: not a valid {kind.__name__} ({reason[:300]})") from None


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """Any error of code that builds a model of transformers becomes a sentence.

    Its settings are unchecked: an activation may be unknown, a size negative. Raises
    ValueError naming the folder's config.json.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise ValueError(
            f"{folder / 'config.json'}: no model can be built of it ({type(error).__name__}: {reason[:300]})"
        ) from None


def saved_config(architecture: type[Sizes], source: Path, model_type: str) -> Sizes | None:
    """The config.json that this package saved in a folder or next to a file, as an
    architecture.

    None when there is no config.json, or when it has another model_type: official files
    have none, or one with another meaning. Raises ValueError naming the file when it is
    not a JSON object, or a setting is wrong.
    """
    folder = source if source.is_dir() else source.parent
    if not (folder / "config.json").is_file():
        return None
    settings = read_json(folder / "config.json")
    if settings.get("model_type") != model_type:
        return None
    return parse_config(architecture, settings, folder)


# ---- tensors -------------------------------------------------------------------------------------


class ReleasedWeights:
    """The tensors of a file or folder by name.

    A value is read only when it is asked for.

    path: the file or folder. shapes: name -> shape. others: other entries of a PyTorch
    file, next to the state dict, such as steps or args.
    """

    def __init__(self, path: Path, wrappers: Sequence[str] = (), *, optional: bool = False):
        """Read the names and shapes.

        Args:
            path: a weights file, or a folder with model.safetensors or
                pytorch_model.bin, in one file or in several with an index.
            wrappers: keys of a PyTorch file that may hold the state dict; the first
                that exists is taken. Without any of them the file itself is the state
                dict.
            optional: a folder without weights, or without some files of its index,
                counts as empty.

        Raises ValueError naming a file that is missing or cannot be read.
        """
        self.path = path
        self.shapes: dict[str, list[int]] = {}
        self.others: dict[str, Any] = {}
        self._wrappers = wrappers
        self._files: dict[str, Path] = {}
        self._opened: tuple[Path, Callable[[str], Tensor]] | None = None
        for file, names in _weight_files(path, optional=optional).items():
            if file.suffix in TORCH_SUFFIXES:
                state, others = _read_torch(file, wrappers)
                self.others.update(others)
                shapes = {name: list(value.shape) for name, value in state.items()}
            else:
                with _open(file) as opened:
                    shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}
            if lost := sorted(set(names or ()) - shapes.keys()):
                raise ValueError(f"{file}: {_list_some(lost, 'missing')}, though the index names them there")
            self.shapes.update(shapes)
            self._files.update(dict.fromkeys(shapes, file))

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, value) of the named tensors, one file after another."""
        names = set(names)
        for file in sorted({self._files[name] for name in names}):
            in_file = sorted(name for name in names if self._files[name] == file)
            if file.suffix in TORCH_SUFFIXES:
                state, _ = _read_torch(file, self._wrappers)
                yield from ((name, state[name]) for name in in_file)
            else:
                with _open(file) as opened:
                    yield from ((name, opened.get_tensor(name)) for name in in_file)

    def value(self, name: str) -> Tensor:
        """One tensor.

        Its file stays open, so asking in the order of the files is fastest.
        """
        file = self._files[name]
        if self._opened is None or self._opened[0] != file:
            is_torch = file.suffix in TORCH_SUFFIXES
            get = _read_torch(file, self._wrappers)[0].__getitem__ if is_torch else _open(file).get_tensor
            self._opened = (file, get)
        return self._opened[1](name)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name]

    @property
    def files(self) -> list[Path]:
        return sorted(set(self._files.values()))


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Inside the block, new modules get their parameters on the meta device, so they
    take no memory.

    Buffers stay real, since released files may lack them.
    """
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and not param.is_meta:
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


class LazyWeights(NamedTuple):
    """A model on the meta device and the files with its values, to be copied tensor by
    tensor.

    So a model larger than the memory can be converted.
    """

    model: Any  # an nn.Module on the meta device
    source: ReleasedWeights
    rename: Callable[[str], str]  # name of a tensor of the model -> its name in source
    saved_name: Callable[[str], str]  # name of a tensor of the model -> its name in a folder we save
    ignore: Callable[[str], Any] | None = None  # see `fill`

    def check(self) -> None:
        """Raise ValueError like `fill`."""
        _match(self.model.state_dict(), self.source, self.rename, self.ignore)

    def value(self, name: str) -> Tensor:
        """A tensor of the model, by its name in the model."""
        return self.source.value(self.rename(name))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in a saved folder, value) of all tensors, one file after another."""
        saved = {self.rename(name): self.saved_name(name) for name in self.model.state_dict()}
        return ((saved[name], value) for name, value in self.source.read(saved))


@torch.no_grad()
def fill(
    state: Mapping[str, Tensor],
    source: Path | ReleasedWeights,
    rename: Callable[[str], str] = str,
    *,
    ignore: Callable[[str], Any] | None = None,
) -> None:
    """Copy released tensors into a model's state, in place.

    Tensors that state does not need are not read.

    Args:
        state: our names -> tensors that receive the values.
        source: the released weights, or their path.
        rename: our name -> the name in the files.
        ignore: whether a tensor of the files that state does not have is expected; None
            expects any.

    Raises ValueError naming the file and the tensors that are missing, unexpected or of
    another shape; state is then unchanged.
    """
    weights = source if isinstance(source, ReleasedWeights) else ReleasedWeights(source)
    targets = _match(state, weights, rename, ignore)
    for name, value in weights.read(targets):
        targets[name].copy_(value)


def _match(
    state: Mapping[str, Tensor],
    source: ReleasedWeights,
    rename: Callable[[str], str],
    ignore: Callable[[str], Any] | None,
) -> dict[str, Tensor]:
    """Names in the released files -> the tensors of state.

    Raises ValueError like `fill`.
    """
    targets = {rename(name): value for name, value in state.items()}
    problems = []
    if missing := sorted(targets.keys() - source.shapes.keys()):
        problems.append(_list_some(missing, "missing"))
    if ignore is not None:
        unexpected = sorted(name for name in source.shapes.keys() - targets.keys() if not ignore(name))
        if unexpected:
            problems.append(_list_some(unexpected, "unexpected"))
    if problems:
        raise ValueError(f"{source.path}: {'; '.join(problems)}")
    different = [
        f"{source.file(name)}: {name} has shape {source.shapes[name]}, expected {list(value.shape)}"
        for name, value in targets.items()
        if source.shapes[name] != list(value.shape)
    ]
    if different:
        more = f" (and {len(different) - 10} more)" if len(different) > 10 else ""
        raise ValueError("; ".join(different[:10]) + more)
    return targets


def weight_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values: the same weights in any file
    layout.
    """
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode() + str(list(value.shape)).encode())
        digest.update(value.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- writing -------------------------------------------------------------------------------------


def write_safetensors(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write model.safetensors, or files of SHARD_BYTES and an index.

    Only one of these files is in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: list[list[str]] = []  # names of the tensors in each file
    current: dict[str, Tensor] = {}
    total = size = 0

    def end_file() -> None:
        nonlocal current, size, total
        save_file(current, folder / f"{len(files)}.partial", {"format": "pt"})
        files.append(list(current))
        current, size, total = {}, 0, total + size

    for name, value in tensors:
        if current and size + value.nbytes > SHARD_BYTES:
            end_file()
        # A copy: in a PyTorch file several tensors may be views of one storage, which
        # safetensors refuses.
        current[name] = value.detach().clone(memory_format=torch.contiguous_format)
        size += value.nbytes
    end_file()
    if len(files) == 1:
        (folder / "0.partial").rename(folder / WEIGHTS)
        return
    file_of = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{number}.partial").rename(folder / file)
        file_of |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_torch(path: Path, content: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a new PyTorch file of state dicts, with a progress bar.

    Raises ValueError when the path exists, or does not end like a PyTorch file.
    """
    if path.suffix not in TORCH_SUFFIXES:
        raise ValueError(f"DST is {path}; expected a file that ends in {', '.join(TORCH_SUFFIXES)}")
    size = sum(value.nbytes for tensors in content.values() for value in tensors.values())
    with (
        new_path(path) as partial,
        bytes_bar(size, f"writing {path.name}") as bar,
        partial.open("wb") as file,
    ):
        torch.save(content, cast(IO[bytes], _CountingFile(file, bar)))


class _CountingFile:
    """A file that moves a progress bar. torch.save takes any object with these two
    methods.
    """

    def __init__(self, file: IO[bytes], bar: tqdm):
        self.file, self.bar = file, bar

    def write(self, content) -> int:
        self.bar.update(len(content))
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def tensors_bar(tensors: Iterable[tuple[str, Tensor]], total: int, description: str) -> tqdm:
    """The tensors, with a progress bar on stderr."""
    return tqdm(tensors, total=total, desc=description, unit="tensor", file=sys.stderr)


def bytes_bar(size: int, description: str) -> tqdm:
    """A progress bar on stderr for a number of bytes."""
    return tqdm(total=size, desc=description, unit="B", unit_scale=True, file=sys.stderr)


# ---- files ---------------------------------------------------------------------------------------


def _list_some(names: list[str], what: str) -> str:
    plural = "tensors are" if len(names) > 1 else "tensor is"
    among = "among them " if len(names) > 10 else ""
    return f"{len(names)} {plural} {what}, {among}{', '.join(names[:10])}"


def _weight_files(path: Path, *, optional: bool) -> dict[Path, list[str] | None]:
    """Weights file -> names that an index puts into it (None without an index), for a
    file or a folder.
    """
    if path.is_file():
        return {path: None}
    for name in (WEIGHTS, TORCH_WEIGHTS):
        index = path / f"{name}.index.json"
        if index.is_file():
            files = _read_index(index)
            # A download of *.json alone, for a configuration, brings the index too.
            return {} if optional and not all(file.is_file() for file in files) else {**files}
        if (path / name).is_file():
            return {path / name: None}
    if optional:
        return {}
    raise ValueError(f"{path / WEIGHTS} is missing")


def _read_index(index: Path) -> dict[Path, list[str]]:
    try:
        names = read_json(index)["weight_map"]
        files: dict[Path, list[str]] = {}
        for tensor, name in names.items():
            if Path(name).name != name:
                raise ValueError(f"{index}: names a file outside the folder, {name!r}")
            files.setdefault(index.parent / name, []).append(tensor)
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{index}: expected a weight_map of tensors to files") from None
    return files


def _open(path: Path):
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error})") from None


def refusal(error: Exception) -> str:
    """Why a file of weights could not be loaded, in 200 characters.

    PyTorch's own message fills a page, and advises to run the code in the file.
    """
    message = " ".join(str(error).split())
    if of_class := re.search(r"GLOBAL (\S+)", message):
        return f"it holds a {of_class[1]}"
    if "weights_only" in message:
        return "it is not a file that torch.save wrote"
    # PyTorch seeks before the beginning of a zip file that was cut.
    if isinstance(error, EOFError) or (isinstance(error, OSError) and error.errno == errno.EINVAL):
        return "it ends early"
    return message[:200] or type(error).__name__


def _read_torch(path: Path, wrappers: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict in a PyTorch file, and what else is in it.

    Values stay on disk until they are used.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        # Files that the authors' training saved hold its options as a Namespace, a
        # plain record.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # For a file that is not a pickle, the unpickler raises errors of many kinds.
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
        raise ValueError(f"{path}: cannot be read as PyTorch weights ({refusal(error)})") from None
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
        looked = f", and has no state dict under {', '.join(wrappers)}" if wrappers else ""
        raise ValueError(f"{path}: not a state dict: it has {', '.join(odd[:10])}{looked}")
    return content, others
