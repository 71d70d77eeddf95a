"""Projections that share an input, run by the Triton kernels' own PTX in the emulator and checked: what tests and the
search for planted defects have in common."""

import dataclasses
import functools
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastlora.backends import workspace
from fastlora.backends.configs import TileConfig
from fastlora.backends.triton import projection_launch
from fastlora.problem import Needs
from fastlora.projections import (
    NO_NEEDS,
    Projection,
    SharedBackward,
    SharedForward,
    describe_shared_backward,
    describe_shared_forward,
)
from tests.emulator import LaunchOptions
from tests.support import float16_range, numerics, triton_checks
from tests.support.compile_gate import assert_fits, expected_instruction
from tests.support.triton_checks import SCHEDULES, SMALL
from tests.support.triton_emulation import emulated_launches

ALL = Needs(True, True, True, True)


class Member(NamedTuple):
    """What one of several projections is drawn with.

    rank: None: it has no adapter.
    needs: None: nothing depends on its output. Without dx none of them has it.
    """

    n: int
    rank: int | None
    bias: bool = False
    dropout_p: float = 0.0
    scaling: float = 2.0
    needs: Needs | None = ALL


class Group(NamedTuple):
    """Projections of one x. That of a member without an adapter has one of zeros, as it is computed without."""

    members: tuple[Member, ...]
    cases: tuple[numerics.Case, ...]


def draw(m: int, k: int, members: tuple[Member, ...], dtype=torch.bfloat16, *, integers=False, **options) -> Group:
    """All of one x. ``integers``: for which every result is exact; else as numerics.draw_case, with its ``options``."""
    cases: list[numerics.Case] = []
    for seed, each in enumerate(members):
        sizes = m, each.n, k, each.rank or 1
        if integers:
            case = numerics.draw_integer_case(*sizes, dtype, seed=seed)
        else:
            case = numerics.draw_case(*sizes, dtype, dropout_p=each.dropout_p, seed=seed, **options)
        changed: dict[str, Any] = {"x": cases[0].x if cases else case.x, "scaling": each.scaling}
        if not each.bias:
            changed["bias"] = None
        if each.rank is None:
            changed |= {"lora_a": torch.zeros_like(case.lora_a), "lora_b": torch.zeros_like(case.lora_b)}
            changed |= {"dropout_p": 0.0, "seed": None}
        cases.append(dataclasses.replace(case, **changed))
    return Group(members, tuple(cases))


def operands(group: Group) -> tuple[Projection, ...]:
    return tuple(
        Projection(c.weight, None, None, c.bias, 1.0, each.dropout_p)
        if each.rank is None
        else Projection(c.weight, c.lora_a, c.lora_b, c.bias, c.scaling, c.dropout_p, c.seed)
        for each, c in zip(*group, strict=True)
    )


def needs_of(each: Member) -> Needs:
    """What can be asked for of what it has."""
    needs, adapted = each.needs or NO_NEEDS, each.rank is not None
    return Needs(needs.dx, needs.da and adapted, needs.db and adapted, needs.dbias and each.bias)


def backward_of(group: Group, ss: list[Tensor | None]) -> SharedBackward:
    return SharedBackward(
        tuple(None if each.needs is None else c.dy for each, c in zip(*group, strict=True)),
        group.cases[0].x,
        operands(group),
        tuple(ss),
        tuple(map(needs_of, group.members)),
    )


def run(group: Group, config: TileConfig, backward: bool, kernels: Any) -> tuple[dict[str, Tensor], list[dict]]:
    """dX, and the other results of each projection by name, of one launch each way."""
    given, spec = describe_shared_forward(SharedForward(group.cases[0].x, operands(group)))
    ys, ss = kernels.prepare(spec, config)(given)
    assert [s is None for s in ss] == [each.rank is None for each in group.members]
    results: list[dict[str, Tensor]] = [{"y": y} for y in ys]
    over_all = {}
    if backward:
        saved, spec = describe_shared_backward(backward_of(group, ss))
        dx, others = kernels.prepare(spec, config)(saved)
        over_all = {"dx": dx} if dx is not None else {}
        assert bool(over_all) == spec.needs.dx
        for each, found, of_one in zip(group.members, results, others, strict=True):
            wanted = needs_of(each)._replace(dx=False)
            assert tuple(g is not None for g in of_one) == tuple(wanted), "the gradients that were asked for"
            found |= {name: g for name, g in of_one._asdict().items() if g is not None}
    assert not any(buffer.any() for buffer in workspace._by_stream.values()), "the workspace was left dirty"
    return over_all, results


def emulate(
    group: Group,
    arch: int,
    options: LaunchOptions,
    *,
    config: TileConfig | None = None,
    backward: bool = True,
    kernels: Any = projection_launch,
    edit_ptx: Any = None,
    on_kernel: Any = None,
):
    """``run`` in the emulator, by a small tile unless ``config`` says otherwise: results, the launches' counters."""
    with emulated_launches(kernels, arch, options, edit_ptx, on_kernel) as stats:
        results = run(group, config or SMALL[arch], backward, kernels)
    assert len(stats) == 1 + backward, "one launch each way"
    return results, stats


def of(kernels: Any) -> Any:
    """The launcher of projections that belongs to a copy of fastlora.backends.triton.launch, or to itself."""
    return importlib.import_module(f"{kernels.__package__}.projection_launch")


def _sums(group: Group, of_one) -> Tensor:
    """Over the projections that have a dY."""
    found = [of_one(c) for each, c in zip(*group, strict=True) if each.needs is not None]
    return sum(found[1:], start=found[0])


def assert_exact(results, group: Group) -> None:
    """Raises AssertionError unless every result of a case of integers has the one right bit pattern."""
    over_all, of_each = results
    for found, case in zip(of_each, group.cases, strict=True):
        numerics.assert_exact(found, case)
    if over_all:
        dx = _sums(group, lambda c: numerics.compose(c.to(torch.float64))["dx"])
        assert torch.equal(dx, dx.to(over_all["dx"].dtype).double()), "draw sparser numbers"
        numerics.assert_equal(over_all, {"dx": dx})


def assert_accurate(results, group: Group, *, against_eager: bool = True) -> None:
    """Raises AssertionError unless every result obeys the error rule. dX's yardstick is what autograd adds up of each
    projection's, in their dtype."""
    over_all, of_each = results
    for found, case in zip(of_each, group.cases, strict=True):
        numerics.assert_accurate(found, case, against_eager=against_eager)
    if over_all:
        total = sum(each.n for each in group.members)
        numerics.assert_obeyed(
            over_all,
            {"dx": _sums(group, lambda c: numerics.compose(c.to(torch.float64))["dx"])},
            {"dx": _sums(group, lambda c: numerics.compose(c)["dx"])} if against_eager else None,
            {"dx": _sums(group, lambda c: numerics.bounds_of(c)["dx"] * (total / c.weight.shape[0]) ** 0.5)},
            eps=torch.finfo(group.cases[0].x.dtype).eps,
        )


# M, K, and projections. Multiples of 16, as of a model's layers: q, k and v of attention by groups; gate and up. And
# others: eight of them, other ranks, one without an adapter, one without a dY, one that trains its A alone. K and N
# have more steps than the pipeline has stages, and leave each remainder by them; M has more than one row group, the
# last one ragged.
QKV = (Member(160, 16), Member(48, 16, scaling=-1.0), Member(32, 16, scaling=1.0))
GATE_UP = (Member(192, 16, bias=True), Member(96, 16, scaling=0.5))
LARGE_RANK = (Member(128, 96), Member(64, 80, bias=True, scaling=1.0))
MIXED = (
    Member(56, 8, bias=True, needs=Needs(True, True, False, True)),
    Member(40, None, bias=True),
    Member(33, 3, scaling=-1.0, needs=Needs(True, False, True, False)),
    Member(24, 5, bias=True, scaling=1.0, needs=None),
    Member(49, 16, scaling=4.0),
)
EIGHT = tuple(Member(8 + 8 * (i % 3), 1 + i, bias=i % 2 == 0, scaling=(-1.0, 1.0, 2.0)[i % 3]) for i in range(8))
WITHOUT_DX = tuple(
    each._replace(needs=each.needs and each.needs._replace(dx=False)) for each in (*MIXED, Member(16, 2, bias=True))
)
WITHOUT_DS = tuple(Member(n, 16, bias=True, needs=Needs(False, False, True, True)) for n in (64, 96))
GROUPS: dict[str, tuple[int, int, tuple[Member, ...]]] = {
    "q, k, v": (272, 192, QKV),
    "gate, up": (208, 160, GATE_UP),
    "large ranks": (176, 224, LARGE_RANK),
    "mixed": (264, 97, MIXED),
    "eight": (139, 72, EIGHT),
    "without dX": (150, 40, WITHOUT_DX),
    "without dS": (200, 96, WITHOUT_DS),
    "one": (130, 64, (Member(40, 16, bias=True),)),
}


def schedules_of(name: str) -> tuple[LaunchOptions, ...]:
    return SCHEDULES[:4] if name == "mixed" else SCHEDULES[1:4:2]


def check_integers(name: str, arch: int, schedules=None, kernels: Any = projection_launch, **altered: Any) -> None:
    """Under every schedule the same, one right result. A separate shrink where the ranks or a missing adapter ask for
    it; else S is made by column 0."""
    group = draw(*GROUPS[name], integers=True)
    for options in schedules or schedules_of(name):
        assert_exact(emulate(group, arch, options, kernels=of(kernels), **altered)[0], group)


def check_separate(arch: int, schedules=SCHEDULES[2:4], kernels: Any = projection_launch, **altered: Any) -> None:
    """S in tiles of its own, which come ahead of each row group, where it could be fused."""
    m, k, members = GROUPS["q, k, v"]
    group, config = draw(m, k, members, integers=True), dataclasses.replace(SMALL[arch], fused=False)
    for options in schedules:
        assert_exact(emulate(group, arch, options, kernels=of(kernels), config=config, **altered)[0], group)


DROPPED = (
    Member(48, 16, dropout_p=0.3, bias=True, scaling=1.7),
    Member(32, 16, dropout_p=0.0, scaling=-0.7),
    Member(40, 4, dropout_p=0.6, scaling=2.3),
    Member(24, None, bias=True, dropout_p=0.3),
)


def check_dropout(
    dtype: torch.dtype, arch: int, schedules=SCHEDULES[2:4], kernels: Any = projection_launch, **altered: Any
) -> None:
    """A mask and a probability each, or none."""
    group = draw(139, 104, DROPPED, dtype)
    for options in schedules:
        assert_accurate(emulate(group, arch, options, kernels=of(kernels), **altered)[0], group)


def check_float16_range(arch: int, kernels: Any = projection_launch, **altered: Any) -> None:
    """A branch overflows in float16 where the composed layer's does, and nowhere else, beside one of a small scaling,
    on whose output nothing depends."""
    for regime in float16_range.REGIMES:
        small, case = (float16_range.draw(regime, scaling, 70, 48, 96, 5, 0.0) for scaling in (-0.3, 3000.3))
        cases = (dataclasses.replace(small, x=case.x), case)
        members = (Member(48, 5, bias=True, needs=None), Member(48, 5, bias=True))
        over_all, found = emulate(Group(members, cases), arch, SCHEDULES[2], kernels=of(kernels), **altered)[0]
        float16_range.check(over_all | found[1], case)


class Shipped(NamedTuple):
    """A tile of the tables."""

    arch: int
    config: TileConfig
    rank: int
    dtype: torch.dtype
    aligned: bool
    dropout_p: float
    forward_only: bool


def shipped() -> Iterator[Any]:
    """Each tile of the tables of sm_80 and sm_90, as triton_checks.shipped has them; all but one for the sweep."""
    for each in triton_checks.shipped():
        (tile,) = each.values
        if tile.multiple == 8:
            continue
        found = Shipped(
            tile.arch, tile.config, tile.rank, tile.dtype, tile.multiple == 16, tile.dropout_p, tile.forward_only
        )
        tested = each.id in TESTED_TILES
        yield pytest.param(found, id=str(each.id), marks=() if tested else (pytest.mark.sweep,))


TESTED_TILES = ("sm_90-hopper-64x128x64",)


def check_shipped(tile: Shipped, options: LaunchOptions = SCHEDULES[3], **altered: Any) -> None:
    """q, k and v whose heads are by groups (4:1:1): more row blocks than a shipped group has, more steps than the
    pipeline has stages, by the tile's instruction and without a spill."""
    config = tile.config
    m = (config.group_m + 1) * config.block_m + 13
    k = max(config.num_stages + 1, config.block_n // config.block_k + 1) * config.block_k
    n = k if tile.aligned else k + 1
    k = k if tile.aligned else k + 3
    small = max(16, n // 4 // 16 * 16) if tile.aligned else n // 4
    members = tuple(
        Member(size, tile.rank, dropout_p=tile.dropout_p, scaling=scaling, bias=i == 1)
        for i, (size, scaling) in enumerate(((n, 1.7), (small, -0.6), (small, 1.1)))
    )
    group = draw(m, k, members, tile.dtype)
    instruction = expected_instruction(tile.arch, config, tile.dtype)
    altered.setdefault("on_kernel", functools.partial(assert_fits, arch=tile.arch, instruction=instruction))
    results, _ = emulate(group, tile.arch, options, config=config, backward=not tile.forward_only, **altered)
    assert_accurate(results, group, against_eager=tile.dtype != torch.float32)
