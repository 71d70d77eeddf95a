"""The Triton backend, host side: which calls the kernels serve, and the two launches of a layer."""

from importlib.metadata import version
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora import philox
from fastlora.backends.configs import FUSED_RANK, MAX_RANK, TileConfig, choose_config, gradients_last, padded_rank
from fastlora.backends.target import Target, multiplies_by_warpgroup, resident_programs, target_of
from fastlora.backends.triton.kernels import lora_backward_kernel, lora_forward_kernel
from fastlora.backends.triton.schedule import N_COUNTERS
from fastlora.backends.triton.variant import Variant
from fastlora.backends.tuning import tuned_config
from fastlora.backends.workspace import borrow_workspace
from fastlora.problem import BackwardOperands, ForwardOperands, Gradients, Launcher, LaunchSpec, split_scaling


def why_unsupported(spec: LaunchSpec) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if spec.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {spec.dtype} is not float16, bfloat16 or float32"
    if triton.knobs.runtime.interpret and spec.dtype != torch.float32:
        # It keeps bfloat16 as integers; the results are wrong and nothing raises.
        return (
            f"its interpreter (TRITON_INTERPRET=1) serves float32 alone, not {spec.dtype}, for its bfloat16 results"
            " are wrong; use float32, or unset TRITON_INTERPRET"
        )
    if spec.sizes.r > MAX_RANK:
        return f"rank {spec.sizes.r} is above {MAX_RANK}"
    if spec.base_format != "dense" or spec.branch != "single":
        return f"no kernel for a {spec.base_format} base weight with a {spec.branch} branch"
    return None


@triton.jit
def _count_kernel(counter_ptr, n):
    for i in range(n):
        tl.store(counter_ptr, i + 1)


def interpreter_unusable() -> str | None:
    """Why Triton's interpreter cannot run these kernels, or None: whether a loop over a kernel's argument works (not in
    Triton 3.6 with NumPy 2.4)."""
    counter = torch.zeros(1, dtype=torch.int32)
    try:
        _count_kernel[(1,)](counter, 3)
    except Exception:  # the interpreter's own wrapper around whatever its NumPy raised
        counter.zero_()
    if counter.item() == 3:
        return None
    return (
        f"the interpreter (TRITON_INTERPRET=1) of Triton {triton.__version__} fails with NumPy {version('numpy')};"
        " install numpy<2.4, or unset TRITON_INTERPRET"
    )


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
        arch=target.arch, n_sms=target.n_sms, element_size=spec.dtype.itemsize, aligned=aligned, dropout=spec.dropout,
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
            tma_down=has_tma and shrink_aligned,
            even_k=contracted % config.block_k == 0,
            tf32=spec.tf32,
            wgmma=target.arch == 90,
        )
        self.plain_variant = self.variant.as_plain()
        self.target, self.wave, self._compiled = target, target.n_sms, False
        self.n_rows = triton.cdiv(spec.sizes.m, config.block_m)
        # Triton 3.9 warns where multiply-adds are left to its default, which will be not to fuse them.
        self.options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}

    def learn(self, compiled: Any) -> None:
        """Takes the wave from the kernel as it is compiled; until the first launch, one program a multiprocessor.
        (Triton's interpreter compiles none.)"""
        if self._compiled or compiled is None:
            return
        used = compiled.metadata
        programs = resident_programs(self.target.arch, compiled.n_regs, used.shared, 32 * used.num_warps)
        self.wave, self._compiled = self.target.n_sms * programs, True

    def matrix(self, tensor: Tensor, block: list[int], by_descriptor: bool) -> Tensor | TensorDescriptor:
        return TensorDescriptor.from_tensor(tensor, block) if by_descriptor else tensor


class _Forward(_Prepared):
    """Y [M, N] and S [M, R] in one launch; see backends.reference."""

    def __init__(self, spec: LaunchSpec, config: TileConfig, target: Target):
        m, n, k, r = spec.sizes
        block_r = padded_rank(r)
        if spec.dropout and spec.dtype.itemsize == 2 and config.block_m >= 64 and multiplies_by_warpgroup(target.arch):
            block_r = max(block_r, 64)  # the rank is the height of a product (see tiles._shrink)
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
            compiled = lora_forward_kernel[self.grid](
                x=self.matrix(x, [config.block_m, config.block_k], variant.tma),
                weight=self.matrix(weight, [config.block_n, config.block_k], variant.tma),
                lora_a=self.matrix(lora_a, [variant.block_r, config.block_k], variant.tma_down),
                lora_b_ptr=lora_b, bias_ptr=bias, y_ptr=y, s_ptr=s,
                workspace_ptr=borrow_workspace(self.n_words, x.device), n_words=self.n_words, wave=self.wave,
                M=m, N=n, K=k, R=r,
                stride_xm=x.stride(0), stride_wn=weight.stride(0), stride_ar=lora_a.stride(0),
                stride_bn=lora_b.stride(0),
                **_forward_scales(scaling, dropout_p, x.dtype),
                seed=_seed_argument(seed), threshold=philox.threshold(dropout_p),
                plain_variant=self.plain_variant, **self.options,
            )  # fmt: skip
        self.learn(compiled)
        return y, s


class _Backward(_Prepared):
    """The gradients that the description needs in one launch; see backends.reference."""

    def __init__(self, spec: LaunchSpec, config: TileConfig, target: Target):
        m, n, k, r = spec.sizes
        needs = spec.needs
        block_r = padded_rank(r)
        fused = config.fused and needs.dx and block_r <= FUSED_RANK
        super().__init__(spec, config, target, block_r=block_r, fused=fused)
        n_chunks = triton.cdiv(self.n_rows, config.group_m)
        n_columns = triton.cdiv(k, config.block_n) + (not fused) if needs.dx else int(needs.da)
        tiles_a = triton.cdiv(k, config.gradient_n) if needs.da else 0
        tiles_b = triton.cdiv(n, config.gradient_n) if needs.db or needs.dbias else 0
        self.grid = (self.n_rows * n_columns + n_chunks * (tiles_a + tiles_b),)
        self.n_words = N_COUNTERS.value + self.n_rows + tiles_a + tiles_b
        self.makes_ds, self.serial = n_columns > 0, n_chunks > 1
        self.gradients_last = int(needs.dx and gradients_last(m, k, n, config.block_m, config.block_n))

    def __call__(self, operands: BackwardOperands) -> Gradients:
        dy, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed = operands
        m, n, k, r = self.spec.sizes
        needs, config, variant, serial = self.spec.needs, self.config, self.variant, self.serial

        def output(needed: bool, *shape: int, dtype: torch.dtype = dy.dtype) -> Tensor | None:
            return dy.new_empty(shape, dtype=dtype) if needed else None

        dx, ds = output(needs.dx, m, k), output(self.makes_ds, m, r)
        da, db = output(needs.da, r, k, dtype=lora_a.dtype), output(needs.db, n, r, dtype=lora_b.dtype)
        dbias = output(needs.dbias, n)
        partial_a = output(serial and needs.da, k, r, dtype=torch.float32)
        partial_b = output(serial and needs.db, n, r, dtype=torch.float32)
        partial_bias = output(serial and needs.dbias, n, dtype=torch.float32)
        with torch.cuda.device_of(dy):  # Triton launches on the current device, whatever the tensors' is
            compiled = lora_backward_kernel[self.grid](
                dy=self.matrix(dy, [config.block_m, config.block_k], variant.tma),
                weight=self.matrix(weight, [config.block_k, config.block_n], variant.tma),
                lora_b=self.matrix(lora_b, [config.block_k, variant.block_r], variant.tma_down),
                dy_ptr=dy, x_ptr=x, lora_a_ptr=lora_a, s_ptr=s,
                dx_ptr=dx, ds_ptr=ds, da_ptr=da, db_ptr=db, dbias_ptr=dbias,
                partial_a_ptr=partial_a, partial_b_ptr=partial_b, partial_bias_ptr=partial_bias,
                workspace_ptr=borrow_workspace(self.n_words, dy.device), n_words=self.n_words, wave=self.wave,
                gradients_last=self.gradients_last, M=m, N=n, K=k, R=r,
                stride_dym=dy.stride(0), stride_xm=x.stride(0) if needs.da and x is not None else 0,
                stride_wn=weight.stride(0), stride_ar=lora_a.stride(0), stride_bn=lora_b.stride(0),
                scaling=scaling, on_branch=_scale_of_branch(scaling, dy.dtype),
                inverse_keep=philox.inverse_keep(dropout_p), seed=_seed_argument(seed),
                threshold=philox.threshold(dropout_p),
                SERIAL=serial, plain_variant=self.plain_variant, **self.options,
            )  # fmt: skip
        self.learn(compiled)
        return Gradients(dx, da, db, dbias)


def _scale_of_branch(scaling: float, dtype: torch.dtype) -> float | None:
    """What multiplies S·Bᵀ and dYᵀ·S; None, which compiles to nothing, for 1."""
    on_branch = split_scaling(scaling, dtype).on_branch
    return None if on_branch == 1.0 else on_branch


def _forward_scales(scaling: float, dropout_p: float, dtype: torch.dtype) -> dict[str, float | None]:
    """The forward kernel's arguments that structs.BranchScales is made of."""
    inverse_keep = philox.inverse_keep(dropout_p)
    if dtype != torch.float16:
        return {"scale_s": scaling * inverse_keep, "in_s": None, "on_branch": None}
    in_s = split_scaling(scaling, dtype).in_s
    return {"scale_s": inverse_keep, "in_s": in_s, "on_branch": _scale_of_branch(scaling, dtype)}


def _seed_argument(seed: Tensor | None) -> Tensor | int | None:
    return int(seed) if seed is not None and seed.device.type == "cpu" else seed
