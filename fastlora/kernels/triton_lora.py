"""The Triton backend: a whole LoRA layer in one launch forward and one launch backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora import philox, reference
from fastlora.configs import FUSED_RANK, MAX_RANK, TileConfig, choose_config, padded_rank
from fastlora.dispatch import Problem
from fastlora.kernels.target import target_of
from fastlora.kernels.triton_schedule import N_COUNTERS, claim, leave, locate, wait_for
from fastlora.kernels.triton_tiles import gradient_tile, low_rank_tile
from fastlora.kernels.workspace import borrow_workspace
from fastlora.reference import Gradients, Needs


@triton.jit
def _seed_value(seed):
    return tl.load(seed) if seed.dtype.is_ptr() else seed


@triton.jit
def lora_forward_kernel(
    x, w, a, b_ptr, bias_ptr, y_ptr, s_ptr, workspace_ptr, M, N, K, R, n_words,
    stride_xm, stride_wn, stride_ar, stride_bn, scale_s, seed, threshold,
    GROUP_M: tl.constexpr, FUSED: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr,
    TMA_D: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Y = X·W0ᵀ + S·Bᵀ + bias and S = scale_s·drop(X)·Aᵀ."""
    n_rows = tl.cdiv(M, BLOCK_M)
    n_columns = tl.cdiv(N, BLOCK_N) + (0 if FUSED else 1)
    seed_value = _seed_value(seed) if DROPOUT else 0
    ticket = claim(workspace_ptr)
    while ticket < n_rows * n_columns:
        row, column, _, _ = locate(ticket, n_rows, n_columns, 0, GROUP_M)
        low_rank_tile(
            x, w, a, b_ptr, bias_ptr, y_ptr, s_ptr, workspace_ptr + N_COUNTERS, row, column, M, N, K, R,
            stride_xm, stride_wn, stride_ar, stride_bn, N, scale_s, 1.0, seed_value, threshold,
            True, FUSED, HAS_BIAS, DROPOUT, TMA, TMA_D, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, BLOCK_N,
        )  # fmt: skip
        ticket = claim(workspace_ptr)
    leave(workspace_ptr, n_words, 1024)


@triton.jit
def lora_backward_kernel(
    dy, w, b, dy_ptr, x_ptr, a_ptr, s_ptr, dx_ptr, ds_ptr, da_ptr, db_ptr, dbias_ptr, partial_a_ptr, partial_b_ptr,
    partial_bias_ptr, workspace_ptr, M, N, K, R, n_words, stride_dym, stride_xm, stride_wn, stride_ar, stride_bn,
    scaling, inverse_keep, seed, threshold,
    NEED_DX: tl.constexpr, NEED_DA: tl.constexpr, NEED_DB: tl.constexpr, NEED_DBIAS: tl.constexpr,
    CHAINED: tl.constexpr, GROUP_M: tl.constexpr, FUSED: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr, TMA_D: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SLICE_N: tl.constexpr,
    GRADIENT_M: tl.constexpr, GRADIENT_N: tl.constexpr,
):  # fmt: skip
    """dX = dY·W0 + mask∘(dS·A)/(1-p), dS = scaling·dY·B, dA = dSᵀ·drop(X), dB = dYᵀ·S, dbias = Σ_m dY.

    BLOCK_N and BLOCK_K are the tile's as a product's: BLOCK_K along N, which dX contracts, BLOCK_N along K.
    """
    n_rows = tl.cdiv(M, BLOCK_M)
    n_columns = 0
    if NEED_DX:
        n_columns = tl.cdiv(K, BLOCK_N) + (0 if FUSED else 1)
    elif NEED_DA:
        n_columns = 1
    blocks_b = tl.cdiv(N, GRADIENT_N) if NEED_DB or NEED_DBIAS else 0
    blocks_a = tl.cdiv(K, GRADIENT_N) if NEED_DA else 0
    n_parts = tl.cdiv(n_rows, GROUP_M)
    flags_ptr = workspace_ptr + N_COUNTERS
    counts_b_ptr = flags_ptr + n_rows
    counts_a_ptr = counts_b_ptr + blocks_b
    seed_value = _seed_value(seed) if DROPOUT else 0
    ticket = claim(workspace_ptr)
    while ticket < n_rows * n_columns + n_parts * (blocks_b + blocks_a):
        row, column, part, gradient = locate(ticket, n_rows, n_columns, blocks_b + blocks_a, GROUP_M)
        first_row = part * GROUP_M * BLOCK_M
        end_row = tl.minimum(first_row + GROUP_M * BLOCK_M, M)
        if gradient < 0:
            if NEED_DX or NEED_DA:
                low_rank_tile(
                    dy, w, b, a_ptr, a_ptr, dx_ptr, ds_ptr, flags_ptr, row, column, M, K, N, R,
                    stride_dym, stride_wn, stride_bn, stride_ar, K, scaling, inverse_keep, seed_value, threshold,
                    False, FUSED, False, DROPOUT, TMA, TMA_D, EVEN_K, PRECISION,
                    BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, SLICE_N,
                )  # fmt: skip
        elif gradient < blocks_b:
            if NEED_DB or NEED_DBIAS:
                gradient_tile(
                    dy_ptr, s_ptr, db_ptr, dbias_ptr, partial_b_ptr, partial_bias_ptr, counts_b_ptr,
                    gradient, first_row, end_row, part, n_parts, N, R, stride_dym, R, 1, 1.0, 0, 0,
                    NEED_DB, NEED_DBIAS, CHAINED, False, PRECISION, GRADIENT_M, GRADIENT_N, BLOCK_R,
                )  # fmt: skip
        else:
            if NEED_DA:
                for m in range(first_row // BLOCK_M, tl.cdiv(end_row, BLOCK_M)):
                    wait_for(flags_ptr + m, 1)
                gradient_tile(
                    x_ptr, ds_ptr, da_ptr, da_ptr, partial_a_ptr, partial_a_ptr, counts_a_ptr,
                    gradient - blocks_b, first_row, end_row, part, n_parts, K, R, stride_xm, 1, K, inverse_keep,
                    seed_value, threshold, True, False, CHAINED, DROPOUT, PRECISION, GRADIENT_M, GRADIENT_N, BLOCK_R,
                )  # fmt: skip
        ticket = claim(workspace_ptr)
    leave(workspace_ptr, n_words, 1024)


def supports(problem: Problem) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"triton: dtype {problem.dtype} is not float16, bfloat16 or float32"
    if problem.sizes.r > MAX_RANK:
        return f"triton: rank {problem.sizes.r} is above {MAX_RANK}"
    return None


def _precision(dtype: torch.dtype) -> str:
    """fp32 products are fp32 products, unless torch was told otherwise."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _descriptor_or_tensor(tensor: Tensor, block: list[int], arch: int) -> tuple[Tensor | TensorDescriptor, bool]:
    """A TMA descriptor where the architecture has them and the tensor's alignment allows, else the tensor."""
    size = tensor.element_size()
    allowed = arch >= 90 and tensor.data_ptr() % 16 == 0 and tensor.stride(0) * size % 16 == 0
    return (TensorDescriptor.from_tensor(tensor, block), True) if allowed else (tensor, False)


def _seed_argument(seed: Tensor | None) -> Tensor | int:
    if seed is None:
        return 0
    return int(seed) if seed.device.type == "cpu" else seed


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
    """Y [M, N] and S [M, R] in one launch; see fastlora.reference.lora_forward. ``config`` overrides the tables."""
    (m, k), (n, r) = x.shape, lora_b.shape
    if 0 in (m, n, k):
        return reference.lora_forward(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed)
    target = target_of(x.device)
    cfg = config or choose_config("forward", target.arch, m, n, k, r, x.dtype, dropout_p > 0.0)
    block_r = padded_rank(r)
    fused = block_r <= FUSED_RANK
    x_arg, tma_x = _descriptor_or_tensor(x, [cfg.block_m, cfg.block_k], target.arch)
    w_arg, tma_w = _descriptor_or_tensor(weight, [cfg.block_n, cfg.block_k], target.arch)
    a_arg, tma_a = _descriptor_or_tensor(lora_a, [block_r, cfg.block_k], target.arch)
    tma = tma_x and tma_w
    y, s = x.new_empty(m, n), x.new_empty(m, r)
    n_rows = triton.cdiv(m, cfg.block_m)
    n_tiles = n_rows * (triton.cdiv(n, cfg.block_n) + (not fused))
    n_words = N_COUNTERS.value + n_rows
    lora_forward_kernel[(min(n_tiles, target.n_sms * cfg.programs_per_sm),)](
        x_arg if tma else x, w_arg if tma else weight, a_arg, lora_b, bias if bias is not None else y, y, s,
        borrow_workspace(n_words, x.device), m, n, k, r, n_words,
        x.stride(0), weight.stride(0), lora_a.stride(0), lora_b.stride(0),
        scaling * philox.inverse_keep(dropout_p), _seed_argument(seed), philox.threshold(dropout_p),
        GROUP_M=cfg.group_m, FUSED=fused, HAS_BIAS=bias is not None, DROPOUT=dropout_p > 0.0, TMA=tma, TMA_D=tma_a,
        EVEN_K=k % cfg.block_k == 0, PRECISION=_precision(x.dtype),
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k, BLOCK_R=block_r,
        num_warps=cfg.num_warps, num_stages=cfg.num_stages,
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
    """The gradients that ``needs`` names in one launch; see fastlora.reference.lora_backward."""
    (m, n), (r, k) = dy.shape, lora_a.shape
    if 0 in (m, n, k):
        return reference.lora_backward(dy, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed, needs)
    target = target_of(dy.device)
    cfg = config or choose_config("backward", target.arch, m, n, k, r, dy.dtype, dropout_p > 0.0)
    block_r = padded_rank(r)
    fused = needs.dx and block_r <= FUSED_RANK
    dy_arg, tma_dy = _descriptor_or_tensor(dy, [cfg.block_m, cfg.block_k], target.arch)
    w_arg, tma_w = _descriptor_or_tensor(weight, [cfg.block_k, cfg.block_n], target.arch)
    b_arg, tma_b = _descriptor_or_tensor(lora_b, [cfg.block_k, block_r], target.arch)
    tma = tma_dy and tma_w
    n_rows = triton.cdiv(m, cfg.block_m)
    n_parts = triton.cdiv(n_rows, cfg.group_m)
    n_columns = triton.cdiv(k, cfg.block_n) + (not fused) if needs.dx else int(needs.da)
    blocks_a = triton.cdiv(k, cfg.gradient_n) if needs.da else 0
    blocks_b = triton.cdiv(n, cfg.gradient_n) if needs.db or needs.dbias else 0
    n_words = N_COUNTERS.value + n_rows + blocks_a + blocks_b

    def output(needed: bool, *shape: int, dtype: torch.dtype = dy.dtype) -> Tensor | None:
        return dy.new_empty(shape, dtype=dtype) if needed else None

    chained = n_parts > 1
    dx, ds = output(needs.dx, m, k), output(n_columns > 0, m, r)
    da, db = output(needs.da, r, k, dtype=lora_a.dtype), output(needs.db, n, r, dtype=lora_b.dtype)
    dbias = output(needs.dbias, n)
    partial_a = output(chained and needs.da, k, r, dtype=torch.float32)
    partial_b = output(chained and needs.db, n, r, dtype=torch.float32)
    partial_bias = output(chained and needs.dbias, n, dtype=torch.float32)
    n_tiles = n_rows * n_columns + n_parts * (blocks_a + blocks_b)
    lora_backward_kernel[(min(n_tiles, target.n_sms * cfg.programs_per_sm),)](
        dy_arg if tma else dy, w_arg if tma else weight, b_arg, dy, x, lora_a, s, dx, ds, da, db, dbias,
        partial_a, partial_b, partial_bias, borrow_workspace(n_words, dy.device), m, n, k, r, n_words,
        dy.stride(0), x.stride(0) if needs.da else 0, weight.stride(0), lora_a.stride(0), lora_b.stride(0),
        scaling, philox.inverse_keep(dropout_p), _seed_argument(seed), philox.threshold(dropout_p),
        NEED_DX=needs.dx, NEED_DA=needs.da, NEED_DB=needs.db, NEED_DBIAS=needs.dbias,
        CHAINED=chained, GROUP_M=cfg.group_m, FUSED=fused, DROPOUT=dropout_p > 0.0, TMA=tma, TMA_D=tma_b,
        EVEN_K=n % cfg.block_k == 0, PRECISION=_precision(dy.dtype),
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k, BLOCK_R=block_r,
        SLICE_N=cfg.slice_n if dropout_p > 0.0 else cfg.block_n,
        GRADIENT_M=cfg.gradient_m, GRADIENT_N=cfg.gradient_n,
        num_warps=cfg.num_warps, num_stages=cfg.num_stages,
    )  # fmt: skip
    return Gradients(dx, da, db, dbias)
