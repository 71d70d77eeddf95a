"""Layers over packed weights run by the Triton kernels, and checked: values, scratch bit for bit, the protocol."""

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from fastlora import quantised_operands
from fastlora.backends import workspace
from fastlora.backends.configs import TileConfig
from fastlora.backends.triton import quantised_launch
from fastlora.problem import Needs
from fastlora.quantised_weight import QuantisedWeight, quantised
from tests.emulator import LaunchOptions
from tests.support import numerics
from tests.support.quantised_models import quantise
from tests.support.triton_checks import ALL, SCHEDULES, SMALL
from tests.support.triton_emulation import emulated_launches

PART = 1024  # so small that a panel of a small tile has several


def draw_packed(name: str, weight: Tensor, block: int = 64) -> QuantisedWeight:
    """A weight in one of quantised_models.FORMATS, by the library itself; 4-bit ones hold every code, nested ones a
    scale of zero, which would be none if it were rounded once."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    precision = torch.get_float32_matmul_precision()
    packed = quantised(quantise(linear, name, block=block).weight)
    torch.set_float32_matmul_precision(precision)  # torchao has allowed TF32 for the process
    if packed.is_4bit:
        codes = packed.tensors[0].view(-1)
        start = min(codes.numel(), 5)
        every = torch.arange(256, dtype=torch.uint8)[: codes.numel() - start]
        codes[start : start + every.numel()] = every
    if packed.nested:
        _, scales, absmax2, code2, offset = packed.tensors
        products = code2[scales.int()].double() * absmax2.double().repeat_interleave(packed.block[1])[: scales.numel()]
        rounded = products.float()
        offset.fill_(-rounded[(rounded != products).nonzero()[0]].item())
    return packed


def draw(name: str, sizes, dtype: torch.dtype, *, block: int = 64, **options) -> tuple[numerics.Case, QuantisedWeight]:
    """A layer, whose weight is the one that the packed one holds."""
    case = numerics.draw_case(*sizes, dtype, **options)
    packed = draw_packed(name, case.weight, block)
    return dataclasses.replace(_in_wider_rows(case), weight=packed.dequantize()), packed


def _in_wider_rows(case: numerics.Case) -> numerics.Case:
    """Rows of X and dY, of which A and B know nothing, further apart than they are long."""
    wider = {name: torch.nn.functional.pad(getattr(case, name), (0, 16)) for name in ("x", "dy")}
    return dataclasses.replace(case, **{name: rows[:, :-16] for name, rows in wider.items()})


def draw_integers(sizes, dtype: torch.dtype, seed: int = 0) -> tuple[numerics.Case, QuantisedWeight]:
    """A layer whose every result has one right bit pattern, over a weight in int8 with zero points, and scales of 1."""
    case = _in_wider_rows(numerics.draw_integer_case(*sizes, dtype, seed=seed))
    n, k = case.weight.shape
    zeros = torch.arange(n).view(n, 1) % 7 - 3
    tensors = ((case.weight + zeros).to(torch.int8), torch.ones(n, 1), zeros.to(torch.int8))
    return case, QuantisedWeight("int8", tensors, (n, k), dtype, (1, k))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two weights are the same but for the sign of zeros, which bitsandbytes' own code paths give fp4 one way
    or the other, and for the bits of a NaN."""
    return one.dtype == other.dtype and torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


@contextmanager
def allocated(shape: tuple[int, int], dtype: torch.dtype) -> Iterator[list[Tensor]]:
    """Within it, the list of the tensors of this shape and dtype that ``new_empty`` makes."""
    found, allocate = [], torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        tensor = allocate(self, *args, **kwargs)
        if tuple(tensor.shape) == tuple(shape) and tensor.dtype == dtype:
            found.append(tensor)
        return tensor

    with mock.patch.object(torch.Tensor, "new_empty", new_empty):
        yield found


def run_layer(
    case: numerics.Case, packed: QuantisedWeight, needs: Needs | None, prepare: Callable, in_loop: bool = False
) -> dict[str, Tensor]:
    """Forward and backward of one layer by the launchers that ``prepare`` makes of their descriptions; its results.
    Each launch that reads the weight decodes it, bit for bit, and no other does; where the forward does it ``in_loop``,
    without scratch. (M is neither N nor K.)"""
    c = case
    needs = needs and needs._replace(dbias=needs.dbias and c.bias is not None)
    shared = (c.scaling, c.dropout_p, c.seed)
    with allocated(packed.shape, packed.dtype) as scratch:
        operands, spec = quantised_operands.describe_forward((c.x, packed, c.lora_a, c.lora_b, c.bias, *shared))
        y, s = prepare(spec)(operands)
        results = {"y": y}
        if needs:
            given = (c.dy, c.x, packed, c.lora_a, c.lora_b, s, *shared)
            operands, spec = quantised_operands.describe_backward(given, needs)
            results |= {n: g for n, g in prepare(spec)(operands)._asdict().items() if g is not None}
    assert len(scratch) == (not in_loop) + bool(needs and needs.dx), "scratch where tiles decode the weight"
    assert all(same_bits(each, c.weight) for each in scratch), "the scratch is not the library's own weight"
    assert not any(buffer.any() for buffer in workspace._by_stream.values()), "the workspace was left dirty"
    return results


def run(
    case: numerics.Case,
    packed: QuantisedWeight,
    config: TileConfig | None,
    needs: Needs | None = ALL,
    kernels: Any = quantised_launch,
    **choice: Any,
) -> dict[str, Tensor]:
    """``run_layer`` by ``kernels``."""
    choice = {"part": PART, "in_loop": False, **choice}
    return run_layer(case, packed, needs, lambda spec: kernels.prepare(spec, config, **choice), choice["in_loop"])


def emulate(
    case: numerics.Case,
    packed: QuantisedWeight,
    arch: int,
    options: LaunchOptions,
    needs: Needs | None = ALL,
    kernels: Any = quantised_launch,
    edit_ptx: Callable[[str], str] | None = None,
    on_kernel: Callable[[Any], None] | None = None,
    config: TileConfig | None = None,
    **choice: Any,
):
    """``run`` in the emulator, by a small tile unless ``config`` says otherwise: results, the launches' counters."""
    with emulated_launches(kernels, arch, options, edit_ptx, on_kernel) as stats:
        results = run(case, packed, config or SMALL[arch], needs, kernels, **choice)
    assert len(stats) == (2 if needs else 1), "one launch each way"
    return results, stats


def of(kernels: Any) -> Any:
    """The launcher over packed weights that belongs to a copy of fastlora.backends.triton.launch, or to itself."""
    return importlib.import_module(f"{kernels.__package__}.quantised_launch")


# [M, N, K, R]: several row groups, panels and parts of each, with a ragged last panel; columns that are no multiple of
# eight, so that codes are read byte by byte; a rank of which S is made in slices.
# And few rows, in the loop of the product, over a K that is no multiple of its step.
SIZES = ((136, 72, 80, 8), (97, 36, 45, 5), (75, 48, 64, 72), (49, 72, 200, 5))
FLOAT32_TILE = TileConfig(32, 32, 16, 2, 4, 2, 16, 32, 32)


def check_integers(sizes, arch: int, schedules=SCHEDULES, kernels: Any = quantised_launch, **altered: Any) -> None:
    """Under every schedule the same, one right result."""
    case, packed = draw_integers(sizes, torch.bfloat16)
    for options in schedules:
        numerics.assert_exact(emulate(case, packed, arch, options, kernels=of(kernels), **altered)[0], case)


def check_format(
    name: str,
    sizes,
    dtype: torch.dtype,
    arch: int,
    options: LaunchOptions = SCHEDULES[2],
    block: int = 64,
    dropout_p: float = 0.0,
    kernels: Any = quantised_launch,
    **altered: Any,
) -> None:
    """Of one of quantised_models.FORMATS; ``block``: elements that share a scale, of 4-bit ones."""
    case, packed = draw(name, sizes, dtype, block=block, dropout_p=dropout_p)
    if dtype == torch.float32:
        altered.setdefault("config", FLOAT32_TILE)
    results = emulate(case, packed, arch, options, kernels=of(kernels), **altered)[0]
    numerics.assert_accurate(results, case, against_eager=dtype != torch.float32)


class FormatCase(NamedTuple):
    """A format on one architecture; a backward decodes by the same code, and has to be compiled as well."""

    name: str
    sizes: tuple[int, int, int, int]
    dtype: torch.dtype
    arch: int
    needs: Needs | None = None
    in_loop: bool = False
    block: int = 64

    def describe(self) -> str:
        return f"sm_{self.arch} {self.name} {self.sizes} {self.dtype}" + " in the loop" * self.in_loop

    def check(self, options: LaunchOptions = SCHEDULES[2], **altered: Any) -> None:
        check_format(*self[:4], options, needs=self.needs, in_loop=self.in_loop, block=self.block, **altered)


# At sizes of words and of bytes; and in float32, where no later rounding hides what a fused multiply-add makes of
# nested scales.
EVERY_FORMAT = (
    FormatCase("nf4", SIZES[0], torch.bfloat16, 80),
    FormatCase("nf4 nested", SIZES[1], torch.bfloat16, 80, ALL),
    FormatCase("fp4", SIZES[0], torch.bfloat16, 90),
    FormatCase("fp4 nested", SIZES[1], torch.float16, 90),
    FormatCase("int8", SIZES[1], torch.bfloat16, 80),
    FormatCase("int8 tensor", SIZES[1], torch.bfloat16, 90),
    FormatCase("int8 group", SIZES[0], torch.bfloat16, 80, ALL),
    FormatCase("float8", SIZES[0], torch.bfloat16, 80),
    # More scales than have one nested scale.
    FormatCase("nf4 nested", (72, 136, 80, 8), torch.float32, 80, block=32),
    FormatCase("nf4 nested", (40, 168, 72, 8), torch.float32, 90, block=32),
    FormatCase("nf4 nested", SIZES[3], torch.bfloat16, 90, in_loop=True),
    FormatCase("int8", SIZES[3], torch.bfloat16, 80, in_loop=True),
)
INTEGERS = ((80, SIZES[0]), (90, SIZES[2]))
