"""The choice of a backend, and what is counted."""

import pytest
import torch

import fastlora
from fastlora import dispatch
from fastlora.dispatch import select_backend
from fastlora.problem import LaunchSpec, Sizes

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def spec(device=GPU, dtype=torch.bfloat16, sizes=(64, 64, 64, 8), direction="forward", **changes) -> LaunchSpec:
    return LaunchSpec(direction, Sizes(*sizes), dtype, (dtype, dtype), device, **changes)


@pytest.fixture
def reasons(monkeypatch):
    """Backends that serve everything; a test makes one refuse by setting its reason."""
    table = dict.fromkeys(dispatch.BACKENDS)
    monkeypatch.setattr(dispatch, "_why_unsupported", lambda name, spec: table[name])
    dispatch._route.cache_clear()
    yield table
    dispatch._route.cache_clear()


@pytest.fixture
def counts():
    fastlora.reset_dispatch_counts()
    yield fastlora.dispatch_counts
    fastlora.reset_dispatch_counts()


def layer_arguments(m=4, r=2):
    return torch.ones(m, 6), torch.ones(5, 6), torch.ones(r, 6), torch.ones(5, r), 2.0


def test_the_fastest_backend_is_preferred(reasons):
    assert select_backend(spec(), None) == ("cuda", ())
    reasons["cuda"] = "cuda: rank 7 is not a multiple of 8"
    assert select_backend(spec(), None) == ("triton", ("cuda: rank 7 is not a multiple of 8",))
    reasons["triton"] = "triton: rank 300 is above 256"
    name, passed_over = select_backend(spec(), None)
    assert name == "reference" and len(passed_over) == 2


def test_cpu_tensors_take_the_reference_without_a_fallback(reasons):
    assert select_backend(spec(device=CPU), None) == ("reference", ())


def test_a_requested_backend_is_taken_or_refused(reasons):
    assert select_backend(spec(), "triton") == ("triton", ())
    reasons["triton"] = "triton: no CUDA device"
    with pytest.raises(ValueError, match="backend 'triton' cannot serve this call: triton: no CUDA device"):
        select_backend(spec(), "triton")
    with pytest.raises(ValueError, match="unknown backend 'cublas'; choose one of cuda, triton, reference"):
        select_backend(spec(), "cublas")


def test_forward_and_backward_are_counted(counts):
    x, *rest = layer_arguments()
    fastlora.lora_linear(x.requires_grad_(), *rest).sum().backward()
    assert counts() == {"cuda": 0, "triton": 0, "reference": 2, "fallbacks": {}}


def test_fallbacks_are_counted_by_reason(counts, reasons):
    reasons["cuda"] = "cuda: not built"
    reasons["triton"] = "triton: dtype torch.float64"
    for _ in range(3):
        assert dispatch._counted(dispatch._route(spec(), None)) and counts()["cuda"] == counts()["triton"] == 0
    assert counts()["reference"] == 3
    assert counts()["fallbacks"] == {"cuda: not built": 3, "triton: dtype torch.float64": 3}
    dispatch.count_fallback("peft: merged")
    assert counts()["fallbacks"]["peft: merged"] == 1


def test_the_environment_variable_insists(counts, monkeypatch):
    monkeypatch.setenv("FASTLORA_BACKEND", "reference")
    fastlora.lora_linear(*layer_arguments())
    assert counts()["reference"] == 1
    monkeypatch.setenv("FASTLORA_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="unknown backend 'nonsense'"):
        fastlora.lora_linear(*layer_arguments())


def test_triton_refuses_what_it_cannot_compute():
    from fastlora.backends.triton import launch as triton_lora

    assert triton_lora.why_unsupported(spec()) is None
    assert "float64" in triton_lora.why_unsupported(spec(dtype=torch.float64))
    assert "rank 257" in triton_lora.why_unsupported(spec(sizes=(1, 1, 1, 257)))


def test_available_backends_give_a_reason():
    found = fastlora.available_backends()
    assert list(found) == ["cuda", "triton", "reference"]
    assert found["reference"] == "usable"
    if not torch.cuda.is_available():
        assert all(found[name] != "usable" and len(found[name]) > 10 for name in ("cuda",))


def test_ranks_beyond_the_kernels_are_served(counts):
    assert fastlora.lora_linear(*layer_arguments(r=300)).shape == (4, 5)
    assert counts()["reference"] == 1
