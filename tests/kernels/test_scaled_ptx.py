"""The Triton kernels of DoRA layers, proven on their own PTX, as test_triton_ptx.py does it for others."""

import math

import pytest
import torch

import fastlora
from fastlora import one_launch, routes, selection
from fastlora.backends.target import Target
from fastlora.backends.triton import launch as triton_lora
from fastlora.backends.triton import scaled_launch
from fastlora.dora import Norms, dora_linear
from tests.emulator import LaunchOptions
from tests.support import numerics
from tests.support import scaled_checks as checks
from tests.support.triton_checks import SMALL, needs_compiler
from tests.support.triton_emulation import emulated

pytestmark = [needs_compiler, pytest.mark.usefixtures("own_workspace", "poisoned")]


@pytest.mark.parametrize("arch, sizes", checks.INTEGERS, ids=str)
def test_integers_are_exact_under_every_schedule(arch, sizes):
    checks.check_integers(sizes, arch)


@pytest.mark.parametrize("tile", list(checks.shipped()))
def test_shipped_tiles(tile):
    checks.check_shipped(tile)


def test_bytes_of_both_launches():
    """Beyond a layer without a scale: forward Z is written, backward dY and Z are read once and dY is written, scaled.
    A pass over Y behind such a layer and one over dY in front of it read and write two of these sizes each, and the
    sums dm and dbias read three."""
    m, n, k, _ = checks.SIZES[0]
    _, (forward, backward) = checks.emulate(checks.draw_integers(*checks.SIZES[0]), 80, LaunchOptions(resident=1))
    tile, of_y = SMALL[80], m * n * 2
    loaded = math.ceil(m / tile.block_m) * tile.block_m  # rows, those past the end as well

    def moved(launch, name: str) -> tuple[int, int]:
        return launch.buffers[name].bytes_read, launch.buffers[name].bytes_written

    assert moved(forward, "unscaled_ptr") == moved(forward, "y_ptr") == (0, of_y)
    assert moved(forward, "x") == ((math.ceil(n / tile.block_n) + 1) * loaded * k * 2, 0), "once a column, and for S"
    assert moved(backward, "dy_ptr") == moved(backward, "unscaled_ptr") == (of_y, 0)
    for_dx = (math.ceil(k / tile.block_n) + 1) * loaded * n * 2
    assert moved(backward, "scaled_ptr") == (for_dx + of_y, of_y), "once a column of dX, for dS, and for dB"


@pytest.fixture
def on_triton(monkeypatch):
    """Calls on the CPU are a GPU's, of which Triton's are emulated."""
    monkeypatch.setattr(one_launch, "may_launch", lambda device, requested: True)
    monkeypatch.setattr(one_launch, "_LAUNCHING", ("triton",))
    monkeypatch.setattr("fastlora.dora.may_launch", lambda device, requested: True)
    monkeypatch.setattr(selection, "triton_unusable", lambda device: None)
    for kernels in (scaled_launch, triton_lora):
        monkeypatch.setattr(kernels, "target_of", lambda device: Target(80, n_sms=3))
    routes.forget_routes()
    fastlora.reset_dispatch_counts()
    yield
    routes.forget_routes()


def draw() -> checks.Case:
    """Adapters in float32 over a 16-bit layer, as PEFT has them."""
    return checks.draw(50, 48, 64, 8, torch.bfloat16, adapter_dtype=torch.float32)


def leaves_of(case: checks.Case) -> dict[str, torch.Tensor]:
    c = case.layer
    given = {"dx": c.x, "da": c.lora_a, "db": c.lora_b, "dbias": c.bias, "dm": case.magnitude}
    return {name: tensor.clone().requires_grad_() for name, tensor in given.items()}


class Known(Norms):
    """The norm that a case has drawn."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def of(self, *_):
        return self.norm


def call(case: checks.Case, leaves: dict[str, torch.Tensor], **options) -> torch.Tensor:
    x, a, b, bias, magnitude = leaves.values()
    return dora_linear(
        x, case.layer.weight, a, b, case.layer.scaling, magnitude, bias, norms=Known(case.norm), **options
    )


def test_a_layer_is_one_launch_each_way(on_triton):
    """From the public function on, counted as Triton's, and no fallback; in [..., K], and again by its keys."""
    case = draw()
    leaves = leaves_of(case)
    with emulated(80) as stats:
        for _ in range(2):
            y = call(case, {**leaves, "dx": leaves["dx"].view(2, 25, 64)})
            gradients = torch.autograd.grad(y, list(leaves.values()), case.layer.dy.view(2, 25, 48))
        with torch.no_grad():
            evaluated = call(case, leaves)
    assert len(stats) == 5
    assert fastlora.dispatch_counts() == {"cuda": 0, "triton": 5, "composed": 0, "reference": 0, "fallbacks": {}}
    checks.assert_accurate({"y": y.detach().view(50, 48), **dict(zip(leaves, gradients, strict=True))}, case)
    checks.assert_accurate({"y": evaluated}, case)
    assert all(each.dtype == leaf.dtype for each, leaf in zip(gradients, leaves.values(), strict=True))


def test_where_only_a_forward_is_served_a_pass_scales_dy(on_triton, monkeypatch):
    """Counted with its reason, and as exact."""
    served = selection.why_unsupported
    refused = lambda name, spec: "triton: no" if spec.direction == "backward" else served(name, spec)  # noqa: E731
    monkeypatch.setattr(selection, "why_unsupported", refused)
    case = draw()
    leaves = leaves_of(case)
    with emulated(80) as stats:
        gradients = torch.autograd.grad(call(case, leaves), list(leaves.values()), case.layer.dy)
    counts = fastlora.dispatch_counts()
    assert len(stats) == 1 and (counts["triton"], counts["reference"]) == (1, 1)
    assert counts["fallbacks"] == {"triton: no": 1}
    checks.assert_accurate(dict(zip(leaves, gradients, strict=True)), case)


def test_float32_is_composed_where_that_is_preferred(on_triton):
    case = checks.draw(5, 48, 64, 8, torch.float32)
    with emulated(80) as stats:
        y = call(case, leaves_of(case))
    assert not stats and fastlora.dispatch_counts()["fallbacks"] == {}
    checks.assert_accurate({"y": y.detach()}, case)


def test_second_derivatives_are_the_compositions(on_triton, monkeypatch):
    """Of the norm of all gradients, by torch's operators, counted: Z depends on x, A and B."""
    case = checks.draw(20, 24, 32, 4, torch.float32)

    def second(**options):
        leaves = leaves_of(case)
        gradients = torch.autograd.grad(
            call(case, leaves, **options), list(leaves.values()), case.layer.dy, create_graph=True
        )
        total = sum(gradient.pow(2).sum() for gradient in gradients)
        return torch.autograd.grad(total, [leaf for name, leaf in leaves.items() if name != "dbias"])

    with emulated(80) as stats:
        got = second(backend="triton")
    assert len(stats) == 1 and fastlora.dispatch_counts()["fallbacks"] == {"create_graph=True": 1}
    monkeypatch.undo()
    numerics.assert_reordered(got, second(), terms=32)


def test_autocast_and_a_changed_input(on_triton):
    case = draw()
    wide = checks.Case(case.layer.to(torch.float32), case.magnitude, case.norm)
    leaves = leaves_of(wide)
    with emulated(80) as stats, torch.autocast("cpu", torch.bfloat16):
        y = call(wide, leaves)
        assert y.dtype == torch.bfloat16 and len(stats) == 1
        given = leaves["dx"].detach().bfloat16()
        y = call(wide, {**leaves, "dx": given})
        kept = call(wide, {**leaves, "dx": given}, copy_input=True)
        given += 1
    with pytest.raises(RuntimeError, match="was modified in place after the layer's forward"):
        y.sum().backward()
    with emulated(80) as stats:
        (dm,) = torch.autograd.grad(kept, leaves["dm"], case.layer.dy)
    assert len(stats) == 1
    checks.assert_accurate({"dm": dm}, case)


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"bias": torch.ones(3)}, "shapes do not fit together"),
        ({"magnitude": torch.ones(48, device="meta")}, "x is on cpu but magnitude is on meta"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_launch(on_triton, changed, reason):
    c = checks.draw(5, 48, 64, 8, torch.bfloat16)
    given = {"magnitude": c.magnitude, "bias": c.layer.bias, **changed}
    with pytest.raises(ValueError, match=reason):
        dora_linear(
            c.layer.x, c.layer.weight, c.layer.lora_a, c.layer.lora_b, 1.0, given["magnitude"], given["bias"],
            norms=Known(c.norm),
        )  # fmt: skip
