"""Versions of the packages that a score may depend on, for its summary."""

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
    """Name -> version of Python and of the PACKAGES that are installed.

    Imports none of them.
    """
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
