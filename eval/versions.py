"""Versions that a score may depend on, for its summary."""

import platform
from importlib import metadata

PACKAGES = (
    "mmtensorar",
    "torch",
    "transformers",
    "open_clip_torch",
    "torch-fidelity",
    "numpy",
    "scipy",
    "pillow",
)


def installed() -> dict[str, str]:
    """Name -> version of Python and of those PACKAGES that are installed. Nothing is imported."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
