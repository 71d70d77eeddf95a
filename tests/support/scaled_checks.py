"""DoRA layers run by the Triton kernels, and checked: values, scratch, the protocol."""

import dataclasses
import functools
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from fastlora import scaled_operands
from fastlora.backends import workspace
from fastlora.backends.configs import TileConfig
from fastlora.backends.triton import scaled_launch
from fastlora.problem import BackwardOperands, ForwardOperands, Needs, ScaledBackward, ScaledForward
from tests.emulator import LaunchOptions
from tests.support import numerics, triton_checks
from tests.support.compile_gate import assert_fits, expected_instruction
from tests.support.triton_checks import ALL, SCHEDULES, SMALL
from tests.support.triton_emulation import emulated_launches


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, and the two vectors whose quotient scales the columns of Y."""

    layer: numerics.Case
    magnitude: Tensor
    norm: Tensor

    def wide(self) -> "Case":
        return Case(self.layer.to(torch.float64), self.magnitude.double(), self.norm.double())


def draw(
    m: int, n: int, k: int, r: int, dtype: torch.dtype, *, magnitude: torch.dtype = torch.float32, **options
) -> Case:
    """Factors of both signs, from tiny ones to 2, one that is 0, and no two neighbours alike."""
    layer = numerics.draw_case(m, n, k, r, dtype, **options)
    generator = torch.Generator().manual_seed(1)
    norm = torch.rand(n, generator=generator) + 0.5
    factors = torch.rand(n, generator=generator) * 2 * (1 - 2 * (torch.arange(n) % 2))
    factors[n // 3], factors[n // 2] = 0.0, 1e-6
    device = layer.x.device
    return Case(layer, (factors * norm).to(magnitude).to(device), norm.to(device))


def draw_integers(m: int, n: int, k: int, r: int) -> Case:
    """A layer in bfloat16 with float32 adapters whose every result has one right bit pattern: factors are 0 and powers
    of two."""
    layer = numerics.draw_integer_case(m, n, k, r, torch.bfloat16)
    layer = dataclasses.replace(layer, lora_a=layer.lora_a.float(), lora_b=layer.lora_b.float())
    norm = 2.0 ** (torch.arange(n) % 5 - 2)
    factors = torch.tensor([1.0, -2.0, 0.5, 0.0, 2.0, -1.0, -0.5])[torch.arange(n) % 7]
    case = Case(layer, factors * norm, norm)
    narrow = ("y", "unscaled", "dx", "dbias")
    for name, value in compose(case.wide()).items():
        dtype = torch.bfloat16 if name in narrow else torch.float32
        if not torch.equal(value, value.to(dtype).double()):
            raise ValueError(f"{name} of integer case {m, n, k, r} is not exact in {dtype}: draw sparser numbers")
    return case


def compose(case: Case) -> dict[str, Tensor]:
    """Y, Z and the gradients of the composition by torch, in the case's own dtypes, by autograd."""
    c = case.layer
    sources = {"dx": c.x, "da": c.lora_a, "db": c.lora_b, "dbias": c.bias, "dm": case.magnitude}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in sources.items() if t is not None}
    x = leaves["dx"]
    unscaled = linear(x, c.weight) + linear(linear(x, leaves["da"].to(x.dtype)), leaves["db"].to(x.dtype)) * c.scaling
    y = unscaled * (leaves["dm"] / case.norm)
    y = (y + leaves["dbias"] if "dbias" in leaves else y).to(x.dtype)
    gradients = torch.autograd.grad(y, list(leaves.values()), c.dy)
    return {"y": y.detach(), "unscaled": unscaled.detach(), **dict(zip(leaves, gradients, strict=True))}


def bounds(case: Case) -> dict[str, Tensor]:
    """For each result, the same sums over absolute values, times the square root of their length."""
    c = case.wide()
    factors = (c.magnitude / c.norm).abs()
    none = dataclasses.replace(c.layer, bias=None)
    unscaled = numerics.bounds_of(none)["y"]
    scaled = numerics.bounds_of(dataclasses.replace(c.layer, dy=c.layer.dy * factors))
    dy = c.layer.dy.abs()
    bias = 0.0 if c.layer.bias is None else c.layer.bias.abs()
    m = dy.shape[0]
    return {
        "y": unscaled * factors + bias,
        "unscaled": unscaled,
        **{name: scaled[name] for name in ("dx", "da", "db")},
        "dbias": dy.sum(0) * m**0.5,
        "dm": (dy * unscaled).sum(0) / c.norm * m**0.5,
    }


def assert_accurate(results: dict[str, Tensor], case: Case, *, against_eager: bool = True) -> None:
    """The error rule of tests.support.numerics."""
    eager = compose(case) if against_eager else None
    eps = torch.finfo(case.layer.x.dtype).eps
    numerics.assert_obeyed(results, compose(case.wide()), eager, bounds(case), eps)


def assert_exact(results: dict[str, Tensor], case: Case) -> None:
    """For integer cases."""
    numerics.assert_equal(results, compose(case.wide()))


def run(
    case: Case,
    config: TileConfig | None,
    needs: Needs | None = ALL,
    trains: bool = True,
    kernels: Any = scaled_launch,
) -> dict[str, Tensor]:
    """Forward and backward of one layer by ``kernels``; its results.

    needs: None: there is no backward. trains: whether the magnitude gets a gradient.
    """
    c = case.layer
    needs = needs and needs._replace(dbias=needs.dbias and c.bias is not None)
    shared, factors = (c.scaling, c.dropout_p, c.seed), (case.magnitude, case.norm)
    given = ScaledForward(ForwardOperands(c.x, c.weight, c.lora_a, c.lora_b, c.bias, *shared), *factors, trains)
    operands, spec = scaled_operands.describe_forward(given)
    y, s, unscaled = kernels.prepare(spec, config)(operands)
    results = {"y": y} | ({"unscaled": unscaled} if trains else {})
    assert (unscaled is not None) == trains, "Z where the magnitude trains, and nowhere else"
    if needs is not None:
        layer = BackwardOperands(c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, *shared)
        backward = ScaledBackward(layer, *factors, unscaled)
        taken, spec = scaled_operands.describe_backward(backward, needs)
        gradients, dm = kernels.prepare(spec, config)(taken)
        results |= {n: g for n, g in (*gradients._asdict().items(), ("dm", dm)) if g is not None}
        wanted = {name for name, need in (*needs._asdict().items(), ("dm", trains)) if need}
        assert results.keys() - {"y", "unscaled"} == wanted
    assert not any(buffer.any() for buffer in workspace._by_stream.values()), "the workspace was left dirty"
    return results


def emulate(
    case: Case,
    arch: int,
    options: LaunchOptions,
    needs: Needs | None = ALL,
    trains: bool = True,
    kernels: Any = scaled_launch,
    edit_ptx: Any = None,
    on_kernel: Any = None,
    config: TileConfig | None = None,
):
    """``run`` in the emulator, by a small tile unless ``config`` says otherwise: results, the launches' counters."""
    with emulated_launches(kernels, arch, options, edit_ptx, on_kernel) as stats:
        results = run(case, config or SMALL[arch], needs, trains, kernels)
    assert len(stats) == (1 if needs is None else 2), "one launch each way"
    return results, stats


def of(kernels: Any) -> Any:
    """The launcher of DoRA layers that belongs to a copy of fastlora.backends.triton.launch, or to itself."""
    return importlib.import_module(f"{kernels.__package__}.scaled_launch")


# [M, N, K, R]: several row groups and column blocks, a ragged last one of each; S with tiles of its own above a rank of
# 64.
SIZES = ((264, 136, 72, 8), (136, 72, 80, 72))
INTEGERS = ((80, SIZES[0]), (90, SIZES[1]))


class Shipped(NamedTuple):
    """A tile of the tables."""

    arch: int
    config: TileConfig
    rank: int
    dtype: torch.dtype
    aligned: bool
    forward_only: bool


def shipped() -> Iterator[Any]:
    """Each tile of the tables of sm_80 and sm_90, by both ways to make S where either may be chosen. All but the
    largest of 16 bits are the sweep's."""
    seen = set()
    for each in triton_checks.shipped():
        (tile,) = each.values
        found = Shipped(tile.arch, tile.config, tile.rank, tile.dtype, tile.multiple == 16, tile.forward_only)
        if tile.multiple == 8 or found in seen:
            continue
        seen.add(found)
        largest = tile.config.block_n == (256 if tile.arch == 90 else 128) and tile.config.fused
        yield pytest.param(
            found, id=str(each.id).removesuffix("-dropout"), marks=() if largest else (pytest.mark.sweep,)
        )


def check_shipped(tile: Shipped, options: LaunchOptions = SCHEDULES[3], **altered: Any) -> None:
    """Several row groups of the shipped size, more steps than the pipeline has stages, by the tile's instruction."""
    config = tile.config
    m = (config.group_m + 1) * config.block_m + 13
    n = k = max(config.num_stages + 1, config.block_n // config.block_k + 1) * config.block_k
    if not tile.aligned:
        n, k = n + 1, k + 3
    case = draw(m, n, k, tile.rank, tile.dtype)
    gate = functools.partial(
        assert_fits, arch=tile.arch, instruction=expected_instruction(tile.arch, config, tile.dtype)
    )
    altered.setdefault("on_kernel", gate)
    results, _ = emulate(case, tile.arch, options, None if tile.forward_only else ALL, config=config, **altered)
    assert_accurate(results, case, against_eager=tile.dtype != torch.float32)


def check_integers(sizes, arch: int, schedules=SCHEDULES, kernels: Any = scaled_launch, **altered: Any) -> None:
    """Under every schedule the same, one right result."""
    case = draw_integers(*sizes)
    for options in schedules:
        assert_exact(emulate(case, arch, options, kernels=of(kernels), **altered)[0], case)
