"""Whether a set that exists still has the pictures of its source.

A manifest records the state of the source: a hash of the times at which its files were
written. When the state differs (files were edited, or only copied), or is missing (sets
made before it was recorded), every sample is made again in memory and compared.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.build_stages import DUPLICATE
from data_tools.executors import Executor
from data_tools.samples import FilteredOut, MadeSample, SampleSettings, make_sample
from data_tools.sources import Item, Items
from data_tools.storage import local_copy
from mmtensorar.data.shards import Manifest, iterate_tar, read_sample, sample_starts
from mmtensorar.data.tars import TarReader
from mmtensorar.files import read_lines

STATE = "source_state"  # its key in Manifest.made


def settings_of(made: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a set was made with, apart from the state of its source."""
    return None if made is None else {key: value for key, value in made.items() if key != STATE}


def changed_item(
    folder: Path,
    manifest: Manifest,
    items: Items,
    settings: SampleSettings,
    left_out: Path | None,
    *,
    executor: Executor,
    workers: int,
) -> str | None:
    """The name of an item that would give another sample now; None when there is none.

    Args:
        folder, manifest: The set, made with these settings from items of these names.
        left_out: The file that lists what was left out, None when there is none.
        executor, workers: See `data_tools.executors`.

    Raises ValueError for a damaged shard.
    """
    if left_out is not None:
        pictures = (manifest.made or {}).get("deduplicate") == "pictures"
        if name := _changed_left_out(left_out, items, settings, pictures=pictures):
            return name
    tasks = []
    for shard in manifest.shards:
        first, last = _key_range(folder / shard.name)
        tasks.append((folder / shard.name, first, items[first : last + 1], settings))
    with tqdm(desc="comparing with the source", unit=" shards", total=len(tasks), disable=None) as progress:
        for name in executor(changed_in_shard, tasks, workers):
            if name is not None:
                return name
            progress.update(1)
    return None


def changed_in_shard(path: Path, first: int, items: Items, settings: SampleSettings) -> str | None:
    """The name of an item whose sample in a shard is not the one it gives now.

    Codes and text features are not compared. first: number of the first of the items.
    """
    with local_copy(path) as local:
        for sample in iterate_tar(local):
            number = _number(sample.key) - first
            if not 0 <= number < len(items):
                return f"sample {sample.key}"
            made = _made(sample.key, items[number], settings)
            if made is None or made.sample.members.items() - sample.members.items():
                return items[number].key
    return None


def _changed_left_out(path: Path, items: Items, settings: SampleSettings, *, pictures: bool) -> str | None:
    """The name of an item that was left out, and would be kept now, or left out for
    another reason.

    A name may have several items, one for each caption. pictures: duplicates are
    samples with the same picture, not also the same caption.
    """
    left: Counter[str] = Counter()
    duplicates: Counter[tuple[str, str]] = Counter()  # of (name, name of the first)
    for row in left_out_rows(path):
        if row["reason"].startswith(DUPLICATE):
            duplicates[row["name"], row["reason"].removeprefix(DUPLICATE)] += 1
        else:
            left[row["name"]] += 1
    names = {*left, *chain.from_iterable(duplicates)}
    digests = defaultdict[str, list[str]](list)
    for item in items if names else ():
        if item.key not in names:
            continue
        if (made := _made("0", item, settings)) is not None:
            digests[item.key].append(made.picture if pictures else made.digest)
        elif item.key in left:
            left[item.key] -= 1
    for (name, first), number in duplicates.items():
        if sum(digest in digests[first] for digest in digests[name]) < number:
            return name
    return next((name for name, number in left.items() if number > 0), None)


def left_out_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a set's list of what was left out. Raises ValueError for a damaged one,
    naming its line.
    """
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in ("name", "reason")})
            valid = all(isinstance(value, str) for value in rows[-1].values())
        except (ValueError, TypeError, KeyError, RecursionError):
            valid = False
        if not valid:
            raise ValueError(
                f"{path} line {number}: expected name and reason; delete the file, or add --overwrite"
            )
    return rows


def _made(key: str, item: Item, settings: SampleSettings) -> MadeSample | None:
    """An item's sample; None when it is left out."""
    try:
        return make_sample(key, item, settings)
    except (FilteredOut, ValueError, MemoryError):
        return None


def _key_range(path: Path) -> tuple[int, int]:
    """Numbers of the first and the last sample of a shard, which are their keys."""
    with local_copy(path) as local:
        starts = sample_starts(local).tolist()
        with TarReader(local) as file:
            ends = (starts[:2], starts[-2:])
            first, last = (_number(read_sample(file, local, *bounds, ()).key) for bounds in ends)
    return first, last


def _number(key: str) -> int:
    return int(key) if key.isascii() and key.isdecimal() else -1
