"""What no LoRA layer can be built with: hyperparameters and weights, checked before anything is made."""

import math
from numbers import Integral, Real

import torch
from torch import Tensor

INITS = ("kaiming", "gaussian")
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def weight_reason(weight: Tensor) -> str | None:
    """Why a LoRA layer cannot be built on this weight, or None."""
    return _dense_reason(weight, 2, "[out, in]")


def matrices_reason(weight: Tensor) -> str | None:
    """Why a branch cannot be put on this parameter of an experts module, or None."""
    return _dense_reason(weight, 3, "matrix for each expert")


def _dense_reason(weight: Tensor, dims: int, wanted: str) -> str | None:
    if weight.dim() == dims and weight.dtype in WEIGHT_DTYPES and weight.layout == torch.strided:
        return None
    layout = "" if weight.layout == torch.strided else f" {weight.layout}"
    return f"it is{layout} {weight.dtype} {list(weight.shape)}, not a dense floating-point {wanted} of 16 bits or more"


def check_adapter_dtype(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """Raises TypeError unless adapters of this dtype go with a weight of that one."""
    if dtype != weight_dtype and not (dtype == torch.float32 and weight_dtype.itemsize == 2):
        allowed = f"it must be {weight_dtype}" + (" or torch.float32" if weight_dtype.itemsize == 2 else "")
        raise TypeError(f"adapter_dtype {dtype} does not go with a {weight_dtype} weight; {allowed}")


def check_hyperparameters(r: int, alpha: float, dropout: float, init: str) -> None:
    """Raises ValueError or TypeError naming the hyperparameter that no LoRA layer can have."""
    if isinstance(r, bool) or not isinstance(r, Integral):
        raise TypeError(f"r must be an integer, got {r!r}")
    if r < 1:
        raise ValueError(f"r must be at least 1, got {r}")
    for name, value in (("alpha", alpha), ("dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}, got {init!r}")
