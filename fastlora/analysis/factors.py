"""ΔW = scaling·B·A by its factors: what may be analysed, and its singular value decomposition without the product."""

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor


class ThinSVD(NamedTuple):
    """ΔW = U·diag(S)·Vᵀ with q = min(r, N, K): u [N, q], s [q] descending, v [K, q]; float64."""

    u: Tensor
    s: Tensor
    v: Tensor

    @property
    def rank(self) -> int:
        """Singular values that float64 can tell from zero."""
        return numerical_rank(self.s, max(len(self.u), len(self.v)))


def check_matrix(name: str, value: Tensor) -> None:
    """Refuses what is no finite floating-point matrix with elements.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: not 2-D, an empty dimension (rank 0), NaN or infinity.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}")
    if value.dim() != 2 or 0 in value.shape:
        raise ValueError(f"{name} must be a matrix of rank 1 or more with no empty dimension, got {list(value.shape)}")
    if value.is_meta:
        raise ValueError(f"{name} {list(value.shape)} is on the meta device and holds no values")
    # Smallest and largest carry NaN along, and need no mask of the matrix's size.
    if not torch.isfinite(torch.stack(torch.aminmax(value.detach()))).all():
        count = int((~torch.isfinite(value)).sum())
        raise ValueError(f"{name} {list(value.shape)} has {count} elements that are NaN or infinite")


def check_factors(lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
    """Refuses what are no A [r, K] and B [N, r] of one layer.

    Raises:
        TypeError: not floating-point tensors, or a scaling that is no number.
        ValueError: shapes that do not fit each other, NaN or infinity, rank 0, different devices.
    """
    check_matrix("lora_a", lora_a)
    check_matrix("lora_b", lora_b)
    if lora_a.shape[0] != lora_b.shape[1]:
        raise ValueError(
            f"lora_a {list(lora_a.shape)} and lora_b {list(lora_b.shape)} are of different rank: "
            "expected lora_a [r, K] and lora_b [N, r]"
        )
    if lora_a.device != lora_b.device:
        raise ValueError(f"lora_a is on {lora_a.device}, lora_b on {lora_b.device}")
    if isinstance(scaling, bool) or not isinstance(scaling, Real):
        raise TypeError(f"scaling must be a number, got {scaling!r}")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")


def numerical_rank(values: Tensor, size: int) -> int:
    """How many descending float64 singular values of a matrix, whose longer side is `size`, are not rounding noise."""
    noise = values[0] * size * torch.finfo(torch.float64).eps
    return int((values > noise).sum())


def thin_svd(lora_a: Tensor, lora_b: Tensor, scaling: float) -> ThinSVD:
    """Singular value decomposition of scaling·B·A at a cost of (N + K)·r², never N·K.

    B = Q_b·R_b and Aᵀ = Q_a·R_a, so that ΔW = Q_b·(scaling·R_b·R_aᵀ)·Q_aᵀ, whose middle is at most r × r.

    Args:
        lora_a: [r, K]. lora_b: [N, r]. scaling: the factor of B·A.

    Raises:
        As `check_factors`.
    """
    check_factors(lora_a, lora_b, scaling)
    q_b, r_b = torch.linalg.qr(lora_b.detach().double())
    q_a, r_a = torch.linalg.qr(lora_a.detach().double().T)
    u, s, vh = torch.linalg.svd(scaling * (r_b @ r_a.T), full_matrices=False)
    return ThinSVD(q_b @ u, s, q_a @ vh.T)
