"""Shards: tars of samples beside a manifest. Writers (`data_tools`) and readers (`data.py`) share this file.

A sample is every consecutive member of a tar with one key:

    {key}.jpg  RGB as collected (also png, webp)     {key}.txt  caption, UTF-8     {key}.json  source, size, ...
    {key}.codes.npy  uint16 [A, T, F], A crops       {key}.t5.npy  float16 [P, C], features of the caption

In a set of classes the caption is the class's number; the manifest says which name has which number.
`manifest.json` names the shards and says what is in them. It is written last, so a folder with a manifest is
complete. What is read here may come from anywhere: nothing is unpickled, nothing is extracted to disk, sizes are
bounded before they are believed, and damage is a ValueError that names shard and key.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import tarfile
import warnings
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmtensorar.data import tars
from mmtensorar.files import atomic_path, move, remove, sha256, write_text

MANIFEST = "manifest.json"
IMAGE_EXTENSIONS = ("jpg", "png", "webp")
# Every extension a sample may have, and the most bytes such a member may hold.
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
MAX_PIXELS = 89_000_000  # just under the number at which Pillow starts to warn

# Pillow remarks on damaged metadata, one line a picture; the pixels, and errors, are not affected.
warnings.filterwarnings("ignore", module=r"PIL\.")


# EXIF orientation -> what makes it upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Sample(NamedTuple):
    """One key of a tar. members: extension (everything after the first dot) -> content."""

    key: str
    members: dict[str, bytes]


# ---- reading a tar ---------------------------------------------------------------------------


def iterate_tar(path: Path | str) -> Iterator[Sample]:
    """Samples of one local, uncompressed tar in their order.

    Raises ValueError naming the shard, and the key where there is one, for a missing, damaged or cut tar, a
    member twice, a key that comes back later, a member that is not a plain file or is too large, a path instead
    of a name, and an extension that is not in EXTENSIONS.
    """
    path = Path(path)
    sample: Sample | None = None
    seen: set[str] = set()
    with tars.opened(path) as file:
        for member in tars.members(file, path):
            key, extension = checked_name(path, member.name, member.size)
            if sample is None or key != sample.key:
                if sample is not None:
                    yield sample
                if key in seen:
                    raise ValueError(
                        f"{path}: sample {key}: its members are not together: {member.name} comes after another key"
                    )
                seen.add(key)
                sample = Sample(key, {})
            if extension in sample.members:
                raise ValueError(f"{path}: sample {key}: member {member.name} is there twice")
            sample.members[extension] = tars.content(file, member, path)
    if sample is not None:
        yield sample


def checked_name(path: Path, name: str, size: int) -> tuple[str, str]:
    """Key and extension of a member. Raises ValueError unless it is a plain name of a known kind, and of bounded size."""
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
    """[n + 1] int64: where the headers of each sample of a tar begin, then where those of the last one end.

    Raises ValueError like iterate_tar, for what headers tell. Content is not read.
    """
    starts, damage = whole_starts(path)
    if damage is not None:
        raise damage
    return starts


def whole_starts(path: Path) -> tuple[np.ndarray, ValueError | None]:
    """sample_starts as far as the first damage, and what that is. The last sample before it may lack members."""
    starts: list[int] = []
    seen: set[str] = set()
    last, damage = None, None
    end = 0
    try:
        with tars.opened(path) as file:
            for place, member in tars.placed(file, path):
                key, _ = checked_name(path, member.name, member.size)
                if key != last:
                    if key in seen:
                        raise ValueError(
                            f"{path}: sample {key}: its members are not together: {member.name} comes after another key"
                        )
                    seen.add(key)
                    last = key
                    starts.append(place)
                end = member.end
    except (ValueError, OSError) as error:
        damage = ValueError(str(error))
    return np.array([*starts, end], np.int64), damage


def read_samples(
    path: Path, starts: np.ndarray, numbers: Iterable[int], extensions: Collection[str]
) -> Iterator[Sample]:
    """Some samples of a tar, by their numbers in it; only members of the given extensions are read. starts: of sample_starts."""
    with tars.opened(path) as file:
        for number in numbers:
            yield read_sample(file, path, int(starts[number]), int(starts[number + 1]), extensions)


def read_sample(file: tars.opened, path: Path, start: int, stop: int, extensions: Collection[str]) -> Sample:
    """The sample between two places of an open tar."""
    key, found = "", {}
    for member in tars.members(file, path, start, stop):
        key, extension = checked_name(path, member.name, member.size)
        if extension in found:
            raise ValueError(f"{path}: sample {key}: member {member.name} is there twice")
        if extension in extensions:
            found[extension] = tars.content(file, member, path)
    return Sample(key, found)


# ---- members ---------------------------------------------------------------------------------


def image_member(sample: Sample, where: str) -> bytes:
    """The sample's picture, still encoded. Raises ValueError unless there is exactly one."""
    found = [name for name in IMAGE_EXTENSIONS if name in sample.members]
    if len(found) != 1:
        raise ValueError(
            f"{where}: expected one of {', '.join(IMAGE_EXTENSIONS)}, found {', '.join(found) or 'none'}"
        )
    return sample.members[found[0]]


def decode_image(content: bytes, where: str, *, upright: bool = False) -> Image.Image:
    """A picture as RGB; upright turns it as its EXIF orientation says. Transparent parts are laid on white.

    Raises ValueError, starting with `where`, for anything but a whole JPEG, PNG or WEBP of at most MAX_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG", "PNG", "WEBP"]) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:  # from the header: nothing is decoded yet
                raise ValueError(f"{width}x{height} pixels, more than the {MAX_PIXELS} allowed")
            image.load()
            if upright and (turn := TURNS.get(orientation(image))) is not None:
                image = image.transpose(turn)
            if image.mode.startswith("I;16"):  # Pillow's own way would cut off at 255 all that is brighter
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError(f"grey levels of 32 bits (mode {image.mode}); expected 8 or 16")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                ground = Image.new("RGBA", image.size, "white")
                return Image.alpha_composite(ground, image).convert("RGB")
            return image if image.mode == "RGB" else image.convert("RGB")  # which would copy
    except MemoryError:
        raise ValueError(f"{where}: unreadable image (more than fits into memory)") from None
    # Pillow reports damage in many ways, by format.
    except Exception as error:
        reason = "not a JPEG, PNG or WEBP" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{where}: unreadable image ({reason})") from error


def orientation(image: Image.Image) -> int:
    """The EXIF tag of how a camera was held, 1 (upright) where there is none or it cannot be read."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # the rest of the picture is of worth all the same
        return 1


def picture(sample: Sample, where: str, image_size: int) -> Image.Image:
    """The sample's picture as RGB. Raises ValueError when it is damaged, or not the size that the manifest says."""
    image = decode_image(image_member(sample, where), where)
    if image.size != (image_size, image_size):
        said = f"the manifest says {image_size}x{image_size}"
        raise ValueError(f"{where}: the image is {image.width}x{image.height}; {said}")
    return image


def square(image: Image.Image, image_size: int, place: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """The centre of a picture, its shorter side resized to image_size: halved while it is twice as long, then bicubic.

    So the pictures of ADM's and LlamaGen's training were made (center_crop_arr). Upscaled where it must be. place: how much of
    what is cut off is cut at the left and at the top.
    """
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if max(image.size) > 8 * min(image.size):
        # Scaled as a whole, a line of 1 x 60,000 pixels would take gigabytes: what is cut off anyway goes first.
        short = min(image.size)
        left, top = (
            int((side - min(side, 4 * short)) * share) for side, share in zip(image.size, place, strict=True)
        )
        image = image.crop(
            (left, top, left + min(image.width, 4 * short), top + min(image.height, 4 * short))
        )
    scale = image_size / min(image.size)
    width, height = (max(image_size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = int((width - image_size) * place[0]), int((height - image_size) * place[1])
    return image.crop((left, top, left + image_size, top + image_size))


def decode_caption(content: bytes, where: str) -> str:
    """Caption without surrounding white space. Raises ValueError when it is not UTF-8, too long or empty."""
    if len(content) > EXTENSIONS["txt"]:
        raise ValueError(
            f"{where}: the caption has {len(content)} bytes, more than the {EXTENSIONS['txt']} allowed"
        )
    try:
        caption = content.removeprefix(codecs.BOM_UTF8).decode().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: the caption is not UTF-8 (byte {error.start})") from error
    if not caption:
        raise ValueError(f"{where}: the caption is empty")
    return caption


def encode_codes(codes: np.ndarray) -> bytes:
    """codes: [A, T, F] uint16 -> content of a codes.npy member."""
    assert codes.dtype == np.uint16 and codes.ndim == 3
    return _encode_array(codes)


def encode_features(features: np.ndarray) -> bytes:
    """features: [P, C] float16 -> content of a t5.npy member."""
    assert features.dtype == np.float16 and features.ndim == 2
    return _encode_array(features)


def _encode_array(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _decode_array(content: bytes, where: str, dtype: type, letters: str) -> np.ndarray:
    """where: names the member too. letters: its axes. Raises ValueError for anything else, objects included."""
    try:
        # What np.load does for this format; np.load itself would also open zip archives.
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except MemoryError:
        raise ValueError(f"{where} announces more than fits into memory") from None
    # What numpy and its parser raise for a hostile header is of many kinds, and of no use to tell apart.
    except Exception as error:
        raise ValueError(
            f"{where} is not a plain numpy array ({' '.join(str(error).split())[:200]})"
        ) from error
    if array.dtype != dtype or array.ndim != len(letters):
        expected = f"{np.dtype(dtype)} [{', '.join(letters)}]"
        raise ValueError(f"{where} holds {array.dtype} {list(array.shape)}; expected {expected}")
    return array


def decode_codes(content: bytes, where: str) -> np.ndarray:
    """Content of a codes.npy member -> [A, T, F] uint16. Raises ValueError for anything else."""
    return _decode_array(content, f"{where}: codes.npy", np.uint16, "ATF")


def decode_features(content: bytes, where: str) -> np.ndarray:
    """Content of a t5.npy member -> [P, C] float16. Raises ValueError for anything else."""
    return _decode_array(content, f"{where}: t5.npy", np.float16, "PC")


def check_codes(codes: np.ndarray, expected: Codes, where: str) -> None:
    """Raise ValueError unless codes [A, T, F] have the shape and range that the manifest announces."""
    shape = (expected.crops, expected.grid[0] * expected.grid[1], len(expected.factor_sizes))
    if codes.shape != shape:
        raise ValueError(f"{where}: codes.npy has shape {list(codes.shape)}, the manifest says {list(shape)}")
    for factor, size in enumerate(expected.factor_sizes):
        largest = int(codes[..., factor].max())
        if largest >= size:
            raise ValueError(f"{where}: codes.npy holds code {largest}, but factor {factor} has {size} codes")


def check_features(features: np.ndarray, expected: TextFeatures, where: str) -> None:
    """Raise ValueError unless features [P, C] are as wide and at most as long as the manifest says, and finite."""
    tokens, width = features.shape
    if width != expected.width or not 1 <= tokens <= expected.max_tokens:
        said = f"the manifest says [1 to {expected.max_tokens}, {expected.width}]"
        raise ValueError(f"{where}: t5.npy has shape {[tokens, width]}, {said}")
    if not np.isfinite(features).all():
        raise ValueError(f"{where}: t5.npy holds numbers that are not finite")


# ---- manifest --------------------------------------------------------------------------------


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# Pixels or codes along a side, tokens of a caption: a damaged manifest must not make anyone reserve memory for 10**30.
MAX_SIDE = 2**13
Extent = Annotated[int, Field(ge=1, le=MAX_SIDE)]


class Shard(_Record):
    """One tar. name: file name inside the folder. sha256: of the whole file, in hex."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+\.tar$")
    num_samples: int = Field(ge=1, le=10**9)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Codes(_Record):
    """What the codes.npy members are: of which image tokenizer, [crops, grid h*w, factors], each below its size.

    precision: in which the image tokenizer computed.
    """

    image_tokenizer: str
    weight_hash: str
    grid: tuple[Extent, Extent]
    factor_sizes: tuple[Annotated[int, Field(ge=1, le=2**16)], ...] = Field(min_length=1, max_length=64)
    crops: int = Field(ge=1, le=1000)
    precision: Literal["fp32", "bf16"] = "fp32"


class TextFeatures(_Record):
    """What the t5.npy members are: of which text encoder, [at most max_tokens, width], of captions cleaned how.

    cleaning: see mmtensorar.captions.encoders.Cleaning; none is the caption as written.
    """

    text_encoder: str
    weight_hash: str
    width: int = Field(ge=1, le=2**16)
    max_tokens: Extent
    cleaning: str


class Manifest(_Record):
    """What a shard folder holds. image_size: pixels a side. source, seed: where the samples came from.

    classes: the names of the classes, in the order of their numbers, when the captions are class numbers. made: the settings
    that it was made with.
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
        """sha256 over the shards' names and contents: two sets with one fingerprint feed a run alike."""
        content = json.dumps([[shard.name, shard.num_samples, shard.sha256] for shard in self.shards])
        return hashlib.sha256(content.encode()).hexdigest()

    @classmethod
    def read(cls, folder: Path | str, *, complete: bool = True) -> Manifest:
        """The manifest of a shard folder, whose shards are all there, if it is to be complete (their content is not read).

        Raises ValueError when the folder, the manifest or a shard is missing, or the manifest is not valid.
        """
        folder = _place(folder)
        path = folder / MANIFEST
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; make shards with data_tools/make_shards.py")
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {MANIFEST}: the shard set is incomplete or this is not a shard folder; "
                "make it with data_tools/make_shards.py"
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
        """The content of a manifest file. Raises ValueError, starting with `where`, when it is not a valid manifest."""
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error})") from error
        version = found.get("format") if isinstance(found, dict) else None
        if version != 1:
            raise ValueError(f"{where}: format {version!r}; this version reads format 1")
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise ValueError(
                f"{where}: {key}: {first['msg']}" if key else f"{where}: {first['msg']}"
            ) from error

    def write(self, folder: Path | str) -> None:
        path = _place(folder) / MANIFEST
        write_text(path, self.model_dump_json(indent=1) + "\n")


def iterate_shard(folder: Path | str, shard: Shard) -> Iterator[Sample]:
    """iterate_tar on one shard of a set; at the end a ValueError unless it held as many samples as the manifest says."""
    path = Path(folder) / shard.name
    num_samples = 0
    for num_samples, sample in enumerate(iterate_tar(path), 1):
        yield sample
    if num_samples != shard.num_samples:
        raise ValueError(
            f"{path}: {num_samples} samples, the manifest says {shard.num_samples}; make the shard again"
        )


# ---- writing ---------------------------------------------------------------------------------


def _place(folder: Path | str) -> Path:
    return Path(folder) if isinstance(folder, str) else folder


def write_tar(path: Path, samples: Iterable[Sample]) -> Shard:
    """Write samples under a temporary name, then rename. Equal samples give equal bytes.

    What iterate_tar would refuse is refused here too (ValueError).
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
    """A shard set in the making: a folder inside the set's own, which replaces the set when all is there.

    folder: on the disk, or a UPath.
    purpose: everything the result depends on. A later run with the same purpose finds the shards that an
    interrupted one finished; staged files of any other purpose are removed, if clean. Until `commit`, the set in the folder
    stays as it was.
    """

    PREFIX = ".unfinished-"

    def __init__(self, folder: Path, purpose: object, *, clean: bool = True):
        digest = hashlib.sha256(json.dumps(purpose, sort_keys=True).encode()).hexdigest()[:16]
        self.folder, self.path = folder, folder / f"{self.PREFIX}{digest}"
        for other in folder.glob(f"{self.PREFIX}*") if clean else ():
            if other != self.path:
                remove(other)
        if isinstance(folder, Path):  # object stores have files only
            self.path.mkdir(parents=True, exist_ok=True)

    def record(self, shard: Shard) -> None:
        """Note that a shard is there, whole, under its name."""
        path = self.path / f"{shard.name}.json"
        write_text(path, shard.model_dump_json())

    def finished(self, name: str) -> Shard | None:
        """A shard that was recorded, by this run or one before it."""
        path = self.path / f"{name}.json"
        return Shard.model_validate_json(path.read_bytes()) if path.is_file() else None

    def commit(self, manifest: Manifest) -> None:
        """Put the staged shards in place of the folder's set."""
        manifest.write(self.path)
        self.recover(self.folder)

    @classmethod
    def recover(cls, folder: Path) -> None:
        """Finish a commit that was cut off, if there is one.

        In between the folder has no manifest: old and new shards are never taken for one set.
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
