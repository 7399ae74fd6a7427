"""Numbers in messages: one of a thing is not plural, and no time is "0 min"."""

from pathlib import Path

import pytest

from mmtensorar.words import counted, time_left

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "number, noun, text",
    [
        (0, "sample", "0 samples"),
        (1, "sample", "1 sample"),
        (2, "shard", "2 shards"),
        (1, "class", "1 class"),
        (1000, "class", "1000 classes"),
        (2, "box", "2 boxes"),
    ],
)
def test_counted(number, noun, text):
    assert counted(number, noun) == text


def test_counted_takes_a_plural():
    assert counted(2, "query", "queries") == "2 queries" and counted(1, "query", "queries") == "1 query"


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "under a minute left"),
        (29, "under a minute left"),
        (31, "1 minute left"),
        (125, "2 minutes left"),
        (179 * 60, "179 minutes left"),
        (12600, "3.5 hours left"),
    ],
)
def test_time_left(seconds, text):
    assert time_left(seconds) == text
