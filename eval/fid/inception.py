"""FID's Inception network, from torch-fidelity: TensorFlow's graph of 2015, with its
weights and resizing.

ADM's evaluator reads three tensors of that graph. torch-fidelity names two of them:
pool [2,048] and the logits without their bias [1,008]. The spatial features have no
name there: they are the first 7 channels of mixed_6/conv, the 1x1 branch of the block
Mixed_6d, 17 x 17 x 7 = 2,023 numbers.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmtensorar.checkpoints.released import refusal, weight_hash

SPATIAL_CHANNELS = 7


class Features(NamedTuple):
    """Features of N pictures, float32."""

    pool: np.ndarray  # [N, 2048]
    spatial: np.ndarray  # [N, 2023], in the order of TensorFlow's [17, 17, 7]
    logits: np.ndarray  # [N, 1008]


class Inception:
    """The network. name: with a hash of the weights."""

    def __init__(self, state: dict[str, Tensor], device: torch.device, name: str):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise ValueError(
                "Inception features need the package torch-fidelity: pip install -e '.[eval]'"
            ) from None
        # The class unpickles the file that it is given; this one is our own.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        try:
            self.net = FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=buffer
            )
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"--inception: {name} does not hold torch-fidelity's Inception ({reason})"
            ) from None
        self.net.to(device)
        self.device, self.name = device, f"{name} ({weight_hash(state)[:12]})"
        self._spatial: Tensor | None = None
        self.net.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    @classmethod
    def load(cls, path: Path | None, device: torch.device) -> Inception:
        """path: torch-fidelity's weights file; None: downloaded once, 95 MB.

        Raises ValueError on failure.
        """
        if path is not None and not path.is_file():
            found = "a folder; expected a file" if path.is_dir() else "no such file"
            raise ValueError(f"--inception: {path}: {found}")
        try:
            if path is not None:
                return cls(torch.load(path, map_location="cpu", weights_only=True), device, path.name)
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

            state = torch.hub.load_state_dict_from_url(
                URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True
            )
            return cls(state, device, URL_INCEPTION_V3.rsplit("/", 1)[-1])
        except ImportError:
            raise ValueError(
                "Inception features need the package torch-fidelity: pip install -e '.[eval]'"
            ) from None
        except ValueError:
            raise
        except Exception as error:  # any: downloads and unknown files fail in many ways
            source = path or "torch-fidelity's weights; give the file with --inception"
            raise ValueError(f"--inception: cannot load {source} ({refusal(error)})") from None

    def _keep(self, module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS]

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray) -> Features:
        """[N, H, W, 3] uint8 -> features.

        Raises ValueError when they are not finite.
        """
        pixels = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).to(self.device)
        try:
            pool, logits = self.net(pixels)
        except torch.OutOfMemoryError:
            raise ValueError(
                f"the GPU has too little memory for {len(pictures)} pictures; try a smaller --batch-size"
            ) from None
        spatial = self._spatial.permute(0, 2, 3, 1).flatten(1)
        features = Features(*(values.float().cpu().numpy() for values in (pool, spatial, logits)))
        if not all(np.isfinite(values).all() for values in features):
            raise ValueError(
                f"{self.name} gives features that are not finite: "
                "its weights or this machine compute nonsense"
            )
        return features
