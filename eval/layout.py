"""GenEval's folder of images: NNNNN/metadata.jsonl and NNNNN/samples/<digits>.png, NNNNN counting prompts from 00000.

Unlike the official scorer, which scores what it finds, reading is strict: what is missing, there twice or too many is an
error that lists it.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageOps

from mmtensorar import files

RECORD = "generation.json"  # which checkpoint and settings the images come from; see run.py


def image_path(folder: Path, prompt_index: int, image_index: int) -> Path:
    return folder / f"{prompt_index:05d}" / "samples" / f"{image_index:05d}.png"


def survey(
    folder: Path, *, num_prompts: int | None = None, num_images: int | None = None
) -> tuple[list[list[Path]], list[str]]:
    """Per prompt its images' files, those of one prompt in order; and what is missing, there twice or too many, in words.

    num_prompts, num_images (per prompt): how many there must be; None takes the most that are there. Raises ValueError
    when there is no image at all.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    problems: list[str] = []
    folders = _numbered(folder, (path for path in folder.iterdir() if path.is_dir()), problems)
    found = {
        index: _numbered(folder, (path / "samples").glob("*.png"), problems)
        for index, path in folders.items()
    }
    if not any(found.values()):
        raise ValueError(f"{folder} holds no images; expected {image_path(Path(), 0, 0)}")
    if num_prompts is None:
        num_prompts = max(found) + 1
    if num_images is None:
        num_images = max(max(images, default=-1) for images in found.values()) + 1
    for index in range(num_prompts):
        if index not in found:
            problems.append(f"{index:05d} is missing, the folder of prompt {index} of {num_prompts}")
            continue
        absent = [i for i in range(num_images) if i not in found[index]]
        problems += [f"{image_path(Path(), index, i)} is missing" for i in absent]
    for index, images in found.items():
        problems += [
            f"{p.relative_to(folder)} is one too many"
            for i, p in images.items()
            if index >= num_prompts or i >= num_images
        ]
    wanted = {
        index: {i: p for i, p in found[index].items() if i < num_images}
        for index in sorted(found)
        if index < num_prompts
    }
    return [[images[i] for i in sorted(images)] for images in wanted.values() if images], problems


def _numbered(folder: Path, paths: Iterable[Path], problems: list[str]) -> dict[int, Path]:
    """Number -> path of those that are called by one; a number that two are called by is a problem."""
    found: dict[int, Path] = {}
    for path in sorted(path for path in paths if path.stem.isascii() and path.stem.isdecimal()):
        if int(path.stem) in found:
            problems.append(f"{path.relative_to(folder)} has the number of {found[int(path.stem)].name}")
        found.setdefault(int(path.stem), path)
    return found


def image_files(
    folder: Path, *, num_prompts: int | None = None, num_images: int | None = None
) -> list[list[Path]]:
    """The files of `survey`. Raises ValueError listing its problems."""
    files, problems = survey(folder, num_prompts=num_prompts, num_images=num_images)
    if problems:
        raise ValueError(listed(folder, problems))
    return files


def listed(folder: Path, problems: Sequence[str]) -> str:
    """A folder's problems in one sentence, the first ten in words."""
    more = f", and {len(problems) - 10} more" if len(problems) > 10 else ""
    return f"{folder}: {', '.join(problems[:10])}{more}"


def open_image(path: Path) -> Image.Image:
    """An image in RGB, turned as its EXIF says. Raises ValueError, naming the file, when it cannot be read."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    # Pillow raises SyntaxError for some broken PNG files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from None


def read_record(folder: Path) -> dict:
    """generation.json of a folder of images; empty when there is none."""
    return files.read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
