"""Parity: our models compared with tensors recorded from the original code.

    python -m tests.parity FIXTURE_DIR [...]

A fixture folder holds cases. A case is NAME.json (a manifest with `calls`) and
NAME.safetensors or NAME.safetensors.xz (weights/, inputs/ and outputs/). The manifest's
`family` names the adapter, tests/parity/FAMILY.py, with two functions:

    load(manifest, weights) -> subject
        weights: official names -> float32 tensors, without `weights/`.
    run(subject, call, inputs) -> outputs
        Both use full names. inputs: `inputs/...`, and recorded outputs that the call's arguments name.
        outputs: `outputs/...`.

Adapters take settings from the manifest's `config` and a call's `args`, never from ids.
They raise Unsupported for a call that they do not expose, and `load` raises ValueError
for a manifest from which it cannot build a model.

Folders of evaluator fixtures (recorded detections, answers or features with official
scores) are compared by the scoring functions of eval/ instead, see evaluators.py.
"""

import lzma
from pathlib import Path

from safetensors.torch import load, load_file
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"


def tensors_file(manifest: Path) -> Path:
    """The file with the tensors of NAME.json: NAME.safetensors, or the same compressed
    with xz.
    """
    plain = manifest.with_suffix(".safetensors")
    packed = plain.with_name(plain.name + ".xz")
    return packed if packed.is_file() and not plain.is_file() else plain


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Raises SafetensorError, lzma.LZMAError or OSError."""
    return load(lzma.decompress(path.read_bytes())) if path.suffix == ".xz" else load_file(path)


class Unsupported(Exception):
    """A call that our implementation does not expose.

    It is skipped when the manifest marks it optional; otherwise it is a failure.
    """


def by_last_name(call: dict, found: dict) -> dict:
    """{last part of a name: tensor} -> {full name of the output: tensor}, for names in
    `found`.
    """
    return {name: found[last] for name in call["outputs"] if (last := name.rsplit("/", 1)[1]) in found}
