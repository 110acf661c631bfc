"""The precision that losses are computed in: float32, or float64 where any input has it."""

import torch
from torch import Tensor


def loss_dtype(*inputs: Tensor) -> torch.dtype:
    """float64 if an input is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def widen(x: Tensor) -> Tensor:
    """The same values in `loss_dtype`."""
    return x.to(loss_dtype(x))
