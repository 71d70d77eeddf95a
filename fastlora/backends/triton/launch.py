"""The Triton backend: a whole LoRA layer in one launch forward and one launch backward."""

from functools import lru_cache
from importlib.metadata import version

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora import philox
from fastlora.backends import reference
from fastlora.backends.configs import FUSED_RANK, MAX_RANK, Direction, TileConfig, choose_config, padded_rank
from fastlora.backends.target import Target, target_of
from fastlora.backends.triton.schedule import N_COUNTERS, claim, leave, locate, wait_for
from fastlora.backends.triton.tiles import (
    BranchScales,
    Dropout,
    Gradient,
    Matrix,
    Part,
    Shape,
    Variant,
    gradient_tile,
    low_rank_tile,
    variant_of,
)
from fastlora.backends.tuning import tuned_config
from fastlora.backends.workspace import borrow_workspace
from fastlora.dispatch import Problem
from fastlora.problem import Gradients, Needs, split_scaling

# Arguments whose values Triton must not compile for: every sixteenth seed would bring a compilation into training.
UNSPECIALISED = ("seed", "n_words", "wave")


@triton.jit
def _dropout(seed, threshold, inverse_keep):
    """A seed comes by value, or by pointer where a CUDA graph draws it."""
    if seed is None:
        return Dropout(0, 0, 1.0)
    elif seed.dtype.is_ptr():
        return Dropout(tl.load(seed), threshold, inverse_keep)
    else:
        return Dropout(seed, threshold, inverse_keep)


@triton.jit(do_not_specialize=UNSPECIALISED)
def lora_forward_kernel(
    x, w, a, b_ptr, bias_ptr, y_ptr, s_ptr, workspace_ptr, M, N, K, R, n_words, wave,
    stride_xm, stride_wn, stride_ar, stride_bn, scale_s, in_s, on_branch, seed, threshold, plain_variant: tl.constexpr,
):  # fmt: skip
    """Y = X·W0ᵀ + on_branch·S·Bᵀ + bias and S = scale_s·in_s·drop(X)·Aᵀ; the two are None where they are 1."""
    variant: tl.constexpr = variant_of(plain_variant)
    n_rows = tl.cdiv(M, variant.tile.block_m)
    n_columns = tl.cdiv(N, variant.tile.block_n) + variant.s_columns
    dropout = _dropout(seed, threshold, 1.0)
    row, column, _, _ = locate(claim(workspace_ptr), n_rows, n_columns, 0, wave, variant.tile.group_m)
    low_rank_tile(
        Matrix(x, stride_xm), Matrix(w, stride_wn), Matrix(a, stride_ar), Matrix(b_ptr, stride_bn), bias_ptr,
        Matrix(y_ptr, N), Matrix(s_ptr, R), workspace_ptr + N_COUNTERS, row, column, Shape(M, N, K, R),
        BranchScales(scale_s, in_s, on_branch), dropout, variant,
    )  # fmt: skip
    leave(workspace_ptr, n_words, 1024)


@triton.jit(do_not_specialize=UNSPECIALISED)
def lora_backward_kernel(
    dy, w, b, dy_ptr, x_ptr, a_ptr, s_ptr, dx_ptr, ds_ptr, da_ptr, db_ptr, dbias_ptr,
    partial_a_ptr, partial_b_ptr, partial_bias_ptr, workspace_ptr, M, N, K, R, n_words, wave,
    stride_dym, stride_xm, stride_wn, stride_ar, stride_bn, scaling, on_branch, inverse_keep, seed, threshold,
    CHAINED: tl.constexpr, plain_variant: tl.constexpr,
):  # fmt: skip
    """dX = dY·W0 + mask∘(dS·A)/(1-p), dS = scaling·dY·B, dA = dSᵀ·drop(X), dB = on_branch·dYᵀ·S, dbias = Σ_m dY.

    A gradient whose pointer is None is not wanted, and no tile is queued for it. dX contracts N: variant.tile.block_k
    runs along N and block_n along K. dY comes as operand of dX (perhaps a TMA descriptor) and as a pointer.
    """
    variant: tl.constexpr = variant_of(plain_variant)
    n_rows = tl.cdiv(M, variant.tile.block_m)
    n_columns = 0
    if dx_ptr is not None:
        n_columns = tl.cdiv(K, variant.tile.block_n) + variant.s_columns
    elif da_ptr is not None:
        n_columns = 1
    tiles_b = 0
    if db_ptr is not None or dbias_ptr is not None:
        tiles_b = tl.cdiv(N, variant.tile.gradient_n)
    tiles_a = 0
    if da_ptr is not None:
        tiles_a = tl.cdiv(K, variant.tile.gradient_n)
    n_parts = tl.cdiv(n_rows, variant.tile.group_m)
    flags_ptr = workspace_ptr + N_COUNTERS
    counts_b_ptr = flags_ptr + n_rows
    counts_a_ptr = counts_b_ptr + tiles_b
    dropout = _dropout(seed, threshold, inverse_keep)
    scale_b = 1.0
    if on_branch is not None:
        scale_b = on_branch
    row, column, group, gradient = locate(
        claim(workspace_ptr), n_rows, n_columns, tiles_b + tiles_a, wave, variant.tile.group_m
    )
    first_row = group * (variant.tile.group_m * variant.tile.block_m)
    part = Part(group, n_parts, first_row, tl.minimum(first_row + variant.tile.group_m * variant.tile.block_m, M))
    if gradient < 0:
        if ds_ptr is not None:
            low_rank_tile(
                Matrix(dy, stride_dym), Matrix(w, stride_wn), Matrix(b, stride_bn), Matrix(a_ptr, stride_ar), None,
                Matrix(dx_ptr, K), Matrix(ds_ptr, R), flags_ptr, row, column, Shape(M, K, N, R),
                BranchScales(scaling, None, None), dropout, variant,
            )  # fmt: skip
    elif gradient < tiles_b:
        if db_ptr is not None or dbias_ptr is not None:
            gradient_tile(
                Matrix(dy_ptr, stride_dym), Matrix(s_ptr, R), Gradient(partial_b_ptr, db_ptr, R, 1),
                Gradient(partial_bias_ptr, dbias_ptr, 1, 1), counts_b_ptr, gradient, part, N, R, scale_b, dropout,
                CHAINED, False, variant,
            )  # fmt: skip
    else:
        if da_ptr is not None:
            for m in range(group * variant.tile.group_m, tl.minimum((group + 1) * variant.tile.group_m, n_rows)):
                wait_for(flags_ptr + m, 1)
            gradient_tile(
                Matrix(x_ptr, stride_xm), Matrix(ds_ptr, R), Gradient(partial_a_ptr, da_ptr, 1, K),
                Gradient(None, None, 1, 1), counts_a_ptr, gradient - tiles_b, part, K, R, inverse_keep, dropout,
                CHAINED, variant.dropout, variant,
            )  # fmt: skip
    leave(workspace_ptr, n_words, 1024)


def supports(problem: Problem) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"triton: dtype {problem.dtype} is not float16, bfloat16 or float32"
    if triton.knobs.runtime.interpret:
        return _interpreter_reason(problem.dtype)
    if problem.sizes.r > MAX_RANK:
        return f"triton: rank {problem.sizes.r} is above {MAX_RANK}"
    return None


def _interpreter_reason(dtype: torch.dtype) -> str | None:
    """Why Triton's interpreter cannot serve a dtype, or None. It keeps bfloat16 as integers, and says nothing."""
    if dtype != torch.float32:
        return (
            f"triton: its interpreter (TRITON_INTERPRET=1) serves float32 alone, not {dtype}, for its bfloat16 results"
            " are wrong; use float32, or unset TRITON_INTERPRET"
        )
    if not _interpreter_loops():
        return (
            f"triton: the interpreter (TRITON_INTERPRET=1) of Triton {triton.__version__} fails with NumPy"
            f" {version('numpy')}; install numpy<2.4, or unset TRITON_INTERPRET"
        )
    return None


@triton.jit
def _count_kernel(counter_ptr, n):
    for i in range(n):
        tl.store(counter_ptr, i + 1)


@lru_cache(maxsize=1)
def _interpreter_loops() -> bool:
    """Whether the interpreter can run a loop over a kernel's argument (Triton 3.6 with NumPy 2.4 cannot)."""
    counter = torch.zeros(1, dtype=torch.int32)
    try:
        _count_kernel[(1,)](counter, 3)
    except Exception:
        return False
    return counter.item() == 3


def _uses_tf32(dtype: torch.dtype) -> bool:
    """Whether torch's own products of a dtype would use TF32 on a GPU. Where old and new ways of setting it are mixed,
    torch 2.9 and later raise on a read of ``allow_tf32``; earlier versions have nothing else to read."""
    if dtype != torch.float32:
        return False
    flags = torch.backends.cuda.matmul
    precision = getattr(flags, "fp32_precision", None)
    return flags.allow_tf32 if precision is None else precision == "tf32"


def _has_aligned_rows(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0


def _choose(
    direction: Direction, m: int, n: int, k: int, r: int, dropout: bool, target: Target, rows: Tensor, weight: Tensor
) -> TileConfig:
    """What ``fastlora tune`` found on this GPU, else the tables' choice."""
    aligned = _has_aligned_rows(rows) and _has_aligned_rows(weight)
    tuned = tuned_config(direction, rows.device, m, n, k, r, rows.dtype, dropout) if aligned else None
    return tuned or choose_config(
        direction, m, n, k, r, arch=target.arch, n_sms=target.n_sms, element_size=rows.element_size(), aligned=aligned
    )


def _descriptor_or_tensor(tensor: Tensor, block: list[int], arch: int) -> tuple[Tensor | TensorDescriptor, bool]:
    """A TMA descriptor where the architecture has them and the tensor's strides allow, else the tensor. (Rows that
    overlap, as an expanded gradient's do, are none that the driver takes.)"""
    if arch >= 90 and _has_aligned_rows(tensor) and tensor.stride(0) >= tensor.shape[1]:
        return TensorDescriptor.from_tensor(tensor, block), True
    return tensor, False


def _scale_of_branch(scaling: float, dtype: torch.dtype) -> float | None:
    """What multiplies S·Bᵀ and dYᵀ·S; None, which compiles to nothing, for 1."""
    on_branch = split_scaling(scaling, dtype).on_branch
    return None if on_branch == 1.0 else on_branch


def _forward_scales(scaling: float, dropout_p: float, dtype: torch.dtype) -> tuple[float, float | None, float | None]:
    """BranchScales of the forward."""
    of_sum = philox.inverse_keep(dropout_p)
    if dtype != torch.float16:
        return scaling * of_sum, None, None
    return of_sum, split_scaling(scaling, dtype).in_s, _scale_of_branch(scaling, dtype)


def _seed_argument(seed: Tensor | None) -> Tensor | int | None:
    return int(seed) if seed is not None and seed.device.type == "cpu" else seed


def lora_forward(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    bias: Tensor | None,  # [N]
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Y [M, N] and S [M, R] in one launch; see backends.reference. ``config`` overrides the tables."""
    (m, k), (n, r) = x.shape, lora_b.shape
    if 0 in (m, n, k):
        return reference.lora_forward(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed)
    target = target_of(x.device)
    cfg = config or _choose("forward", m, n, k, r, dropout_p > 0.0, target, x, weight)
    block_r = padded_rank(r)
    if dropout_p > 0.0 and target.arch >= 90 and x.element_size() == 2:
        block_r = max(block_r, 64)  # the rank is the height of a product (see _make_s), and wgmma's least is 64
    fused = cfg.fused and block_r <= FUSED_RANK
    x_arg, tma_x = _descriptor_or_tensor(x, [cfg.block_m, cfg.block_k], target.arch)
    w_arg, tma_w = _descriptor_or_tensor(weight, [cfg.block_n, cfg.block_k], target.arch)
    a_arg, tma_a = _descriptor_or_tensor(lora_a, [block_r, cfg.block_k], target.arch)
    tma = tma_x and tma_w
    y, s = x.new_empty(m, n), x.new_empty(m, r)
    n_rows = triton.cdiv(m, cfg.block_m)
    n_tiles = n_rows * (triton.cdiv(n, cfg.block_n) + (not fused))
    wave = target.n_sms * cfg.programs_per_sm
    n_words = N_COUNTERS.value + n_rows
    variant = Variant(
        tile=cfg, block_r=block_r, forward=True, fused=fused, dropout=dropout_p > 0.0, tma=tma, tma_d=tma_a,
        even_k=k % cfg.block_k == 0, tf32=_uses_tf32(x.dtype), wgmma=target.arch == 90,
    )  # fmt: skip
    # Triton 3.9 warns where multiply-adds are left to its default, which will be not to fuse them.
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever the tensors' is
        lora_forward_kernel[(n_tiles,)](
            x_arg if tma else x, w_arg if tma else weight, a_arg, lora_b, bias, y, s,
            borrow_workspace(n_words, x.device), m, n, k, r, n_words, wave,
            x.stride(0), weight.stride(0), lora_a.stride(0), lora_b.stride(0),
            *_forward_scales(scaling, dropout_p, x.dtype), _seed_argument(seed), philox.threshold(dropout_p),
            plain_variant=variant.as_plain(), num_warps=cfg.num_warps, num_stages=cfg.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return y, s


def lora_backward(
    dy: Tensor,  # [M, N]
    x: Tensor | None,  # [M, K], read for dA alone
    weight: Tensor,  # [N, K]
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    s: Tensor | None,  # [M, R], read for dB alone
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: Needs,
    config: TileConfig | None = None,
) -> Gradients:
    """The gradients that ``needs`` names in one launch; see fastlora.backends.reference.lora_backward."""
    (m, n), (r, k) = dy.shape, lora_a.shape
    if 0 in (m, n, k):
        return reference.lora_backward(dy, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed, needs)
    target = target_of(dy.device)
    cfg = config or _choose("backward", m, n, k, r, dropout_p > 0.0, target, dy, weight)
    block_r = padded_rank(r)
    fused = cfg.fused and needs.dx and block_r <= FUSED_RANK
    dy_arg, tma_dy = _descriptor_or_tensor(dy, [cfg.block_m, cfg.block_k], target.arch)
    w_arg, tma_w = _descriptor_or_tensor(weight, [cfg.block_k, cfg.block_n], target.arch)
    b_arg, tma_b = _descriptor_or_tensor(lora_b, [cfg.block_k, block_r], target.arch)
    tma = tma_dy and tma_w
    variant = Variant(
        tile=cfg, block_r=block_r, forward=False, fused=fused, dropout=dropout_p > 0.0, tma=tma, tma_d=tma_b,
        even_k=n % cfg.block_k == 0, tf32=_uses_tf32(dy.dtype), wgmma=target.arch == 90,
    )  # fmt: skip
    n_rows = triton.cdiv(m, cfg.block_m)
    n_parts = triton.cdiv(n_rows, cfg.group_m)
    n_columns = triton.cdiv(k, cfg.block_n) + (not fused) if needs.dx else int(needs.da)
    tiles_a = triton.cdiv(k, cfg.gradient_n) if needs.da else 0
    tiles_b = triton.cdiv(n, cfg.gradient_n) if needs.db or needs.dbias else 0
    wave = target.n_sms * cfg.programs_per_sm
    n_words = N_COUNTERS.value + n_rows + tiles_a + tiles_b

    def output(needed: bool, *shape: int, dtype: torch.dtype = dy.dtype) -> Tensor | None:
        return dy.new_empty(shape, dtype=dtype) if needed else None

    chained = n_parts > 1
    dx, ds = output(needs.dx, m, k), output(n_columns > 0, m, r)
    da, db = output(needs.da, r, k, dtype=lora_a.dtype), output(needs.db, n, r, dtype=lora_b.dtype)
    dbias = output(needs.dbias, n)
    partial_a = output(chained and needs.da, k, r, dtype=torch.float32)
    partial_b = output(chained and needs.db, n, r, dtype=torch.float32)
    partial_bias = output(chained and needs.dbias, n, dtype=torch.float32)
    n_tiles = n_rows * n_columns + n_parts * (tiles_a + tiles_b)
    with torch.cuda.device_of(dy):  # Triton launches on the current device, whatever the tensors' is
        lora_backward_kernel[(n_tiles,)](
            dy_arg if tma else dy, w_arg if tma else weight, b_arg, dy, x, lora_a, s, dx, ds, da, db, dbias,
            partial_a, partial_b, partial_bias, borrow_workspace(n_words, dy.device), m, n, k, r, n_words, wave,
            dy.stride(0), x.stride(0) if needs.da else 0, weight.stride(0), lora_a.stride(0), lora_b.stride(0),
            scaling, _scale_of_branch(scaling, dy.dtype), philox.inverse_keep(dropout_p), _seed_argument(seed),
            philox.threshold(dropout_p),
            CHAINED=chained, plain_variant=variant.as_plain(), num_warps=cfg.num_warps, num_stages=cfg.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return Gradients(dx, da, db, dbias)
