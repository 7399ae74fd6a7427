"""The caption cleaning that LlamaGen's text-conditional models were trained with.

It follows the steps of FoundationVision/LlamaGen at ce98ec4, in the same order, with
regular expressions of our own. It needs the packages ftfy and beautifulsoup4.
"""

from __future__ import annotations

import html
import re
import sys
import urllib.parse
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

# original: `clean` twice, as in the original code. original_or_raw: the same, but a
# caption of which that leaves nothing (Chinese, a link) stays as written. lower: lower
# case without surrounding white space, as in the original code when its cleaning is
# off. none: as written.
Cleaning = Literal["original", "original_or_raw", "lower", "none"]
WITH_PACKAGES: tuple[Cleaning, ...] = ("original", "original_or_raw")

# T5 reads 120 tokens, a few hundred characters. Some patterns below take time quadratic
# in the length.
MAX_CLEANED_CHARS = 2048


@lru_cache(maxsize=4096)  # the same captions are also looked at by `leaves_nothing`
def prepare(caption: str, cleaning: Cleaning) -> str:
    """A caption as the backbone's training saw it.

    "original" reads only the first MAX_CLEANED_CHARS characters.
    """
    if cleaning in WITH_PACKAGES:
        cleaned = clean(clean(caption[:MAX_CLEANED_CHARS]))
        return caption if cleaning == "original_or_raw" and _is_nothing(cleaned, caption) else cleaned
    return caption.lower().strip() if cleaning == "lower" else caption


def leaves_nothing(caption: str, cleaning: Cleaning) -> bool:
    """Whether a cleaning removes every letter and digit of a caption, or all of it."""
    return _is_nothing(prepare(caption, cleaning), caption)


def _is_nothing(cleaned: str, caption: str) -> bool:
    # Marks may stay: of a Chinese sentence, its commas.
    return not any(map(str.isalnum, cleaned)) and (not cleaned or any(map(str.isalnum, caption)))


class Emptied:
    """Counts the captions of which a cleaning leaves nothing, and warns of them by
    name.

    The first MAX_WARNINGS are named, and later those whose number is a power of ten.
    """

    MAX_WARNINGS = 3

    def __init__(self, cleaning: Cleaning):
        self.cleaning: Cleaning = cleaning
        self.count = 0

    def add(self, name: str, caption: str) -> None:
        """Count a caption. name: of the sample, or empty."""
        if not leaves_nothing(caption, self.cleaning):
            return
        self.count += 1
        if self.count <= self.MAX_WARNINGS or str(self.count).strip("0") == "1":
            where = f"{name}: " if name else ""
            number = f" (number {self.count})" if self.count > self.MAX_WARNINGS else ""
            print(
                f"warning: {where}caption cleaning {self.cleaning} leaves nothing of the caption "
                f"{caption[:100]!r}{number}",
                file=sys.stderr,
            )


def require_packages():
    """(ftfy, BeautifulSoup).

    Raises ValueError naming the package that is not installed.
    """
    try:
        import ftfy
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise ValueError(
            f"caption_cleaning is original, which needs the package {error.name}: pip install -e '.[text]', "
            "or set it to lower"
        ) from None
    return ftfy, BeautifulSoup


_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)

# (pattern, replacement), in this order: _LINKS before the markup is removed, the others
# after it.
_LINKS = [
    (r"<person>", "person"),
    (
        r"\b(?:https?:(?:/{1,3}|[a-z0-9%])|www\d{0,3}\."
        r"|[a-z0-9.-]+\.(?:com|co|ru|net|org|edu|gov|it)\b/?(?!@))\S*",
        "",
    ),
]
_MARKS = [
    (r"@\w+\b", ""),  # nicknames
    # CJK strokes to unified ideographs
    (r"[\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff]+", ""),
    (f"[{_DASHES}]+", "-"),
    (r"[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    (r"[\u2018\u2019]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # article numbers
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILES})\b", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
]
_NOISE = [
    # names of files and products: jc6640, jc6640vc, 6640vc231
    (r"\b[a-z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-z]+\d+[a-z]+\b", ""),
    (r"\b\d+[a-z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})\b(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-z]+\d+[a-z]+\d+[a-z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes, with a Latin or a Cyrillic x
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
]
_EDGES = [
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
]


def clean(caption: str) -> str:
    """One pass of the original's cleaning: lower case, no links, markup, product
    numbers and the like.
    """
    ftfy, soup = require_packages()
    text = urllib.parse.unquote_plus(str(caption)).strip().lower()
    text = _replace(text, _LINKS)
    text = _replace(soup(text, features="html.parser").text, _MARKS)
    if len(re.findall(r"[-_]", text)) > 3:
        text = re.sub(r"[-_]", " ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    text = _replace(text, _NOISE).strip()
    return _replace(text, _EDGES).strip()


def _replace(text: str, steps: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in steps:
        text = re.sub(pattern, replacement, text)
    return text
