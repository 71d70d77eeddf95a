"""What ΔW does with the frozen weight: which of W's directions it amplifies, and by how much."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.analysis.factors import check_factors, check_matrix, thin_svd

# Up to this smaller dimension the singular values of W come from its Gram matrix; beyond, from a Krylov space.
EXACT_SIZE = 2048
KRYLOV_STEPS = 8
OVERSAMPLING = 16
# W is converted by blocks of rows: no copy of all of it is made.
BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Amplification:
    """One row of the paper's table 7. All are Frobenius norms, but `rank` and `factor`.

    Attributes:
        rank: directions r taken from each matrix: the rank of ΔW, 0 for an adapter that has not trained yet.
        delta_projection: ‖UᵀWV‖ with U, V the top r singular directions of ΔW: how much of W lies where ΔW acts.
        weight_projection: the same with those of W itself: the most that any r directions can hold.
        random_projection: the same with those of a random matrix: what chance would hold.
        random_expected: root mean square of the last over random matrices, r·‖W‖ / √(N·K).
        weight_norm: ‖W‖. delta_norm: ‖ΔW‖.
        factor: delta_norm / delta_projection: by how much ΔW amplifies the directions that it acts on. Infinite where W
            has nothing there. For ΔW = 0 it and the projections are NaN: there are no directions.
    """

    rank: int
    delta_projection: float
    weight_projection: float
    random_projection: float
    random_expected: float
    weight_norm: float
    delta_norm: float
    factor: float


def amplification(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, seed: int = 0) -> Amplification:
    """‖UᵀWV‖_F with U [N, r] and V [K, r] from ΔW, from W and from a random matrix, and the factor ‖ΔW‖_F / ‖UᵀWV‖_F.

    ΔW = scaling·B·A is never formed, and W enters through products with r columns. The singular directions of a
    Gaussian matrix are drawn as what they are, two independent uniformly random orthonormal bases. Of W's own
    directions only the singular values are needed: ‖UᵀWV‖² is the sum of the r largest squares; see
    `top_singular_values`.

    Args:
        weight: W [N, K]. lora_a: [r, K]. lora_b: [N, r]. Any floating-point dtypes; the computation is in float64.
        scaling: the factor of B·A.
        seed: of the random matrix.

    Raises:
        ValueError: the shapes do not fit each other, rank 0, NaN or infinity, different devices.
        TypeError: not floating-point tensors, or a scaling that is no number.

    Source: Hu et al. 2021 (arXiv:2106.09685), section 7.3, table 7, and appendix H.4.
    """
    check_matrix("weight", weight)
    check_factors(lora_a, lora_b, scaling)
    n, k = weight.shape
    if lora_a.shape[1] != k or lora_b.shape[0] != n:
        raise ValueError(
            f"weight {[n, k]} does not fit lora_a {list(lora_a.shape)} and lora_b {list(lora_b.shape)}: "
            "expected weight [N, K], lora_a [r, K], lora_b [N, r]"
        )
    if weight.device != lora_a.device:
        raise ValueError(f"weight is on {weight.device}, lora_a and lora_b on {lora_a.device}")
    delta = thin_svd(lora_a, lora_b, scaling)
    rank, delta_norm = delta.rank, delta.s.norm().item()
    weight_norm = math.sqrt(sum(block.square().sum().item() for _, block in _row_blocks(weight)))
    if rank == 0:
        return Amplification(0, *[math.nan] * 4, weight_norm, delta_norm, math.nan)
    generator = torch.Generator().manual_seed(seed)
    u, v = (_random_basis(size, rank, generator).to(weight.device) for size in (n, k))
    on_delta = _projection_norm(weight, delta.u[:, :rank], delta.v[:, :rank])
    return Amplification(
        rank=rank,
        delta_projection=on_delta,
        weight_projection=top_singular_values(weight, rank, seed).norm().item(),
        random_projection=_projection_norm(weight, u, v),
        random_expected=rank * weight_norm / math.sqrt(n * k),
        weight_norm=weight_norm,
        delta_norm=delta_norm,
        factor=delta_norm / on_delta if on_delta else math.inf,
    )


def top_singular_values(weight: Tensor, count: int, seed: int = 0) -> Tensor:
    """The largest singular values of W [N, K], without a full decomposition of a large one.

    Where min(N, K) ≤ 2048: square roots of the eigenvalues of the smaller Gram matrix, in float64, with a relative
    error of about 1e-16·(σ₁ / σᵢ)². Beyond: a block Krylov space of 8 powers with 16 columns to spare, 23 passes over
    W in float32 (float64 where W is). Where the spectrum falls off the norm of the values is exact to 1e-6; that of a
    Gaussian matrix, whose values crowd, comes out too low: 0.05% at 1500 × 1200, 0.4% at 4096 × 4096.

    Args:
        count: how many, from 1 to min(N, K). seed: of the Krylov space's random start.

    Returns:
        [count] float64, descending.

    Raises:
        ValueError: the count is out of range, or W is not a finite matrix.

    Source: Musco and Musco, "Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value
    Decomposition" (NeurIPS 2015).
    """
    check_matrix("weight", weight)
    smaller = min(weight.shape)
    if not 1 <= count <= smaller:
        raise ValueError(f"weight {list(weight.shape)} has {smaller} singular values, cannot give {count}")
    width = count + OVERSAMPLING
    if smaller <= EXACT_SIZE or width * KRYLOV_STEPS >= smaller:
        tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
        gram = sum(block.T @ block for _, block in _row_blocks(tall))
        return torch.linalg.eigvalsh(gram).flip(0)[:count].clamp(min=0).sqrt()
    start = torch.randn(weight.shape[1], width, generator=torch.Generator().manual_seed(seed))
    start = start.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    powers = [_orthonormal(_times(weight, start))]
    while len(powers) < KRYLOV_STEPS:
        powers.append(_orthonormal(_times(weight, _transposed_times(weight, powers[-1]))))
    basis = _orthonormal(torch.cat(powers, dim=1))
    return torch.linalg.svdvals(_transposed_times(weight, basis).double())[:count]


def _row_blocks(weight: Tensor, dtype: torch.dtype = torch.float64) -> Iterator[tuple[slice, Tensor]]:
    rows = max(1, BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        yield part, weight.detach()[part].to(dtype)


def _times(weight: Tensor, columns: Tensor) -> Tensor:
    return torch.cat([block @ columns for _, block in _row_blocks(weight, columns.dtype)])


def _transposed_times(weight: Tensor, columns: Tensor) -> Tensor:
    return sum(block.T @ columns[part] for part, block in _row_blocks(weight, columns.dtype))


def _projection_norm(weight: Tensor, u: Tensor, v: Tensor) -> float:
    """‖uᵀ·W·v‖_F."""
    return (u.T @ _times(weight, v)).norm().item()


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q


def _random_basis(size: int, rank: int, generator: torch.Generator) -> Tensor:
    """A uniformly random orthonormal basis [size, rank] of a subspace."""
    return _orthonormal(torch.randn(size, rank, dtype=torch.float64, generator=generator))
