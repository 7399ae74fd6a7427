"""Pictures for FID: a folder, or an .npz as ADM's evaluator takes them.

They are read a batch at a time.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eval import layout
from mmtensorar.data.pictures import SUFFIXES
from mmtensorar.folders import LeftOut, walk
from mmtensorar.picture_folder import in_order

PICTURES = "arr_0"
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # of pool and spatial features, in ADM's reference files
WIDTHS = {"pool": 2048, "spatial": 2023}
MAX_SIDE = 4096
# All that numpy and zipfile raise for a file that is damaged, encrypted or not an .npz.
DAMAGE = (OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class Pictures(NamedTuple):
    """A named set of num pictures.

    batches: batch size -> arrays [B, H, W, 3] uint8, in order.
    """

    name: str
    num: int
    batches: Callable[[int], Iterator[np.ndarray]]


def find(path: Path, *, num_prompts: int | None = None, num_images: int | None = None) -> Pictures:
    """The pictures of a folder or an .npz file.

    A folder in the layout of eval/layout.py gives the first picture of every prompt,
    then the second of every prompt, and so on: in the order of the files, each split of
    the Inception score would hold few classes. Any other folder is read in the order of
    file names (and of the numbers that `generate` gives), subfolders included; what is
    not read is counted in a note.

    Args:
        path: folder or file.
        num_prompts, num_images: of a folder in that layout; None: as its
            generation.json says.

    Raises ValueError when there are no pictures, or some are missing.
    """
    if path.suffix == ".npz":
        return _archive(path)
    if not path.is_dir():
        raise ValueError(f"{path} is neither a folder nor an .npz file")
    if (path / layout.RECORD).is_file() or num_prompts is not None:
        prompts = layout.image_files(path, num_prompts=num_prompts, num_images=num_images)
        files = [images[number] for number in range(len(prompts[0])) for images in prompts]
    else:
        files = _pictures_below(path)
    if not files:
        raise ValueError(f"{path} holds no pictures ({', '.join(SUFFIXES)})")
    return Pictures(str(path), len(files), lambda size: _read_files(files, size))


def _pictures_below(folder: Path) -> list[Path]:
    left_out = LeftOut(folder)
    files = []
    for file in walk(folder, left_out):
        if file.suffix.lower() not in SUFFIXES:
            left_out.add("not a picture", file)
        elif kind := layout.no_picture(file):
            left_out.add(kind, file)
        else:
            files.append(file)
    left_out.print()
    return sorted(files, key=in_order)


def _read_files(files: Sequence[Path], size: int) -> Iterator[np.ndarray]:
    first = None
    for start in range(0, len(files), size):
        batch = []
        for file in files[start : start + size]:
            image = layout.open_image(file)
            first = first or image.size
            if image.size != first:
                sides = " and ".join(f"{width}x{height}" for width, height in (first, image.size))
                raise ValueError(f"{file}: pictures of {sides} in one folder; expected one size")
            batch.append(np.asarray(image))
        yield np.stack(batch)


def _archive(path: Path) -> Pictures:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{PICTURES}.npy") as file:
            shape = _header(file, path)
            left_out = LeftOut(path)
            for name in archive.namelist():
                if Path(name).stem not in (PICTURES, *STATISTICS):
                    left_out.add(f"pictures are read from {PICTURES} only", Path(name))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except DAMAGE as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: not an .npz with an array {PICTURES} ({error})") from None
    left_out.print()
    return Pictures(str(path), shape[0], lambda size: _read_archive(path, size))


def _read_archive(path: Path, size: int) -> Iterator[np.ndarray]:
    with zipfile.ZipFile(path) as archive, archive.open(f"{PICTURES}.npy") as file:
        num, *sides = _header(file, path)
        for start in range(0, num, size):
            shape = (min(size, num - start), *sides)
            try:
                content = file.read(int(np.prod(shape)))
            except DAMAGE as error:
                raise ValueError(f"{path}: damaged after {start} pictures ({error})") from None
            if len(content) < np.prod(shape):
                raise ValueError(
                    f"{path}: ends within picture {start + len(content) // int(np.prod(sides))} of {num}"
                )
            yield np.frombuffer(content, np.uint8).reshape(shape)


def _header(file, path: Path) -> tuple[int, int, int, int]:
    """Read a .npy header; returns the shape.

    Raises ValueError unless pictures follow.
    """
    formats = np.lib.format
    try:
        version = formats.read_magic(file)
        read = formats.read_array_header_1_0 if version == (1, 0) else formats.read_array_header_2_0
        shape, by_columns, dtype = read(file)
    except DAMAGE as error:
        raise ValueError(f"{path}: {PICTURES} is damaged ({error})") from None
    fits = dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and not by_columns
    if not fits or not all(0 < side <= MAX_SIDE for side in shape[1:3]) or shape[0] < 1:
        raise ValueError(f"{path}: {PICTURES} is {dtype} of shape {list(shape)}; expected uint8 [N, H, W, 3]")
    return shape


def reference_statistics(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Kind of features, pool or spatial -> mean [C] and covariance [C, C] in an ADM
    reference file, if any.

    They describe the whole training set, of which the file's pictures are 10,000.
    Raises ValueError for damage, for widths other than Inception's, and for numbers
    that are not finite.
    """
    if path.suffix != ".npz":
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in STATISTICS if name in file.files}
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except DAMAGE as error:
        raise ValueError(f"{path}: not an .npz of arrays ({error})") from None
    statistics = {}
    for kind, (mean, covariance) in {"pool": STATISTICS[:2], "spatial": STATISTICS[2:]}.items():
        if mean in arrays and covariance in arrays:
            width = (WIDTHS[kind],)
            if arrays[mean].shape != width or arrays[covariance].shape != width * 2:
                shapes = f"{list(arrays[mean].shape)} and {list(arrays[covariance].shape)}"
                raise ValueError(
                    f"{path}: {mean} and {covariance} are of shapes {shapes}; "
                    f"expected {list(width)} and {list(width * 2)}"
                )
            for name in (mean, covariance):
                if arrays[name].dtype.kind != "f" or not np.isfinite(arrays[name]).all():
                    raise ValueError(
                        f"{path}: {name} is {arrays[name].dtype}, or not finite; expected finite floats"
                    )
            statistics[kind] = arrays[mean], arrays[covariance]
        elif alone := [name for name in (mean, covariance) if name in arrays]:
            raise ValueError(f"{path}: has {alone[0]} alone; expected {mean} and {covariance}, or neither")
    return statistics
