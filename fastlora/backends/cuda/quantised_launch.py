"""The CUDA backend over a quantised base weight: one launch each way, which decodes it.

Once, ahead of the products: the launch's first tiles decode W0 into scratch of N·K elements in x's dtype, which is
freed when the launch has been made; behind them it is the dense launch. Or in the loop of the products, each of which
decodes its columns in shared memory: a forward of few rows, without scratch. A backward without dX reads no weight: it
is a dense launch.
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
from fastlora.backends.packed_blocks import elements_of_block, why_bad_blocks
from fastlora.backends.tuning import tuned_in_loop
from fastlora.problem import Launcher, LaunchSpec
from fastlora.quantised_weight import FOUR_BIT, QuantisedWeight

_BYTE_CODES = {torch.int8: "int8", torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
_SCALES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# The most of a forward without dropout whose products decode the weight in their loop: two row blocks.
ROWS_IN_LOOP = 128
# Elements that a thread decodes, with one scale: once for all tiles, and in the loop (csrc/host/packed_weight.h).
_TOGETHER, _IN_STAGE = 8, 32


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
    name, r = spec.base_format, spec.sizes.r
    ranks = [v["rank"] for v in extension.variants() if v["decodes"] and getattr(torch, v["dtype"]) == spec.dtype]
    if r > max(ranks, default=0):
        return f"rank {r} is above {max(ranks, default=0)} over {name} weights"
    if not packed.contiguous or not packed.starts[0]:
        return f"codes of the {name} weight do not start on 16 bytes, or one of its tensors is not contiguous"
    codes, scales, *rest = packed.dtypes
    block, nested = packed.block
    if name not in FOUR_BIT and (
        codes not in _BYTE_CODES or scales not in _SCALES or any(dtype != torch.int8 for dtype in rest)
    ):
        return f"no kernel decodes {name} weights of {packed.dtypes}"
    if reason := why_bad_blocks(spec):
        return reason
    if name in FOUR_BIT and (block & (block - 1) or nested & (nested - 1)):
        return f"blocks of {block} elements and {nested} scales of the {name} weight are no powers of two"
    if elements_of_block(spec) % _TOGETHER:
        return f"{elements_of_block(spec)} elements of the {name} weight have one scale"
    few = has_few_rows(spec.direction, spec.sizes.m, spec.dropout)
    if few and tuned_in_loop("cuda", spec) is None and (reason := why_not_in_loop(spec)):
        return f"{spec.sizes.m} rows over {name} weights, better decoded in the loop of their product, and {reason}"
    return None


def why_not_in_loop(spec: LaunchSpec) -> str | None:
    """Why the products of such a launch, which is served, cannot decode the weight in their loop, or None."""
    if spec.direction == "backward" or spec.dropout:
        return "only a forward without dropout does that"
    if spec.sizes.k % _IN_STAGE:
        return f"in_features {spec.sizes.k} is no multiple of {_IN_STAGE}"
    if (block := elements_of_block(spec)) % _IN_STAGE:
        return f"{block} elements with one scale are no multiple of {_IN_STAGE}"
    return None


def decodes_in_loop(spec: LaunchSpec, tuned: bool = True) -> bool:
    """Whether the products of a launch should decode the weight in their loop, instead of tiles ahead of them: as was
    found by ``fastlora tune``, unless ``tuned`` is False, else up to ROWS_IN_LOOP rows.

    By a model (python -m benchmarks.schedule --decoding) that is faster on average over Llama's layers, up to half as
    many rows in each of them, and faster than the Triton kernels; nothing is measured.
    """
    if why_not_in_loop(spec):
        return False
    found = tuned_in_loop("cuda", spec) if tuned else None
    return spec.sizes.m <= ROWS_IN_LOOP if found is None else found


def prepare(
    spec: LaunchSpec, tile: CudaTile | None = None, ctas: int | None = None, in_loop: bool | None = None
) -> Launcher:
    """What serves every call of this description, with a QuantisedWeight for a weight.

    Args:
        tile, ctas: as for the dense launch.
        in_loop: whether products decode the weight, instead of tiles ahead of them; see decodes_in_loop.
    """
    backward = spec.direction == "backward"
    if in_loop is None:
        in_loop = decodes_in_loop(spec)
    fields = {} if backward and not spec.needs.dx else {**_packed_fields(spec), "in_loop": in_loop}
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
    scratch in the weight's place, or in the loop nothing."""

    def __init__(self, spec: LaunchSpec, plan: Any):
        self.in_loop = plan.variant["in_loop"]
        self.decodes = self.in_loop or plan.decode_tiles > 0
        if self.decodes:
            assert spec.packed is not None
            more = len(spec.packed.dtypes) - 2
            names = ("codes", "scales") + (("absmax2", "code2", "offset") if more == 3 else ("zeros",) * more)
            kept = (name for name in self.operands if not (self.in_loop and name == "weight"))
            self.operands = (*kept, *names)
        super().__init__(spec, plan)

    def launch(self, operands: Sequence[Any], *rest: Any) -> None:
        act, weight, *others = operands
        assert act is not None and isinstance(weight, QuantisedWeight)
        if self.in_loop:
            super().launch((act, *others, *weight.tensors), *rest)
        elif self.decodes:
            super().launch((act, act.new_empty(weight.shape), *others, *weight.tensors), *rest)
        else:  # nothing reads a weight: any memory stands for one
            super().launch((act, act, *others), *rest)


class _Forward(_Decoding, ForwardLaunch):
    """Y [M, N] and S [M, R] in one launch; see backends.reference."""


class _Backward(_Decoding, BackwardLaunch):
    """The gradients that the description needs in one launch; see backends.reference."""
