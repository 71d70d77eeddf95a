"""Projections that share an input run by the compiled CUDA kernels' own PTX in the emulator, and checked."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlora.backends.cuda import shared_launch
from fastlora.backends.cuda.tiles import CudaTile
from fastlora.philox import inverse_keep, keep_mask
from fastlora.problem import Needs, split_scaling
from fastlora.projections import (
    Projection,
    SharedBackward,
    SharedForward,
    describe_shared_backward,
    describe_shared_forward,
)
from tests.emulator import LaunchOptions
from tests.support import numerics
from tests.support.cuda_checks import LARGE, MEDIUM, is_clean
from tests.support.cuda_emulation import SCHEDULES, emulated, ptx_of, variants_for
from tests.support.numerics import Case

WIDE, NARROW = replace(LARGE, splits=1), replace(MEDIUM, group_m=2, splits=1)
NEEDS = Needs(True, True, True, False)
K = 264


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


# Grouped attention, whose k and v have a quarter of q's columns; its ranks differ, and columns and ranks have tails. The
# same with what an adapter may lack, and as many as there may be; gate and up.
QKV = Group(((520, 16), (136, 8), (136, 16)))
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


def draw(group: Group, m: int, dtype=torch.bfloat16, integers: bool = True, k: int = K, bias_gradients=False):
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
        cases.append(case)
    return cases


def _projections(group: Group, cases: Sequence[Case]) -> tuple[Projection, ...]:
    return tuple(
        Projection(c.weight, *((c.lora_a, c.lora_b) if r else (None, None)), c.bias, c.scaling, c.dropout_p, c.seed)
        for c, (_, r) in zip(cases, group.sizes, strict=True)
    )


def run(
    group: Group,
    cases: Sequence[Case],
    tile: CudaTile,
    options: LaunchOptions | None = None,
    ptx=ptx_of,
    needs: Sequence[Needs | None] | Needs = NEEDS,
    ctas: int = 4,
) -> tuple[dict[str, list[Tensor | None]], list]:
    """Y and S of each, dX, and the gradients that ``needs`` names of each (None: it has no dY); and the launches'
    counters."""
    needs = [needs] * len(cases) if isinstance(needs, Needs) else needs
    needs = [n if n is None or r else Needs(n.dx, False, False, False) for n, (_, r) in zip(needs, group.sizes, strict=True)]
    projections = _projections(group, cases)
    dys = tuple(None if n is None else c.dy for n, c in zip(needs, cases, strict=True))
    with emulated(options, ptx) as launched:
        operands, spec = describe_shared_forward(SharedForward(cases[0].x, projections))
        assert shared_launch.why_not_compiled(spec) is None
        ys, ss = shared_launch.prepare(spec, tile, ctas)(operands)
        of_each = tuple(Needs(False, False, False, False) if n is None else n for n in needs)
        operands, spec = describe_shared_backward(SharedBackward(dys, cases[0].x, projections, tuple(ss), of_each))
        assert shared_launch.why_not_compiled(spec) is None
        dx, others = shared_launch.prepare(spec, tile, ctas)(operands)
    assert len(launched.stats) == 2, "one launch each way"
    assert is_clean(), "the workspace was left dirty"
    found = {"y": ys, "s": ss, "dx": [dx]}
    return found | {name: [getattr(each, name) for each in others] for name in ("da", "db", "dbias")}, launched.stats


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
                x = x * keep_mask(c.seed, c.dropout_p, *x.shape) * inverse_keep(c.dropout_p)
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


def check_integers(name: str, options: LaunchOptions | None = None, ptx=ptx_of, m: int | None = None, dtype=torch.bfloat16):
    """Row blocks, columns, steps and ranks end in tails; several groups make partial sums of the gradients."""
    group, tile = GROUPS[name]
    m = m or (600 if tile.block_n == 256 else 280)
    cases = draw(group, m, dtype)
    results, _ = run(group, cases, tile, options, ptx)
    assert_exact(results, expected(group, cases), dtype)
