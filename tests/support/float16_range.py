"""Where a float16 layer may overflow: where the composed layer does, and nowhere else.

S and dS are rounded to float16 between two products, the composed layer's too: where drop(x)·Aᵀ or scaling·dY·B is
beyond the range there, what is made of it is not finite; everywhere else a result is infinite where its own exact value
is beyond the range. The composed layer may overflow in more places (S·Bᵀ before the scaling, scaling·dY)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastlora.philox import inverse_keep, keep_mask
from fastlora.problem import split_scaling
from tests.support import numerics

OVERFLOW = 65520.0  # what rounds to infinity
_NEAR = 2.0**-7  # of the threshold: which side a sum in fp32 falls on depends on its order
SCALINGS = (0.0, 1e-3, 0.3, -0.75, 1.0, 1.5, -2.0, 32.0, -100.7, 3000.3)


@dataclass(frozen=True)
class Regime:
    """Sizes of x·Aᵀ, of the branch and of scaling·dY·B, each spread over a factor of 2^±6 from row to row."""

    name: str
    shrunk: float
    branch: float
    gradient: float


REGIMES = (
    Regime("S overflows in some rows", shrunk=3e4, branch=1.0, gradient=1e-3),
    Regime("Y overflows in some rows", shrunk=100.0, branch=3e4, gradient=1.0),
    Regime("dS overflows in some rows", shrunk=1.0, branch=100.0, gradient=3e4),
)


def draw(regime: Regime, scaling: float, m: int, n: int, k: int, r: int, dropout_p: float = 0.0) -> numerics.Case:
    """A float16 case, in whose regime the branch's size stays what it is whatever the scaling, as far as float16 can
    hold the B that this takes."""
    base = numerics.draw_case(m, n, k, r, torch.float64, dropout_p=dropout_p)
    spread = torch.logspace(-6, 6, m, base=2.0, dtype=torch.float64)[torch.randperm(m, generator=_generator())]
    effective = max(abs(scaling), 1e-3)
    b_size = min(regime.branch / (effective * regime.shrunk), 1000.0)
    dy_size = min(regime.gradient / (effective * b_size), 900.0)
    case = replace(
        base,
        scaling=scaling,
        x=base.x * spread[:, None] * min(regime.shrunk, 100.0),
        weight=base.weight / min(regime.shrunk, 100.0),
        lora_a=base.lora_a * max(1.0, regime.shrunk / 100.0),
        lora_b=base.lora_b * base.scaling * b_size,
        dy=base.dy * spread.flip(0)[:, None] * dy_size * n**-0.5,
    )
    return case.to(torch.float16)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@dataclass(frozen=True)
class _Expected:
    """exact: in float64. poisoned: made of an S or dS that overflows. unsure: of one, or itself, too near to tell.
    allowed: error of a finite result."""

    exact: Tensor
    poisoned: Tensor
    unsure: Tensor
    allowed: Tensor


def expected(case: numerics.Case) -> dict[str, _Expected]:
    """By result's name."""
    c = case.to(torch.float64)
    m, k = c.x.shape
    keep = torch.ones(m, k, dtype=torch.float64)
    if c.dropout_p > 0.0:
        keep = keep_mask(c.seed, c.dropout_p, m, k) * inverse_keep(c.dropout_p)
    dropped = c.x * keep
    s, ds = linear(dropped, c.lora_a), c.scaling * c.dy @ c.lora_b
    bounds = numerics.bounds_of(case)
    tiny = 2.0**-24  # float16's smallest number: twice the error of a rounding below its normal ones
    by_s = split_scaling(c.scaling, torch.float16).on_branch * tiny
    ones_m = torch.ones(m, dtype=torch.float64)
    floors = {
        "y": by_s * c.lora_b.abs().sum(1)[None, :],
        "dx": tiny * keep * c.lora_a.abs().sum(0)[None, :],
        "da": tiny * (ones_m @ dropped.abs())[None, :],
        "db": by_s * (ones_m @ c.dy.abs())[:, None],
    }

    def beyond(values: Tensor, factor: float) -> Tensor:
        return values.abs() >= OVERFLOW * factor

    def made_of(overflows: Tensor, name: str) -> Tensor:
        rows, ranks = overflows.any(1), overflows.any(0)
        shape = exact[name].shape
        of = {"y": rows[:, None], "dx": rows[:, None] & (keep > 0), "da": ranks[:, None], "db": ranks[None, :]}
        return of[name].expand(shape)

    exact = numerics.compose(c)
    found = {}
    for name, floor in floors.items():
        between = s if name in ("y", "db") else ds
        surely, perhaps = (made_of(beyond(between, 1 + near), name) for near in (_NEAR, -_NEAR))
        itself = beyond(exact[name], 1 - _NEAR) & ~beyond(exact[name], 1 + _NEAR)
        allowed = 4 * torch.finfo(torch.float16).eps * bounds[name] + floor + tiny
        found[name] = _Expected(exact[name], surely, ~surely & (perhaps | itself), allowed)
    return found


def check(results: dict[str, Tensor], case: numerics.Case) -> dict[str, tuple[int, int]]:
    """Raises AssertionError where a result overflows and should not, or should and does not, or is wrong; returns
    numbers of finite and of other elements by result."""
    eager = numerics.compose(case)
    counts = {}
    for name, want in expected(case).items():
        result = results[name].double()
        label = f"{name} at scaling {case.scaling}"
        overflows = want.poisoned | (want.exact.abs() >= OVERFLOW)
        sure = ~want.unsure
        assert not result[sure & want.poisoned].isfinite().any(), f"{label}: finite, made of what is not"
        own = sure & overflows & ~want.poisoned
        assert torch.equal(result[own], torch.copysign(torch.tensor(torch.inf).double(), want.exact[own])), (
            f"{label}: no infinity beyond the range"
        )
        finite = sure & ~overflows
        wrong = ~((result - want.exact).abs() <= want.allowed) & finite
        assert not wrong.any(), f"{label}: {int(wrong.sum())} of {wrong.numel()} wrong, {result[wrong][0]}"
        lost = sure & eager[name].isfinite() & ~result.isfinite()
        assert not lost.any(), f"{label}: the composed layer is finite in {int(lost.sum())} elements more"
        counts[name] = int(finite.sum()), int((sure & overflows).sum())
    return counts
