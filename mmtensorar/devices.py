"""Choose the device: that of a command's --device, else a GPU if there is one."""

from __future__ import annotations

import torch


def pick(name: str | None) -> torch.device:
    """The device with this name. None: the GPU if there is one, else the CPU.

    Raises ValueError when the name is not a device, or is a GPU that does not exist.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; expected for example cpu or cuda:0") from None
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but {torch.cuda.device_count()} GPUs are visible")
    return device
