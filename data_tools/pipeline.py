"""The work of make_shards.py: from a listed source to finished shard sets."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools import dry_run
from data_tools.build_stages import (
    ERROR,
    LeftOut,
    Part,
    SetSettings,
    add_codes,
    count_reasons,
    distribute,
    find_duplicates,
    is_one_part,
    is_validation,
    make_part,
    make_shard,
)
from data_tools.encoders import Encoder, load_encoders
from data_tools.executors import Executor, in_processes
from data_tools.listed_source import ListedSource, list_source
from data_tools.reuse import STATE, changed_item, settings_of
from data_tools.samples import SampleSettings
from data_tools.storage import is_local
from mmtensorar.data.shards import MANIFEST, Manifest, Shard, Staging
from mmtensorar.files import write_text
from mmtensorar.words import counted

LEFT_OUT = "left_out.jsonl"
PART_SAMPLES = 1000  # where shards are not counted in samples
PART_FORMAT = 2  # version of the records of parts


def set_settings(options: argparse.Namespace) -> SetSettings:
    """The set's settings from the options of make_shards.py."""
    return SetSettings(
        samples_per_shard=options.samples_per_shard,
        bytes_per_shard=options.bytes_per_shard,
        validation_share=options.validation_share,
        deduplicate=options.deduplicate,
        on_error=options.on_error,
    )


def sample_settings(options: argparse.Namespace) -> SampleSettings:
    """The samples' settings from the options of make_shards.py."""
    return SampleSettings(
        image_size=options.image_size,
        crop=options.crop,
        format=options.format,
        quality=options.quality,
        min_side=options.min_side,
        max_aspect=options.max_aspect,
        min_caption=options.min_caption,
        max_caption=options.max_caption,
        seed=options.seed,
    )


def make(options: argparse.Namespace, executor: Executor) -> None:
    """Make the set that the options ask for, or reuse it when it exists already.

    Raises ValueError for everything that a user can cause.
    """
    existing_set(options.out)  # now, because listing the source may take long
    source = list_source(options)
    encoder = load_encoders(options, source.classes)
    if options.dry_run:
        print_notes(source.notes)
        dry_run.show(source, sample_settings(options), set_settings(options), options.out)
        if (old := existing_set(options.out)) is not None and not options.overwrite:
            print(f"{options.out} holds a set already ({describe(old)}); another one needs --overwrite")
        print(f"nothing was written; without --dry-run the set goes to {options.out}")
        return
    Build(
        out=options.out,
        source=source,
        settings=set_settings(options),
        samples=sample_settings(options),
        encoder=encoder,
        overwrite=options.overwrite,
        executor=executor,
        workers=options.workers,
    ).run()
    print_notes([*source.notes, *(encoder.notes() if encoder else ())])


def print_notes(notes: Iterable[str]) -> None:
    """Print what is to be known about a source and its captions."""
    for note in notes:
        print(f"note: {note}")


@dataclass(frozen=True)
class Build:
    """One set that is made, with its validation set if there is one."""

    out: Path
    source: ListedSource
    settings: SetSettings
    samples: SampleSettings
    encoder: Encoder | None
    overwrite: bool
    executor: Executor
    workers: int

    @property
    def validation_out(self) -> Path:
        return self.out.with_name(f"{self.out.name}_validation")

    @property
    def made(self) -> dict[str, Any]:
        """Everything that the bytes of the set depend on."""
        made: dict[str, Any] = {
            "source": self.source.name,
            "num_items": len(self.source.items),
            **asdict(self.settings),
            **asdict(self.samples),
        }
        if self.source.state:
            made[STATE] = self.source.state
        return made | {key: value.model_dump(mode="json") for key, value in self.entries.items()}

    @property
    def entries(self) -> dict[str, Any]:
        """Fields of the manifest that describe codes and text features."""
        return self.encoder.entries if self.encoder else {}

    def run(self) -> None:
        """Make what does not exist yet."""
        splits = bool(self.settings.validation_share)
        validation_exists = splits and self.exists(self.validation_out)
        if self.exists(self.out) and validation_exists == splits:
            manifest = existing_set(self.out)
            assert manifest is not None
            print(f"reusing {self.out}: {describe(manifest)}")
            return
        staging = Staging(self.out, [self.made, PART_FORMAT])
        parts = self.make_parts(staging)
        left_out = self.left_out(parts)
        gone = {item.number for item in left_out}
        if len(gone) == len(self.source.items):
            self.write_left_out(left_out)
            first = min(left_out)
            raise ValueError(
                f"{self.out}: nothing is left of {counted(len(gone), 'sample')} ({count_reasons(left_out)}); "
                f"the first, {first.name}: {first.reason.removeprefix(ERROR)}"
            )
        validation = self.validation_numbers(parts, gone)
        if splits and not validation_exists:
            target = Staging(self.validation_out, [self.made, PART_FORMAT])
            self.write_set(
                parts, target, staging.path, lambda number: number not in gone and number in validation
            )
        self.write_left_out(left_out)
        self.write_set(
            parts, staging, staging.path, lambda number: number not in gone and number not in validation
        )

    def exists(self, out: Path) -> bool:
        """Whether the set is in a folder already, with its codes and text features.

        When files of the source were written since, its samples are compared. Raises
        ValueError when the folder holds another set and may not be overwritten.
        """
        old = existing_set(out)
        if old is None:
            return False
        same = (
            settings_of(old.made) == settings_of(self.made)
            and old.classes == self.source.classes
            and all(getattr(old, key) == value for key, value in self.entries.items())
        )
        reason = ""
        if same and old.made != self.made:
            if name := self.changed_item(out, old):
                same, reason = False, f": {name} has changed since it was made"
            else:
                old.model_copy(update={"made": self.made}).write(out)
        if not same and not self.overwrite:
            raise ValueError(
                f"{out} holds another set ({describe(old)}){reason}; choose another --out, or add --overwrite"
            )
        return same

    def changed_item(self, out: Path, manifest: Manifest) -> str | None:
        """The name of an item whose picture is another one in a set; None when there is
        none.
        """
        print(f"{out}: the times of the source's files are other ones; comparing the pictures")
        left_out = out / LEFT_OUT
        try:
            return changed_item(
                out,
                manifest,
                self.source.items,
                self.samples,
                left_out if left_out.is_file() else None,
                executor=self.executor,
                workers=self.workers,
            )
        except ValueError:
            if not self.overwrite:
                raise
            return "a shard"  # it is damaged, and will be replaced

    def make_parts(self, staging: Staging) -> list[Part]:
        """Make the parts that do not exist yet.

        Codes are added here, while the workers make the next parts.
        """
        settings, items = self.settings, self.source.items
        size = PART_SAMPLES if settings.bytes_per_shard else settings.samples_per_shard
        starts = range(0, len(items), size)
        finished, uncoded, tasks = {}, [], []
        for number, start in enumerate(starts):
            name = f"part-{number:06d}"
            if part := Part.read(staging.path, name):
                if self.encoder is None or part.coded:
                    finished[name] = part
                else:
                    uncoded.append(part)
            else:
                some = items[start : start + size]
                tasks.append((staging.path, name, start, some, self.samples, settings.on_error == "skip"))
        if finished:
            print(f"resuming {self.out}: {len(finished)} of {len(starts)} parts are finished")
        initial = sum(part.num_items for part in finished.values())
        with tqdm(
            desc="making shards", unit=" images", total=len(items), initial=initial, disable=None
        ) as progress:
            for part in chain(uncoded, self.executor(make_part, tasks, self.workers)):
                if self.encoder:
                    part = add_codes(staging.path, part, self.encoder.encode)
                finished[part.name] = part
                progress.update(part.num_items)
        return [finished[name] for name in sorted(finished)]

    def left_out(self, parts: list[Part]) -> list[LeftOut]:
        """Items that filters left out, that are damaged, or that are duplicates."""
        left_out = [item for part in parts for item in part.left_out]
        if self.settings.deduplicate:
            pictures = self.settings.deduplicate == "pictures"
            left_out += find_duplicates(parts, self.source.items, pictures=pictures)
        return left_out

    def validation_numbers(self, parts: list[Part], gone: set[int]) -> set[int]:
        """Numbers of the samples that belong to the validation set.

        Raises ValueError when one of the two sets would be empty.
        """
        share = self.settings.validation_share
        if not share:
            if (self.validation_out / MANIFEST).is_file():
                print(
                    f"note: {self.validation_out} was split from another set in {self.out}, "
                    "and may hold the same pictures as this one"
                )
            return set()
        validation = {
            kept.number for part in parts for kept in part.kept if is_validation(kept.picture, share)
        }
        kept = {kept.number for part in parts for kept in part.kept} - gone
        if not 0 < len(kept & validation) < len(kept):
            sizes = f"{counted(len(kept - validation), 'sample')} and {len(kept & validation)} for validation"
            raise ValueError(f"{self.out}: --validation-share {share:g} gives {sizes}; choose another one")
        return validation

    def write_left_out(self, left_out: list[LeftOut]) -> None:
        """List what was left out in a file of the set's folder."""
        path = self.out / LEFT_OUT
        if not left_out:
            path.unlink(missing_ok=True)
            return
        lines = [json.dumps({"name": item.name, "reason": item.reason}) for item in sorted(left_out)]
        write_text(path, "\n".join(lines) + "\n")
        num_items = len(self.source.items)
        print(f"left out {len(left_out)} of {num_items}: {count_reasons(left_out)}; listed in {path}")

    def write_set(
        self, parts: list[Part], staging: Staging, from_folder: Path, takes: Callable[[int], bool]
    ) -> None:
        """Write one set, and replace what is in its folder.

        Args:
            parts: All parts.
            staging: Of the set.
            from_folder: Folder of the parts.
            takes: Whether the sample of a number belongs to this set.
        """
        bytes_per_shard = self.settings.bytes_per_shard
        max_samples = len(self.source.items) if bytes_per_shard else self.settings.samples_per_shard
        plan = list(distribute(parts, takes, max_samples=max_samples, max_bytes=bytes_per_shard))
        if not plan:
            raise ValueError(f"{staging.folder}: no sample is left for it; choose another --validation-share")
        finished: dict[str, Shard] = {}
        tasks = []
        for number, selections in enumerate(plan):
            path = staging.path / f"{number:05d}.tar"
            if shard := staging.finished(path.name):
                finished[path.name] = shard
            else:
                tasks.append((from_folder, path, selections))
        # Moving local parts takes no time, so that neither workers nor a progress bar
        # are needed.
        regroups = not all(map(is_one_part, plan))
        is_slow = regroups or not is_local(staging.path)
        execute, workers = (self.executor, self.workers) if is_slow else (in_processes, 1)
        with tqdm(
            desc="regrouping", unit=" shards", total=len(tasks), disable=None if regroups else True
        ) as progress:
            for shard in execute(make_shard, tasks, workers):
                staging.record(shard)
                finished[shard.name] = shard
                progress.update(1)
        manifest = Manifest(
            shards=tuple(finished[name] for name in sorted(finished)),
            num_samples=sum(shard.num_samples for shard in finished.values()),
            image_size=self.samples.image_size,
            **self.entries,
            classes=self.source.classes,
            source=self.source.name,
            seed=self.samples.seed,
            made=self.made,
        )
        staging.commit(manifest)
        print(f"{staging.folder}: {describe(manifest)}, in {counted(len(manifest.shards), 'shard')}")


# ---- what is in a folder ---------------------------------------------------------------------


def describe(manifest: Manifest) -> str:
    """A set in a few words."""
    in_classes = f" in {counted(len(manifest.classes), 'class')}" if manifest.classes else ""
    source = f"{manifest.source!r}{in_classes}"
    samples = counted(manifest.num_samples, "sample")
    return f"{samples} of {source}, {manifest.image_size} pixels, seed {manifest.seed}"


def existing_set(out: Path) -> Manifest | None:
    """The set in a folder. Raises ValueError when the folder holds anything else."""
    Staging.recover(out)
    if (out / MANIFEST).exists():
        return Manifest.read(out, complete=is_local(out))
    if out.exists():
        if not out.is_dir():
            raise ValueError(f"{out} is a file; choose another --out")
        foreign = [path for path in out.iterdir() if not _is_own(path.name)]
        if foreign:
            raise ValueError(
                f"{out} is not a shard folder: it has no {MANIFEST}, but {foreign[0].name}; "
                "choose another --out"
            )
    return None


def _is_own(name: str) -> bool:
    """Whether an unfinished run may have left a file of this name."""
    return name.startswith(Staging.PREFIX) or name == LEFT_OUT or name.endswith(".tmp")
