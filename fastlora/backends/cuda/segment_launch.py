"""Rows in segments by the CUDA kernels, host side: which calls they serve, and the two launches of a layer.

Nothing is read of the tensors that say where segments end and what they use: the plan has a tile for every row block
that there may be.
"""

import os
from typing import Any

import torch
from torch import Tensor

from fastlora.backends.cuda import extension
from fastlora.backends.cuda import launch as single
from fastlora.backends.cuda.launch import PreparedLaunch, cast
from fastlora.backends.cuda.tiles import CudaTile, choose_segment_tile
from fastlora.problem import Gradients, Launcher, LaunchSpec, Stacks
from fastlora.segments import GroupedBackward, GroupedForward

MAX_SEGMENTS = 1023  # kMaxSegments of csrc/host/params.h: their table must fit shared memory
_TRUE = ("1", "true", "yes", "on", "y")  # as Triton reads its environment
_OF_SEGMENTS = ("ends", "experts", "adapters", "scalings")


def why_unsupported(spec: LaunchSpec) -> str | None:
    """Why these kernels cannot serve a call here, or None."""
    if spec.device.type != "cuda":
        return f"the tensors are on {spec.device}"
    if os.environ.get("TRITON_DEBUG", "").lower() in _TRUE:
        return "TRITON_DEBUG asks for kernels that trap where segments are broken: Triton's"
    return single.unusable(spec.device) or why_not_compiled(spec)


def why_not_compiled(spec: LaunchSpec) -> str | None:
    """Why these kernels do not compute such a call on any device, or None. The extension must be built."""
    return single.why_not_compiled(spec, branch="segments") or _why_refused(spec, _stacks(spec))


def _why_refused(spec: LaunchSpec, stacks: Stacks) -> str | None:
    if not 0 < stacks.n_segments <= MAX_SEGMENTS:
        return f"{stacks.n_segments} segments are not from 1 to {MAX_SEGMENTS}"
    if 0 in (stacks.n_weights, stacks.n_adapters):
        return f"a stack of {stacks.n_weights} weights and {stacks.n_adapters} adapters has none to read"
    if spec.dropout:
        return "no kernel for rows in segments drops elements"
    if spec.needs.dbias:
        return "no kernel for rows in segments makes the bias's gradient"
    if stacks.weight != spec.dtype:
        return f"weights of {stacks.weight} would have to be cast to {spec.dtype}"
    if stacks.scalings is not None and (stacks.scalings != torch.float32 or spec.dtype == torch.float16):
        return f"scalings of {stacks.scalings} with x of {spec.dtype}: float32 ones with bfloat16 are served"
    if stacks.n_weights > 1 and (stacks.weight_stride % 8 or stacks.weight_stride < _weight_extent(spec)):
        return f"weights {stacks.weight_stride} elements apart interleave, or do not start on 16 bytes"
    return None


def _weight_extent(spec: LaunchSpec) -> int:
    """Elements from the first row of a weight to behind its last."""
    return (spec.sizes.k if spec.base_format == "transposed" else spec.sizes.n) * spec.row_strides.weight


def prepare(spec: LaunchSpec, tile: CudaTile | None = None, ctas: int | None = None) -> Launcher:
    """What serves every call of this description. ``tile`` overrides choose_segment_tile, ``ctas`` the number of CTAs:
    one for each multiprocessor."""
    m, n, k, r = spec.sizes
    stacks, needs = _stacks(spec), spec.needs
    backward = spec.direction == "backward"
    out_columns, contracted = (k, n) if backward else (n, k)
    tile = tile or choose_segment_tile(m, stacks.n_segments)
    makes = {"makes_out": needs.dx, "grad_a": needs.da, "grad_b": needs.db}
    plan = extension.loaded().Plan(
        backward=backward, transposed=spec.base_format == "transposed", dropout=False,
        fp16=spec.dtype == torch.float16, m=m, n=out_columns, k=contracted, r=r,
        n_segments=stacks.n_segments, n_weights=stacks.n_weights, n_adapters=stacks.n_adapters,
        n_biases=0 if backward else stacks.n_biases,
        block_m=tile.block_m, block_n=tile.block_n, group_m=tile.group_m, splits=1, fused=False,
        ctas=ctas or single.multiprocessors(spec.device), **(makes if backward else {}),
    )  # fmt: skip
    constants = {
        # Of the only weight it may be anything.
        "weight_stride": stacks.weight_stride if stacks.n_weights > 1 else _weight_extent(spec),
        "wide_experts": stacks.experts == torch.int64,
        "wide_adapters": stacks.adapters == torch.int64,
    }
    return (_Backward if backward else _Forward)(spec, plan, constants)


def _stacks(spec: LaunchSpec) -> Stacks:
    assert spec.stacks is not None, "fastlora.segments.describe_segments says them"
    return spec.stacks


class _Forward(PreparedLaunch):
    """Y [M, N] and S [M, R] in one launch; see backends.segments_reference."""

    operands = ("act", "weight", "lora_a", "lora_b", "bias", "out", "s", "kept_s", *_OF_SEGMENTS)

    def __init__(self, spec: LaunchSpec, plan: Any, constants: dict[str, Any]):
        super().__init__(spec, plan, **constants)
        self.s_rows = plan.s_rows

    def __call__(self, operands: GroupedForward) -> tuple[Tensor, Tensor]:
        o, dtype = operands, self.spec.dtype
        m, n, _, r = self.spec.sizes
        y, s, copied = (o.x.new_empty(*size) for size in ((m, n), (m, r), (self.s_rows, r)))
        factors = cast(o.lora_a, dtype), cast(o.lora_b, dtype)
        of_segments = (*o.segments, o.scalings)
        scaling = o.scaling if o.scalings is None else 1.0
        self.launch((o.x, o.weight, *factors, o.bias, y, copied, s, *of_segments), scaling, 0.0, None)
        return y, s


class _Backward(PreparedLaunch):
    """The gradients that the description needs in one launch; see backends.segments_reference."""

    operands = (
        "act", "weight", "lora_a", "lora_b", "layer_input", "saved_s", "out", "s", "grad_a", "grad_b", *_OF_SEGMENTS
    )  # fmt: skip

    def __init__(self, spec: LaunchSpec, plan: Any, constants: dict[str, Any]):
        m, n, k, r = spec.sizes
        needs, count, dtypes = spec.needs, _stacks(spec).n_adapters, {*spec.adapter_dtypes, spec.dtype}
        # Both gradients are stored in one dtype; if the adapters differ in theirs, one of them is cast.
        grad_dtype = spec.dtype if len(dtypes) == 1 else torch.float32
        super().__init__(spec, plan, fp32_grads=grad_dtype != spec.dtype, **constants)
        made = (
            (needs.dx, (m, k), spec.dtype), (needs.dx or needs.da, (plan.s_rows, r), spec.dtype),
            (needs.da, (count, r, k), grad_dtype), (needs.db, (count, n, r), grad_dtype),
        )  # fmt: skip
        self.outputs = tuple((shape, dtype) if need else None for need, shape, dtype in made)

    def __call__(self, operands: GroupedBackward) -> Gradients:
        o, dtype = operands, self.spec.dtype
        made = [each and o.dy.new_empty(each[0], dtype=each[1]) for each in self.outputs]
        factors = cast(o.lora_a, dtype), cast(o.lora_b, dtype)
        of_segments = (*o.segments, o.scalings)
        scaling = o.scaling if o.scalings is None else 1.0
        self.launch((o.dy, o.weight, *factors, o.x, o.s, *made, *of_segments), scaling, 0.0, None)
        dx, _, da, db = made
        return Gradients(dx, cast(da, o.lora_a.dtype), cast(db, o.lora_b.dtype), None)
