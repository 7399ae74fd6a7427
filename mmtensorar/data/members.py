"""Encode and decode a sample's members: captions, codes, text features.

Pictures: `pictures.py`.

Letters: A crops, T image tokens, F factors, P tokens of a caption, C width of a
feature.
"""

from __future__ import annotations

import io
import unicodedata

import numpy as np

from mmtensorar.data.shards import EXTENSIONS, Codes, TextFeatures
from mmtensorar.files import NotText, decode


def decode_caption(content: bytes, where: str) -> str:
    """A caption without surrounding white space.

    Raises ValueError, starting with `where`, when it is not UTF-8, too long or empty.
    """
    if len(content) > EXTENSIONS["txt"]:
        raise ValueError(
            f"{where}: the caption has {len(content)} bytes, more than the {EXTENSIONS['txt']} allowed"
        )
    try:
        caption = decode(content).strip()
    except NotText as error:
        raise ValueError(f"{where}: the caption is {error}") from None
    if is_empty(caption):
        raise ValueError(f"{where}: the caption is empty")
    return caption


def is_empty(caption: str) -> bool:
    """Whether a caption shows nothing: it holds only white space, control and format
    characters.
    """
    return all(letter.isspace() or unicodedata.category(letter) in ("Cc", "Cf") for letter in caption)


# ---- arrays ----------------------------------------------------------------------------------


def encode_codes(codes: np.ndarray) -> bytes:
    """codes: [A, T, F] uint16 -> content of a codes.npy member."""
    assert codes.dtype == np.uint16 and codes.ndim == 3
    return _encode_array(codes)


def encode_features(features: np.ndarray) -> bytes:
    """features: [P, C] float16 -> content of a t5.npy member."""
    assert features.dtype == np.float16 and features.ndim == 2
    return _encode_array(features)


def decode_codes(content: bytes, where: str) -> np.ndarray:
    """Content of a codes.npy member -> [A, T, F] uint16.

    Raises ValueError for anything else.
    """
    return _decode_array(content, f"{where}: codes.npy", np.uint16, "ATF")


def decode_features(content: bytes, where: str) -> np.ndarray:
    """Content of a t5.npy member -> [P, C] float16.

    Raises ValueError for anything else.
    """
    return _decode_array(content, f"{where}: t5.npy", np.float16, "PC")


def check_codes(codes: np.ndarray, expected: Codes, where: str) -> None:
    """Raise ValueError unless codes [A, T, F] have the shape and range in the
    manifest.
    """
    shape = (expected.crops, expected.grid[0] * expected.grid[1], len(expected.factor_sizes))
    if codes.shape != shape:
        raise ValueError(f"{where}: codes.npy has shape {list(codes.shape)}, the manifest says {list(shape)}")
    for factor, size in enumerate(expected.factor_sizes):
        largest = int(codes[..., factor].max())
        if largest >= size:
            raise ValueError(f"{where}: codes.npy holds code {largest}, but factor {factor} has {size} codes")


def check_features(features: np.ndarray, expected: TextFeatures, where: str) -> None:
    """Raise ValueError unless features [P, C] fit the manifest.

    They must be finite, as wide as it says, and at most as long.
    """
    tokens, width = features.shape
    if width != expected.width or not 1 <= tokens <= expected.max_tokens:
        raise ValueError(
            f"{where}: t5.npy has shape {[tokens, width]}, "
            f"the manifest says [1 to {expected.max_tokens}, {expected.width}]"
        )
    if not np.isfinite(features).all():
        raise ValueError(f"{where}: t5.npy holds numbers that are not finite")


def _encode_array(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _decode_array(content: bytes, where: str, dtype: type, letters: str) -> np.ndarray:
    """Parse a .npy file.

    Args:
        where: Names shard, key and member.
        letters: The expected axes, one letter each.

    Raises ValueError for any other dtype or number of axes, damage, and arrays of
    objects.
    """
    try:
        # This is what np.load does for the format; np.load itself would also open zip
        # archives.
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except MemoryError:
        raise ValueError(f"{where} announces more than fits into memory") from None
    # numpy and its parser raise many kinds of errors for a hostile header.
    except Exception as error:
        raise ValueError(
            f"{where} is not a plain numpy array ({' '.join(str(error).split())[:200]})"
        ) from error
    if array.dtype != dtype or array.ndim != len(letters):
        expected = f"{np.dtype(dtype)} [{', '.join(letters)}]"
        raise ValueError(f"{where} holds {array.dtype} {list(array.shape)}; expected {expected}")
    return array
