"""The YAML of recipes and of key=value: a value is what a person reads.

Plain values follow YAML 1.2's core schema, and not YAML 1.1 as PyYAML does:

    0042, 2e-5, .5        42, 0.00002 and 0.5; 1.1 reads 0042 as octal 34, and 2e-5 as text
    1:30, 2024-01-31      text; 1.1 reads 90 (base 60), and a date
    yes, no, on, off      text; only true and false are booleans
    0x10                  16, as in both
    0o17, 0b11, 1_000     refused: one version reads a number, the other text

Also refused: keys that are not text, keys that occur twice, text with half a character,
and what nests too deeply.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_DIGITS = 3000  # Python writes no number of more than 4300 digits; 3000 in base 16 make 3613
MAX_VALUES = 100_000  # a recipe has about a hundred

_TAG = "tag:yaml.org,2002:"
_TWO_WAYS = "!two-ways"
_INT = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_NULL = re.compile(r"null|Null|NULL|~|")
# What YAML 1.1 or 1.2 reads as a number, and the other as text.
_AMBIGUOUS = re.compile(
    r"[-+]?0[oO][0-7]+|[-+]?0[bB][01_]+|[-+]0[xX][0-9a-fA-F_]+|0X[0-9a-fA-F_]+|0x[0-9a-fA-F_]*_[0-9a-fA-F_]*"
    r"|[-+]?(?=[0-9._]*_)(?=[._]*[0-9])[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?|[-+]?\.[0-9]+_[0-9_]*"
)


class Loader(yaml.SafeLoader):
    """Reads YAML 1.2's core schema; see the module."""

    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key, problem = key_node.value, None
            if key_node.tag != f"{_TAG}str":
                problem = f"a key must be text, got {key!r}" if isinstance(key, str) else "a key must be text"
            elif key in seen:
                problem = f"the key {key!r} is given twice"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def _refuse(self, node: Any, problem: str) -> None:
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

    def _text(self, node: Any) -> str:
        text = self.construct_scalar(node)
        try:
            # JSON writes characters above U+FFFF as two escapes, of half a character
            # each.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self._refuse(node, f"{text!r} holds half a character (a lone surrogate)")
        if "\0" in text:
            self._refuse(node, f"{text!r} holds a zero character")
        return text

    def _int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        if not _INT.fullmatch(text) or len(text) > MAX_DIGITS:
            self._refuse(node, f"expected a whole number, got {shortened(text)}")
        return int(text, 16) if text.startswith("0x") else int(text)

    def _float(self, node: Any) -> float:
        text = self.construct_scalar(node)
        if not (_FLOAT.fullmatch(text) or _INT.fullmatch(text)):
            self._refuse(node, f"expected a number, got {shortened(text)}")
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))

    def _bool(self, node: Any) -> bool:
        text = self.construct_scalar(node)
        if not _BOOL.fullmatch(text):
            self._refuse(node, f"expected true or false, got {shortened(text)}")
        return text.lower() == "true"

    def _two_ways(self, node: Any) -> None:
        text = self.construct_scalar(node)
        self._refuse(node, f"{shortened(text)} is read as a number by some programs and as text by others; "
                     f"write {_as_number(text)}, or '{text[:80]}' in quotes")  # fmt: skip


class Dumper(yaml.SafeDumper):
    """Writes YAML that Loader, and readers of YAML 1.1, read back unchanged."""

    def _str(self, text: str) -> yaml.ScalarNode:
        # PyYAML folds these line breaks as if they were spaces.
        style = '"' if re.search("[\x85\u2028\u2029\ufeff]", text) else None
        return self.represent_scalar(f"{_TAG}str", text, style=style)


_NUMBERS = list("-+.0123456789")  # the first characters of what a pattern may match
for _tag, _pattern, _first in (
    (f"{_TAG}int", _INT, _NUMBERS),
    (f"{_TAG}float", _FLOAT, _NUMBERS),
    (_TWO_WAYS, _AMBIGUOUS, _NUMBERS),
    (f"{_TAG}bool", _BOOL, list("tTfF")),
    (f"{_TAG}null", _NULL, ["~", "n", "N", ""]),
):
    for _yaml_class in (Loader, Dumper):
        _yaml_class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern.pattern})$"), _first)
Dumper.add_representer(str, Dumper._str)
Loader.add_constructor(f"{_TAG}str", Loader._text)
Loader.add_constructor(f"{_TAG}int", Loader._int)
Loader.add_constructor(f"{_TAG}float", Loader._float)
Loader.add_constructor(f"{_TAG}bool", Loader._bool)
Loader.add_constructor(_TWO_WAYS, Loader._two_ways)


def load(text: str) -> Any:
    """The value of a YAML document.

    Raises ValueError, with the line and what is wrong there, for what is not the YAML
    of recipes.
    """
    try:
        value = yaml.load(text, Loader=Loader)
        _check_size(value)
        return value
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        if isinstance(error, yaml.reader.ReaderError):
            raise ValueError(f"the character {chr(error.character)!r} is not allowed in YAML") from None
        raise ValueError(f"{line}{getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise ValueError("lists or settings are nested too deeply") from None
    except (ValueError, OverflowError) as error:  # an escape such as "\\UFFFFFFFF"
        raise ValueError(f"not YAML ({error})") from None


def _check_size(value: Any) -> None:
    """Raise ValueError for a value that contains itself, or repeats itself without end,
    by `&a` and `*a`.
    """
    waiting, num_values = [value], 0
    while waiting:
        value = waiting.pop()
        num_values += 1
        if num_values > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values, or a value that contains itself")
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def dump(value: Any) -> str:
    """A value as YAML that `load` reads back unchanged; settings keep their order."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def shortened(text: str) -> str:
    """Text in quotes, cut after 80 characters."""
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


def _as_number(text: str) -> str:
    """What a person most likely means by a number with underscores or a base."""
    plain = text.replace("_", "").lower()
    try:
        return str(int(plain, 0))
    except ValueError:
        return plain
