"""FID, sFID, Inception score, precision and recall of a model, of pictures, or of recorded features.

    python -m eval.fid --ckpt runs/NAME/model --ref VIRTUAL_imagenet256_labeled.npz      generates 50,000, then scores
    python -m eval.fid --images FOLDER_OR_NPZ --ref FOLDER_OR_NPZ                        scores pictures made by anyone
    python -m eval.fid score --features features.npz [--split-size 5000] [--out FILE]

--ref: an .npz of ADM's evaluator (arr_0, and mu, sigma, mu_s, sigma_s, which FID and sFID then take), or a folder. --ckpt:
a class-conditional model, as many pictures of each class. --out receives summary.json and, kept for a run that goes on,
features/ and the pictures. Under a launcher (torchrun) all ranks generate, each its share, and the first one scores. `score` takes float arrays: ref_pool [N, C] and sample_pool [M, C] for FID, precision and recall,
ref_spatial and sample_spatial for sFID, sample_logits [M, V] for the Inception score.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from eval import harness, layout, versions
from eval.fid import features, score, sources
from mmtensorar import files
from mmtensorar.sampling.options import add_generation

NUM_IMAGES = 50_000  # of published numbers
ARRAYS = ("ref_pool", "sample_pool", "ref_spatial", "sample_spatial", "sample_logits")


def read_features(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file. Raises ValueError naming it, and the array that is damaged, of another shape or not finite."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ARRAYS if name in file.files}
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except sources.DAMAGE as error:
        raise ValueError(f"{path}: not an .npz of arrays ({error})") from None
    for name, array in arrays.items():
        if array.ndim != 2 or array.dtype.kind != "f":
            raise ValueError(
                f"{path}: {name} is {array.dtype} of shape {list(array.shape)}; expected floats [N, C]"
            )
        if not len(array):
            raise ValueError(f"{path}: {name} is empty")
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: {name} has numbers that are not finite")
    return arrays


def measure(
    arrays: Mapping[str, np.ndarray],
    split_size: int = score.SPLIT_SIZE,
    statistics: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> dict[str, float]:
    """The metrics that the arrays allow, by name. Raises ValueError when they allow none.

    statistics: kind of features -> mean and covariance of the reference, instead of those of its array.
    """
    found = {}
    for name, kind in (("fid", "pool"), ("sfid", "spatial")):
        known = (statistics or {}).get(kind)
        if f"sample_{kind}" in arrays and (known or f"ref_{kind}" in arrays):
            reference = score.Statistics(*known) if known else score.statistics(arrays[f"ref_{kind}"])
            found[name] = score.frechet_distance(score.statistics(arrays[f"sample_{kind}"]), reference)
    if "sample_logits" in arrays:
        found["inception_score"] = score.inception_score(arrays["sample_logits"], split_size)
    if {"ref_pool", "sample_pool"} <= arrays.keys():
        found["precision"], found["recall"] = score.precision_recall(
            arrays["ref_pool"], arrays["sample_pool"]
        )
    if not found:
        raise ValueError(
            f"no metric can be computed; expected arrays {', '.join(ARRAYS)}, found {', '.join(arrays) or 'none'}"
        )
    return found


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def class_prompts(generator) -> list[dict]:
    """A prompt per class. Raises ValueError for a model that is not class-conditional."""
    if generator.caption_encoder.kind != "class":
        raise ValueError(
            "this model takes captions; FID here is of class-conditional models, or of pictures (--images)"
        )
    return [{"prompt": str(number)} for number in range(generator.caption_encoder.num_classes)]


def evaluate(options: argparse.Namespace) -> None:
    if options.images is not None and not harness.scores():
        return
    statistics = sources.reference_statistics(options.ref)  # a wrong path is told before hours of generating
    reference = sources.find(options.ref)
    numbers: dict = {}
    if options.images is not None:
        harness.ignored(options, ["num_images"])
        folder, out = options.images, options.out or Path("runs/eval") / f"{options.images.stem}_fid"
    else:
        generator = harness.load(options)
        prompts = class_prompts(generator)
        each, rest = divmod(options.num_images or NUM_IMAGES, len(prompts))
        if rest or not each:
            raise ValueError(
                f"--num-images is {options.num_images or NUM_IMAGES}; expected a multiple of the {len(prompts)} classes"
            )
        folder = out = harness.generate_into(options, generator, "class_conditional", prompts, each)
        del generator
        if not harness.scores():
            return
        numbers = dict(num_prompts=len(prompts), num_images=each)
    samples = sources.find(folder, **numbers)

    from eval.fid.inception import Inception
    from mmtensorar import devices

    network = Inception.load(options.inception, devices.pick(options.device))
    arrays: dict[str, np.ndarray] = {}
    for side, pictures in (("ref", reference), ("sample", samples)):
        found = features.extract(pictures, network, network.name, out / "features", options.batch_size)
        arrays |= {f"{side}_{kind}": array for kind, array in found.items()}
    found = measure(arrays, options.split_size, statistics)
    record = layout.read_record(folder) if folder.is_dir() else {}
    summary = {
        "benchmark": "class_conditional",
        **found,
        "num_images": samples.num,
        "images": str(folder),
        "images_sha256": file_hash(folder) if folder.is_file() else None,
        "reference": str(options.ref),
        "reference_sha256": file_hash(options.ref) if options.ref.is_file() else None,
        "reference_images": reference.num,
        "statistics_of_the_reference": {
            kind: "in the file" if kind in statistics else "of its pictures" for kind in ("pool", "spatial")
        },
        "inception": network.name,
        "split_size": options.split_size,
        "checkpoint": record.get("checkpoint"),
        "seed": record.get("seed"),
        "generation": record or None,
        "versions": versions.installed(),
    }
    files.write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"\n{samples.num} pictures of {folder} against {options.ref}, {network.name}")
    show(found)
    if samples.num < NUM_IMAGES:
        print(
            f"NOT comparable with published numbers, which are of {NUM_IMAGES:,} pictures: FID falls as their number grows"
        )
    print(f"\n{out / 'summary.json'}")


def show(found: Mapping[str, float]) -> None:
    for name, value in found.items():
        print(f"{name:<16} {value:.6f}")
    if "precision" in found:
        print("precision and recall: exact distances; ADM's float16 ones come out some hundredths higher")


def score_features(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.fid score", description="Recorded features to scores."
    )
    parser.add_argument("--features", type=Path, required=True, metavar="FILE", help=".npz")
    add_split_size(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the scores as JSON")
    options = parser.parse_args(arguments)
    harness.check_numbers(options, split_size=1)
    arrays = read_features(options.features)
    try:
        found = measure(arrays, options.split_size)
    except ValueError as error:
        raise ValueError(f"{options.features}: {error}") from None
    show(found)
    if options.out is not None:
        record = {"features": str(options.features), "split_size": options.split_size, **found}
        files.write_text(options.out, json.dumps(record, indent=2) + "\n")


def add_split_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--split-size", type=int, default=score.SPLIT_SIZE, help="images a split of the Inception score"
    )


def score_pictures(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.fid",
        description="FID, sFID, Inception score, precision and recall. `score --features FILE` takes recorded features.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--ckpt", type=Path, help="consolidated class-conditional checkpoint, such as runs/NAME/model"
    )
    source.add_argument(
        "--images", type=Path, metavar="PATH", help="a folder, or an .npz with arr_0, uint8 [N, H, W, 3]"
    )
    parser.add_argument(
        "--ref", type=Path, required=True, metavar="PATH", help="ADM's reference .npz, or a folder"
    )
    parser.add_argument(
        "--out", type=Path, help="default: runs/eval/NAME of the checkpoint's run, or of the pictures"
    )
    parser.add_argument(
        "--num-images", type=int, help=f"in all, as many of each class (default {NUM_IMAGES})"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--inception", type=Path, metavar="FILE", help="torch-fidelity's weights; default: downloaded once"
    )
    add_split_size(parser)
    add_generation(parser, needs=", with --ckpt")
    options = parser.parse_args(arguments)
    harness.check_numbers(options, split_size=1)
    harness.check_numbers(options, num_images=1, seed=0)
    evaluate(options)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] == "score":
            score_features(arguments[1:])
        else:
            score_pictures(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what there is", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
