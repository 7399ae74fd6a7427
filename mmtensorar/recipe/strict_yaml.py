"""The YAML of recipes: keys are text, no key occurs twice, and 2e-5 is a number."""

from __future__ import annotations

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """Refuses keys that are not text, and equal keys, of which plain YAML silently keeps the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key, problem = key_node.value, None
            if key_node.tag != "tag:yaml.org,2002:str":
                problem = f"a key must be text, got {key!r}" if isinstance(key, str) else "a key must be text"
            elif key in seen:
                problem = f"the key {key!r} is given twice"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class Dumper(yaml.SafeDumper):
    """Writes YAML that Loader reads back unchanged."""


# PyYAML reads 2e-5 as text, because it has no decimal point.
for _yaml_class in (Loader, Dumper):
    _yaml_class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
