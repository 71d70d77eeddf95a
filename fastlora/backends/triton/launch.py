"""The Triton backend: a whole LoRA layer in one launch forward and one launch backward."""

from functools import lru_cache
from importlib.metadata import version

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora import philox
from fastlora.backends.configs import FUSED_RANK, MAX_RANK, TileConfig, choose_config, padded_rank
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
from fastlora.problem import BackwardOperands, ForwardOperands, Gradients, Launcher, LaunchSpec, split_scaling

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
    stride_xm, stride_wn, stride_ar, stride_bn, scale_s, in_s, on_branch, seed, threshold,
    plain_variant: tl.constexpr,
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


def why_unsupported(spec: LaunchSpec) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if spec.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {spec.dtype} is not float16, bfloat16 or float32"
    if triton.knobs.runtime.interpret and (reason := _interpreter_reason(spec.dtype)):
        return reason
    if spec.sizes.r > MAX_RANK:
        return f"rank {spec.sizes.r} is above {MAX_RANK}"
    if spec.base_format != "dense" or spec.branch != "single":
        return f"no kernel for a {spec.base_format} base weight with a {spec.branch} branch"
    return None


def _interpreter_reason(dtype: torch.dtype) -> str | None:
    """Why Triton's interpreter cannot serve a dtype, or None. It keeps bfloat16 as integers, and says nothing."""
    if dtype != torch.float32:
        return (
            f"its interpreter (TRITON_INTERPRET=1) serves float32 alone, not {dtype}, for its bfloat16 results"
            " are wrong; use float32, or unset TRITON_INTERPRET"
        )
    if not _interpreter_loops():
        return (
            f"the interpreter (TRITON_INTERPRET=1) of Triton {triton.__version__} fails with NumPy"
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


def prepare(spec: LaunchSpec, config: TileConfig | None = None) -> Launcher:
    """What serves every call of this description; ``config`` overrides the tables and what was tuned."""
    target = target_of(spec.device)
    config = config or _choose(spec, target)
    return _Forward(spec, config, target) if spec.direction == "forward" else _Backward(spec, config, target)


def _choose(spec: LaunchSpec, target: Target) -> TileConfig:
    """What ``fastlora tune`` found on this GPU, else the tables' choice."""
    aligned = spec.aligned.act and spec.aligned.weight
    if aligned:
        tuned = tuned_config(spec.direction, spec.device, *spec.sizes, spec.dtype, spec.dropout)
        if tuned is not None:
            return tuned
    return choose_config(
        spec.direction, *spec.sizes,
        arch=target.arch, n_sms=target.n_sms, element_size=spec.dtype.itemsize, aligned=aligned,
    )  # fmt: skip


class _Prepared:
    """What the calls of one description share: the configuration, the kernel's variant, and how the grid is cut."""

    def __init__(self, spec: LaunchSpec, config: TileConfig, target: Target, *, block_r: int, fused: bool):
        self.spec, self.config = spec, config
        has_tma = target.arch >= 90
        forward = spec.direction == "forward"
        contracted = spec.sizes.k if forward else spec.sizes.n
        shrink_aligned = spec.aligned.lora_a if forward else spec.aligned.lora_b
        self.variant = Variant(
            tile=config,
            block_r=block_r,
            forward=forward,
            fused=fused,
            dropout=spec.dropout,
            tma=has_tma and spec.aligned.act and spec.aligned.weight,
            tma_d=has_tma and shrink_aligned,
            even_k=contracted % config.block_k == 0,
            tf32=spec.tf32,
            wgmma=target.arch == 90,
        )
        self.plain_variant = self.variant.as_plain()
        self.wave = target.n_sms * config.programs_per_sm
        self.n_rows = triton.cdiv(spec.sizes.m, config.block_m)
        # Triton 3.9 warns where multiply-adds are left to its default, which will be not to fuse them.
        self.options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}

    def matrix(self, tensor: Tensor, block: list[int], by_descriptor: bool) -> Tensor | TensorDescriptor:
        return TensorDescriptor.from_tensor(tensor, block) if by_descriptor else tensor


class _Forward(_Prepared):
    """Y [M, N] and S [M, R] in one launch; see backends.reference."""

    def __init__(self, spec: LaunchSpec, config: TileConfig, target: Target):
        m, n, k, r = spec.sizes
        block_r = padded_rank(r)
        if spec.dropout and target.arch >= 90 and spec.dtype.itemsize == 2:
            block_r = max(block_r, 64)  # the rank is the height of a product (see _make_s), and wgmma's least is 64
        fused = config.fused and block_r <= FUSED_RANK
        super().__init__(spec, config, target, block_r=block_r, fused=fused)
        self.grid = (self.n_rows * (triton.cdiv(n, config.block_n) + (not fused)),)
        self.n_words = N_COUNTERS.value + self.n_rows

    def __call__(self, operands: ForwardOperands) -> tuple[Tensor, Tensor]:
        x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed = operands
        m, n, k, r = self.spec.sizes
        config, variant = self.config, self.variant
        y, s = x.new_empty(m, n), x.new_empty(m, r)
        with torch.cuda.device_of(x):  # Triton launches on the current device, whatever the tensors' is
            lora_forward_kernel[self.grid](
                self.matrix(x, [config.block_m, config.block_k], variant.tma),
                self.matrix(weight, [config.block_n, config.block_k], variant.tma),
                self.matrix(lora_a, [variant.block_r, config.block_k], variant.tma_d),
                lora_b, bias, y, s, borrow_workspace(self.n_words, x.device), m, n, k, r, self.n_words, self.wave,
                x.stride(0), weight.stride(0), lora_a.stride(0), lora_b.stride(0),
                *_forward_scales(scaling, dropout_p, x.dtype), _seed_argument(seed), philox.threshold(dropout_p),
                plain_variant=self.plain_variant, **self.options,
            )  # fmt: skip
        return y, s


class _Backward(_Prepared):
    """The gradients that the description needs in one launch; see backends.reference."""

    def __init__(self, spec: LaunchSpec, config: TileConfig, target: Target):
        m, n, k, r = spec.sizes
        needs = spec.needs
        block_r = padded_rank(r)
        fused = config.fused and needs.dx and block_r <= FUSED_RANK
        super().__init__(spec, config, target, block_r=block_r, fused=fused)
        n_parts = triton.cdiv(self.n_rows, config.group_m)
        n_columns = triton.cdiv(k, config.block_n) + (not fused) if needs.dx else int(needs.da)
        tiles_a = triton.cdiv(k, config.gradient_n) if needs.da else 0
        tiles_b = triton.cdiv(n, config.gradient_n) if needs.db or needs.dbias else 0
        self.grid = (self.n_rows * n_columns + n_parts * (tiles_a + tiles_b),)
        self.n_words = N_COUNTERS.value + self.n_rows + tiles_a + tiles_b
        self.makes_ds, self.chained = n_columns > 0, n_parts > 1

    def __call__(self, operands: BackwardOperands) -> Gradients:
        dy, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed = operands
        m, n, k, r = self.spec.sizes
        needs, config, variant, chained = self.spec.needs, self.config, self.variant, self.chained

        def output(needed: bool, *shape: int, dtype: torch.dtype = dy.dtype) -> Tensor | None:
            return dy.new_empty(shape, dtype=dtype) if needed else None

        dx, ds = output(needs.dx, m, k), output(self.makes_ds, m, r)
        da, db = output(needs.da, r, k, dtype=lora_a.dtype), output(needs.db, n, r, dtype=lora_b.dtype)
        dbias = output(needs.dbias, n)
        partial_a = output(chained and needs.da, k, r, dtype=torch.float32)
        partial_b = output(chained and needs.db, n, r, dtype=torch.float32)
        partial_bias = output(chained and needs.dbias, n, dtype=torch.float32)
        with torch.cuda.device_of(dy):  # Triton launches on the current device, whatever the tensors' is
            lora_backward_kernel[self.grid](
                self.matrix(dy, [config.block_m, config.block_k], variant.tma),
                self.matrix(weight, [config.block_k, config.block_n], variant.tma),
                self.matrix(lora_b, [config.block_k, variant.block_r], variant.tma_d),
                dy, x, lora_a, s, dx, ds, da, db, dbias, partial_a, partial_b, partial_bias,
                borrow_workspace(self.n_words, dy.device), m, n, k, r, self.n_words, self.wave,
                dy.stride(0), x.stride(0) if needs.da else 0, weight.stride(0), lora_a.stride(0), lora_b.stride(0),
                scaling, _scale_of_branch(scaling, dy.dtype), philox.inverse_keep(dropout_p), _seed_argument(seed),
                philox.threshold(dropout_p), CHAINED=chained, plain_variant=self.plain_variant, **self.options,
            )  # fmt: skip
        return Gradients(dx, da, db, dbias)


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
