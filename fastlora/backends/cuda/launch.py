"""The CUDA backend for Hopper: a whole LoRA layer in one launch forward and one launch backward."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlora import philox
from fastlora.backends.cuda import extension
from fastlora.backends.cuda.tiles import CudaTile, choose_tile
from fastlora.backends.target import raw_stream
from fastlora.backends.workspace import borrow_workspace
from fastlora.problem import (
    BackwardOperands,
    ForwardOperands,
    Gradients,
    Launcher,
    LaunchSpec,
    PassingReason,
    split_scaling,
)

_BASE_FORMATS = ("dense", "transposed")


def unusable(device: torch.device | None = None) -> str | None:
    """Why these kernels cannot run on a device (None: the current one), or None. That there is no device is a
    PassingReason, and so is an error."""
    module, reason = extension.load()
    if module is None:
        return reason
    if torch.version.hip is not None:
        return "this torch is built for ROCm, and the kernels are for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return PassingReason("no CUDA device")
    try:
        if module.device_count() == 0:
            return PassingReason(f"the extension's CUDA runtime finds no device ({module.device_error()})")
        major, minor = _capability(device or torch.device("cuda", torch.cuda.current_device()))
    except (RuntimeError, AssertionError) as error:
        return PassingReason(f"the device cannot be used: {str(error).splitlines()[0]}")
    compiled = sorted({variant["arch"] for variant in extension.variants()})
    if 10 * major + minor not in compiled:
        names = ", ".join(f"{arch // 10}.{arch % 10}" for arch in compiled)
        return f"compiled for compute capability {names}, this device has {major}.{minor}"
    return None


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def why_not_compiled(spec: LaunchSpec, branch: str = "single") -> str | None:
    """Why these kernels do not compute such a call on any device, or None. The extension must be built. ``branch``: of
    the kernels in question."""
    m, n, k, r = spec.sizes
    if spec.base_format not in _BASE_FORMATS or spec.branch != branch:
        return f"no kernel for a {spec.base_format} base weight with a {spec.branch} branch"
    if spec.column_scale is not None:
        return "no kernel scales the columns of Y"
    transposed = spec.base_format == "transposed"
    kinds = {"segments": branch == "segments", "shared": branch == "shared_input"}
    compiled = [v for v in extension.variants() if v.items() >= kinds.items()]
    served = [v for v in compiled if getattr(torch, v["dtype"]) == spec.dtype]
    if not served:
        dtypes = " or ".join(sorted({variant["dtype"] for variant in extension.variants()}, reverse=True))
        return f"dtype {spec.dtype} is not {dtypes}"
    ranks = [v["rank"] for v in served if v["transposed"] == transposed]
    if not ranks:
        return f"no kernel for a {spec.base_format} base weight with a {branch} branch"
    if r > max(ranks):
        of_branch = {"segments": " of rows in segments", "shared_input": " of several projections"}.get(branch, "")
        return f"rank {r}{of_branch} is above {max(ranks)}" + (" over a transposed base weight" if transposed else "")
    if n % 8 or k % 8 or r % 8:
        return f"out_features {n}, in_features {k} and rank {r} must be multiples of 8"
    # Factors of another dtype are cast, and the cast is aligned.
    if not all(spec.aligned._replace(**{name: True for name in cast_factors(spec)})):
        return "an operand does not start on 16 bytes, or its rows do not"
    if max(m, n, k) >= 2**31 - 1024:
        return f"a dimension of {max(m, n, k)} does not fit 32 bits"
    return None


def cast_factors(spec: LaunchSpec) -> tuple[str, ...]:
    """Which of the factors have another dtype than x, and are cast to it."""
    factors = zip(("lora_a", "lora_b"), spec.adapter_dtypes, strict=True)
    return tuple(name for name, dtype in factors if dtype != spec.dtype)


def why_unsupported(spec: LaunchSpec) -> str | None:
    """Why these kernels cannot serve a call here, or None."""
    if spec.device.type != "cuda":
        return f"the tensors are on {spec.device}"
    return unusable(spec.device) or why_not_compiled(spec)


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """How many a device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


class PreparedLaunch:
    """What the calls of one description share: the plan with all that does not change, and scratch memory."""

    operands: tuple[str, ...]  # of `launch`, by their names in a plan

    def __init__(self, spec: LaunchSpec, plan: Any, **constants: Any):
        self.spec, self.plan, self.device = spec, plan, spec.device
        m, n, k, r = spec.sizes
        given, outputs = spec.row_strides, (n if spec.direction == "forward" else k)
        factors = dict(zip(("lora_a", "lora_b"), ((given.lora_a, k), (given.lora_b, r)), strict=True))
        casts = cast_factors(spec)  # which makes them contiguous
        strides = {
            "act": given.act if m > 1 else k + n - outputs,
            "weight": given.weight,
            **{name: contiguous if name in casts else stride for name, (stride, contiguous) in factors.items()},
            "layer_input": given.saved_x if m > 1 else k,
            "out": outputs,
            "saved_s": r,
        }
        matrices = {name: (0, stride) for name, stride in strides.items() if name in self.operands}
        partials = {"gradient_partials": plan.gradient_partial_floats, "split_partials": plan.split_partial_floats}
        scratch = {name: size for name, size in partials.items() if size}
        # By their names in a plan, in the order in which `bound` is given them.
        seed_address, seed = (("seed_address",), ("seed",)) if spec.dropout else ((), ())
        self.tensors = (*self.operands, "workspace", *scratch, *seed_address)
        self.bound = plan.bind((*self.tensors, *NUMBERS, *seed), **matrices, **constants)
        self.scratch = tuple(scratch.values())
        self.words = plan.workspace_words

    def launch(self, operands: Sequence[Tensor | None], scaling: float, dropout_p: float, seed: Tensor | None) -> None:
        """A launch with these ``operands``, of which None is one that it does not use."""
        partials = [torch.empty(size, dtype=torch.float32, device=self.device) for size in self.scratch]
        tensors = [*operands, borrow_workspace(self.words, self.device), *partials]
        numbers = branch_numbers(scaling, dropout_p, self.spec.dtype, self.spec.direction == "backward")
        if seed is not None:
            address, value = by_address_or_value(seed)
            tensors.append(address)
            numbers = (*numbers, value)
        launch_bound(self, tensors, numbers)


def by_address_or_value(seed: Tensor) -> tuple[Tensor | None, int]:
    """By value where it is in reach of the CPU."""
    return (None, int(seed)) if seed.device.type == "cpu" else (seed, 0)


class Bound(Protocol):
    """A launcher of a plan, and the names in it of the tensors that each call gives."""

    tensors: tuple[str, ...]
    device: torch.device
    bound: Any


def launch_bound(prepared: Bound, tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> None:
    """Launches on the current stream of the operands' device, which need not be current itself. ``numbers``: those of
    NUMBERS, and with dropout the seed."""
    device = prepared.device.index or 0
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    prepared.bound(device, raw_stream(device), *addresses, *numbers)


NUMBERS = ("scale_in_s", "scale_on_branch", "drop_threshold", "inverse_keep")


@lru_cache(maxsize=256)
def branch_numbers(scaling: float, dropout_p: float, dtype: torch.dtype, backward: bool) -> tuple[float, ...]:
    """The values of NUMBERS: the factors of the branch, and what dropout drops and keeps."""
    scales = split_scaling(scaling, dtype)
    drops = (philox.threshold(dropout_p), philox.inverse_keep(dropout_p)) if dropout_p > 0.0 else (0, 1.0)
    return (scaling if backward else scales.in_s, scales.on_branch, *drops)


def prepare(spec: LaunchSpec, tile: CudaTile | None = None, ctas: int | None = None) -> Launcher:
    """What serves every call of this description. ``tile`` overrides choose_tile, ``ctas`` the number of CTAs: one for
    each multiprocessor."""
    plan = make_plan(spec, tile, ctas)
    return BackwardLaunch(spec, plan) if spec.direction == "backward" else ForwardLaunch(spec, plan)


def make_plan(spec: LaunchSpec, tile: CudaTile | None, ctas: int | None, **packed: Any) -> Any:
    """The fastlora._C.Plan of a description; ``packed``: its fields of a base weight that the launch decodes, where it
    does at all."""
    m, n, k, r = spec.sizes
    backward = spec.direction == "backward"
    out_columns, contracted = (k, n) if backward else (n, k)
    ctas = ctas or multiprocessors(spec.device)
    kernel = {
        "transposed": spec.base_format == "transposed", "dropout": spec.dropout, "backward": backward
    }  # fmt: skip
    in_loop = packed.get("in_loop", False)
    decoding = {"decodes": bool(packed) and not in_loop, "in_loop": in_loop}
    tile = tile or choose_tile(m, out_columns, contracted, r, ctas, **decoding, **kernel)
    needs = spec.needs
    makes = {"makes_out": needs.dx, "grad_a": needs.da, "grad_b": needs.db, "grad_bias": needs.dbias}
    return extension.loaded().Plan(
        **kernel, fp16=spec.dtype == torch.float16, m=m, n=out_columns, k=contracted, r=r,
        block_m=tile.block_m, block_n=tile.block_n, group_m=tile.group_m, splits=tile.splits,
        fused=tile.fused and (needs.dx or not backward), gradients_last=tile.gradients_last and needs.dx, ctas=ctas,
        **(makes if backward else {}), **packed,
    )  # fmt: skip


class ForwardLaunch(PreparedLaunch):
    """Y [M, N] and S [M, R] in one launch; see backends.reference."""

    operands = ("act", "weight", "lora_a", "lora_b", "bias", "out", "s")

    def __call__(self, operands: ForwardOperands) -> tuple[Tensor, Tensor]:
        x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed = operands
        m, n, _, r = self.spec.sizes
        dtype = self.spec.dtype
        y, s = x.new_empty(m, n), x.new_empty(m, r)
        factors = cast(lora_a, dtype), cast(lora_b, dtype)
        self.launch((x, weight, *factors, bias, y, s), scaling, dropout_p, seed)
        return y, s


class BackwardLaunch(PreparedLaunch):
    """The gradients that the description needs in one launch; see backends.reference."""

    operands = (
        "act", "weight", "lora_a", "lora_b", "layer_input", "saved_s", "out", "s", "grad_a", "grad_b", "grad_bias"
    )  # fmt: skip

    def __init__(self, spec: LaunchSpec, plan: Any):
        m, n, k, r = spec.sizes
        needs, dtypes = spec.needs, {*spec.adapter_dtypes, spec.dtype}
        # Both gradients are stored in one dtype; if the adapters differ in theirs, one of them is cast.
        grad_dtype = spec.dtype if len(dtypes) == 1 else torch.float32
        super().__init__(spec, plan, fp32_grads=grad_dtype != spec.dtype)
        # Of dX, dS, dA, dB and dbias: how to make each that is needed. (shape, strides, dtype): torch.empty_strided
        # takes less of the CPU than the functions that work out the strides.
        self.outputs = tuple(
            ((rows, columns), (columns, 1), dtype) if need else None
            for need, rows, columns, dtype in (
                (needs.dx, m, k, spec.dtype), (needs.dx or needs.da, m, r, spec.dtype),
                (needs.da, r, k, grad_dtype), (needs.db, n, r, grad_dtype),
            )
        ) + ((((n,), (1,), spec.dtype) if needs.dbias else None),)  # fmt: skip

    def __call__(self, operands: BackwardOperands) -> Gradients:
        dy, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed = operands
        dtype = self.spec.dtype
        made = [
            None if output is None else torch.empty_strided(*output[:2], dtype=output[2], device=self.device)
            for output in self.outputs
        ]
        factors = cast(lora_a, dtype), cast(lora_b, dtype)
        self.launch((dy, weight, *factors, x, s, *made), scaling, dropout_p, seed)
        dx, _, da, db, dbias = made
        return Gradients(dx, cast(da, lora_a.dtype), cast(db, lora_b.dtype), dbias)


def cast(tensor: Any, dtype: torch.dtype) -> Any:
    """The tensor, or None, in this dtype; itself where it has it."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)
