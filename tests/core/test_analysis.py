"""fastlora.analysis against cases that can be solved by hand, and against full decompositions of small matrices."""

import math

import pytest
import torch

from fastlora.analysis import (
    amplification,
    delta_cosine,
    effective_rank,
    random_similarity,
    row_similarity,
    spectrum,
    subspace_similarity,
    top_singular_values,
)
from fastlora.analysis.factors import numerical_rank

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 through one QR and one SVD of small matrices


def basis(size, count, seed=0):
    """Orthonormal columns [size, count]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, count, dtype=torch.float64, generator=generator)).Q


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_singular_values(rows, values, seed=0):
    """[len(values), rows.shape[0]]: known singular values; right-singular directions are the columns, in order."""
    return basis(len(values), len(values), seed) @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ rows.T


def phi(a1, a2, i, j):
    """The paper's formula, literally."""
    u1 = torch.linalg.svd(a1.double()).Vh.T[:, :i]
    u2 = torch.linalg.svd(a2.double()).Vh.T[:, :j]
    return (torch.linalg.matrix_norm(u1.T @ u2) ** 2 / min(i, j)).item()


class TestSimilarity:
    def test_identical_subspaces_give_one(self):
        a = gaussian(5, 40)
        mixed = gaussian(5, 5, seed=1) @ a  # another basis of the same space
        table = subspace_similarity(a, a)
        assert table.shape == (5, 5) and table.dtype == torch.float64
        torch.testing.assert_close(table.diagonal(), torch.ones(5, dtype=torch.float64), **EXACT)
        assert subspace_similarity(a, mixed)[-1, -1].item() == pytest.approx(1, abs=1e-12)
        assert table.max() <= 1

    def test_orthogonal_subspaces_give_zero(self):
        columns = basis(40, 7)
        table = subspace_similarity(columns[:, :3].T * 2.0, columns[:, 3:].T)
        torch.testing.assert_close(table, torch.zeros(3, 4, dtype=torch.float64), **EXACT)

    def test_nested_subspaces_are_exact(self):
        """Directions 0…7 in falling order against 2…5 in falling order: every entry counts what the two share."""
        columns = basis(30, 8)
        wide = with_singular_values(columns, [8.0, 7, 6, 5, 4, 3, 2, 1])
        narrow = with_singular_values(columns[:, 2:6], [4.0, 3, 2, 1], seed=1)
        expected = [[len(set(range(2, 2 + i)) & set(range(j))) / min(i, j) for j in range(1, 9)] for i in range(1, 5)]
        table = subspace_similarity(narrow, wide)
        torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float64), **EXACT)
        torch.testing.assert_close(subspace_similarity(wide, narrow), table.T, **EXACT)

    def test_partial_overlap_is_the_squared_cosine(self):
        columns, angle = basis(20, 2), 0.3
        turned = math.cos(angle) * columns[:, 0] + math.sin(angle) * columns[:, 1]
        table = subspace_similarity(columns[:, :1].T, 7 * turned[None])
        assert table.item() == pytest.approx(math.cos(angle) ** 2, abs=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_every_entry_is_the_papers_formula(self, dtype):
        a1, a2 = gaussian(3, 24, dtype=dtype), gaussian(6, 24, seed=1, dtype=dtype)
        table = subspace_similarity(a1, a2)
        for i in range(1, 4):
            for j in range(1, 7):
                assert table[i - 1, j - 1].item() == pytest.approx(phi(a1, a2, i, j), abs=1e-12)

    def test_b_is_compared_by_its_left_directions(self):
        b1, b2 = gaussian(24, 3), gaussian(24, 6, seed=1)
        torch.testing.assert_close(subspace_similarity(b1, b2, side="left"), subspace_similarity(b1.T, b2.T), **EXACT)

    def test_directions_past_the_rank_are_nan(self):
        a, other = gaussian(4, 12), gaussian(3, 12, seed=1)
        a[3] = a[0] - 2 * a[1]
        table = subspace_similarity(a, other)
        assert table[:3].isfinite().all() and table[3].isnan().all()
        assert subspace_similarity(torch.zeros(12, 2), gaussian(12, 3), side="left").isnan().all()
        assert subspace_similarity(gaussian(5, 3), gaussian(2, 3, seed=1)).isnan().sum() == 2 * 2

    def test_rounding_noise_is_no_direction(self):
        values = torch.tensor([2.0, 1e-6, 4e-14], dtype=torch.float64)
        assert numerical_rank(values, 1000) == 2 and numerical_rank(values, 10) == 3

    def test_chance_is_the_mean_over_random_subspaces(self):
        """φ(i, j) of random subspaces within 5 standard errors of max(i, j) / K."""
        draws = torch.stack(
            [subspace_similarity(gaussian(2, 16, seed=s), gaussian(4, 16, seed=s + 999)) for s in range(400)]
        )
        error = (draws.mean(0) - random_similarity(2, 4, 16)).abs() / (draws.std(0) / len(draws) ** 0.5)
        assert error.max() < 5
        assert random_similarity(3, 2, 2).isnan().tolist() == [[False] * 2] * 2 + [[True] * 2]
        assert random_similarity(2, 4, 16)[1].tolist() == [2 / 16, 2 / 16, 3 / 16, 4 / 16]


class TestSpectrum:
    @pytest.mark.parametrize(("n", "k", "r"), [(30, 20, 4), (20, 30, 1), (3, 20, 8), (20, 3, 8)])
    def test_equals_that_of_the_product(self, n, k, r):
        a, b = gaussian(r, k), gaussian(n, r, seed=1)
        expected = torch.linalg.svdvals(-0.7 * b @ a)[: min(r, n, k)]
        # The backward error of either decomposition: a rounding of the largest value for every row or column.
        rounding = max(n, k) * torch.finfo(torch.float64).eps * expected[0].item()
        torch.testing.assert_close(spectrum(a, b, -0.7), expected, rtol=0, atol=rounding)

    def test_known_values(self):
        left, right, values = basis(50, 3), basis(40, 3, seed=1), torch.tensor([5.0, 2.0, 0.5], dtype=torch.float64)
        torch.testing.assert_close(spectrum(right.T, left * values, 2.0), 2 * values, **EXACT)

    @pytest.mark.parametrize(("values", "expected"), [([3.0] * 4, 4.0), ([2.0, 0, 0], 1.0), ([2.0, 2.0, 0], 2.0)])
    def test_effective_rank_counts_equal_directions(self, values, expected):
        q = len(values)
        a, b = basis(20, q).T, basis(25, q, seed=1) * torch.tensor(values, dtype=torch.float64)
        assert effective_rank(a, b, 0.5) == pytest.approx(expected, abs=1e-10)
        assert effective_rank(torch.tensor(values)) == pytest.approx(expected)

    def test_effective_rank_is_the_exponential_of_the_entropy(self):
        p = [0.7, 0.2, 0.1]
        expected = math.exp(-sum(x * math.log(x) for x in p))
        assert effective_rank(torch.tensor(p, dtype=torch.float64) * 9) == pytest.approx(expected, rel=1e-12)

    def test_an_untrained_adapter_has_no_directions(self):
        a, b = gaussian(4, 20), torch.zeros(30, 4)
        assert spectrum(a, b).tolist() == [0.0] * 4
        assert effective_rank(a, b) == 0.0


class TestAmplification:
    def test_aligned_with_the_top_direction_of_w(self):
        """ΔW = 3·u₁v₁ᵀ on W with σ₁ = 4: ‖UᵀWV‖ = 4 whatever else W holds, factor 3/4."""
        u, v, values = basis(30, 5), basis(24, 5, seed=1), torch.tensor([4.0, 2, 1, 0.5, 0.1], dtype=torch.float64)
        found = amplification(u * values @ v.T, v[:, :1].T, 1.5 * u[:, :1], 2.0)
        assert found.rank == 1
        assert found.delta_projection == pytest.approx(4.0)
        assert found.weight_projection == pytest.approx(4.0)
        assert found.delta_norm == pytest.approx(3.0)
        assert found.factor == pytest.approx(0.75)
        assert found.weight_norm == pytest.approx(values.norm().item())

    def test_aligned_with_lesser_directions_of_w(self):
        """ΔW on W's third and fourth directions, σ = 1 and 0.5: both together, signs and order regardless."""
        u, v, values = basis(24, 5), basis(30, 5, seed=1), torch.tensor([4.0, 2, 1, 0.5, 0.1], dtype=torch.float64)
        a, b = v[:, [3, 2]].T, u[:, [3, 2]] * torch.tensor([-6.0, 8.0], dtype=torch.float64)
        found = amplification(u * values @ v.T, a, b, 1.0)
        assert found.delta_projection == pytest.approx(math.sqrt(1.25))
        assert found.weight_projection == pytest.approx(math.sqrt(20))
        assert found.delta_norm == pytest.approx(10)
        assert found.factor == pytest.approx(10 / math.sqrt(1.25))

    def test_outside_of_w_the_factor_is_infinite(self):
        weight = torch.zeros(6, 8, dtype=torch.float64)
        weight[0, 0] = 2.0
        found = amplification(weight, torch.eye(8)[7:], torch.eye(6)[:, 5:], 1.0)
        assert found.delta_projection == 0 and found.factor == math.inf

    def test_equals_the_definition_on_formed_matrices(self):
        weight, a, b = gaussian(20, 26, dtype=torch.bfloat16), gaussian(3, 26, seed=1), gaussian(20, 3, seed=2)
        u, s, vh = torch.linalg.svd(0.25 * b @ a)
        found = amplification(weight, a, b, 0.25)
        projected = torch.linalg.matrix_norm(u[:, :3].T @ weight.double() @ vh[:3].T).item()
        assert found.delta_projection == pytest.approx(projected, rel=1e-12)
        assert found.factor == pytest.approx(s.norm().item() / projected, rel=1e-12)
        u, s, vh = torch.linalg.svd(weight.double())
        projected = torch.linalg.matrix_norm(u[:, :3].T @ weight.double() @ vh[:3].T).item()
        assert found.weight_projection == pytest.approx(projected, rel=1e-12)

    def test_random_baseline_within_its_confidence_interval(self):
        """The mean square over 300 random matrices within 5 standard errors of r²·‖W‖² / (N·K)."""
        weight, a, b = gaussian(12, 18) * 3, gaussian(2, 18, seed=1), gaussian(12, 2, seed=2)
        found = [amplification(weight, a, b, 1.0, seed=seed) for seed in range(300)]
        squares = torch.tensor([entry.random_projection**2 for entry in found])
        expected = 4 * weight.square().sum().item() / (12 * 18)
        assert found[0].random_expected ** 2 == pytest.approx(expected)
        assert abs(squares.mean().item() - expected) < 5 * squares.std().item() / len(found) ** 0.5
        assert amplification(weight, a, b, 1.0, seed=7).random_projection == found[7].random_projection

    def test_an_untrained_adapter(self):
        found = amplification(gaussian(6, 8), gaussian(2, 8), torch.zeros(6, 2), 2.0)
        assert found.rank == 0 and found.delta_norm == 0 and found.weight_norm > 0
        assert math.isnan(found.factor) and math.isnan(found.weight_projection)

    def test_directions_are_those_that_dw_has(self):
        """A rank-deficient ΔW: two of four directions, and as many of W's and of the random matrix's."""
        u, v = basis(12, 4), basis(16, 4, seed=1)
        weight = u * torch.tensor([4.0, 3, 2, 1], dtype=torch.float64) @ v.T
        a, b = v.T, torch.cat([u[:, 2:], torch.zeros(12, 2)], 1) @ basis(4, 4, seed=3)
        found = amplification(weight, a, b, 1.0)
        assert found.rank == 2 and found.weight_projection == pytest.approx(5.0)
        left, _, right = torch.linalg.svd(b @ a)
        projected = torch.linalg.matrix_norm(left[:, :2].T @ weight @ right[:2].T).item()
        assert found.delta_projection == pytest.approx(projected, rel=1e-10)


class TestTopSingularValues:
    @pytest.mark.parametrize("shape", [(40, 70), (70, 40)])
    def test_gram_matrix(self, shape, monkeypatch):
        monkeypatch.setattr("fastlora.analysis.projections.BLOCK_ELEMENTS", 200)  # several blocks, the last one short
        weight = gaussian(*shape)
        torch.testing.assert_close(
            top_singular_values(weight, 12), torch.linalg.svdvals(weight)[:12], rtol=1e-12, atol=0
        )

    @pytest.mark.parametrize(("count", "decay", "bound"), [(8, None, 1e-3), (4, 0.8, 1e-6)])
    def test_krylov_space(self, count, decay, bound, monkeypatch):
        """The documented accuracy, on the hardest spectrum and on one that falls off."""
        monkeypatch.setattr("fastlora.analysis.projections.EXACT_SIZE", 0)
        weight = gaussian(700, 600)
        if decay is not None:
            weight = basis(700, 100) * decay ** torch.arange(100) @ basis(600, 100, seed=1).T
        exact, found = torch.linalg.svdvals(weight)[:count].norm(), top_singular_values(weight, count).norm()
        assert exact * (1 - bound) < found <= exact * (1 + 1e-12)


class TestTwoAdapters:
    @pytest.mark.parametrize("s_1, s_2", ((1.0, 2.0), (0.5, -3.0)))
    def test_the_cosine_is_that_of_the_products(self, s_1, s_2):
        first = gaussian(3, 20), gaussian(12, 3, seed=1), s_1
        a, b = gaussian(5, 20, seed=2), gaussian(12, 5, seed=3)
        second = torch.cat([first[0], a]).float(), torch.cat([first[1], b], 1).float(), s_2
        deltas = [s * b.double() @ a.double() for a, b, s in (first, second)]
        exact = (deltas[0] * deltas[1]).sum() / (deltas[0].norm() * deltas[1].norm())
        assert delta_cosine(first, second) == pytest.approx(exact.item(), abs=1e-6)
        assert 0.3 < abs(exact) < 0.95 and (exact < 0) == (s_2 < 0)

    def test_the_same_update_by_other_factors(self):
        a, b, turned = gaussian(3, 20), gaussian(12, 3, seed=1), torch.linalg.qr(gaussian(3, 3, seed=2)).Q
        assert delta_cosine((a, b, 1.0), (turned @ a, 7 * b @ turned.T, 2.0)) == pytest.approx(1.0)

    def test_an_update_that_is_zero_has_none(self):
        a, b = gaussian(3, 20), gaussian(12, 3)
        assert math.isnan(delta_cosine((a, 0 * b, 1.0), (a, b, 1.0))) and math.isnan(
            delta_cosine((a, b, 1.0), (a, b, 0.0))
        )

    def test_updates_of_other_shapes_are_refused(self):
        with pytest.raises(ValueError, match=r"\[12, 20\] and of \[12, 21\]"):
            delta_cosine((gaussian(3, 20), gaussian(12, 3), 1.0), (gaussian(3, 21), gaussian(12, 3), 1.0))

    def test_rows_that_correspond(self):
        a = gaussian(4, 500)
        assert row_similarity(a, torch.cat([3 * a, gaussian(2, 500, seed=1)])) == pytest.approx(1.0)
        assert row_similarity(a, -a[:2]) == pytest.approx(-1.0)
        assert abs(row_similarity(a, gaussian(4, 500, seed=1))) < 5 / 2000**0.5
        assert abs(row_similarity(a, a.flip(0))) < 5 / 2000**0.5, "the same rows elsewhere"
