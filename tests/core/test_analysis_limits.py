"""fastlora.analysis: memory at full size, and every input that it refuses."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlora.analysis import (
    amplification,
    effective_rank,
    projections,
    random_similarity,
    spectrum,
    subspace_similarity,
    top_singular_values,
)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation inside allocated; views of what was there do not count."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        made = [leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf)]
        sizes = [leaf.numel() for leaf in made if leaf.untyped_storage().data_ptr() not in given]
        self.elements = max([self.elements, *sizes])
        return result


def test_spectrum_of_a_16384_square_layer_needs_no_matrix_of_its_size():
    size, r = 16384, 8
    torch.manual_seed(0)
    a, b = torch.randn(r, size), torch.randn(size, r)
    with LargestTensor() as largest:
        values = spectrum(a, b, 2.0)
        rank = effective_rank(a, b, 2.0)
        subspace_similarity(a, a)
    assert largest.elements <= r * size
    # ‖BA‖² without BA: the trace of (BᵀB)(AAᵀ).
    a, b = a.double(), b.double()
    assert values.square().sum().item() == pytest.approx(4 * ((b.T @ b) * (a @ a.T)).sum().item(), rel=1e-12)
    assert 1 < rank < r


def test_amplification_makes_no_matrix_of_the_weights_size(monkeypatch):
    monkeypatch.setattr(projections, "BLOCK_ELEMENTS", 1 << 18)
    monkeypatch.setattr(projections, "EXACT_SIZE", 512)
    n, k, r = 1024, 1536, 4
    torch.manual_seed(0)
    weight, a, b = torch.randn(n, k).half(), torch.randn(r, k), torch.randn(n, r)
    with LargestTensor() as largest:
        found = amplification(weight, a, b, 1.0)
    assert found.rank == r
    assert largest.elements <= n * k // 4


A, B, W = torch.randn(2, 8), torch.randn(6, 2), torch.randn(6, 8)
NAN = torch.full((2, 8), torch.nan)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: subspace_similarity(A, A[:, :5]), ["[2, 8]", "[2, 5]"]),
        (lambda: subspace_similarity(B, B[:4], side="left"), ["[6, 2]", "[4, 2]"]),
        (lambda: subspace_similarity(A, A, side="top"), ["'top'", "'left'"]),
        (lambda: subspace_similarity(A[0], A), ["first", "[8]"]),
        (lambda: subspace_similarity(A, A[:0]), ["second", "rank 1 or more", "[0, 8]"]),
        (lambda: subspace_similarity(A, NAN), ["second", "16 elements", "NaN"]),
        (lambda: subspace_similarity(A, A.to("meta")), ["meta"]),
        (lambda: random_similarity(0, 2, 8), ["0"]),
        (lambda: spectrum(A, B[:, :1]), ["lora_a [2, 8]", "lora_b [6, 1]", "rank"]),
        (lambda: spectrum(B, A), ["lora_a [6, 2]", "lora_b [2, 8]"]),
        (lambda: spectrum(A[:0], B[:, :0]), ["lora_a", "rank 1 or more"]),
        (lambda: spectrum(NAN, B), ["lora_a", "NaN"]),
        (lambda: spectrum(A, B * torch.inf), ["lora_b", "infinite"]),
        (lambda: spectrum(A, B, torch.nan), ["scaling", "nan"]),
        (lambda: effective_rank(A, B[:, :1]), ["rank"]),
        (lambda: effective_rank(torch.tensor([1.0, -1.0])), ["not negative"]),
        (lambda: effective_rank(torch.ones(0)), ["at least one"]),
        (lambda: amplification(W.T, A, B, 1.0), ["weight [8, 6]", "[2, 8]", "[6, 2]"]),
        (lambda: amplification(W[0], A, B, 1.0), ["weight", "[8]"]),
        (lambda: amplification(W * torch.nan, A, B, 1.0), ["weight", "NaN"]),
        (lambda: amplification(W, A, B[:, :1], 1.0), ["rank"]),
        (lambda: top_singular_values(W, 7), ["6 singular values", "7"]),
        (lambda: top_singular_values(W, 0), ["0"]),
    ],
)
def test_refused_values(call, words):
    with pytest.raises(ValueError) as refusal:
        call()
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: subspace_similarity([[1.0]], A), "first"),
        (lambda: subspace_similarity(A.int(), A), "int32"),
        (lambda: spectrum(A, B, "2"), "scaling"),
        (lambda: effective_rank(A), "lora_a and lora_b"),
        (lambda: amplification(W.to(torch.int8), A, B, 1.0), "int8"),
    ],
)
def test_refused_types(call, word):
    with pytest.raises(TypeError, match=word):
        call()
