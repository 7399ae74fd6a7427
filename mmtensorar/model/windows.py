"""Overlapping windows of image tokens: index arithmetic only.

Shapes: B batch, T image tokens, K window, F factors.
"""

import torch
from torch import Tensor


def valid_slots(num_tokens: int, window: int, device: torch.device | str | None = None) -> Tensor:
    """[T, K] bool: True where slot i of window t lies inside the image, t + i < T.

    Raises ValueError when window is outside 1..T.
    """
    if not 1 <= window <= num_tokens:
        raise ValueError(f"window is {window}; expected 1 to {num_tokens}, the number of image tokens")
    start_T = torch.arange(num_tokens, device=device)
    offset_K = torch.arange(window, device=device)
    return start_T[:, None] + offset_K < num_tokens


def slide(codes: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Cut codes into overlapping windows (TensorAR, arXiv:2505.16324).

    codes: [B, T, F] int64, raster order. window: K, with 1 <= K <= T.
    Returns windows [B, T, K, F], windows[:, t, i] = codes[:, t + i], and
    valid [T, K] bool, False past the last token (those slots hold 0).
    Raises ValueError when window is outside 1..T.
    """
    T = codes.shape[1]
    valid_TK = valid_slots(T, window, codes.device)
    start_T = torch.arange(T, device=codes.device)
    offset_K = torch.arange(window, device=codes.device)
    index_TK = (start_T[:, None] + offset_K).clamp(max=T - 1)
    return codes[:, index_TK] * valid_TK[:, :, None], valid_TK
