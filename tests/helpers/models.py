"""What tests ask of a TensorAR that the product does not."""

from torch import Tensor

from mmtensorar.model.tensorar import TensorAR


def window_logits(model: TensorAR, hidden: Tensor, prev: Tensor) -> Tensor:
    """hidden [B, S, D], earlier factors prev [B, S, K, f] -> logits [B, S, K, V_f] of factor f."""
    return model.backbone.head(model.offset_states(hidden), prev)
