"""The device that a command's --device names."""

from __future__ import annotations

import torch


def pick(name: str | None) -> torch.device:
    """None is the GPU if there is one, else the CPU. Raises ValueError for a name that is no device, or an absent GPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; expected for example cpu or cuda:0") from None
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but {torch.cuda.device_count()} GPUs are visible")
    return device
