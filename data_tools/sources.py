"""Where samples come from: one generator per source.

Each yields (key, image, caption, meta). The image is a function without arguments, so that listing a source is
cheap and a worker process opens or draws the picture. A new source is a new generator here and an option of
`make_shards.py`.
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_tools import shapes
from mmtensorar.shards import decode_caption, decode_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Item(NamedTuple):
    """One sample of a source. key: unique in it. meta: what the json member will say."""

    key: str
    image: Callable[[], Image.Image]
    caption: str
    meta: dict


def open_image(path: Path) -> Image.Image:
    """A picture file as upright RGB. Raises ValueError naming the file when it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    return decode_image(content, str(path), upright=True)


def folder(root: Path) -> Iterator[Item]:
    """Every jpg, png and webp below a folder, sorted, with the caption from the .txt file of the same name.

    Raises ValueError naming the file for a missing, empty or non-UTF-8 caption, and for a folder without pictures.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    for path in _images(root, captions=True):
        caption_path = path.with_suffix(".txt")
        if not caption_path.is_file():
            raise ValueError(f"{path}: no caption; expected it in {caption_path}")
        name = path.relative_to(root).as_posix()
        meta = {"source": "folder", "name": name, "num_bytes": path.stat().st_size}
        yield Item(name, partial(open_image, path), decode_caption(caption_path.read_bytes(), str(caption_path)), meta)


def _images(root: Path, *, captions: bool = False) -> list[Path]:
    """Every jpg, png and webp below a folder, sorted; other files (but captions) are counted aloud."""
    # By parts, so that the order does not depend on the separator.
    files = sorted((p for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")), key=lambda p: p.parts)
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    expected = (*SUFFIXES, ".txt") if captions else SUFFIXES
    ignored = [path for path in files if path.suffix.lower() not in expected]
    if ignored:
        print(f"note: left out {len(ignored)} files that are not jpg, png or webp, such as {ignored[0]}", file=sys.stderr)
    if not images:
        raise ValueError(f"{root}: no {', '.join(SUFFIXES)} files in it")
    return images


def class_names(root: Path) -> tuple[str, ...]:
    """Names of a folder's sub-folders, sorted: a class's place in them is its number.

    Hidden ones are none: an editor's folder would shift every number. Raises ValueError when there is no sub-folder.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    names = tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")))
    if not names:
        raise ValueError(f"{root}: no sub-folders in it; expected one per class")
    return names


def class_folder(root: Path) -> Iterator[Item]:
    """Every jpg, png and webp below the sub-folders of a folder; the caption is the number of its class.

    Pictures beside the sub-folders are left out. Raises ValueError for a class without pictures: left out, it would
    shift the numbers of those after it, and kept, its number would never be trained.
    """
    for number, name in enumerate(class_names(root)):
        for path in _images(root / name):
            meta = {"source": "class_folder", "name": path.relative_to(root).as_posix(), "class": name}
            yield Item(meta["name"], partial(open_image, path), str(number), meta | {"num_bytes": path.stat().st_size})


def jsonl(path: Path) -> Iterator[Item]:
    """Lines `{"image": path relative to the file's folder, "caption": text}`; other fields are kept in meta.

    Raises ValueError naming file and line for a line that is not so, and for an image outside the folder.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    root = path.parent.resolve()
    lines = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error})") from error
            if not isinstance(fields, dict) or not all(isinstance(fields.get(k), str) for k in ("image", "caption")):
                raise ValueError(f'{where}: expected {{"image": relative path, "caption": text}}')
            name = fields.pop("image")
            caption = decode_caption(fields.pop("caption").encode(errors="surrogatepass"), where)
            # Resolved, so that neither `..`, an absolute path nor a link leads out of the folder.
            image = (root / name).resolve() if "\0" not in name else root
            if not image.is_relative_to(root):
                raise ValueError(f"{where}: image {name!r} lies outside {root}")
            if not image.is_file():
                raise ValueError(f"{where}: image {name!r} is not a file in {root}")
            meta = {"source": "jsonl", "name": name, "num_bytes": image.stat().st_size}
            yield Item(f"line {number}", partial(open_image, image), caption, meta | ({"fields": fields} if fields else {}))
            lines += 1
    if not lines:
        raise ValueError(f"{path}: no lines in it")


def synthesize_shapes(num_samples: int, *, seed: int, size: int) -> Iterator[Item]:
    """Scenes of the embedded world: sample `index` depends on seed and index alone. size: pixels a side."""
    for index in range(num_samples):
        scene = shapes.sample_scene(np.random.default_rng([seed, index]))
        yield Item(
            str(index), partial(_draw, seed, index, size), scene.caption, {"source": "shapes", "scene": scene.metadata}
        )


def _draw(seed: int, index: int, size: int) -> Image.Image:
    rng = np.random.default_rng([seed, index])
    return shapes.draw(shapes.sample_scene(rng), rng, size)
