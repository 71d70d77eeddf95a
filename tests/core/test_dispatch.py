"""The choice of a backend, and what is counted."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

import fastlora
from fastlora import routes, selection
from fastlora.backends.triton import driver as triton_driver
from fastlora.counts import count_fallback
from fastlora.problem import BACKENDS, LaunchSpec, Sizes
from fastlora.selection import select_backend

DRIVER_UNUSABLE = triton_driver._driver_unusable.__wrapped__  # unremembered
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def spec(device=GPU, dtype=torch.bfloat16, sizes=(64, 64, 64, 8), direction="forward", **changes) -> LaunchSpec:
    return LaunchSpec(direction, Sizes(*sizes), dtype, (dtype, dtype), device, **changes)


@pytest.fixture
def reasons(monkeypatch):
    """Backends that serve everything; a test makes one refuse by setting its reason."""
    table = dict.fromkeys(BACKENDS)
    monkeypatch.setattr(routes, "_warned", True)
    monkeypatch.setattr(selection, "why_unsupported", lambda name, spec: table[name])
    routes.forget_routes()
    yield table
    routes.forget_routes()


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
    assert name == "composed" and len(passed_over) == 2
    reasons["composed"] = "composed: no C compiler"
    name, passed_over = select_backend(spec(), None)
    assert name == "reference" and len(passed_over) == 3


def test_cpu_tensors_take_the_reference_without_a_fallback(reasons):
    assert select_backend(spec(device=CPU), None) == ("reference", ())


def test_a_requested_backend_is_taken_or_refused(reasons):
    assert select_backend(spec(), "triton") == ("triton", ())
    reasons["triton"] = "triton: no CUDA device"
    with pytest.raises(ValueError, match="backend 'triton' cannot serve this call: triton: no CUDA device"):
        select_backend(spec(), "triton")
    with pytest.raises(ValueError, match="unknown backend 'cublas'; choose one of cuda, triton, composed, reference"):
        select_backend(spec(), "cublas")


def test_forward_and_backward_are_counted(counts):
    x, *rest = layer_arguments()
    fastlora.lora_linear(x.requires_grad_(), *rest).sum().backward()
    assert counts() == {"cuda": 0, "triton": 0, "composed": 0, "reference": 2, "fallbacks": {}}


def test_fallbacks_are_counted_by_reason(counts, reasons):
    reasons["cuda"] = "cuda: not built"
    reasons["triton"] = "triton: dtype torch.float64"
    reasons["composed"] = "composed: no kernel draws"
    for _ in range(3):
        assert routes.counted(routes.find_route(spec(), None)) and counts()["cuda"] == counts()["triton"] == 0
    assert counts()["reference"] == 3
    assert counts()["fallbacks"] == dict.fromkeys(filter(None, reasons.values()), 3)
    count_fallback("peft: merged")
    assert counts()["fallbacks"]["peft: merged"] == 1


def choose(description: LaunchSpec) -> str:
    """The backend that serves a call: what dispatch.forward does of it, without a GPU's tensors."""
    fastlora.reset_dispatch_counts()
    routes.counted(routes.find_route(description, None))
    (name,) = (name for name in BACKENDS if fastlora.dispatch_counts()[name])
    return name


@pytest.fixture
def backends(monkeypatch, counts):
    """A device on which every backend runs; nothing is launched. ``prepared`` lists the calls that a GPU's backends
    have been prepared for."""
    from fastlora.backends.cuda import extension
    from fastlora.backends.cuda import launch as cuda

    prepared = []

    def prepare(spec):
        prepared.append(spec)
        return lambda operands: (operands[0], operands[0])

    module = SimpleNamespace(device_count=lambda: 1, device_error=lambda: "no CUDA-capable device is detected")
    monkeypatch.setattr(extension, "load", lambda: (module, None))
    monkeypatch.setattr(extension, "variants", lambda: ({"arch": 90},))
    monkeypatch.setattr(cuda, "why_not_compiled", lambda spec: None)
    monkeypatch.setattr(cuda, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_driver, "_driver_unusable", lambda: None)
    for name in ("cuda", "triton"):
        monkeypatch.setattr(selection.backend_module(name), "prepare", prepare)
    monkeypatch.setattr(selection.backend_module("triton"), "why_unsupported", lambda spec: None)
    monkeypatch.setattr(triton_driver, "_driver_unusable", lambda: None)
    monkeypatch.setattr(routes, "_warned", True)
    routes.forget_routes()
    yield SimpleNamespace(module=module, extension=extension, cuda=cuda, prepared=prepared)
    routes.forget_routes()


def no_device(backends, patch):
    patch.setattr(torch.cuda, "is_available", lambda: False)


def none_that_the_runtime_finds(backends, patch):
    patch.setattr(backends.module, "device_count", lambda: 0)


def a_busy_device(backends, patch):
    def fail(device):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    patch.setattr(backends.cuda, "_capability", fail)


@pytest.mark.parametrize("fails", (no_device, none_that_the_runtime_finds, a_busy_device))
def test_a_reason_that_may_pass_is_asked_again_at_the_next_call(backends, fails):
    with pytest.MonkeyPatch.context() as patch:
        fails(backends, patch)
        for _ in range(2):
            assert choose(spec()) != "cuda"
    assert choose(spec()) == "cuda"
    known = len(backends.prepared)
    assert choose(spec()) == "cuda" and len(backends.prepared) == known, "a route without such a reason is remembered"


def test_that_triton_has_no_device_may_pass(backends, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("triton").knobs.runtime, "interpret", False)
    monkeypatch.setattr(backends.extension, "load", lambda: (None, "not built"))
    with pytest.MonkeyPatch.context() as patch:
        no_device(backends, patch)
        assert choose(spec(dropout=True)) == choose(spec(dropout=True)) == "reference"
        assert choose(spec()) == "composed", "which needs no Triton"
    assert choose(spec()) == choose(spec(dropout=True)) == "triton"


def test_a_reason_that_stays_is_remembered(backends, monkeypatch):
    monkeypatch.setattr(backends.cuda, "_capability", lambda device: (8, 0))
    assert choose(spec()) == choose(spec()) == "triton"
    assert len(backends.prepared) == 1


def a_rocm_torch(patch):
    patch.setattr(torch.version, "hip", "7.0")


def no_c_compiler(patch):
    patch.delenv("CC", raising=False)
    patch.setattr(triton_driver.shutil, "which", lambda name: None)


def a_compiler_that_is_not_there(patch):
    patch.setenv("CC", "no-such-compiler -O2")


def a_driver_that_does_not_build(patch):
    def fail():
        raise subprocess.CalledProcessError(1, ["gcc", "driver.c"])

    active = SimpleNamespace(get_current_target=fail)
    patch.setattr("triton.runtime.driver", SimpleNamespace(active=active))


def a_driver_error(patch):
    def fail(device=None):
        raise RuntimeError("CUDA error: system not yet initialized\nCompile with TORCH_USE_CUDA_DSA")

    patch.setattr(torch.cuda, "get_device_capability", fail)


@pytest.mark.parametrize(
    "fails, reason",
    (
        (a_rocm_torch, "built for ROCm"),
        (no_c_compiler, "neither gcc nor clang"),
        (a_compiler_that_is_not_there, "CC=no-such-compiler -O2 is not found"),
        (a_driver_that_does_not_build, "its driver does not start: CalledProcessError: Command"),
        (a_driver_error, "the device cannot be used: CUDA error: system not yet initialized"),
    ),
)
def test_what_triton_lacks_is_a_reason_and_no_crash(backends, counts, monkeypatch, fails, reason):
    monkeypatch.setattr(backends.extension, "load", lambda: (None, "not built"))
    monkeypatch.setattr(triton_driver, "_driver_unusable", DRIVER_UNUSABLE)
    fails(monkeypatch)
    assert choose(spec()) not in ("cuda", "triton")
    assert any(key.startswith("triton: ") and reason in key for key in counts()["fallbacks"])
    assert reason in fastlora.available_backends()["triton"]


def test_a_runtime_that_cannot_count_its_devices_is_a_reason(backends, counts, monkeypatch):
    def fail():
        raise RuntimeError("fastlora: cudaErrorSystemNotReady")

    monkeypatch.setattr(backends.module, "device_count", fail, raising=False)
    assert choose(spec()) != "cuda"
    assert any("cuda: the device cannot be used" in key for key in counts()["fallbacks"])


def test_devices_that_differ_are_named_each(backends, monkeypatch):
    capabilities = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr(backends.cuda, "_capability", lambda device: capabilities[device.index])
    found = fastlora.available_backends()
    assert found["triton"] == "cuda:0: usable; cuda:1: compute capability 7.5 is below 8.0"
    assert found["cuda"].startswith("cuda:0: usable; cuda:1: compiled for compute capability 9.0")
    assert choose(spec(device=torch.device("cuda", 1))) not in ("cuda", "triton")


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
    assert "32-bit offsets" in triton_lora.why_unsupported(spec(sizes=(1, 1, 2**23, 256)))
    assert triton_lora.why_unsupported(spec(sizes=(1, 2**30, 2**23 - 1, 256))) is None


def test_available_backends_give_a_reason():
    found = fastlora.available_backends()
    assert list(found) == ["cuda", "triton", "composed", "reference"]
    assert found["reference"] == "usable"
    if not torch.cuda.is_available():
        assert all(found[name] != "usable" and len(found[name]) > 10 for name in ("cuda",))


def test_ranks_beyond_the_kernels_are_served(counts):
    assert fastlora.lora_linear(*layer_arguments(r=300)).shape == (4, 5)
    assert counts()["reference"] == 1
