"""Whether two adapters found the same: similarity of their leading subspaces, of ΔW itself, and of how A began."""

import math

import torch
from torch import Tensor

from fastlora.analysis.factors import check_factors, check_matrix, numerical_rank

SIDES = ("right", "left")


def subspace_similarity(first: Tensor, second: Tensor, side: str = "right") -> Tensor:
    """φ(A₁, A₂, i, j) = ‖U₁ᵢᵀ·U₂ⱼ‖²_F / min(i, j) for every i and j at once.

    U₁ᵢ [K, i] holds the top i right-singular directions of A₁. φ is the mean squared cosine of the principal angles
    between the two subspaces: 1 where one contains the other, 0 where they are orthogonal; with p = min(i, j) and the
    projection metric d of the Grassmann manifold, φ = 1 − d² / p.

    Args:
        first: A₁ [r1, K] (side "right"), or B₁ [N, r1] (side "left").
        second: A₂ [r2, K], or B₂ [N, r2]. Any floating-point dtype; the computation is in float64.
        side: "right" compares the directions that A reads, "left" those that B writes.

    Returns:
        [r1, r2] float64, entry [i − 1, j − 1] for i and j. NaN where i or j exceeds the matrix's rank: a B that is
        still zero has no directions, and those past the rank would be arbitrary.

    Raises:
        ValueError: not matrices over one space K (or N), rank 0, NaN or infinity, different devices, an unknown side.
        TypeError: not floating-point tensors.

    Source: Hu et al. 2021 (arXiv:2106.09685), section 7.2, equation 4, and appendix G.
    """
    if side not in SIDES:
        raise ValueError(f"side must be one of {', '.join(map(repr, SIDES))}, got {side!r}")
    check_matrix("first", first)
    check_matrix("second", second)
    space, ranks = (1, 0) if side == "right" else (0, 1)
    if first.shape[space] != second.shape[space]:
        raise ValueError(
            f"first {list(first.shape)} and second {list(second.shape)} do not lie in one space: "
            f"dimension {space} must agree for side {side!r}"
        )
    if first.device != second.device:
        raise ValueError(f"first is on {first.device}, second on {second.device}")
    table = first.new_full((first.shape[ranks], second.shape[ranks]), torch.nan, dtype=torch.float64)
    u_1, u_2 = _directions(first, side), _directions(second, side)
    overlap = (u_1.T @ u_2).square().cumsum(0).cumsum(1)
    table[: u_1.shape[1], : u_2.shape[1]] = (overlap / _smaller(*overlap.shape, overlap.device)).clamp(max=1.0)
    return table


def random_similarity(r1: int, r2: int, size: int) -> Tensor:
    """What φ is on average for independent random subspaces of a space of `size` dimensions: max(i, j) / size.

    E‖U₁ᵢᵀ·U₂ⱼ‖²_F = i·j / size, divided by min(i, j).

    Returns:
        [r1, r2] float64; NaN where i or j exceeds `size`: there is no such subspace.

    Raises:
        ValueError: a rank or the size is below 1.
    """
    if min(r1, r2, size) < 1:
        raise ValueError(f"ranks and size must be at least 1, got {r1}, {r2} and {size}")
    i = torch.arange(1, r1 + 1, dtype=torch.float64)
    j = torch.arange(1, r2 + 1, dtype=torch.float64)
    larger = torch.maximum(i[:, None], j)
    return (larger / size).masked_fill(larger > size, torch.nan)


def delta_cosine(first: tuple[Tensor, Tensor, float], second: tuple[Tensor, Tensor, float]) -> float:
    """⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖·‖ΔW₂‖), the cosine of two updates as vectors of N·K numbers: 1 for the same change up to its
    size, near 0 for unrelated ones. By ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂)∘(A₁A₂ᵀ), without either product.

    Args:
        first, second: A [r, K], B [N, r] and the scaling of each; ranks may differ.

    Returns:
        Between −1 and 1; NaN where a ΔW is 0.

    Raises:
        ValueError, TypeError: as ``check_factors``; or N or K differ.
    """
    for each in (first, second):
        check_factors(*each)
    (a_1, b_1, s_1), (a_2, b_2, s_2) = ((a.detach().double(), b.detach().double(), s) for a, b, s in (first, second))
    if a_1.shape[1] != a_2.shape[1] or b_1.shape[0] != b_2.shape[0]:
        raise ValueError(
            f"ΔW of [{b_1.shape[0]}, {a_1.shape[1]}] and of [{b_2.shape[0]}, {a_2.shape[1]}] are of different shape"
        )

    def inner(a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor) -> float:
        return ((b.T @ other_b) * (a @ other_a.T)).sum().item()

    squares = inner(a_1, b_1, a_1, b_1), inner(a_2, b_2, a_2, b_2)
    if min(squares) <= 0.0 or not s_1 * s_2:
        return math.nan
    cosine = inner(a_1, b_1, a_2, b_2) / math.sqrt(squares[0] * squares[1]) * math.copysign(1.0, s_1 * s_2)
    return min(1.0, max(-1.0, cosine))


def row_similarity(first: Tensor, second: Tensor) -> float:
    """Mean cosine of the corresponding rows of two A.

    Training turns what A spans, but not row i of one adapter towards row i of another: rows that correspond are what is
    left of a common random start.

    Args:
        first: [r1, K]. second: [r2, K]; the first min(r1, r2) rows are compared.

    Raises:
        ValueError, TypeError: as ``subspace_similarity``.
    """
    check_matrix("first", first)
    check_matrix("second", second)
    r = min(len(first), len(second))
    return torch.cosine_similarity(first[:r].detach().double(), second[:r].detach().double(), dim=1).mean().item()


def _directions(matrix: Tensor, side: str) -> Tensor:
    """The leading singular directions as columns, as many as the matrix's rank."""
    u, s, vh = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    basis = vh.T if side == "right" else u
    return basis[:, : numerical_rank(s, max(matrix.shape))]


def _smaller(rows: int, columns: int, device: torch.device) -> Tensor:
    """min(i, j), counted from 1."""
    i = torch.arange(1, rows + 1, dtype=torch.float64, device=device)
    j = torch.arange(1, columns + 1, dtype=torch.float64, device=device)
    return torch.minimum(i[:, None], j)
