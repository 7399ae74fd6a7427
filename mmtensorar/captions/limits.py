"""The most tokens of a prompt: long texts are read only as far as needed, and
reported.

A prompt longer than the limit costs the whole batch memory, since every row is padded
to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmtensorar.model.conditions import CaptionEncoder, Excess

# Where a model's files say nothing lower. DPG-Bench's prompts, which are long, have
# about 80.
DEFAULT_MAX_TOKENS = 256

# Characters read per token of the limit. A token seldom stands for more than 10.
CHARS_PER_TOKEN = 128


def beginning(text: str, max_tokens: int, count: Callable[[str], int]) -> str:
    """The text, or of a very long one a beginning that has more than max_tokens
    tokens.

    It bounds time and memory of the text tokenizer, whose result is cut afterwards.
    Where many characters make few tokens (white space, unknown words), it is longer, so
    that nothing within the limit is lost.

    count: text -> number of tokens.
    """
    size = CHARS_PER_TOKEN * max_tokens
    while size < len(text) and count(text[:size]) <= max_tokens:
        size *= 2
    return text[:size]


def excesses(encoder: CaptionEncoder, captions: Sequence[Any]) -> list[tuple[int, Excess]]:
    """(number of the caption, excess) for each caption that the encoder cuts."""
    found = ((number, encoder.excess(caption)) for number, caption in enumerate(captions))
    return [(number, excess) for number, excess in found if excess is not None]
