"""GenEval's folder of images: NNNNN/metadata.jsonl and NNNNN/samples/<digits>.png.

NNNNN counts prompts from 00000. The official scorer scores every image that exists.
Reading here is strict: images that are missing, surplus, or that share a number raise
an error that lists them. Pictures anywhere else in the folder are counted in a note.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from mmtensorar import files
from mmtensorar.data.pictures import SUFFIXES, open_picture
from mmtensorar.folders import LeftOut, shown, walk
from mmtensorar.picture_folder import is_revisions
from mmtensorar.words import counted

STRIP = "a strip of revisions, of generate --trace"
RECORD = "generation.json"  # the model and settings that made the images; see harness.py
MAX_NAMED = 10_000  # missing prompts and images that get a sentence each
MAX_LISTED = 10  # sentences in one message


class Problem(str):
    """A sentence on what keeps pictures from being a whole set.

    kind: what it is, a noun to count, such as "missing image".
    number: how many the sentence is about.
    """

    kind: str
    number: int

    def __new__(cls, kind: str, sentence: str, number: int = 1) -> Problem:
        problem = super().__new__(cls, sentence)
        problem.kind, problem.number = kind, number
        return problem


def image_path(folder: Path, prompt_index: int, image_index: int) -> Path:
    return folder / f"{prompt_index:05d}" / "samples" / f"{image_index:05d}.png"


def survey(
    folder: Path, *, num_prompts: int | None = None, num_images: int | None = None
) -> tuple[list[list[Path]], list[Problem]]:
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
    problems: list[Problem] = []
    folders = _by_number(folder, (path for path in folder.iterdir() if path.is_dir()), problems)
    images = {
        prompt: _by_number(folder, (path / "samples").glob("*.png"), problems)
        for prompt, path in folders.items()
    }
    _note_others(folder)
    if not any(images.values()):
        raise ValueError(f"{folder} holds no images; expected {image_path(Path(), 0, 0)}")
    if num_prompts is None:
        num_prompts = max(images) + 1
    if num_images is None:
        num_images = max(max(numbered, default=-1) for numbered in images.values()) + 1
    _add_missing(images, num_prompts, num_images, problems)
    for prompt, numbered in images.items():
        problems += [
            Problem("surplus image", f"{path.relative_to(folder)} is one too many")
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


def _add_missing(
    images: Mapping[int, Collection[int]], num_prompts: int, num_images: int, problems: list[Problem]
) -> None:
    """Add a sentence for each missing prompt and image, and for each gap when they are
    more than MAX_NAMED.

    A stray number, such as a date, may leave a gap of millions.
    """
    for first, last in _gaps(images, num_prompts):
        if last - first < MAX_NAMED - len(problems):
            problems += [
                Problem(
                    "missing prompt",
                    f"{prompt:05d} is missing, the folder of prompt {prompt} of {num_prompts}",
                )
                for prompt in range(first, last + 1)
            ]
        else:
            number = last - first + 1
            sentence = f"{first:05d} to {last:05d} are missing, the folders of {number} prompts"
            problems.append(Problem("missing prompt", sentence, number))
    for prompt in sorted(prompt for prompt in images if prompt < num_prompts):
        for first, last in _gaps(images[prompt], num_images):
            if last - first < MAX_NAMED - len(problems):
                paths = (image_path(Path(), prompt, number) for number in range(first, last + 1))
                problems += [Problem("missing image", f"{path} is missing") for path in paths]
            else:
                path, number = image_path(Path(), prompt, first), last - first + 1
                sentence = f"{path} to {last:05d}.png are missing, {number} images"
                problems.append(Problem("missing image", sentence, number))


def _gaps(numbers: Iterable[int], end: int) -> Iterator[tuple[int, int]]:
    """First and last number of each gap between the numbers, from 0 to before end."""
    first = 0
    for number in [*sorted(number for number in numbers if number < end), end]:
        if number > first:
            yield first, number - 1
        first = number + 1


def no_picture(path: Path) -> str | None:
    """What a file is, when it has a picture's name but a model did not generate it.

    None when it is a generated picture.
    """
    if is_revisions(path):
        return STRIP
    if path.name == "grid.png" and (path.parent / "samples").is_dir():
        return "GenEval's grid of the pictures in samples/"
    return None


def _note_others(folder: Path) -> None:
    """Print a note about pictures that do not have the name of an image of the
    layout.
    """
    left_out = LeftOut(folder)
    for path in walk(folder, left_out):
        if path.suffix.lower() in SUFFIXES and not _is_in_layout(path.relative_to(folder)):
            left_out.add(STRIP if is_revisions(path) else "not NNNNN/samples/NNNNN.png", path)
    left_out.print()


def _is_in_layout(path: Path) -> bool:
    return (
        len(path.parts) == 3
        and _has_number(Path(path.parts[0]))
        and path.parts[1] == "samples"
        and path.suffix == ".png"
        and _has_number(path)
    )


def _by_number(folder: Path, paths: Iterable[Path], problems: list[Problem]) -> dict[int, Path]:
    """Number -> path, of the paths whose name is a number; adds a problem for a number
    that two have.
    """
    numbered: dict[int, Path] = {}
    for path in sorted(filter(_has_number, paths)):
        if int(path.stem) in numbered:
            sentence = f"{path.relative_to(folder)} has the number of {numbered[int(path.stem)].name}"
            problems.append(Problem("duplicate number", sentence))
        numbered.setdefault(int(path.stem), path)
    return numbered


def _has_number(path: Path) -> bool:
    return path.stem.isascii() and path.stem.isdecimal()


def image_files(
    folder: Path, *, num_prompts: int | None = None, num_images: int | None = None
) -> list[list[Path]]:
    """The files of `survey`. Raises ValueError listing its problems.

    num_prompts, num_images: as of `survey`; None takes what generation.json says, if it
    does.
    """
    record = read_record(folder)
    num_prompts, num_images = (
        num_prompts or record.get("num_prompts"),
        num_images or record.get("num_images"),
    )
    images, problems = survey(folder, num_prompts=num_prompts, num_images=num_images)
    if problems:
        raise ValueError(listed(folder, problems))
    return images


def numbers(problems: Iterable[Problem]) -> dict[str, int]:
    """How many problems of each kind there are, as a summary records them."""
    count: Counter[str] = Counter()
    for problem in problems:
        count[problem.kind] += problem.number
    return dict(count)


def in_words(count: Mapping[str, int]) -> str:
    """`numbers` as text: `1 missing prompt, 3 missing images`."""
    return ", ".join(counted(number, kind) for kind, number in count.items())


def listed(folder: Path, problems: Sequence[Problem]) -> str:
    """The problems of a folder, or of a file, in one sentence: the first of each kind,
    and the number of the others.
    """
    if len(problems) <= MAX_LISTED:
        return f"{folder}: {', '.join(map(shown, problems))}"
    by_kind: dict[str, list[str]] = {}
    for problem in problems:
        by_kind.setdefault(problem.kind, []).append(problem)
    share = max(1, MAX_LISTED // len(by_kind))
    named = [sentence for of_kind in by_kind.values() for sentence in of_kind[:share]]
    count = in_words(numbers(problems))
    return f"{folder}: {count}: {', '.join(map(shown, named))}, and {len(problems) - len(named)} more"


def changed_prompt(name: str, found: str, expected: str) -> Problem:
    """The sentence on a prompt's folder whose metadata.jsonl has another text than the
    benchmark.
    """
    sentence = f"{name}/metadata.jsonl has the prompt {_shown(found)}, not {_shown(expected)}"
    return Problem("changed prompt", sentence)


def note(folder: Path, problems: Sequence[Problem]) -> None:
    """Print a note that names the problems, if there are any."""
    if problems:
        print(f"note: {listed(folder, problems)}", file=sys.stderr)


def open_image(path: Path) -> Image.Image:
    """An image in RGB, as all commands see it.

    Raises ValueError naming the file when it is unreadable.
    """
    return open_picture(path)


def read_record(folder: Path) -> dict:
    """generation.json of a folder of images; empty when there is none.

    Raises ValueError naming the file when it is damaged, and like `check_record`.
    """
    path = folder / RECORD
    if not path.is_file():
        return {}
    record = files.read_json(path)
    check_record(record, str(path))
    return record


def check_record(record: Mapping[str, object], where: str) -> None:
    """Raise ValueError, starting with `where`, for a value of a kind that
    generation.json never has.
    """
    for key in ("num_prompts", "num_images"):
        value = record.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{where}: {key} is {_shown(value)}; expected a number of 1 or more")
    kinds = {
        "seed": (int, "a number"),
        "window": (int, "a number"),
        "checkpoint": (str, "text"),
        "suite": (str, "text"),
        "prompts_sha256": (str, "text"),
        "sampling": (dict, "an object"),
    }
    for key, (kind, expected) in kinds.items():
        value = record.get(key)
        if value is not None and type(value) is not kind:
            raise ValueError(f"{where}: {key} is {_shown(value)}; expected {expected}")


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
