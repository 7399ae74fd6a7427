"""GenEval's folder of images: NNNNN/metadata.jsonl and NNNNN/samples/<digits>.png.

NNNNN counts prompts from 00000. The official scorer scores every image that exists.
Reading here is strict: images that are missing, surplus, or that share a number raise
an error that lists them. Pictures anywhere else in the folder are counted in a note.
"""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from PIL import Image

from mmtensorar import files
from mmtensorar.data.pictures import SUFFIXES, open_picture
from mmtensorar.folders import LeftOut, walk
from mmtensorar.picture_folder import is_revisions

STRIP = "a strip of revisions, of generate --trace"
RECORD = "generation.json"  # the model and settings that made the images; see harness.py


def image_path(folder: Path, prompt_index: int, image_index: int) -> Path:
    return folder / f"{prompt_index:05d}" / "samples" / f"{image_index:05d}.png"


def survey(
    folder: Path, *, num_prompts: int | None = None, num_images: int | None = None
) -> tuple[list[list[Path]], list[str]]:
    """The files of each prompt's images, in order; and a sentence for each missing or
    surplus one.

    Args:
        folder: the folder.
        num_prompts: how many prompts there must be; None takes the most that exist.
        num_images: how many images of each prompt there must be; None takes the most
            that exist.

    Raises ValueError when there is no image at all.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    problems: list[str] = []
    folders = _by_number(folder, (path for path in folder.iterdir() if path.is_dir()), problems)
    images = {
        prompt: _by_number(folder, (path / "samples").glob("*.png"), problems)
        for prompt, path in folders.items()
    }
    _note_others(folder, {path for numbered in images.values() for path in numbered.values()})
    if not any(images.values()):
        raise ValueError(f"{folder} holds no images; expected {image_path(Path(), 0, 0)}")
    if num_prompts is None:
        num_prompts = max(images) + 1
    if num_images is None:
        num_images = max(max(numbered, default=-1) for numbered in images.values()) + 1
    for prompt in range(num_prompts):
        if prompt not in images:
            problems.append(f"{prompt:05d} is missing, the folder of prompt {prompt} of {num_prompts}")
            continue
        missing = [number for number in range(num_images) if number not in images[prompt]]
        problems += [f"{image_path(Path(), prompt, number)} is missing" for number in missing]
    for prompt, numbered in images.items():
        problems += [
            f"{path.relative_to(folder)} is one too many"
            for number, path in numbered.items()
            if prompt >= num_prompts or number >= num_images
        ]
    wanted = {
        prompt: {number: path for number, path in images[prompt].items() if number < num_images}
        for prompt in sorted(images)
        if prompt < num_prompts
    }
    ordered = [[numbered[number] for number in sorted(numbered)] for numbered in wanted.values() if numbered]
    return ordered, problems


def no_picture(path: Path) -> str | None:
    """What a file is that has a picture's name and is none of a model; None when it is
    one.
    """
    if is_revisions(path):
        return STRIP
    if path.name == "grid.png" and (path.parent / "samples").is_dir():
        return "GenEval's grid of the pictures in samples/"
    return None


def _note_others(folder: Path, images: Collection[Path]) -> None:
    """Print a note about pictures that do not have the name of an image of the
    layout.
    """
    left_out = LeftOut(folder)
    for path in walk(folder, left_out):
        if path.suffix.lower() in SUFFIXES and path not in images:
            left_out.add(STRIP if is_revisions(path) else "not NNNNN/samples/NNNNN.png", path)
    left_out.print()


def _by_number(folder: Path, paths: Iterable[Path], problems: list[str]) -> dict[int, Path]:
    """Number -> path, of the paths whose name is a number; adds a problem for a number
    that two have.
    """
    numbered: dict[int, Path] = {}
    for path in sorted(filter(_has_number, paths)):
        if int(path.stem) in numbered:
            problems.append(f"{path.relative_to(folder)} has the number of {numbered[int(path.stem)].name}")
        numbered.setdefault(int(path.stem), path)
    return numbered


def _has_number(path: Path) -> bool:
    return path.stem.isascii() and path.stem.isdecimal()


def image_files(
    folder: Path, *, num_prompts: int | None = None, num_images: int | None = None
) -> list[list[Path]]:
    """The files of `survey`. Raises ValueError listing its problems."""
    images, problems = survey(folder, num_prompts=num_prompts, num_images=num_images)
    if problems:
        raise ValueError(listed(folder, problems))
    return images


def listed(folder: Path, problems: Sequence[str]) -> str:
    """A folder's problems in one sentence: the first ten, and the number of the
    others.
    """
    more = f", and {len(problems) - 10} more" if len(problems) > 10 else ""
    return f"{folder}: {', '.join(problems[:10])}{more}"


def open_image(path: Path) -> Image.Image:
    """An image in RGB, as all commands see it.

    Raises ValueError naming the file when it is unreadable.
    """
    return open_picture(path)


def read_record(folder: Path) -> dict:
    """generation.json of a folder of images; empty when there is none."""
    return files.read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
