"""The Triton backend, host side: which calls the kernels serve, and the two launches of a layer."""

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache, partial
from importlib.metadata import version
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora import philox
from fastlora.backends.configs import FUSED_RANK, MAX_RANK, TileConfig, choose_config, gradients_last, padded_rank
from fastlora.backends.target import Target, multiplies_by_warpgroup, resident_programs, target_of
from fastlora.backends.triton.compiled import CompiledLaunch, side_by_side
from fastlora.backends.triton.kernels import lora_backward_kernel, lora_forward_kernel
from fastlora.backends.triton.schedule import N_COUNTERS
from fastlora.backends.triton.variant import Variant
from fastlora.backends.tuning import tuned_config
from fastlora.backends.workspace import borrow_workspace
from fastlora.problem import BackwardOperands, ForwardOperands, Gradients, Launcher, LaunchSpec, split_scaling

BASE_FORMATS = ("dense", "transposed")


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
    if spec.sizes.r * spec.sizes.k >= 2**31:
        return f"A's gradient has {spec.sizes.r} x {spec.sizes.k} elements, which 32-bit offsets do not reach"
    if spec.base_format not in BASE_FORMATS or spec.branch != "single":
        return f"no kernel for a {spec.base_format} base weight with a {spec.branch} branch"
    if spec.column_scale is not None:
        return "no kernel scales the columns of Y"
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
    config = config or choose_tile(spec, target)
    serves = ForwardLaunch if spec.direction == "forward" else BackwardLaunch
    return serves(spec, config, target)


def compile_all(calls: Iterable[tuple[Any, Any]], workers: int) -> int:
    """Compiles what calls would launch, several kernels side by side, and loads it.

    Args:
        calls: of what ``prepare`` has returned with operands of its description, which may be on the "meta" device.
        workers: threads that compile; most of the work is outside of Python.

    Returns:
        The number of kernels.
    """
    distinct = {prepared.kernel_key: (prepared, operands) for prepared, operands in calls}
    side_by_side([partial(prepared.compile, operands) for prepared, operands in distinct.values()], workers)
    return len({id(prepared.launch.compiled) for prepared, _ in distinct.values()})


def choose_tile(spec: LaunchSpec, target: Target, one_row_block: bool = False) -> TileConfig:
    """What ``fastlora tune`` found on this GPU, else the tables' choice. ``one_row_block``: as for choose_config."""
    aligned = has_aligned_rows(spec)
    if aligned:
        tuned = tuned_config(spec.direction, spec.device, *spec.sizes, spec.dtype, spec.dropout)
        if tuned is not None and not (one_row_block and tuned.block_m < spec.sizes.m):
            return tuned
    return choose_config(
        spec.direction, *spec.sizes,
        arch=target.arch, n_sms=target.n_sms, element_size=spec.dtype.itemsize, aligned=aligned, dropout=spec.dropout,
        one_row_block=one_row_block,
    )  # fmt: skip


def has_aligned_rows(spec: LaunchSpec) -> bool:
    """Whether the rows of both factors start where a wide load may, as far as Triton knows."""
    return spec.aligned.act and spec.aligned.weight and has_wide_loads(spec)


def has_wide_loads(spec: LaunchSpec) -> bool:
    """Whether Triton knows that rows start where a wide load may: from sizes and strides that are multiples of 16. Else
    the large tiles spill, and on sm_80 no load is asynchronous."""
    strides = spec.row_strides
    numbers = (spec.sizes.n, spec.sizes.k, strides.act, strides.weight, strides.saved_x)
    return all(number % 16 == 0 for number in numbers)


def ceil_div(a: int, b: int) -> int:  # triton.cdiv, made for kernels, takes 3 µs
    return -(-a // b)


def forward_rank(spec: LaunchSpec, config: TileConfig, target: Target) -> int:
    """The rank as a forward's tiles hold it: of a masked product it may be the height (see tiles.shrink)."""
    block_r = padded_rank(spec.sizes.r)
    masks = spec.dropout and spec.dtype.itemsize == 2
    return max(block_r, 64) if masks and config.block_m >= 64 and multiplies_by_warpgroup(target.arch) else block_r


def overwrites_act(spec: LaunchSpec, config: TileConfig, target: Target) -> bool:
    """Whether a shrink must not be fused where act is loaded by pointers: under dropout on Hopper. Of a block that
    wgmma reads where it lies, and the mask in registers, Triton 3.6 pipelines such loads with a buffer too few, and
    overwrites it while wgmma still reads (the emulator finds the race at the largest tiles)."""
    by_wgmma = target.arch == 90 and spec.dtype.itemsize == 2 and config.block_m >= 64
    return by_wgmma and spec.dropout and spec.direction == "forward"


class PreparedLaunch:
    """What the calls of one description share: the configuration, the kernel's variant, and how the grid is cut.

    A call allocates its outputs and launches; ``compile`` does what the first call would do before its launch.
    """

    launch: CompiledLaunch
    kernel_key: tuple

    def __init__(self, spec: LaunchSpec, config: TileConfig, target: Target, *, block_r: int, fused: bool):
        config = replace(config, fused=fused)  # what it cannot have fused is the same kernel as what need not
        self.spec, self.config, self.device = spec, config, spec.device
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
            transposed=spec.base_format == "transposed",
        )
        self.kernel_key = (spec._replace(sizes=spec.sizes._replace(m=0)), self.variant)  # calls of one have one kernel
        self.target, self.wave, self._learned = target, target.n_sms, False
        self.n_rows = ceil_div(spec.sizes.m, config.block_m)

    def learn(self) -> None:
        """Takes the wave from the kernel as it is compiled; until the first launch, one program a multiprocessor.
        (Triton's interpreter compiles none.)"""
        compiled = self.launch.compiled
        if compiled is None:
            return
        used = compiled.metadata
        programs = resident_programs(self.target.arch, compiled.n_regs, used.shared, 32 * used.num_warps)
        self.wave, self._learned = self.target.n_sms * programs, True

    def weight_block(self) -> list[int]:
        """Of the weight as it lies in memory."""
        block = [self.config.block_n, self.config.block_k]
        return block[::-1] if self.variant.contracts_weight_rows else block

    def prepare_launch(
        self, kernel: Any, grid: int, blocks: tuple[list[int], ...], compiled_as: dict[int, Any]
    ) -> CompiledLaunch:
        """Of a kernel on ``blocks`` of its first three arguments, by TMA where the variant says so."""
        by_tma = (self.variant.tma, self.variant.tma, self.variant.tma_down)
        config = self.config
        # Triton 3.9 warns where multiply-adds are left to its default, which will be not to fuse them.
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
        return CompiledLaunch(
            kernel, grid, self.device,
            blocks=tuple(block if tma else None for block, tma in zip(blocks, by_tma, strict=True)),
            compiled_as=compiled_as, constants=(self.variant.as_plain(),), options=options,
        )  # fmt: skip


class ForwardLaunch(PreparedLaunch):
    """Y [M, N] and S [M, R] in one launch; see backends.reference."""

    def __init__(self, spec: LaunchSpec, config: TileConfig, target: Target):
        m, n, _, r = spec.sizes
        block_r = forward_rank(spec, config, target)
        fused = config.fused and block_r <= FUSED_RANK
        super().__init__(spec, config, target, block_r=block_r, fused=fused)
        self.y_shape, self.s_shape = (m, n), (m, r)
        self.n_words = N_COUNTERS.value + self.n_rows
        strides = spec.row_strides
        self.numbers = (*strides[:4],)
        self.launch = self.prepare_launch(
            lora_forward_kernel,
            self.n_rows * (ceil_div(n, config.block_n) + (not fused)),
            ([config.block_m, config.block_k], self.weight_block(), [block_r, config.block_k]),
            seed_types(lora_forward_kernel) if spec.dropout else {},
        )

    def __call__(self, operands: ForwardOperands) -> tuple[Tensor, Tensor]:
        x = operands[0]
        y, s = x.new_empty(self.y_shape), x.new_empty(self.s_shape)
        self.launch(*self.arguments(operands, y, s, borrow_workspace(self.n_words, self.device)))
        if not self._learned:
            self.learn()
        return y, s

    def compile(self, operands: ForwardOperands) -> None:
        """Compiles for such a call; the operands may be on the "meta" device."""
        like = torch.empty(0, dtype=self.spec.dtype, device="meta")
        self.launch.compile(*self.arguments(operands, like, like, like.to(torch.int32)))

    def arguments(self, operands: ForwardOperands, y: Tensor, s: Tensor, workspace: Tensor) -> tuple:
        """Those of lora_forward_kernel, but its constants."""
        x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed = operands
        stored = weight.t() if self.variant.transposed else weight
        return (
            x, stored, lora_a, lora_b, bias, y, s, workspace, *self.spec.sizes, self.n_words, self.wave, *self.numbers,
            *forward_scales(scaling, dropout_p, self.spec.dtype), *seed_arguments(seed), threshold_argument(dropout_p),
        )  # fmt: skip


class BackwardLaunch(PreparedLaunch):
    """The gradients that the description needs in one launch; see backends.reference."""

    def __init__(self, spec: LaunchSpec, config: TileConfig, target: Target):
        m, n, k, r = spec.sizes
        needs = spec.needs
        block_r = padded_rank(r)
        fused = config.fused and needs.dx and block_r <= FUSED_RANK
        super().__init__(spec, config, target, block_r=block_r, fused=fused)
        n_chunks = ceil_div(self.n_rows, config.group_m)
        n_columns = ceil_div(k, config.block_n) + (not fused) if needs.dx else int(needs.da)
        tiles_a = ceil_div(k, config.gradient_n) if needs.da else 0
        tiles_b = ceil_div(n, config.gradient_n) if needs.db or needs.dbias else 0
        self.n_words = N_COUNTERS.value + self.n_rows + tiles_a + tiles_b
        last = int(needs.dx and gradients_last(m, k, n, config.block_m, config.block_n))
        strides = spec.row_strides
        self.numbers = (
            n_columns, last, strides.act, strides.saved_x, strides.weight, strides.lora_a, strides.lora_b,
        )  # fmt: skip
        adapters, serial = spec.adapter_dtypes, n_chunks > 1
        makes_ds, makes_sums = needs.dx or needs.da, (needs.da, needs.db, needs.dbias)
        # (shape, dtype) of dX, dS, dA, dB, dbias, then of the fp32 sums between row chunks; None: not made.
        made = (
            (needs.dx, (m, k), spec.dtype), (makes_ds, (m, r), spec.dtype), (needs.da, (r, k), adapters[0]),
            (needs.db, (n, r), adapters[1]), (needs.dbias, (n,), spec.dtype),
            (serial and needs.da, (k, r), torch.float32), (serial and needs.db, (n, r), torch.float32),
            (serial and needs.dbias, (n,), torch.float32),
        )  # fmt: skip
        self.outputs = tuple((shape, dtype) if need else None for need, shape, dtype in made)
        # Where dS is made, one kernel serves with dX and without it.
        compiled_as: dict[int, Any] = {_DX: spec.dtype} if makes_ds else {}
        compiled_as |= {_PARTIALS + i: torch.float32 for i, need in enumerate(makes_sums) if need}
        compiled_as |= seed_types(lora_backward_kernel) if spec.dropout else {}
        self.launch = self.prepare_launch(
            lora_backward_kernel,
            self.n_rows * n_columns + n_chunks * (tiles_a + tiles_b),
            ([config.block_m, config.block_k], self.weight_block(), [config.block_k, block_r]),
            compiled_as,
        )

    def __call__(self, operands: BackwardOperands) -> Gradients:
        dy = operands[0]
        outputs = [made and dy.new_empty(made[0], dtype=made[1]) for made in self.outputs]
        self.launch(*self.arguments(operands, outputs, borrow_workspace(self.n_words, self.device)))
        if not self._learned:
            self.learn()
        return Gradients(outputs[0], outputs[2], outputs[3], outputs[4])

    def compile(self, operands: BackwardOperands) -> None:
        """Compiles for such a call; the operands may be on the "meta" device."""
        outputs = [made and torch.empty(0, dtype=made[1], device="meta") for made in self.outputs]
        workspace = torch.empty(0, dtype=torch.int32, device="meta")
        self.launch.compile(*self.arguments(operands, outputs, workspace))

    def arguments(self, operands: BackwardOperands, outputs: list[Tensor | None], workspace: Tensor) -> tuple:
        """Those of lora_backward_kernel, but its constants."""
        dy, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed = operands
        stored = weight.t() if self.variant.transposed else weight
        return (
            dy, stored, lora_b, dy, x, lora_a, s, *outputs, workspace,
            *self.spec.sizes, self.n_words, self.wave, *self.numbers,
            *backward_scales(scaling, dropout_p, self.spec.dtype), *seed_arguments(seed), threshold_argument(dropout_p),
        )  # fmt: skip


_DX, _PARTIALS = (lora_backward_kernel.arg_names.index(name) for name in ("dx_ptr", "partial_a_ptr"))


def seed_types(kernel: Any) -> dict[int, Any]:
    """Every seed has 64 bits, also one that would do with less."""
    return {kernel.arg_names.index("seed_ptr"): torch.int64, kernel.arg_names.index("seed"): 1 << 62}


def _scale_of_branch(scaling: float, dtype: torch.dtype) -> float | None:
    """What multiplies S·Bᵀ and dYᵀ·S; None, which compiles to nothing, for 1."""
    on_branch = split_scaling(scaling, dtype).on_branch
    return None if on_branch == 1.0 else on_branch


@lru_cache(maxsize=256)
def forward_scales(scaling: float, dropout_p: float, dtype: torch.dtype) -> tuple[float, float | None, float | None]:
    """The forward kernel's scale_s, in_s and on_branch, which structs.BranchScales is made of."""
    inverse_keep = philox.inverse_keep(dropout_p)
    if dtype != torch.float16:
        return scaling * inverse_keep, None, None
    return inverse_keep, split_scaling(scaling, dtype).in_s, _scale_of_branch(scaling, dtype)


@lru_cache(maxsize=256)
def backward_scales(scaling: float, dropout_p: float, dtype: torch.dtype) -> tuple[float, float | None, float]:
    """The backward kernel's scaling, on_branch and inverse_keep."""
    return scaling, _scale_of_branch(scaling, dtype), philox.inverse_keep(dropout_p)


threshold_argument = lru_cache(maxsize=256)(philox.threshold)


def seed_arguments(seed: Tensor | None) -> tuple[Tensor | None, int | None]:
    """The kernels' seed_ptr and seed: a null pointer and a value where the seed is in reach of the CPU."""
    if seed is None:
        return None, None
    if seed.is_cpu and not triton.knobs.runtime.interpret:
        return None, int(seed)
    return seed, 0
