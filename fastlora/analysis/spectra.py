"""How many directions an adapter uses: singular values and effective rank of ΔW."""

import torch
from torch import Tensor

from fastlora.analysis.factors import check_factors


def spectrum(lora_a: Tensor, lora_b: Tensor, scaling: float = 1.0) -> Tensor:
    """Singular values of ΔW = scaling·B·A, which is never formed.

    With B = Q_b·R_b and Aᵀ = Q_a·R_a they are those of scaling·R_b·R_aᵀ [r, r]: (N + K)·r² operations, not N·K.

    Args:
        lora_a: [r, K]. lora_b: [N, r]. Any floating-point dtype; the computation is in float64.
        scaling: the factor of B·A.

    Returns:
        [min(r, N, K)] float64, descending; all zero where B or A is (an adapter that has not trained yet).

    Raises:
        ValueError: the shapes do not fit each other, rank 0, NaN or infinity, different devices.
        TypeError: not floating-point tensors, or a scaling that is no number.
    """
    check_factors(lora_a, lora_b, scaling)
    r_b = torch.linalg.qr(lora_b.detach().double(), mode="r").R
    r_a = torch.linalg.qr(lora_a.detach().double().T, mode="r").R
    return torch.linalg.svdvals(scaling * (r_b @ r_a.T))


def effective_rank(lora_a: Tensor, lora_b: Tensor | None = None, scaling: float = 1.0) -> float:
    """exp(−Σ pᵢ·ln pᵢ) with pᵢ = σᵢ / Σσ: k for k equal singular values, near 1 where one dominates.

    Args:
        lora_a: [r, K], or singular values [q] as `spectrum` returns them; lora_b is left out then.
        lora_b: [N, r].
        scaling: the factor of B·A; it does not change the result unless it is 0.

    Returns:
        Between 1 and the number of singular values; 0.0 for ΔW = 0.

    Raises:
        ValueError, TypeError: as `spectrum`; or the singular values are empty, negative, NaN or infinite.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007).
    """
    values = _checked_values(lora_a) if lora_b is None else spectrum(lora_a, lora_b, scaling)
    total = values.sum()
    if total == 0:
        return 0.0
    return torch.special.entr(values / total).sum().exp().item()


def _checked_values(values: Tensor) -> Tensor:
    if not isinstance(values, Tensor) or values.dim() != 1 or not values.is_floating_point():
        what = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"effective_rank takes lora_a and lora_b, or floating-point singular values [q]; got {what}")
    values = values.detach().double()
    if not len(values) or not torch.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"singular values must be finite and not negative, at least one, got {values.tolist()[:8]}")
    return values
