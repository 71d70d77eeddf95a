"""The CUDA backend for Hopper: a whole LoRA layer in one launch forward and one launch backward."""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fastlora import philox
from fastlora.backends.cuda import extension
from fastlora.backends.cuda.tiles import CudaTile, choose_tile
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


def why_not_compiled(spec: LaunchSpec) -> str | None:
    """Why these kernels do not compute such a call on any device, or None. The extension must be built."""
    m, n, k, r = spec.sizes
    served = [v for v in extension.variants() if getattr(torch, v["dtype"]) == spec.dtype]
    if not served:
        dtypes = " or ".join(sorted({variant["dtype"] for variant in extension.variants()}, reverse=True))
        return f"dtype {spec.dtype} is not {dtypes}"
    if r > (max_rank := max(variant["rank"] for variant in served)):
        return f"rank {r} is above {max_rank}"
    if n % 8 or k % 8 or r % 8:
        return f"out_features {n}, in_features {k} and rank {r} must be multiples of 8"
    # Factors of another dtype are cast, and the cast is aligned.
    if not all(spec.aligned._replace(**{name: True for name in _cast_factors(spec)})):
        return "an operand does not start on 16 bytes, or its rows do not"
    if max(m, n, k) >= 2**31 - 1024:
        return f"a dimension of {max(m, n, k)} does not fit 32 bits"
    if spec.base_format != "dense" or spec.branch != "single":
        return f"no kernel for a {spec.base_format} base weight with a {spec.branch} branch"
    return None


def _cast_factors(spec: LaunchSpec) -> tuple[str, ...]:
    factors = zip(("lora_a", "lora_b"), spec.adapter_dtypes, strict=True)
    return tuple(name for name, dtype in factors if dtype != spec.dtype)


def why_unsupported(spec: LaunchSpec) -> str | None:
    """Why these kernels cannot serve a call here, or None."""
    if spec.device.type != "cuda":
        return f"the tensors are on {spec.device}"
    return unusable(spec.device) or why_not_compiled(spec)


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _address(operand: Tensor | float) -> tuple[int, int] | float:
    """A matrix as its address and row stride, a vector as its address; numbers are what they are.

    Raises:
        ValueError: the elements of a vector, or of a matrix's rows, do not lie one behind the other.
    """
    if not isinstance(operand, Tensor):
        return operand
    if operand.stride(-1) != 1 and operand.shape[-1] > 1:
        raise ValueError(f"an operand of shape {tuple(operand.shape)} has strides {operand.stride()}, the last not 1")
    if operand.dim() < 2:
        return operand.data_ptr()
    return operand.data_ptr(), operand.stride(0) if operand.shape[0] > 1 else operand.shape[1]


def _launch(plan: Any, device: torch.device, operands: Mapping[str, Tensor | float]) -> None:
    stream = torch.cuda.current_stream(device)
    addresses = {name: _address(operand) for name, operand in operands.items()}
    plan.launch(device=stream.device_index, stream=stream.cuda_stream, **addresses)


def _run(plan: Any, like: Tensor, operands: Mapping[str, Tensor | float | None]) -> None:
    """Launches with the scratch memory that the plan needs."""
    scratch: dict[str, Tensor] = {"workspace": borrow_workspace(plan.workspace_words, like.device)}
    sizes = {"gradient_partials": plan.gradient_partial_floats, "split_partials": plan.split_partial_floats}
    for name, size in sizes.items():
        if size:
            scratch[name] = like.new_empty(size, dtype=torch.float32)
    _launch(plan, like.device, {n: t for n, t in {**operands, **scratch}.items() if t is not None})


def _dropout_operands(dropout_p: float, seed: Tensor | None) -> dict[str, Tensor | float]:
    if seed is None:
        return {}
    by: dict[str, Tensor | float] = (
        {"seed": int(seed)} if seed.device.type == "cpu" else {"seed_address": seed.view(-1)}
    )
    return {"drop_threshold": philox.threshold(dropout_p), "inverse_keep": philox.inverse_keep(dropout_p), **by}


def prepare(spec: LaunchSpec, tile: CudaTile | None = None, ctas: int | None = None) -> Launcher:
    """What serves every call of this description. ``tile`` overrides choose_tile, ``ctas`` the number of CTAs: one for
    each multiprocessor."""
    m, n, k, r = spec.sizes
    backward = spec.direction == "backward"
    out_columns, contracted = (k, n) if backward else (n, k)
    ctas = ctas or _multiprocessors(spec.device)
    tile = tile or choose_tile(m, out_columns, contracted, r, ctas, dropout=spec.dropout, backward=backward)
    needs = spec.needs
    makes = {"makes_out": needs.dx, "grad_a": needs.da, "grad_b": needs.db, "grad_bias": needs.dbias}
    plan = extension.loaded().Plan(
        backward=backward, fp16=spec.dtype == torch.float16, dropout=spec.dropout, m=m, n=out_columns, k=contracted,
        r=r, block_m=tile.block_m, block_n=tile.block_n, group_m=tile.group_m, splits=tile.splits,
        fused=tile.fused and (needs.dx or not backward), gradients_last=tile.gradients_last and needs.dx, ctas=ctas,
        **(makes if backward else {}),
    )  # fmt: skip
    return partial(_backward if backward else _forward, spec, plan)


def _forward(spec: LaunchSpec, plan: Any, operands: ForwardOperands) -> tuple[Tensor, Tensor]:
    """Y [M, N] and S [M, R] in one launch; see backends.reference."""
    x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed = operands
    m, n, _, r = spec.sizes
    y, s = x.new_empty(m, n), x.new_empty(m, r)
    scales = split_scaling(scaling, x.dtype)
    _run(
        plan,
        x,
        {
            "act": x, "weight": weight, "lora_a": lora_a.to(x.dtype), "lora_b": lora_b.to(x.dtype), "bias": bias,
            "out": y, "s": s.view(-1), "scale_in_s": scales.in_s, "scale_on_branch": scales.on_branch,
            **_dropout_operands(dropout_p, seed),
        },
    )  # fmt: skip
    return y, s


def _backward(spec: LaunchSpec, plan: Any, operands: BackwardOperands) -> Gradients:
    """The gradients that the description needs in one launch; see backends.reference."""
    dy, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed = operands
    m, n, k, r = spec.sizes
    needs = spec.needs

    def output(needed: bool, *shape: int, dtype: torch.dtype = dy.dtype) -> Tensor | None:
        return dy.new_empty(shape, dtype=dtype) if needed else None

    # Both gradients are stored in one dtype; if the adapters differ in theirs, one of them is cast.
    grad_dtype = dy.dtype if lora_a.dtype == lora_b.dtype == dy.dtype else torch.float32
    dx, ds = output(needs.dx, m, k), output(needs.dx or needs.da, m * r)
    da, db = output(needs.da, r, k, dtype=grad_dtype), output(needs.db, n, r, dtype=grad_dtype)
    dbias = output(needs.dbias, n)
    _run(
        plan,
        dy,
        {
            "act": dy, "weight": weight, "lora_a": lora_a.to(dy.dtype), "lora_b": lora_b.to(dy.dtype), "out": dx,
            "s": ds, "layer_input": x, "saved_s": s, "grad_a": None if da is None else da.view(-1),
            "grad_b": None if db is None else db.view(-1), "grad_bias": dbias, "scale_in_s": scaling,
            "scale_on_branch": split_scaling(scaling, dy.dtype).on_branch,
            "fp32_grads": grad_dtype == torch.float32,
            **_dropout_operands(dropout_p, seed),
        },
    )  # fmt: skip
    return Gradients(
        dx, None if da is None else da.to(lora_a.dtype), None if db is None else db.to(lora_b.dtype), dbias
    )
