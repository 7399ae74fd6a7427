"""The frame of every evaluator: its options, the pictures to score, and the summary it
writes.

An evaluator is a folder eval/NAME with a `__main__.py` (tests/eval/test_harness.py
holds a whole one). It asks for options, gets a folder of pictures, and returns what it
measured:

    @harness.command
    def main(arguments=None):
        parser = harness.make_parser("eval.NAME", "What it measures.", example="--ckpt runs/NAME/model")
        harness.add_options(parser, images="a folder of pictures")
        options = harness.parse(parser, arguments)
        pictures = harness.pictures(options, "NAME", lambda generator: (prompts, 4))
        if pictures is not None:  # None on ranks that only generate
            harness.write_summary(pictures.out, {"score": 0.5, **harness.origin(pictures.folder)})
        return 0

With --ckpt the pictures are generated in GenEval's layout: OUT/NNNNN/metadata.jsonl and
OUT/NNNNN/samples/00000.png. Generation resumes: OUT/generation.json records the model
and its settings, and pictures that exist are kept when it agrees. Under a launcher
every rank generates its share, and the first rank scores.

Importing torch takes seconds. Nothing here imports it before a model is loaded, so that
mistakes in a command are reported at once.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from eval import versions
from eval.layout import RECORD, image_path, read_record
from mmtensorar import cli, ranks
from mmtensorar.checkpoints.index import read_index
from mmtensorar.files import publish, sha256, temporary_name, write_text
from mmtensorar.processes import RunFolderLock
from mmtensorar.sampling.settings import LOADING, SAMPLING, add_generation, given_settings, without_removed
from mmtensorar.seeds import image_seed
from mmtensorar.words import counted

if TYPE_CHECKING:
    from mmtensorar.image_tokenizers import ImageTokenizer
    from mmtensorar.pipeline import Generator
    from mmtensorar.recipe import SamplerSettings

Work = tuple[Sequence[dict], int]  # prompts, each an object with "prompt"; pictures of each

# Runs that differ only in these make the same pictures, up to rounding; prompts_sha256
# covers the prompts.
MAY_DIFFER = ("checkpoint", "num_prompts", "batch_size", "device", "attn_implementation")


# ---- options -------------------------------------------------------------------------------------


def command(main: cli.Main) -> cli.Main:
    """`mmtensorar.cli.command` for a main whose work resumes: the message on Ctrl-C
    says so.
    """

    @cli.command
    @functools.wraps(main)
    def wrapped(arguments: list[str] | None = None) -> int:
        try:
            with locks():
                return main(arguments)
        except KeyboardInterrupt:
            print("\nstopped; run the same command again to resume from what is there", file=sys.stderr)
            return 130

    return wrapped


_locks: list[RunFolderLock] = []


@contextmanager
def locks() -> Iterator[None]:
    """Release, at the end of the block, the output folders that `pictures` locked in
    it.
    """
    num_before = len(_locks)
    try:
        yield
    finally:
        while len(_locks) > num_before:
            _locks.pop().__exit__()


def _lock(out: Path) -> None:
    """Lock a folder for results on the first rank.

    Raises ValueError when another process works there.
    """
    if ranks.is_first():
        _locks.append(RunFolderLock(out, otherwise="choose another --out", leaves_nothing=True).__enter__())


def make_parser(module: str, description: str, *, example: str) -> argparse.ArgumentParser:
    """A parser whose help ends with an example.

    module: as in `python -m`; example: its arguments.
    """
    return cli.Parser(prog=f"python -m {module}", description=description, example=example)


def add_options(
    parser: argparse.ArgumentParser,
    *,
    images: str,
    ckpt: str = "model folder, such as runs/NAME/model",
    out: str = "default: runs/eval/NAME of the model's run, or of the pictures' folder",
    num_images: str = "per prompt",
    allow_partial: bool = True,
) -> None:
    """Add --ckpt or --images, --out, --num-images, --seed, --allow-partial, and the
    options of sampling.

    Args:
        images, ckpt, out, num_images: help texts, where an evaluator says more.
        allow_partial: whether the evaluator can score an incomplete set of pictures.
    """
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt", type=Path, metavar="FOLDER", help=ckpt)
    source.add_argument("--images", type=Path, metavar="PATH", help=images)
    parser.add_argument("--out", type=cli.folder_to_write, metavar="FOLDER", help=out)
    parser.add_argument("--num-images", type=int, metavar="N", help=num_images)
    parser.add_argument("--seed", type=int, default=0, help="of the pictures (default 0)")
    if allow_partial:
        parser.add_argument(
            "--allow-partial",
            action="store_true",
            help="score the pictures that exist; the score is marked partial wherever it is printed",
        )
    add_generation(parser, needs=", with --ckpt")


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, **least: int
) -> argparse.Namespace:
    """Parse.

    Raises ValueError for a number below its least value, or a folder that is missing.

    least: the least values of an evaluator's own options.
    """
    options = parser.parse_args(arguments)
    check_numbers(options, num_images=1, seed=0, **least)
    # Before a detector or a judge is loaded, or downloaded.
    if options.ckpt is not None:
        read_index(options.ckpt)
    if options.images is not None and not options.images.exists():
        raise ValueError(f"--images: {options.images} does not exist")
    return options


def check_numbers(options: argparse.Namespace, **least: int) -> None:
    """Raise ValueError for an option that is given and below its least value."""
    for name, number in least.items():
        value = getattr(options, name)
        if value is not None and value < number:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected {number} or more")


def warn_ignored(options: argparse.Namespace, names: Sequence[str] = ()) -> None:
    """Print a note for each given option that has no effect with --images.

    names: an evaluator's own.
    """
    for name in (*names, *SAMPLING, *(name for name in LOADING if name != "device")):
        if getattr(options, name) is not None:
            print(f"note: --{name.replace('_', '-')} has no effect with --images", file=sys.stderr)


# ---- pictures to score ---------------------------------------------------------------------------


class Pictures(NamedTuple):
    """Pictures to score.

    folder: where they are (--images may also name a file). out: where results go.
    num_prompts, num_images: as generated; None for pictures that were given.
    image_tokenizer: that of the model; None for pictures that were given.
    """

    folder: Path
    out: Path
    num_prompts: int | None = None
    num_images: int | None = None
    image_tokenizer: ImageTokenizer | None = None


def has_work(options: argparse.Namespace) -> bool:
    """Whether this process has anything to do: ranks above 0 only generate."""
    return options.images is None or ranks.is_first()


def pictures(
    options: argparse.Namespace,
    suite: str,
    work: Callable[[Generator], Work],
    *,
    default_out: Path | None = None,
    ignored: Sequence[str] = (),
) -> Pictures | None:
    """Generate with --ckpt or take --images; None on a rank that does not score.

    Args:
        options: those of `add_options`.
        suite: name of the prompts, for generation.json.
        work: what a model has to draw: its prompts and the pictures of each.
        default_out: results of --images without --out; None: runs/eval/NAME_SUITE, NAME
            of its path.
        ignored: the evaluator's own options that have no effect with --images.

    Raises ValueError when the model cannot be loaded, when --out holds other pictures,
    and when another process works in --out. The folder is locked until `command` or
    `locks` ends.
    """
    if options.images is not None:
        if not ranks.is_first():
            return None
        warn_ignored(options, ignored)
        read_record(options.images)  # damage is reported before the hours of scoring
        path = options.images.resolve()
        name = f"{path.name if path.is_dir() else path.stem}_{suite}"
        out = options.out or default_out or Path("runs/eval") / name
        # Without pictures, the evaluator reports what it misses, and creates no folder.
        if options.images.exists() and (out.is_dir() or not out.exists()):
            _lock(out)
        return Pictures(options.images, out)
    generator = load(options)
    prompts, num_images = work(generator)
    out = options.out or Path("runs/eval") / generator.recipe.run.name
    _lock(out)
    generate_into(out, options, generator, suite, prompts, num_images)
    if not ranks.is_first():
        return None
    return Pictures(out, out, len(prompts), num_images, generator.image_tokenizer)


def load(options: argparse.Namespace) -> Generator:
    """The generator of --ckpt, on this rank's GPU under a launcher.

    Raises ValueError like Generator.load.
    """
    from mmtensorar.pipeline import Generator

    loading = {name: getattr(options, name) for name in LOADING}
    loading["device"] = ranks.device(options.device)
    return Generator.load(options.ckpt, **loading)


def generate_into(
    out: Path,
    options: argparse.Namespace,
    generator: Generator,
    suite: str,
    prompts: Sequence[dict],
    num_images: int,
) -> None:
    """`generate` with the sampling, seed and batch size of a command's options.

    Returns, on the rank that scores, when the pictures of all ranks exist.
    """
    sampling = generator.sampling(**given_settings(options))
    began = time.perf_counter()
    num_made, passes = generate(
        generator,
        options.ckpt,
        suite,
        prompts,
        out,
        sampling,
        num_images=num_images,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    speed = ""
    if num_made:
        rate = num_made / (time.perf_counter() - began)
        speed = f", {passes:.1f} passes a picture, {rate:.3g} pictures a second"
    print(f"{counted(num_made, 'image')} made in {out}{speed}", flush=True)
    if ranks.is_first():
        wait_for_all(out, len(prompts), num_images)


def wait_for_all(out: Path, num_prompts: int, num_images: int) -> None:
    """Return when the pictures of all ranks exist.

    When a rank fails, the launcher ends the others.
    """
    printed = False
    for prompt in range(num_prompts):
        for image in range(num_images):
            while not image_path(out, prompt, image).is_file():
                if not printed:
                    print(f"waiting for the other ranks' images in {out}", file=sys.stderr, flush=True)
                    printed = True
                time.sleep(1)


def generate(
    generator: Generator,
    ckpt: Path,
    suite: str,
    prompts: Sequence[dict],
    out: Path,
    sampling: SamplerSettings,
    *,
    num_images: int,
    seed: int,
    batch_size: int,
) -> tuple[int, float]:
    """Make this rank's share of the pictures that are missing in out.

    Returns how many were made, and the mean of the passes that a picture took.

    Args:
        generator: the model.
        ckpt: the model folder, for generation.json.
        suite: name of the prompts, for generation.json.
        prompts: GenEval metadata, or any object with the text, or class number, under
            "prompt".
        out: the folder, in the layout of eval/layout.py.
        sampling: settings, as `Generator.sampling` makes them.
        num_images: pictures of each prompt.
        seed: of all pictures; each has its own, by `seeds.image_seed`.
        batch_size: pictures at a time.

    Raises ValueError when out holds pictures of another model, other settings or other
    prompts, or pictures of unknown origin.
    """
    settings = {
        "checkpoint": str(ckpt),
        "checkpoint_sha256": sha256(Path(ckpt) / "checkpoint.json"),
        "suite": suite,
        "num_prompts": len(prompts),
        "prompts_sha256": prompts_hash(prompts),
        "num_images": num_images,
        "seed": seed,
        "sampling": sampling.model_dump(mode="json"),
        "window": generator.model.window,
        "batch_size": batch_size,
        **generator.runs_as(),
    }
    out.mkdir(parents=True, exist_ok=True)
    claim(out, settings)
    generator.check([prompt["prompt"] for prompt in prompts])
    work = [(prompt, image) for prompt in range(len(prompts)) for image in range(num_images)]
    work = work[ranks.rank() :: ranks.world_size()]
    # Whole batches, also when some of their pictures exist: padding depends on the
    # batch, and a resumed run should make the pictures that an uninterrupted one makes.
    batches = [work[start : start + batch_size] for start in range(0, len(work), batch_size)]
    batches = [
        batch for batch in batches if not all(image_path(out, *numbers).is_file() for numbers in batch)
    ]
    num_made, passes = 0, []
    with tqdm(
        total=sum(map(len, batches)),
        unit="image",
        desc=f"generating in {out}",
        file=sys.stderr,
        disable=not ranks.is_first(),
    ) as bar:
        for batch in batches:
            made, passes_of_batch = _make(generator, prompts, out, sampling, batch, seed)
            num_made, passes = num_made + made, [*passes, *passes_of_batch]
            bar.update(len(batch))
    return num_made, sum(passes) / max(1, len(passes))


def prompts_hash(prompts: Sequence[dict]) -> str:
    """The SHA-256 of prompts that generation.json records."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def _make(
    generator: Generator,
    prompts: Sequence[dict],
    out: Path,
    sampling: SamplerSettings,
    batch: Sequence[tuple[int, int]],
    seed: int,
) -> tuple[int, tuple[int, ...]]:
    """Draw one batch of (prompt number, image number) and write those that are missing;
    returns how many, and the passes of each picture of the batch.
    """
    from mmtensorar.pipeline import save_png

    texts = [prompts[prompt]["prompt"] for prompt, _ in batch]
    seeds = [image_seed(seed, *numbers) for numbers in batch]
    decoded = generator.decode(texts, seeds, sampling)
    num_made = 0
    drawn = zip(batch, seeds, generator.pictures(decoded.codes), strict=True)
    for (prompt, number), picture_seed, image in drawn:
        path = image_path(out, prompt, number)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = prompts[prompt]
            write_text(path.parent.parent / "metadata.jsonl", json.dumps(metadata) + "\n")
            with temporary_name(path.parent) as temporary:
                save_png(image, temporary, prompt=metadata["prompt"], seed=picture_seed)
                # Unless a rank of another run with these settings has made it
                # meanwhile.
                with suppress(FileExistsError):
                    publish(temporary, path)
                    num_made += 1
    return num_made, decoded.passes


def claim(out: Path, settings: dict) -> None:
    """Record the settings in out.

    Raises ValueError when out holds pictures that they did not make.
    """
    path = out / RECORD
    settings = json.loads(json.dumps(settings))  # tuples come back from the record as lists
    if not path.is_file():
        if any(item.name.isdigit() for item in out.iterdir()) and not path.is_file():
            raise ValueError(
                f"{out} holds images but no {RECORD}, so their origin is unknown; choose another --out"
            )
        with temporary_name(out) as temporary, suppress(FileExistsError):
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            publish(temporary, path)  # of several ranks or runs, one records its settings
            return
    recorded = read_record(out)
    recorded["sampling"] = without_removed(recorded.get("sampling") or {})
    changed = [
        f"{key} {recorded.get(key)!r} there, {value!r} now"
        for key, value in settings.items()
        if key not in MAY_DIFFER and recorded.get(key) != value
    ]
    if changed:
        raise ValueError(
            f"{out} holds images of another run ({'; '.join(changed)}); choose another --out or delete it"
        )


# ---- results -------------------------------------------------------------------------------------


def origin(folder: Path) -> dict:
    """The pictures' origin for a summary: images, checkpoint, seed and generation (None
    if unknown).
    """
    record = read_record(folder) if folder.is_dir() else {}
    return {
        "images": str(folder),
        "checkpoint": record.get("checkpoint"),
        "seed": record.get("seed"),
        "generation": record or None,
    }


def write_summary(out: Path, summary: dict) -> dict:
    """Write summary.json, the last file of an evaluation, with the versions; returns
    the summary.
    """
    out.mkdir(parents=True, exist_ok=True)
    summary = {**summary, "versions": versions.installed()}
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary
