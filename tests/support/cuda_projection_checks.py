"""Projections that share an input run by the compiled CUDA kernels' own PTX in the emulator, and checked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from fastlora import philox
from fastlora.backends.cuda import projection_launch
from fastlora.backends.cuda.tiles import CudaTile
from fastlora.philox import keep_mask
from fastlora.problem import Needs, split_scaling
from fastlora.projections import (
    NO_NEEDS,
    Projection,
    SharedBackward,
    SharedForward,
    describe_shared_backward,
    describe_shared_forward,
)
from tests.emulator import LaunchOptions
from tests.support import numerics
from tests.support.cuda_checks import (
    ENDS,
    LARGE,
    MASKED_COLUMNS,
    MASKED_ROWS,
    MEDIUM,
    draw_masked_integers,
    is_clean,
    masked_seed,
)
from tests.support.cuda_emulation import SCHEDULES, emulated, ptx_of, variants_for
from tests.support.numerics import Case

WIDE, NARROW = replace(LARGE, splits=1), replace(MEDIUM, group_m=2, splits=1)
NEEDS = Needs(True, True, True, False)
K = 200


@dataclass(frozen=True)
class Group:
    """N, rank (0: no adapter), scaling and dropout of each projection; which have a bias."""

    sizes: tuple[tuple[int, int], ...]
    scalings: tuple[float, ...] = (2.0, 1.0, -1.0, 2.0)
    dropouts: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    biases: tuple[bool, ...] = (True, False, True, False)

    @property
    def rank(self) -> int:
        return max(r for _, r in self.sizes)

    @property
    def drops(self) -> bool:
        return any(p > 0.0 for p in self.dropouts)


def _dropped(group: Group) -> Group:
    """Kept elements are doubled or quadrupled."""
    return replace(group, dropouts=(0.5, 0.75, 0.5, 0.5), scalings=(1.0, -1.0, 1.0, 1.0))


# Grouped attention, whose k and v have a quarter of q's columns; its ranks differ, and columns and ranks have tails.
# Gate and up. And as many as there may be, one of them without an adapter.
QKV = Group(((288, 16), (72, 8), (72, 16)))
GATE_UP = Group(((264, 40), (264, 64)), biases=(False, False))
MIXED = Group(((136, 0), (264, 24), (8, 8), (72, 16)))
GROUPS = {
    "q, k, v": (QKV, WIDE),
    "q, k, v, fused": (QKV, replace(WIDE, fused=True, gradients_last=True)),
    "q, k, v, dropped": (_dropped(QKV), WIDE),
    "q, k, v, dropped, fused": (_dropped(QKV), replace(WIDE, fused=True)),
    "gate, up": (GATE_UP, WIDE),
    "gate, up, fused": (GATE_UP, replace(WIDE, fused=True)),
    "gate, up, dropped, fused": (_dropped(GATE_UP), replace(WIDE, fused=True)),
    "four": (MIXED, NARROW),
    "four, fused": (MIXED, replace(NARROW, fused=True, gradients_last=True)),
    "four, dropped": (_dropped(MIXED), replace(NARROW, gradients_last=True)),
    "four, dropped, fused": (_dropped(MIXED), replace(NARROW, fused=True)),
}


def kernels_of(group: Group, tile: CudaTile, dtype=torch.bfloat16) -> set[str]:
    """Names of the forward and the backward kernel."""
    return {each["name"] for each in variants_for(tile, group.drops, group.rank, dtype, shared=True)}


def draw(group: Group, m: int, dtype=torch.bfloat16, *, integers: bool = True, k: int = K, adapter_dtype=None):
    """A case of each projection, all of one x."""
    cases = []
    for i, (n, r) in enumerate(group.sizes):
        of_layer = numerics.draw_integer_case if integers else numerics.draw_case
        case = of_layer(m, n, k, r or 8, dtype, seed=i)
        case = replace(
            case, x=cases[0].x if cases else case.x, scaling=group.scalings[i] * (1.0 if integers else 0.7),
            bias=case.bias if group.biases[i] else None, dropout_p=group.dropouts[i] if r else 0.0,
            seed=torch.tensor(0x0123_4567_89AB_CDEF + (i << 40)) if r and group.dropouts[i] else None,
        )  # fmt: skip
        if integers and group.drops:
            thin = torch.rand(case.lora_b.shape, generator=torch.Generator().manual_seed(i)) < 0.3
            case = replace(case, lora_b=case.lora_b * thin)
        factors = (t.to(adapter_dtype or dtype) for t in (case.lora_a, case.lora_b))
        cases.append(replace(case, **dict(zip(("lora_a", "lora_b"), factors, strict=True))))
    return cases


def projections_of(group: Group, cases: Sequence[Case]) -> tuple[Projection, ...]:
    return tuple(
        Projection(c.weight, *((c.lora_a, c.lora_b) if r else (None, None)), c.bias, c.scaling, c.dropout_p, c.seed)
        for c, (_, r) in zip(cases, group.sizes, strict=True)
    )


Results = dict[str, list[Tensor | None]]


def launch(group: Group, cases: Sequence[Case], tile: CudaTile, needs: Sequence[Needs | None] | Needs, ctas: int):
    """Y and S of each, dX, and the gradients that ``needs`` names of each (None: it has no dY)."""
    needs = [needs] * len(cases) if isinstance(needs, Needs) else needs
    projections = projections_of(group, cases)
    operands, spec = describe_shared_forward(SharedForward(cases[0].x, projections))
    assert projection_launch.why_not_compiled(spec) is None
    ys, ss = projection_launch.prepare(spec, tile, ctas)(operands)
    dys = tuple(None if n is None else c.dy for n, c in zip(needs, cases, strict=True))
    of_each = tuple(
        NO_NEEDS if n is None else n if r else Needs(n.dx, False, False, False)
        for n, (_, r) in zip(needs, group.sizes, strict=True)
    )
    operands, spec = describe_shared_backward(SharedBackward(dys, cases[0].x, projections, tuple(ss), of_each))
    assert projection_launch.why_not_compiled(spec) is None
    dx, others = projection_launch.prepare(spec, tile, ctas)(operands)
    results: Results = {"y": [*ys], "s": ss, "dx": [dx]}
    return results | {name: [getattr(each, name) for each in others] for name in ("da", "db", "dbias")}


def run(
    group: Group,
    cases: Sequence[Case],
    tile: CudaTile,
    options: LaunchOptions | None = None,
    ptx=ptx_of,
    needs: Sequence[Needs | None] | Needs = NEEDS,
    ctas: int = 4,
) -> tuple[Results, list]:
    """As ``launch``, in the emulator; and the launches' counters."""
    with emulated(options, ptx) as launched:
        results = launch(group, cases, tile, needs, ctas)
    assert len(launched.stats) == 2, "one launch each way"
    assert is_clean(), "the workspace was left dirty"
    return results, launched.stats


def expected(group: Group, cases: Sequence[Case], needs: Sequence[Needs | None] | Needs = NEEDS, dtype=torch.float64):
    """As ``run``, by single layers composed of torch's operators in ``dtype``, and dX their sum."""
    needs = [needs] * len(cases) if isinstance(needs, Needs) else needs
    found: dict[str, list] = {name: [] for name in ("y", "s", "dx", "da", "db", "dbias")}
    dx = None
    for case, need, (_, r) in zip(cases, needs, group.sizes, strict=True):
        c = case.to(dtype)
        if not r:
            c = replace(c, lora_a=torch.zeros_like(c.lora_a), lora_b=torch.zeros_like(c.lora_b))
        made = numerics.compose(c)
        found["y"].append(made["y"])
        s = None
        if r:
            x = c.x
            if c.dropout_p:
                x = x * keep_mask(c.seed, c.dropout_p, *x.shape) * philox.inverse_keep(c.dropout_p)
            s = split_scaling(c.scaling, case.x.dtype).in_s * (x @ c.lora_a.t())
        found["s"].append(s)
        if need is not None and need.dx:
            dx = made["dx"] if dx is None else dx + made["dx"]
        for name in ("da", "db", "dbias"):
            asked = need is not None and getattr(need, name) and r
            found[name].append(made[name] if asked else None)
    found["dx"] = [dx]
    return found


def assert_exact(results, wanted, dtype=torch.bfloat16):
    """Every one has the one right value, and is there where it is asked for."""
    for name, values in wanted.items():
        for i, (result, value) in enumerate(zip(results[name], values, strict=True)):
            assert (result is None) == (value is None), f"{name} {i}: {result is None}"
            if value is not None:
                assert torch.equal(value, value.to(dtype).double()), f"{name} {i} of the case is not exact"
                assert torch.equal(result.double(), value), f"{name} {i}"


def check_integers(
    name: str, options: LaunchOptions | None = None, ptx=ptx_of, m: int | None = None, dtype=torch.bfloat16
):
    """Row blocks, columns, steps and ranks end in tails; several groups make partial sums of the gradients."""
    group, tile = GROUPS[name]
    m = m or (392 if tile.block_n == 256 else 280)
    cases = draw(group, m, dtype)
    results, _ = run(group, cases, tile, options, ptx)
    assert_exact(results, expected(group, cases), dtype)


# Groups of row blocks as long as those that are shipped (fastlora.backends.cuda.tiles.group_size).
GROUPED = {
    "groups of sixteen": (Group(((264, 16), (8, 8))), replace(WIDE, group_m=16, gradients_last=True), 72),
    "groups of sixteen, fused": (Group(((264, 16), (8, 8))), replace(WIDE, group_m=16, fused=True), 72),
    "groups of eight, dropped": (_dropped(Group(((136, 24), (72, 8)))), replace(NARROW, group_m=8, fused=True), 72),
}


def check_group(name: str, options: LaunchOptions | None = None, ptx=ptx_of):
    """A whole group, and a ragged one behind it whose last row block has a tail."""
    group, tile, k = GROUPED[name]
    cases = draw(group, (tile.group_m + 2) * tile.block_m + 13, k=k)
    results, _ = run(group, cases, tile, options, ptx)
    assert_exact(results, expected(group, cases))


# All gradients but one kind, one kind alone, and outputs without a gradient, or with some of those of others.
_ALL = Needs(True, True, True, True)
SUBSETS = {
    "all": (_ALL, _ALL, _ALL),
    "dX alone": (Needs(True, False, False, False),) * 3,
    "no dX": (Needs(False, True, True, True), Needs(False, False, True, False), Needs(False, True, False, False)),
    "dA of one": (Needs(False, False, True, False), Needs(False, True, False, False), Needs(False, False, True, False)),
    "dbias alone": (Needs(False, False, False, True), None, None),
    "the second has no dY": (NEEDS, None, NEEDS),
    "the first has no dY": (None, NEEDS, Needs(True, False, True, False)),
    "one has a dY": (None, None, NEEDS),
}


def check_needs(name: str, options: LaunchOptions | None = None, ptx=ptx_of, fused: bool = False):
    needs, group = SUBSETS[name], replace(QKV, biases=(True, False, True))
    needs = [n and n._replace(dbias=n.dbias and given) for n, given in zip(needs, group.biases, strict=True)]
    cases = draw(group, 280)
    results, _ = run(group, cases, replace(WIDE, fused=fused), options, ptx, needs, ctas=2)
    assert_exact(results, expected(group, cases, needs))


# Of numbers whose sums depend on their order, in two columns of tiles and three row blocks.
_SMALL = Group(((264, 16), (72, 8), (72, 16)), dropouts=(0.3, 0.1, 0.5, 0.0))
_WHOLE = replace(_SMALL, dropouts=(0.0,) * 4)
BITS = {
    "three": (_WHOLE, WIDE, torch.bfloat16, SCHEDULES[::2]),
    "three, dropped, fused": (_SMALL, replace(WIDE, fused=True, group_m=1), torch.bfloat16, SCHEDULES[1::2]),
    "four": (MIXED, replace(NARROW, gradients_last=True), torch.bfloat16, SCHEDULES[3:]),
    "four, dropped, fused": (_dropped(MIXED), replace(NARROW, fused=True), torch.bfloat16, SCHEDULES[:1]),
    "float16, fused": (GATE_UP, replace(WIDE, fused=True), torch.float16, SCHEDULES[1:2]),
    "float16, dropped": (_SMALL, WIDE, torch.float16, SCHEDULES[3:]),
}


def check_schedules(name: str, schedules=None, ptx=ptx_of):
    """The same bits under all of them, as accurate as the composed layers'. In float16 a scaling is above 1, which the
    forward splits."""
    group, tile, dtype, of_name = BITS[name]
    schedules = of_name if schedules is None else schedules
    cases = draw(replace(group, scalings=(2.4, -0.7, 1.0, 4.5)), 264, dtype, integers=False, k=136)
    first, _ = run(group, cases, tile, ptx=ptx, ctas=2)
    _assert_accurate(group, cases, first)
    for options in schedules:
        results, _ = run(group, cases, tile, options, ptx, ctas=6)
        for what, values in results.items():
            for i, (result, wanted) in enumerate(zip(values, first[what], strict=True)):
                same = result is None or torch.equal(result.view(torch.int16), wanted.view(torch.int16))
                assert same, f"{what} {i}: other bits"


def _assert_accurate(group: Group, cases: Sequence[Case], results: Results) -> None:
    exact, eager = (expected(group, cases, dtype=dtype) for dtype in (torch.float64, cases[0].x.dtype))
    bounds = [numerics.bounds_of(replace(c, lora_b=c.lora_b if r else torch.zeros_like(c.lora_b)))
              for c, (_, r) in zip(cases, group.sizes, strict=True)]  # fmt: skip
    dx = sum((each.pop("dx") for each in bounds[1:]), start=bounds[0].pop("dx"))
    bounds[0]["dx"] = dx * len(cases) ** 0.5
    for name in ("y", "dx", "da", "db"):
        for i, result in enumerate(results[name]):
            if result is not None:
                of_each = ({name: value[name][i]} for value in (exact, eager))
                numerics.assert_obeyed({name: result}, *of_each, {name: bounds[i][name]}, torch.finfo(result.dtype).eps)


MASKED = {"fused": (replace(WIDE, fused=True), 16), "separate": (WIDE, 16), "narrow": (NARROW, 64)}


def masked_group(rank: int, end: str | None) -> Group:
    _, equal = masked_seed()
    return Group(((136, rank), (136, rank)), (1.0, 1.0), (ENDS[end] if end else equal, equal), (True, True))


def check_masks(name: str, end: str | None, ptx=ptx_of):
    """Each bit of each mask, as for a layer alone (cuda_checks.check_mask): other seeds, and thresholds of which one
    is of ENDS (None: the threshold that bits equal)."""
    tile, rank = MASKED[name]
    seed, group = masked_seed()[0], masked_group(rank, end)
    cases = [
        draw_masked_integers(MASKED_ROWS, n, MASKED_COLUMNS, r, seed + i * 977, p)
        for i, ((n, r), p) in enumerate(zip(group.sizes, group.dropouts, strict=True))
    ]
    cases = [replace(c, x=cases[0].x, scaling=1.0) for c in cases]
    keeps_scale = mock.Mock(return_value=1.0)
    with (
        mock.patch.object(philox, "inverse_keep", keeps_scale),
        mock.patch.object(numerics, "inverse_keep", keeps_scale),
    ):
        results, _ = run(group, cases, tile, ptx=ptx)
        assert_exact(results, expected(group, cases))


def check_neighbours(options: LaunchOptions | None = None, ptx=ptx_of):
    """NaN in the weight, factors and dY of a projection stays out of its neighbours, though boxes and tiles end in
    their tails; but for dX, which is of all."""
    group, tile = QKV, WIDE
    cases = draw(group, 280)
    wanted = expected(group, cases)
    for broken in range(len(cases)):
        nan = {
            name: torch.full_like(getattr(cases[broken], name), torch.nan)
            for name in ("weight", "lora_a", "lora_b", "dy")
        }
        given = [replace(c, **nan) if i == broken else c for i, c in enumerate(cases)]
        results, _ = run(group, given, tile, options, ptx)
        for name in ("y", "s", "da", "db"):
            for i, (result, value) in enumerate(zip(results[name], wanted[name], strict=True)):
                assert torch.equal(result.double(), value) if i != broken else result.isnan().any(), (name, i)
        assert results["dx"][0].isnan().all()
