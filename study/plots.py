"""matplotlib, drawing into files."""

from __future__ import annotations

from pathlib import Path


def pyplot():
    """matplotlib's pyplot without a display.

    Raises ValueError when matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots need matplotlib: pip install -e '.[study]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure, path: Path) -> None:
    """Write and close a figure.

    Its bytes depend on its content only: the file names no software.
    """
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot().close(figure)
