"""The launcher of projections that share an input: which calls it serves and why not others, what it compiles where,
and the way to it from the public function."""

import dataclasses
import itertools

import pytest
import torch

import fastlora
from fastlora import lora_linear, lora_linears, one_launch, routes, selection
from fastlora.backends import composed, reference
from fastlora.backends.configs import FUSED_RANK, TILE_TABLES, table_for
from fastlora.backends.target import Target
from fastlora.backends.triton import launch as single
from fastlora.backends.triton import projection_launch
from fastlora.problem import Needs
from fastlora.projections import (
    Projection,
    SharedBackward,
    SharedForward,
    describe_shared_backward,
    describe_shared_forward,
)
from tests.support import projection_checks as checks
from tests.support.compile_gate import MORE_ARCHITECTURES, assert_fits, expected_instruction
from tests.support.compile_target import compile_for
from tests.support.specialisations import asked_for
from tests.support.triton_checks import ALL, SMALL, needs_compiler
from tests.support.triton_emulation import emulated


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def described(backward=False, m=256, k=128, ns=(64, 32), ranks=(16, 16), dtype=torch.bfloat16, **changed):
    """Operands of a call on "meta", and their description. changed: needs; adapter_dtypes, transposed, of each; bias;
    dropout_p, seed."""
    adapter_dtypes = changed.get("adapter_dtypes", [dtype] * len(ns))
    transposed = changed.get("transposed", [False] * len(ns))
    p, seed = changed.get("dropout_p", 0.0), changed.get("seed", torch.tensor(2**40))
    members = []
    for n, r, adapter, lies in zip(ns, ranks, adapter_dtypes, transposed, strict=True):
        weight = meta(k, n, dtype=dtype).t() if lies else meta(n, k, dtype=dtype)
        bias = meta(n, dtype=dtype) if changed.get("bias") else None
        if r is None:
            members.append(Projection(weight, None, None, bias, 1.0, 0.0))
        else:
            factors = meta(r, k, dtype=adapter), meta(n, r, dtype=adapter)
            members.append(Projection(weight, *factors, bias, 2.0, p, seed if p else None))
    x = meta(m, k, dtype=dtype)
    if not backward:
        return describe_shared_forward(SharedForward(x, tuple(members)))
    dys = tuple(meta(m, n, dtype=dtype) for n in ns)
    ss = tuple(None if r is None else meta(m, r, dtype=dtype) for r in ranks)
    wanted = changed.get("needs", ALL)
    needs = tuple(Needs(wanted.dx, False, False, False) if r is None else wanted for r in ranks)
    return describe_shared_backward(SharedBackward(dys, x, tuple(members), ss, needs))


def test_no_other_launch_takes_several_projections():
    for backward in (False, True):
        spec = described(backward)[1]
        assert projection_launch.why_unsupported(spec) is None
        for backend in (single, composed, reference):
            assert "shared_input" in backend.why_unsupported(spec)
        assert selection.serving_module("triton", spec) is projection_launch
        assert projection_launch.why_unsupported(spec.members[0]) == "no kernel here is for a call of one projection"


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"ns": (64,) * 9, "ranks": (16,) * 9}, "9 projections share an input, and a launch has 8 at most"),
        ({"ranks": (None, None)}, "no projection has an adapter"),
        ({"ns": (64, 0)}, "projection 1 has 0 columns and an adapter of rank 16"),
        ({"ranks": (0, 16)}, "projection 0 has 64 columns and an adapter of rank 0"),
        ({"ranks": (16, 300)}, "projection 1: rank 300 is above 256"),
        ({"transposed": (True, False)}, "no kernel for a transposed base weight (projection 0) of projections that"),
        ({"adapter_dtypes": (torch.float32, torch.bfloat16)}, "adapters of projections that share an input differ"),
        ({"dtype": torch.float64}, "projection 0: dtype torch.float64 is not float16, bfloat16 or float32"),
    ],
    ids=str,
)
def test_what_is_not_served_says_why(changed, reason):
    for backward in (False, True):
        assert reason in projection_launch.why_unsupported(described(backward, **changed)[1])


def test_served_mixtures():
    for changed in (
        {"ns": (64,) * 8, "ranks": (1, 2, 3, 4, 5, 6, 7, 256)},
        {"ns": (64,), "ranks": (16,)},
        {"ns": (8, 9, 10), "ranks": (None, 1, None)},
        {"adapter_dtypes": (torch.float32,) * 2},
        {"dtype": torch.float32},
    ):
        for backward in (False, True):
            assert projection_launch.why_unsupported(described(backward, **changed)[1]) is None


@needs_compiler
def test_one_kernel_for_any_number_of_rows_and_any_seed(monkeypatch):
    """Whatever the first call's seed and probability are multiples of; with dX and without; seeds drawn in a graph."""
    config = dataclasses.replace(TILE_TABLES["hopper"][1], fused=False)  # without dX nothing is fused
    monkeypatch.setattr(projection_launch, "target_of", lambda device: Target(90, n_sms=132))
    seeds = torch.tensor(16), torch.tensor(2**40 + 1), meta(dtype=torch.int64)
    with asked_for(90) as found:
        for m, dx, p, seed in itertools.product((600, 2048, 9001), (True, False), (0.25, 0.1), seeds):
            for needs in (None, Needs(dx, True, True, False)):
                backward = {"needs": needs} if needs else {}
                operands, spec = described(needs is not None, m, dropout_p=p, seed=seed, **backward)
                projection_launch.prepare(spec, config).compile(operands)
    assert sorted(name for name, _ in found) == ["projections_backward_kernel", "projections_forward_kernel"]


@needs_compiler
def test_loads_by_pointers_are_fused_with_no_masked_shrink_on_hopper(monkeypatch):
    """Triton would overwrite what wgmma still reads."""
    for arch, p, fused in ((90, 0.1, False), (90, 0.0, True), (80, 0.1, True)):
        monkeypatch.setattr(projection_launch, "target_of", lambda device, arch=arch: Target(arch, n_sms=132))
        spec = described(dropout_p=p)[1]
        config = TILE_TABLES["hopper" if arch == 90 else "ampere"][0]
        assert projection_launch.prepare(spec, config).variant.fused == fused


@pytest.mark.parametrize(
    "arch, table, tile, backward, fused",
    [
        (103, "blackwell", 1, True, False),
        (103, "blackwell", 1, False, True),
        (120, "ampere", 2, True, False),
        (120, "ampere few rows", 3, False, True),
        (80, "ampere few rows", 3, False, False),
    ],
)
def test_s_is_made_as_it_does_not_spill(monkeypatch, arch, table, tile, backward, fused):
    """Whatever the tables say; see test_shipped_tiles_on_other_architectures, which fails without."""
    monkeypatch.setattr(projection_launch, "target_of", lambda device: Target(arch, n_sms=132))
    config = dataclasses.replace(TILE_TABLES[table][tile], fused=table != "ampere few rows")
    assert projection_launch.prepare(described(backward)[1], config).variant.fused == fused


@pytest.fixture
def on_triton(monkeypatch):
    """Calls on the CPU for Triton are a GPU's, and emulated; single layers and groups by the same tile."""
    monkeypatch.setattr(selection, "triton_unusable", lambda device: None)
    for kernels in (projection_launch, single):
        monkeypatch.setattr(kernels, "target_of", lambda device: Target(80, n_sms=3))
    monkeypatch.setattr(projection_launch, "_choose", lambda spec, target: SMALL[80])
    monkeypatch.setattr(single, "choose_tile", lambda spec, target: SMALL[80])
    routes.forget_routes()
    fastlora.reset_dispatch_counts()
    yield
    routes.forget_routes()


@needs_compiler
@pytest.mark.usefixtures("own_workspace", "poisoned")
def test_a_group_is_one_launch_each_way_with_the_bits_of_single_launches(on_triton):
    """From the public function on, x as [..., K], adapters in float32 over bfloat16; counted, and no fallback."""
    members = (checks.Member(48, 8, bias=True, scaling=1.3), checks.Member(16, 8, bias=True))
    group = checks.draw(50, 64, members, adapter_dtype=torch.float32)
    x = group.cases[0].x.view(2, 25, 64)

    def leaves():
        tensors = [x, *(t for c in group.cases for t in (c.lora_a, c.lora_b, c.bias) if t is not None)]
        return [t.clone().requires_grad_() for t in tensors]

    def outputs(given, together):
        rest, projections = iter(given[1:]), []
        for c in group.cases:
            a, b = next(rest), next(rest)
            projections.append((c.weight, a, b, c.scaling, None if c.bias is None else next(rest)))
        if together:
            return lora_linears(given[0], *zip(*projections, strict=True), backend="triton")
        return [lora_linear(given[0], *each, backend="triton") for each in projections]

    dys = [c.dy.view(2, 25, -1) for c in group.cases]
    found = {}
    for together in (True, False):
        given = leaves()
        with emulated(80) as stats:
            ys = outputs(given, together)
            found[together] = [*ys, *torch.autograd.grad(ys, given, dys)]
        assert len(stats) == (2 if together else 2 * len(members))
        counts = fastlora.dispatch_counts()
        fastlora.reset_dispatch_counts()
        assert counts["triton"] == len(stats) and counts["reference"] == 0 and not counts["fallbacks"]
    dx = len(members)
    for i, (mine, alone) in enumerate(zip(found[True], found[False], strict=True)):
        assert mine.dtype == alone.dtype and mine.shape == alone.shape
        assert i == dx or torch.equal(mine, alone)
    checks.assert_accurate(({"dx": found[True][dx].view(50, 64)}, [{}] * dx), group)


@needs_compiler
@pytest.mark.usefixtures("own_workspace", "poisoned")
def test_a_refused_group_is_a_launch_each_and_counted(on_triton):
    group = checks.draw(20, 32, (checks.Member(16, 4), checks.Member(16, 4, scaling=-1.3)))
    weights = [c.weight.t().contiguous().t() for c in group.cases]  # as [K, N]
    factors = [[getattr(c, name) for c in group.cases] for name in ("lora_a", "lora_b", "scaling")]
    with emulated(80) as stats:
        ys = lora_linears(group.cases[0].x, weights, *factors, backend="triton")
    assert len(stats) == 2
    for y, case in zip(ys, group.cases, strict=True):
        checks.numerics.assert_accurate({"y": y}, case)
    reason = "triton: no kernel for a transposed base weight (projection 0) of projections that share an input"
    assert fastlora.dispatch_counts()["fallbacks"] == {reason: 1}


@needs_compiler
def test_float32_on_a_gpu_is_composed_where_that_is_preferred(monkeypatch):
    """As of single layers: nothing is counted as a fallback, and each projection goes its own way."""
    monkeypatch.setattr(selection, "why_unsupported", lambda name, spec: None)
    found = []
    monkeypatch.setattr(one_launch, "launching_route", lambda *args: found.append(args))
    for dtype, together in ((torch.float32, False), (torch.bfloat16, True)):
        operands, spec = described(dtype=dtype)
        monkeypatch.setattr(selection, "target_of", lambda device: Target(80, n_sms=3))
        assert one_launch.prefers_composed(spec, None) != together
        assert not one_launch.prefers_composed(spec, "triton")
    assert not found


def tiles():
    """The tiles of the tables by architecture, with dropout, which takes the most registers. Those of sm_80 and sm_90
    meet the gate where they run, in test_projections_ptx.py."""
    for arch, (name, table) in itertools.product((100, *MORE_ARCHITECTURES), TILE_TABLES.items()):
        dtype = torch.float32 if name.startswith("float32") else torch.bfloat16
        aligned, few_rows = "unaligned" not in name, name.endswith(" few rows")
        rank = 256 if name.endswith(" large-rank") else FUSED_RANK
        if table_for(arch, rank, dtype.itemsize, aligned, few_rows) == name:
            makes_s = (True, False) if rank == FUSED_RANK and dtype != torch.float32 else (True,)
            directions = (False,) if few_rows else (False, True)
            for config, backward, fused in itertools.product(table, directions, makes_s):
                config = dataclasses.replace(config, fused=fused)
                tile = f"{config.block_m}x{config.block_n}-{'backward' if backward else 'forward'}"
                tile += "" if fused else "-separate"
                yield pytest.param(
                    arch, config, backward, rank, dtype, aligned, not few_rows, id=f"sm_{arch}-{name}-{tile}"
                )


@needs_compiler
@pytest.mark.sweep
@pytest.mark.parametrize("arch, config, backward, rank, dtype, aligned, drops", list(tiles()))
def test_shipped_tiles_on_other_architectures(monkeypatch, arch, config, backward, rank, dtype, aligned, drops):
    monkeypatch.setattr(projection_launch, "target_of", lambda device: Target(arch, n_sms=132))
    m, k, ns = (4096, 4096, (4096, 1024, 1024)) if aligned else (4001, 4005, (4003, 1001, 1001))
    operands, spec = described(backward, m, k, ns, (rank,) * 3, dtype, bias=True, dropout_p=0.1 if drops else 0.0)
    with compile_for(arch) as driver:
        projection_launch.prepare(spec, config)(operands)
    assert_fits(driver.launched[-1].kernel, arch, expected_instruction(arch, config, dtype))
