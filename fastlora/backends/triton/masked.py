"""Dropout's two kernels for layers whose products are cuBLAS's (fastlora.backends.composed): S of the masked input
forward; backward the masked input for dA, and the masked branch of dX.

Philox's bits are those of every other backend. Each is one launch."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora import philox
from fastlora.backends.target import target_of
from fastlora.backends.triton.branch import rounded_s
from fastlora.backends.triton.compiled import side_by_side
from fastlora.backends.triton.memory import keep_mask, load_block
from fastlora.backends.triton.structs import BranchScales, Dropout, Matrix
from fastlora.backends.workspace import borrow_workspace
from fastlora.problem import LaunchSpec, Scales

BLOCK_M = 32  # in float32 no height of 64: tcgen05 would take such a product in TF32 (Triton 3.6)
BACKWARD_K = 128  # columns of a program of the backward
RANK_STEP = 64  # of dS that the backward multiplies at a time
RANK_BYTES = 256  # a larger rank is several columns of programs, each of which draws the mask
LEAST_STEPS = 4  # along K that a part of a row block's sum has
UNSPECIALISED = ("M", "seed", "by_value", "steps")
_ANY_SEED = 1 << 62  # where it is not read; as wide as others, for Triton compiles for the width of an integer


@triton.jit
def _drawn(seed_ptr, seed, by_value, threshold, inverse_keep):
    """A seed is passed by value, or by pointer where a CUDA graph draws it: one kernel for both, for a capture must not
    have to compile."""
    return Dropout(tl.load(seed_ptr, mask=by_value == 0, other=seed), threshold, inverse_keep, 0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def masked_shrink_kernel(
    x_ptr, lora_a_ptr, s_ptr, partial_ptr, workspace_ptr, M, K, R, steps, stride_xm, stride_ar, of_sum, in_s, seed_ptr,
    seed, by_value, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S = of_sum·in_s·drop(X)·Aᵀ (see structs.BranchScales), of one row block and RANKS of its columns a program; with
    ``partial_ptr``, which is [parts, M, R] in fp32, of ``steps`` steps along K. The part that arrives last adds all of
    them up in their order, so the bits are the same in every run, and zeroes its word of the workspace."""
    row, column, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = row * ROWS + tl.arange(0, ROWS)
    offs_r = column * RANKS + tl.arange(0, RANKS)
    dropout = _drawn(seed_ptr, seed, by_value, threshold, 1.0)
    dtype = s_ptr.dtype.element_ty
    TRANSPOSED: tl.constexpr = s_ptr.dtype.element_ty.primitive_bitwidth == 16  # as tiles.shrink, for the same reason
    acc = tl.zeros((RANKS, ROWS) if TRANSPOSED else (ROWS, RANKS), tl.float32)
    for k in tl.range(part * steps * COLUMNS, tl.minimum((part + 1) * steps * COLUMNS, K), COLUMNS):
        offs_k = k + tl.arange(0, COLUMNS)
        x_block = load_block(Matrix(x_ptr, stride_xm), tl.minimum(offs_m, M - 1), offs_k, 0, K, True, False)
        a_block = load_block(Matrix(lora_a_ptr, stride_ar), tl.minimum(offs_r, R - 1), offs_k, 0, K, True, False)
        x_block = tl.where(keep_mask(dropout, offs_m, k, K, COLUMNS), x_block, 0.0)
        if TRANSPOSED:
            acc = tl.dot(a_block.to(dtype), x_block.T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x_block, a_block.T.to(dtype), acc, input_precision=PRECISION)
    if TRANSPOSED:
        acc = acc.T
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    offs_s = offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
    scales = BranchScales(of_sum, in_s, None)
    if partial_ptr is None:
        tl.store(s_ptr + offs_s, rounded_s(acc, scales, dtype), mask=mask)
    else:
        n_parts = tl.num_programs(2)
        plane = M.to(tl.int64) * R
        tl.store(partial_ptr + part * plane + offs_s, acc, mask=mask)
        # One thread executes the atomic; the barrier puts every other thread's stores before it.
        tl.debug_barrier()
        count_ptr = workspace_ptr + row * tl.num_programs(1) + column
        if tl.atomic_add(count_ptr, 1, sem="acq_rel") == n_parts - 1:
            total = tl.zeros((ROWS, RANKS), tl.float32)
            for i in range(0, n_parts):
                total += tl.load(partial_ptr + i * plane + offs_s, mask=mask, other=0.0)
            tl.store(s_ptr + offs_s, rounded_s(total, scales, dtype), mask=mask)
            tl.store(count_ptr, 0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def masked_backward_kernel(
    x_ptr, dropped_ptr, dx_ptr, ds_ptr, lora_a_ptr, M, K, R, stride_xm, stride_ar, inverse_keep, seed_ptr, seed,
    by_value, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of mask∘X, and of dX += inverse_keep·mask∘(dS·A); the mask is drawn once for both. What has no pointer
    is not wanted."""
    row, column = tl.program_id(0), tl.program_id(1)
    offs_m = row * ROWS + tl.arange(0, ROWS)
    offs_k = column * COLUMNS + tl.arange(0, COLUMNS)
    dropout = _drawn(seed_ptr, seed, by_value, threshold, inverse_keep)
    keep = keep_mask(dropout, offs_m, column * COLUMNS, K, COLUMNS)
    inside = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    offs = offs_m[:, None].to(tl.int64) * K + offs_k[None, :]
    if dropped_ptr is not None:
        x_block = load_block(Matrix(x_ptr, stride_xm), offs_m, offs_k, M, K, False, False)
        tl.store(dropped_ptr + offs, tl.where(keep, x_block, 0.0), mask=inside)
    if dx_ptr is not None:
        branch = tl.zeros((ROWS, COLUMNS), tl.float32)
        for r in range(0, R, RANKS):
            offs_r = r + tl.arange(0, RANKS)
            ds_block = load_block(Matrix(ds_ptr, R), tl.minimum(offs_m, M - 1), offs_r, 0, R, True, False)
            a_block = load_block(Matrix(lora_a_ptr, stride_ar), offs_r, offs_k, R, K, False, False)
            branch = tl.dot(ds_block, a_block.to(ds_block.dtype), branch, input_precision=PRECISION)
        dx_block = tl.load(dx_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        dx_block += tl.where(keep, branch * inverse_keep, 0.0)
        tl.store(dx_ptr + offs, dx_block.to(dx_ptr.dtype.element_ty), mask=inside)


def why_unsupported(spec: LaunchSpec) -> str | None:
    """Why no kernel draws the mask of such a call, or None. Triton must be usable."""
    if spec.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no kernel draws dropout's mask in {spec.dtype}; use float32 or a 16-bit dtype, or no dropout"
    if triton.knobs.runtime.interpret:
        if spec.dtype != torch.float32:
            return f"Triton's interpreter (TRITON_INTERPRET=1) serves float32 alone, not {spec.dtype}"
    elif spec.device.type != "cuda":
        return f"no kernel draws dropout's mask on {spec.device}"
    return None


def masked_shrink(
    x: Tensor, lora_a: Tensor, scales: Scales, dropout_p: float, seed: Tensor, *, device: torch.device, tf32: bool
) -> Tensor:
    """S [M, R] of x [M, K] and lora_a [R, K] in x's dtype: scales.in_s·drop(x)·lora_aᵀ / (1-p), rounded once.

    Args:
        x, lora_a: with unit inner strides; on "meta", the kernel for their like is compiled and not launched.
        seed: as fastlora.philox.draw_seed makes it.
        device: where such tensors are.
        tf32: whether a product of float32 may be one of TF32.
    """
    (m, k), r = x.shape, lora_a.shape[0]
    s = x.new_empty(m, r)
    ranks = min(_power_of_two(r), RANK_BYTES // x.element_size())
    block_k = 128 if ranks * x.element_size() <= 128 else 64
    rows, columns, steps = triton.cdiv(m, BLOCK_M), triton.cdiv(r, ranks), triton.cdiv(k, block_k)
    # As many parts as give each multiprocessor two programs, but none too short.
    wanted = triton.cdiv(2 * target_of(device).n_sms, rows * columns)
    steps = max(triton.cdiv(steps, wanted), LEAST_STEPS)
    parts = triton.cdiv(k, steps * block_k)
    partial = x.new_empty(parts, m, r, dtype=torch.float32) if parts > 1 else None
    # In float16 S must overflow where the composed layer's x·Aᵀ does, which a factor below 1 would hide.
    split = x.dtype == torch.float16 and scales.in_s != 1.0
    inverse_keep = philox.inverse_keep(dropout_p)
    workspace = borrow_workspace(rows * columns, x.device) if parts > 1 else None
    arguments = (
        x, lora_a, s, partial, workspace, m, k, r, steps, x.stride(0), lora_a.stride(0),
        inverse_keep if split else inverse_keep * scales.in_s, scales.in_s if split else None,
        *seed_arguments(seed, x), philox.threshold(dropout_p), BLOCK_M, block_k, ranks, "tf32" if tf32 else "ieee",
    )  # fmt: skip
    _launch(masked_shrink_kernel, (rows, columns, parts), arguments, device, x)
    return s


def mask_and_add(
    x: Tensor | None, dx: Tensor | None, ds: Tensor, lora_a: Tensor, dropout_p: float, seed: Tensor, *,
    device: torch.device, tf32: bool,
) -> Tensor | None:  # fmt: skip
    """mask∘x [M, K], unscaled, where x is given; and adds mask∘(ds [M, R]·lora_a [R, K]) / (1-p) to dx [M, K], which is
    contiguous, in place where dx is given. Tensors on "meta": as for masked_shrink."""
    m, r = ds.shape
    k = lora_a.shape[1]
    dropped = None if x is None else ds.new_empty(m, k)
    arguments = (
        x, dropped, dx, ds, lora_a, m, k, r, 0 if x is None else x.stride(0), lora_a.stride(0),
        philox.inverse_keep(dropout_p), *seed_arguments(seed, ds), philox.threshold(dropout_p),
        BLOCK_M, BACKWARD_K, min(_power_of_two(r), RANK_STEP), "tf32" if tf32 else "ieee",
    )  # fmt: skip
    _launch(masked_backward_kernel, (triton.cdiv(m, BLOCK_M), triton.cdiv(k, BACKWARD_K)), arguments, device, ds)
    return dropped


def compile_all(calls: Iterable[Callable[[], Any]], workers: int) -> int:
    """Compiles what calls with tensors on "meta" would launch, side by side; the number of kernels."""
    _compiled.clear()
    side_by_side(calls, workers)
    return len(_compiled)


_compiled: dict[int, Any] = {}  # what tensors on "meta" have compiled, by identity


def _launch(kernel: Any, grid: tuple, arguments: tuple, device: torch.device, like: Tensor) -> None:
    """Triton launches on the current device, whatever the tensors' is."""
    options = _options(like.dtype)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if not like.is_meta:
            kernel[grid](*arguments, **options)
            return
        compiled = kernel.run(*arguments, grid=grid, warmup=True, **options)
    if hasattr(compiled, "metadata"):  # else the compilation has only begun
        _compiled[id(compiled)] = compiled


def _options(dtype: torch.dtype) -> dict:
    """In float32, whose elements take more registers, four warps spill on sm_120. Triton 3.9 warns where multiply-adds
    are left to its default, which will be not to fuse them."""
    return {"num_warps": 8 if dtype == torch.float32 else 4, "num_stages": 3, "enable_fp_fusion": True}


def _power_of_two(rank: int) -> int:
    """At least 16, the narrowest matrix instruction."""
    return max(16, 1 << (rank - 1).bit_length())


def seed_arguments(seed: Tensor, like: Tensor) -> tuple[Tensor, int, int]:
    """A kernel's seed_ptr, seed and by_value."""
    if seed.device.type == "cpu":
        return like.new_empty((), dtype=torch.int64), int(seed), 1
    return seed, _ANY_SEED, 0
