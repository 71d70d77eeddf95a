"""The composed backend: values of its torch part, where it is the default, what it needs of Triton, what users are
told."""

import shutil
import sys
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora import routes, selection
from fastlora.backends import composed, reference, target, tuning
from fastlora.backends.target import Target
from fastlora.backends.triton import driver as triton_driver
from fastlora.problem import BACKENDS, Aligned, LaunchSpec, Needs, Sizes
from tests.support import float16_range, launches, numerics

GPU = torch.device("cuda", 0)
ALL = Needs(True, True, True, True)
DRIVER_UNUSABLE = triton_driver._driver_unusable.__wrapped__  # without its memory


def run(case: numerics.Case, needs: Needs = ALL) -> dict[str, torch.Tensor]:
    c = case
    y, s = launches.forward(composed, c.x, c.weight, c.lora_a, c.lora_b, c.bias, c.scaling, 0.0, None)
    gradients = launches.backward(composed, c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, c.scaling, 0.0, None, needs)
    return {"y": y, **{n: g for n, g in gradients._asdict().items() if g is not None}}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m, n, k, r", [(97, 72, 104, 5), (1, 37, 29, 1), (40, 24, 60, 300)])
def test_values(m, n, k, r, dtype):
    case = numerics.draw_case(m, n, k, r, dtype)
    numerics.assert_accurate(run(case), case)


@pytest.mark.usefixtures("poisoned")
def test_only_the_gradients_asked_for():
    case = numerics.draw_case(20, 24, 28, 3, torch.bfloat16, adapter_dtype=torch.float32)
    for needs in (Needs(True, False, False, False), Needs(False, True, False, False), Needs(False, False, True, True)):
        results = run(case, needs)
        assert set(results) == {"y", *(name for name, need in needs._asdict().items() if need)}
        numerics.assert_accurate(results, case)


@pytest.mark.parametrize("scaling", float16_range.SCALINGS)
@pytest.mark.parametrize("regime", float16_range.REGIMES, ids=lambda regime: regime.name)
def test_float16_overflows_where_the_layer_of_framework_operations_does(regime, scaling):
    case = float16_range.draw(regime, scaling, 33, 40, 136, 5, 0.0)
    float16_range.check(run(case), case)


def test_three_products_forward_and_five_backward():
    """And nothing else of Y's or dX's size: each of torch's calls may be a launch."""
    case = numerics.draw_case(20, 24, 28, 3, torch.float32)

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if name not in ("t", "empty", "new_empty", "detach", "view"):
                called.append(name)
            return function(*args, **(kwargs or {}))

    called: list[str] = []
    with Calls():
        results = run(case)
    assert sorted(called) == sorted(["addmm"] * 3 + ["addmm_"] * 2 + ["mm"] * 3 + ["sum"]), called
    numerics.assert_accurate(results, case)


def layer(**options):
    c = numerics.draw_case(6, 5, 7, 2, torch.float64)
    leaves = [t.clone().requires_grad_() for t in (c.x, c.lora_a, c.lora_b, c.bias)]
    return (
        lambda x, a, b, bias: fastlora.lora_linear(x, c.weight, a, b, 1.7, bias, backend="composed", **options)
    ), leaves


def test_gradients_and_their_gradients():
    call, leaves = layer()
    fastlora.reset_dispatch_counts()
    assert torch.autograd.gradcheck(call, leaves)
    counts = fastlora.dispatch_counts()
    assert counts["composed"] > 0 == counts["reference"] and counts["fallbacks"] == {}
    assert torch.autograd.gradgradcheck(call, leaves)


def test_what_is_saved_is_what_every_backend_saves():
    kept = {}
    for backend in ("composed", "reference"):
        c = numerics.draw_case(40, 24, 28, 3, torch.float32)
        x, a, b = (t.clone().requires_grad_() for t in (c.x, c.lora_a, c.lora_b))
        saved = kept[backend] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            fastlora.lora_linear(x, c.weight, a, b, 1.7, backend=backend)
        assert any(t.data_ptr() == x.data_ptr() for t in saved), "x itself"
    for ours, theirs in zip(kept["composed"], kept["reference"], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_under_autocast():
    c = numerics.draw_case(6, 24, 28, 3, torch.float32)
    a, b = c.lora_a.requires_grad_(), c.lora_b.requires_grad_()

    with torch.autocast("cpu", torch.bfloat16):
        y = fastlora.lora_linear(c.x, c.weight, a, b, 1.7, backend="composed")
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert a.grad is not None and a.grad.dtype == torch.float32


def test_on_the_cpu_dropout_is_refused_with_a_reason():
    """Without Triton's interpreter no kernel draws the mask there."""
    call, leaves = layer(dropout_p=0.5)
    with pytest.raises(ValueError, match="backend 'composed' cannot serve this call: composed: "):
        call(*leaves)


# Where it is the default


@pytest.fixture
def nothing_is_launched(monkeypatch):
    for name in ("cuda", "triton"):
        monkeypatch.setattr(selection.backend_module(name), "prepare", lambda spec: None)


def spec(dtype=torch.bfloat16, direction="forward", sizes=(2048, 4096, 4096, 16), **changes) -> LaunchSpec:
    return LaunchSpec(direction, Sizes(*sizes), dtype, (dtype, dtype), GPU, **changes)


@pytest.fixture
def gpu(nothing_is_launched, monkeypatch, tmp_path):
    """A device on which every backend runs; ``arch`` is its compute capability."""
    state = SimpleNamespace(arch=90, refuse={})
    monkeypatch.setattr(selection, "target_of", lambda device: Target(state.arch, 132))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imaginary")
    monkeypatch.setattr(tuning, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(selection, "why_unsupported", lambda name, spec: state.refuse.get(name))
    monkeypatch.setattr(routes, "_warned", False)
    tuning.forget_choices()
    yield state
    monkeypatch.undo()
    tuning.forget_choices()


def chosen(description: LaunchSpec) -> str:
    return routes.find_route(description, None).name


def test_it_serves_float32_and_gpus_that_no_kernel_was_timed_on(gpu):
    assert chosen(spec()) == chosen(spec(torch.float16)) == "cuda"
    assert chosen(spec(torch.float32)) == chosen(spec(torch.float32, dropout=True)) == "composed"
    for gpu.arch in selection.UNMEASURED:
        routes.forget_routes()
        assert chosen(spec()) == "composed"
    gpu.refuse["composed"] = "composed: triton: no C compiler"
    routes.forget_routes()
    assert chosen(spec()) == "cuda"


def test_the_tuned_backend_comes_first_where_rows_are_as_they_were_timed(gpu):
    key = tuning.shape_class("forward", 2048, 4096, 4096, 16, torch.bfloat16, False)
    tuning.save_choices("Imaginary", {key: {"backend": "triton", "config": None}})
    assert chosen(spec()) == "triton" and selection.preference(spec(), tuned=False)[0] == "cuda"
    assert chosen(spec(direction="backward", needs=ALL)) == chosen(spec(dropout=True)) == "cuda"
    assert chosen(spec(aligned=Aligned(True, True, True, False, True))) == "cuda"
    gpu.refuse["triton"] = "triton: version 3.1 is older than 3.6"
    routes.forget_routes()
    assert chosen(spec()) == "cuda"
    tuning.save_choices("Imaginary", {key: {"backend": "composed", "config": None}})  # also forgets the routes
    assert chosen(spec()) == "composed"


def test_the_slow_path_is_said_once_with_reasons(gpu):
    gpu.refuse = {name: f"{name}: a reason; a remedy" for name in BACKENDS[:3]}
    with pytest.warns(UserWarning, match="by its reference in plain PyTorch, which is slow there") as caught:
        assert chosen(spec()) == chosen(spec(torch.float32)) == "reference"
    assert len(caught) == 1
    assert all(f"{name}: a reason; a remedy" in str(caught[0].message) for name in BACKENDS[:3])


def test_no_warning_where_the_reference_is_wanted_or_the_way(gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert routes.find_route(spec(), "reference").name == "reference"
        assert chosen(spec(sizes=(0, 64, 64, 8))) == "reference"
        assert chosen(spec()._replace(device=torch.device("cpu"))) == "reference"


# What it needs of Triton


@pytest.fixture
def no_cuda_kernels(nothing_is_launched, monkeypatch):
    """A GPU for which the extension is not built, and Triton with all it needs."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_driver, "_driver_unusable", lambda: None)
    monkeypatch.setattr(selection.backend_module("cuda"), "why_unsupported", lambda spec: "not built")
    monkeypatch.setattr(routes, "_warned", True)
    routes.forget_routes()
    yield
    monkeypatch.undo()
    routes.forget_routes()


def old_triton(patch):
    patch.setattr(sys.modules["triton"], "__version__", "3.3.1")
    return "older than 3.6; pip install --upgrade"


def no_triton(patch):
    patch.setitem(sys.modules, "triton", None)
    return "pip install 'fastlora[triton]'"


def no_compiler(patch):
    patch.delenv("CC", raising=False)
    patch.setattr(shutil, "which", lambda name: None)
    patch.setattr(triton_driver, "_driver_unusable", DRIVER_UNUSABLE)
    return "no C compiler for its launches: neither gcc nor clang"


LACKS = [old_triton, no_triton, no_compiler]


@pytest.mark.parametrize("lacks", LACKS, ids=lambda lacks: lacks.__name__)
def test_without_triton_it_serves_what_drops_nothing(no_cuda_kernels, monkeypatch, lacks):
    assert chosen(spec()) == chosen(spec(dropout=True)) == "triton"
    routes.forget_routes()
    reason = lacks(monkeypatch)
    for dtype in (torch.bfloat16, torch.float32):
        assert chosen(spec(dtype)) == "composed"
        route = routes.find_route(spec(dtype, dropout=True), None)
        assert route.name == "reference" and any(
            f"{reason}" in each and "composed: " in each for each in route.passed_over
        )
    monkeypatch.setattr(selection.backend_module("cuda"), "unusable", lambda device: None)
    state = fastlora.available_backends()["composed"]
    assert state.startswith("usable without dropout; with it not, triton: ") and reason in state


def test_float64_drops_nothing_by_a_kernel(no_cuda_kernels):
    assert chosen(spec(torch.float64)) == "composed"
    route = routes.find_route(spec(torch.float64, dropout=True), None)
    assert route.name == "reference"
    assert "composed: no kernel draws dropout's mask in torch.float64; use float32" in " ".join(route.passed_over)


def test_backends_by_dtype(no_cuda_kernels, monkeypatch):
    monkeypatch.setattr(selection, "target_of", lambda device: Target(90, 132))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imaginary")
    found = selection.served_by(GPU)
    assert found == {"bfloat16": "triton", "float16": "triton", "float32": "composed", "float64": "composed"}
    assert set(selection.served_by(torch.device("cpu")).values()) == {"reference"}


# Launches, with the kernels stood in for


@pytest.mark.parametrize("tf32", [False, True])
def test_products_of_the_mask_are_as_precise_as_torchs(monkeypatch, tf32):
    masked = pytest.importorskip("fastlora.backends.triton.masked")
    current, launched = ["another device"], []

    @contextmanager
    def make_current(device):
        current.append(device)
        yield
        current.pop()

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((current[-1], args))

    monkeypatch.setattr(torch.cuda, "device", make_current)
    monkeypatch.setattr(masked, "target_of", lambda device: Target(90, 132))
    for name in ("masked_shrink_kernel", "masked_backward_kernel"):
        monkeypatch.setattr(masked, name, Recorder())
    c = numerics.draw_case(8, 24, 28, 3, torch.float32, dropout_p=0.5)
    described = LaunchSpec("forward", Sizes(8, 24, 28, 3), c.x.dtype, (c.x.dtype,) * 2, GPU, dropout=True, tf32=tf32)
    shared = (c.scaling, 0.5, c.seed)
    _, s = composed.prepare(described)((c.x, c.weight, c.lora_a, c.lora_b, c.bias, *shared))
    backward = described._replace(direction="backward", needs=ALL)
    composed.prepare(backward)((c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, *shared))
    assert [device for device, _ in launched] == [GPU] * 2
    assert all(("tf32" if tf32 else "ieee") in args for _, args in launched)


def test_one_draw_of_the_mask_serves_dx_and_da(monkeypatch):
    """And none is made where neither is wanted."""
    masked = pytest.importorskip("fastlora.backends.triton.masked")
    asked = []
    monkeypatch.setattr(masked, "mask_and_add", lambda x, dx, *rest, **options: asked.append((x, dx)) or x)
    c = numerics.draw_case(8, 24, 28, 3, torch.float32, dropout_p=0.5)
    for needs, given in (
        (ALL, (True, True)), (ALL._replace(da=False), (False, True)), (ALL._replace(dx=False), (True, False)),
    ):  # fmt: skip
        launches.backward(composed, c.dy, c.x, c.weight, c.lora_a, c.lora_b, c.dy[:, :3], 1.7, 0.5, c.seed, needs)
        assert tuple(each is not None for each in asked.pop()) == given
    launches.backward(
        composed,
        c.dy,
        c.x,
        c.weight,
        c.lora_a,
        c.lora_b,
        c.dy[:, :3],
        1.7,
        0.5,
        c.seed,
        Needs(False, False, True, True),
    )
    assert asked == []


def test_the_reference_and_the_composed_layer_agree():
    case = numerics.draw_case(40, 24, 28, 3, torch.float32)
    args = (case.x, case.weight, case.lora_a, case.lora_b, case.bias, case.scaling, 0.0, None)
    for ours, theirs in zip(launches.forward(composed, *args), reference.lora_forward(*args), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert target.target_of(case.x.device).arch == 80
