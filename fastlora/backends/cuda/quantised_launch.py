"""The CUDA backend over a quantised base weight: one launch each way, which decodes it once, ahead of its products.

The launch's first tiles decode W0 into scratch of N·K elements in x's dtype, which is freed when the launch has been
made; behind them it is the dense launch. A backward without dX reads no weight: it is a dense launch without scratch.
"""

from collections.abc import Sequence
from typing import Any

import torch

from fastlora.backends.configs import has_few_rows
from fastlora.backends.cuda import extension
from fastlora.backends.cuda.launch import (
    BackwardLaunch,
    ForwardLaunch,
    PreparedLaunch,
    make_plan,
    unusable,
)
from fastlora.backends.cuda.launch import why_not_compiled as why_dense_not_compiled
from fastlora.backends.cuda.tiles import CudaTile
from fastlora.problem import Launcher, LaunchSpec
from fastlora.quantised_weight import FOUR_BIT, QuantisedWeight

_BYTE_CODES = {torch.int8: "int8", torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
_SCALES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_TOGETHER = 8  # elements that a thread decodes, with one scale
_LARGEST_BLOCK = 1 << 30  # whose elements 32 bits count, with a part's


def why_unsupported(spec: LaunchSpec) -> str | None:
    """Why these kernels cannot serve a call here, or None."""
    if spec.device.type != "cuda":
        return f"the tensors are on {spec.device}"
    return unusable(spec.device) or why_not_compiled(spec)


def why_not_compiled(spec: LaunchSpec) -> str | None:
    """Why these kernels do not compute such a call on any device, or None. The extension must be built."""
    packed = spec.packed
    if packed is None:
        return f"no kernel decodes a {spec.base_format} base weight"
    reason = why_dense_not_compiled(spec._replace(base_format="dense", packed=None))
    if reason is not None:
        return reason
    name, (_, n, k, r) = spec.base_format, spec.sizes
    ranks = [v["rank"] for v in extension.variants() if v["decodes"] and getattr(torch, v["dtype"]) == spec.dtype]
    if r > max(ranks, default=0):
        return f"rank {r} is above {max(ranks, default=0)} over {name} weights"
    if has_few_rows(spec.direction, spec.sizes.m, spec.dropout):
        return f"{spec.sizes.m} rows over {name} weights, which are better decoded in the loop of their product"
    if not packed.contiguous or not packed.starts[0]:
        return f"codes of the {name} weight do not start on 16 bytes, or one of its tensors is not contiguous"
    if packed.counts[1] >= 1 << 31:
        return f"{packed.counts[1]} scales of the {name} weight, which 32 bits do not count"
    codes, scales, *rest = packed.dtypes
    block, nested = packed.block
    if name in FOUR_BIT:
        usual = (torch.uint8, *(torch.float32,) * 3) if nested else (torch.float32,)
        if (scales, *rest) != usual:
            return f"scales of the {name} weight are {(scales, *rest)}, not {usual}"
        if block & (block - 1) or nested & (nested - 1):
            return f"blocks of {block} elements and {nested} scales of the {name} weight are no powers of two"
        return None
    if codes not in _BYTE_CODES or scales not in _SCALES or any(dtype != torch.int8 for dtype in rest):
        return f"no kernel decodes {name} weights of {packed.dtypes}"
    rows, columns = packed.block
    if (rows > 1 and columns != k) or k % columns or n % rows or packed.counts[1] * rows * columns != n * k:
        return f"{packed.counts[1]} scales of {rows} x {columns} elements of the {name} weight [{n}, {k}]"
    if rows * columns % _TOGETHER or rows * columns > _LARGEST_BLOCK:
        return f"{rows * columns} elements of the {name} weight have one scale"
    return None


def prepare(spec: LaunchSpec, tile: CudaTile | None = None, ctas: int | None = None) -> Launcher:
    """What serves every call of this description, with a QuantisedWeight for a weight; ``tile`` and ``ctas`` as for the
    dense launch."""
    backward = spec.direction == "backward"
    fields = {} if backward and not spec.needs.dx else _packed_fields(spec)
    plan = make_plan(spec, tile, ctas, **fields)
    return _Backward(spec, plan) if backward else _Forward(spec, plan)


def _packed_fields(spec: LaunchSpec) -> dict[str, Any]:
    """Of a plan: what codes and scales are, and how many share one."""
    packed = spec.packed
    assert packed is not None
    codes, scales, *_ = packed.dtypes
    if spec.base_format in FOUR_BIT:
        block, nested_block = packed.block
        scale_format = "nested" if nested_block else "float32"
        return {"code_format": spec.base_format, "scale_format": scale_format, "block": block,
                "nested_block": nested_block}  # fmt: skip
    rows, columns = packed.block
    return {"code_format": _BYTE_CODES[codes], "scale_format": _SCALES[scales], "block": rows * columns}


class _Decoding(PreparedLaunch):
    """What a launch over a packed weight adds to the dense one: the tensors that the weight is decoded from, and
    scratch in the weight's place."""

    def __init__(self, spec: LaunchSpec, plan: Any):
        self.decodes = plan.decode_tiles > 0
        if self.decodes:
            assert spec.packed is not None
            more = len(spec.packed.dtypes) - 2
            names = ("codes", "scales") + (("absmax2", "code2", "offset") if more == 3 else ("zeros",) * more)
            self.operands = (*self.operands, *names)
        super().__init__(spec, plan)

    def launch(self, operands: Sequence[Any], *rest: Any) -> None:
        act, weight, *others = operands
        assert act is not None and isinstance(weight, QuantisedWeight)
        if self.decodes:
            super().launch((act, act.new_empty(weight.shape), *others, *weight.tensors), *rest)
        else:  # nothing reads a weight: any memory stands for one
            super().launch((act, act, *others), *rest)


class _Forward(_Decoding, ForwardLaunch):
    """Y [M, N] and S [M, R] in one launch; see backends.reference."""


class _Backward(_Decoding, BackwardLaunch):
    """The gradients that the description needs in one launch; see backends.reference."""
