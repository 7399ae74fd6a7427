"""Shard sets: tars of samples, and the manifest that describes them.

Writers (`data_tools`) and readers (`loader.py`) share this file. A sample is all
consecutive members of a tar with one key:

    {key}.jpg  RGB picture (also png, webp)          {key}.txt     caption, UTF-8
    {key}.codes.npy  uint16 [A, T, F], A crops       {key}.json    source, size, ...
    {key}.t5.npy  float16 [P, C], features of the caption

`pictures.py` and `members.py` decode the members. In a set of classes the caption is
the class number, and the manifest names the classes. `manifest.json` lists the shards
and says what is in them. It is written last, so a folder with a manifest is complete.

Shards are not trusted: nothing is unpickled, nothing is extracted to disk, sizes are
checked against bounds before they are used, and damage raises a ValueError that names
shard and key.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmtensorar.data import tars
from mmtensorar.files import atomic_path, decode, move, parse_json, remove, sha256, write_text
from mmtensorar.recipe import first_problem
from mmtensorar.words import counted

MANIFEST = "manifest.json"
IMAGE_EXTENSIONS = ("jpg", "png", "webp")
# Every extension that a sample may have, and the most bytes that such a member may
# hold.
EXTENSIONS = {
    "jpg": 2**26,
    "png": 2**26,
    "webp": 2**26,
    "txt": 2**16,
    "json": 2**20,
    "codes.npy": 2**26,
    "t5.npy": 2**26,
}
PICKLED = ("pkl", "pyd", "pth")


class Sample(NamedTuple):
    """One key of a tar.

    members: extension (everything after the first dot) -> content.
    """

    key: str
    members: dict[str, bytes]


# ---- reading a tar ---------------------------------------------------------------------------


def iterate_tar(path: Path | str) -> Iterator[Sample]:
    """Samples of one local, uncompressed tar in their order.

    Raises ValueError naming the shard, and the key if there is one, for a missing,
    damaged or truncated tar, a member that occurs twice, a key that comes back later, a
    member that is not a plain file or is too large, a path instead of a name, and an
    extension that is not in EXTENSIONS.
    """
    path = Path(path)
    with tars.TarReader(path) as file:
        for group in _sample_groups(file, path):
            group.check_unique(path)
            if group.is_complete:
                contents = {
                    extension: tars.read_content(file, member, path)
                    for extension, member in group.members.items()
                }
                yield Sample(group.key, contents)


def _sample_groups(file: tars.TarReader, path: Path) -> Iterator[tars.Group]:
    return tars.group_members(file, path, lambda member: checked_name(path, member.name, member.size))


def checked_name(path: Path, name: str, size: int) -> tuple[str, str]:
    """Split a member's name into key and extension.

    Raises ValueError unless it is a plain name with a known extension and the member is
    not too large.
    """
    if "/" in name or "\\" in name or name.startswith(".") or not name.isprintable():
        raise ValueError(
            f"{path}: member {name!r} is a path or has control characters; expected a name such as 0001.jpg"
        )
    key, _, extension = name.partition(".")
    where = f"{path}: sample {key}"
    if extension.rsplit(".", 1)[-1] in PICKLED:
        raise ValueError(
            f"{where}: member {name} is refused: reading .{extension} can run code that came with the data"
        )
    if extension not in EXTENSIONS:
        raise ValueError(f"{where}: member {name} has an unknown extension; known: {', '.join(EXTENSIONS)}")
    if size > EXTENSIONS[extension]:
        raise ValueError(
            f"{where}: member {name} has {size} bytes, more than the {EXTENSIONS[extension]} allowed"
        )
    return key, extension


def sample_starts(path: Path) -> np.ndarray:
    """Where the headers of each sample of a tar begin, and where those of the last one
    end.

    Content is not read. Returns [n + 1] int64. Raises ValueError like iterate_tar for
    everything that the headers show.
    """
    starts, damage = intact_starts(path)
    if damage is not None:
        raise damage
    return starts


def intact_starts(path: Path) -> tuple[np.ndarray, ValueError | None]:
    """Like sample_starts, but up to the first damage; also returns that damage, or
    None.

    The last sample in front of the damage may lack members.
    """
    starts: list[int] = []
    end = 0
    damage = None
    try:
        with tars.TarReader(path) as file:
            for group in _sample_groups(file, path):
                starts.append(group.start)
                end = group.end
    except (ValueError, OSError) as error:
        damage = ValueError(str(error))
    return np.array([*starts, end], np.int64), damage


def read_samples(
    path: Path, starts: np.ndarray, numbers: Iterable[int], extensions: Collection[str]
) -> Iterator[Sample]:
    """Some samples of a tar.

    Args:
        starts: From sample_starts.
        numbers: Of the samples in the tar, from 0.
        extensions: Only these members are read.
    """
    with tars.TarReader(path) as file:
        for number in numbers:
            yield read_sample(file, path, int(starts[number]), int(starts[number + 1]), extensions)


def read_sample(
    file: tars.TarReader, path: Path, start: int, stop: int, extensions: Collection[str]
) -> Sample:
    """The sample between two offsets of an open tar.

    Only members of `extensions` are read.
    """
    key = ""
    members: dict[str, bytes] = {}
    for member in tars.iterate_members(file, path, start, stop):
        key, extension = checked_name(path, member.name, member.size)
        if extension in members:
            raise ValueError(f"{path}: sample {key}: member {member.name} occurs twice")
        if extension in extensions:
            members[extension] = tars.read_content(file, member, path)
    return Sample(key, members)


# ---- manifest --------------------------------------------------------------------------------


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# Bounds pixels or codes along a side and tokens of a caption, so that a damaged
# manifest cannot make anyone reserve memory for 10**30 of them.
MAX_SIDE = 2**13
Extent = Annotated[int, Field(ge=1, le=MAX_SIDE)]


class Shard(_Record):
    """One tar.

    name: file name inside the folder. sha256: of the complete file, in hex.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+\.tar$")
    num_samples: int = Field(ge=1, le=10**9)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Codes(_Record):
    """The codes.npy members: [crops, grid h * w, factors], each code below its factor's
    size.

    image_tokenizer, weight_hash: what made them. precision: in which it computed.
    """

    image_tokenizer: str
    weight_hash: str
    grid: tuple[Extent, Extent]
    factor_sizes: tuple[Annotated[int, Field(ge=1, le=2**16)], ...] = Field(min_length=1, max_length=64)
    crops: int = Field(ge=1, le=1000)
    precision: Literal["fp32", "bf16"] = "fp32"


class TextFeatures(_Record):
    """The t5.npy members: [at most max_tokens, width].

    text_encoder, weight_hash: what made them. cleaning: how captions were cleaned
    before, see mmtensorar.captions.cleaning.Cleaning; none is the caption as written.
    """

    text_encoder: str
    weight_hash: str
    width: int = Field(ge=1, le=2**16)
    max_tokens: Extent
    cleaning: str


class Manifest(_Record):
    """What a shard folder holds.

    image_size: pixels a side. source, seed: where the samples came from. classes: names
    of the classes in the order of their numbers, when the captions are class numbers.
    made: the settings that the set was made with.
    """

    format: Literal[1] = 1
    shards: tuple[Shard, ...] = Field(min_length=1)
    num_samples: int
    image_size: Extent
    codes: Codes | None = None
    text_features: TextFeatures | None = None
    classes: tuple[str, ...] | None = None
    source: str
    seed: int
    made: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _adds_up(self) -> Manifest:
        if self.num_samples != sum(shard.num_samples for shard in self.shards):
            raise ValueError("num_samples is not the sum over the shards")
        if len({shard.name for shard in self.shards}) != len(self.shards):
            raise ValueError("two shards have the same name")
        return self

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names and contents of the shards."""
        content = json.dumps([[shard.name, shard.num_samples, shard.sha256] for shard in self.shards])
        return hashlib.sha256(content.encode()).hexdigest()

    @classmethod
    def read(cls, folder: Path | str, *, complete: bool = True) -> Manifest:
        """The manifest of a shard folder.

        Args:
            complete: Check that every shard exists. Their content is not read.

        Raises ValueError when the folder, the manifest or a shard is missing, or the
        manifest is not valid.
        """
        folder = _as_path(folder)
        path = folder / MANIFEST
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; make shards with mmtensorar shards make")
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {MANIFEST}: the shard set is incomplete or this is not a shard folder; "
                f"make it with mmtensorar shards make{_tars_of_others(folder)}"
            )
        manifest = cls.parse(path)
        for shard in manifest.shards if complete else ():
            if not (folder / shard.name).is_file():
                raise ValueError(f"{folder / shard.name}: the shard is missing, but {MANIFEST} names it")
        return manifest

    @classmethod
    def parse(cls, path: Path) -> Manifest:
        """One manifest file. Raises ValueError when it is not a valid manifest."""
        return cls.parse_bytes(path.read_bytes(), str(path))

    @classmethod
    def parse_bytes(cls, content: bytes, where: str) -> Manifest:
        """The content of a manifest file.

        Raises ValueError, starting with `where`, when it is not a valid manifest.
        """
        try:
            text = decode(content)
            value = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        version = value.get("format") if isinstance(value, dict) else None
        if version != 1:
            raise ValueError(f"{where}: format {version!r}; this version reads format 1")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ValueError(f"{where}: {first_problem(error)}") from None

    def write(self, folder: Path | str) -> None:
        """Write manifest.json into a folder, atomically."""
        write_text(_as_path(folder) / MANIFEST, self.model_dump_json(indent=1) + "\n")


def iterate_shard(folder: Path | str, shard: Shard) -> Iterator[Sample]:
    """iterate_tar on one shard of a set.

    Raises ValueError at the end unless it held as many samples as the manifest says.
    """
    path = Path(folder) / shard.name
    num_samples = 0
    for sample in iterate_tar(path):
        num_samples += 1
        yield sample
    if num_samples != shard.num_samples:
        raise ValueError(wrong_count(path, num_samples, shard))


def wrong_count(path: Path | str, num_samples: int, shard: Shard) -> str:
    """The message for a shard that holds another number of samples than its manifest
    says.
    """
    samples = counted(num_samples, "sample")
    return f"{path}: {samples}, the manifest says {shard.num_samples}; make the shard again"


def _tars_of_others(folder: Path) -> str:
    """The end of a message about a folder without a manifest: how its tars become a
    set.
    """
    has_tars = isinstance(folder, Path) and any(
        ".tar" in path.name or path.suffix == ".tgz" for path in folder.iterdir()
    )
    return f" (from its tars: mmtensorar shards make --tars {folder} --out NEW)" if has_tars else ""


def _as_path(folder: Path | str) -> Path:
    return Path(folder) if isinstance(folder, str) else folder


# ---- writing ---------------------------------------------------------------------------------


def write_tar(path: Path, samples: Iterable[Sample]) -> Shard:
    """Write a tar atomically. Equal samples give equal bytes.

    Raises ValueError for everything that iterate_tar would refuse.
    """
    num_samples = 0
    with atomic_path(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                for extension, content in sample.members.items():
                    info = tarfile.TarInfo(f"{sample.key}.{extension}")  # its mtime, uid and gid are 0
                    info.size = len(content)
                    checked_name(path, info.name, info.size)
                    tar.addfile(info, io.BytesIO(content))
                num_samples += 1
        digest = sha256(temporary)
    return Shard(name=path.name, num_samples=num_samples, sha256=digest)


class Staging:
    """A shard set that is being made.

    Its files are in a hidden folder inside the set's own folder. Until `commit` the
    folder's present set stays as it was; then the staged set replaces it as a whole.

    Args:
        folder: Of the set; on disk, or a UPath.
        purpose: Everything that the result depends on, as JSON. A later run with an
            equal purpose finds the shards that an interrupted one finished.
        clean: Remove what was staged for any other purpose.
    """

    PREFIX = ".unfinished-"

    def __init__(self, folder: Path, purpose: object, *, clean: bool = True):
        digest = hashlib.sha256(json.dumps(purpose, sort_keys=True).encode()).hexdigest()[:16]
        self.folder, self.path = folder, folder / f"{self.PREFIX}{digest}"
        for other in folder.glob(f"{self.PREFIX}*") if clean else ():
            if other != self.path:
                remove(other)
        if isinstance(folder, Path):  # object stores have no empty folders
            self.path.mkdir(parents=True, exist_ok=True)

    def record(self, shard: Shard) -> None:
        """Note that a shard is finished."""
        path = self.path / f"{shard.name}.json"
        write_text(path, shard.model_dump_json())

    def finished(self, name: str) -> Shard | None:
        """The shard of a name, if this run or an earlier one has recorded it."""
        path = self.path / f"{name}.json"
        return Shard.model_validate_json(path.read_bytes()) if path.is_file() else None

    def commit(self, manifest: Manifest) -> None:
        """Replace the folder's set by the staged shards."""
        manifest.write(self.path)
        self.recover(self.folder)

    @classmethod
    def recover(cls, folder: Path) -> None:
        """Finish a commit that was interrupted, if there is one.

        During a commit the folder has no manifest, so that a mixture of old and new
        shards is never taken for a set.
        """
        for path in folder.glob(f"{cls.PREFIX}*/{MANIFEST}"):
            staged = path.parent
            if (folder / MANIFEST).is_file():
                move(folder / MANIFEST, staged / "replaced.json")
            names = {shard.name for shard in Manifest.parse(path).shards}
            if (staged / "replaced.json").is_file():
                for shard in Manifest.parse(staged / "replaced.json").shards:
                    if shard.name not in names:
                        (folder / shard.name).unlink(missing_ok=True)
            for name in names:
                if (staged / name).is_file():
                    move(staged / name, folder / name)
            move(path, folder / MANIFEST)
            remove(staged)
