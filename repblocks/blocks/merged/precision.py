"""Which dtype a convolution runs in under autocast, and the arithmetic of statistics, which never does."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def convolution_dtype(x: Tensor) -> torch.dtype:
    """What autocast makes of x in front of a convolution; x's own dtype without autocast."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Every operation in the dtype of its operands."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def widened(x: Tensor) -> Tensor:
    """Half precision as float32."""
    return x.float() if x.dtype in _HALF else x
