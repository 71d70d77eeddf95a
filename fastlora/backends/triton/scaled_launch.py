"""The Triton backend of a DoRA layer, host side: which calls its kernels serve, and the two launches.

The forward scales Y's columns in its epilogue. The backward scales dY's once, by tiles ahead of all others, which make
dm and dbias of the same pass: into scratch of its size, which is freed when the launch has been made. Products read it
by ordinary loads, as they read S: Triton has no proxy fence between other programs' stores and TMA.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastlora.backends.configs import TileConfig
from fastlora.backends.target import Target, target_of
from fastlora.backends.triton.launch import BackwardLaunch, ForwardLaunch, ceil_div, choose_tile, has_aligned_rows
from fastlora.backends.triton.launch import why_unsupported as why_unscaled_unsupported
from fastlora.backends.triton.scaled_kernels import scaled_backward_kernel, scaled_forward_kernel
from fastlora.backends.workspace import borrow_workspace
from fastlora.problem import ColumnScale, Gradients, Launcher, LaunchSpec

_SHORT = {2: 32, 4: 16}  # rows, by the bytes of an element
_MAGNITUDES = (torch.float16, torch.bfloat16, torch.float32)


def why_unsupported(spec: LaunchSpec) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    scale = spec.column_scale
    if scale is None:
        return "no kernel here is without a column scale"
    if spec.dropout:
        return "no kernel scales columns with dropout"
    if scale.magnitude not in _MAGNITUDES:
        return f"a magnitude of {scale.magnitude} is not float16, bfloat16 or float32"
    if scale.norm != torch.float32:
        return f"a norm of {scale.norm} is not float32"
    return why_unscaled_unsupported(spec._replace(column_scale=None))


def prepare(spec: LaunchSpec, config: TileConfig | None = None) -> Launcher:
    """What serves every call of this description, with ScaledForward or ScaledBackward; ``config`` overrides the tables
    and what was tuned."""
    target = target_of(spec.device)
    config = without_spill(config or choose_tile(spec, target), spec, target)
    return (_Forward if spec.direction == "forward" else _Backward)(spec, config, target)


def without_spill(config: TileConfig, spec: LaunchSpec, target: Target) -> TileConfig:
    """A tile of the tables, where it would spill as one that does not. A short one leaves S to tiles of their own (in
    float32 it spills on sm_80, in 16 bits on sm_120). A forward's on sm_100 has 128 columns at most; over unaligned
    rows it takes steps of 64 there and where it has 16 rows (of 32 that spills on sm_86 and sm_89)."""
    config = replace(config, fused=config.fused and config.block_m > _SHORT[spec.dtype.itemsize])
    if spec.direction == "backward":
        return config
    if target.arch >= 100:
        config = replace(config, block_n=min(config.block_n, 128))
    if spec.dtype.itemsize == 2 and not has_aligned_rows(spec) and (config.block_m == 16 or target.arch in (100, 103)):
        config = replace(config, block_k=64)
    return config


def _scale_of(spec: LaunchSpec) -> ColumnScale:
    assert spec.column_scale is not None, "fastlora.scaled_operands says it"
    return spec.column_scale


class _Forward(ForwardLaunch):
    """Y [M, N], S [M, R], and Z [M, N], which is Y before factor and bias, or None."""

    def __init__(self, spec: LaunchSpec, config: TileConfig, target: Target):
        super().__init__(spec, config, target)
        blocks = tuple(block or [] for block in self.launch.blocks)
        self.launch = self.prepare_launch(scaled_forward_kernel, self.launch.grid, blocks, self.launch.compiled_as)

    def __call__(self, operands: Any) -> Any:
        x = operands.layer.x
        y, s = x.new_empty(self.y_shape), x.new_empty(self.s_shape)
        unscaled = x.new_empty(self.y_shape) if operands.keeps_unscaled else None
        workspace = borrow_workspace(self.n_words, self.device)
        self.launch(*self.arguments(operands.layer, y, s, workspace), operands.magnitude, operands.norm, unscaled)
        if not self._learned:
            self.learn()
        return y, s, unscaled

    def compile(self, operands: Any) -> None:
        """Compiles for such a call; the operands may be on the "meta" device."""
        like = torch.empty(0, dtype=self.spec.dtype, device="meta")
        unscaled = like if operands.keeps_unscaled else None
        arguments = self.arguments(operands.layer, like, like, like.to(torch.int32))
        self.launch.compile(*arguments, operands.magnitude, operands.norm, unscaled)


class _Backward(BackwardLaunch):
    """Gradients, and the magnitude's [N] or None."""

    def __init__(self, spec: LaunchSpec, config: TileConfig, target: Target):
        needs, scale, (m, n, _, _) = spec.needs, _scale_of(spec), spec.sizes
        # dbias is made where dY is scaled; all other gradients read the scaled rows.
        super().__init__(spec._replace(needs=needs._replace(dbias=False)), config, target)
        self.variant = replace(self.variant, tma=False, tma_down=False, scaled=True)
        self.kernel_key = (self.kernel_key[0], self.variant)
        self.scratch_shape = (m, n) if needs.dx or needs.da or needs.db else None
        n_groups, parts = ceil_div(self.n_rows, config.group_m), ceil_div(n, config.gradient_n)
        self.n_words += n_groups + parts
        sums = ((needs.dbias, spec.dtype), (scale.trains, scale.magnitude))
        dbias, dm = (((n,), dtype) if need else None for need, dtype in sums)
        part_bias, part_m = (((n,), torch.float32) if need and n_groups > 1 else None for need, _ in sums)
        made = [*self.outputs]
        made[_DBIAS], made[_PARTIAL_BIAS] = dbias, part_bias
        self.outputs = (*made, dm, part_m)
        compiled_as = dict(self.launch.compiled_as)
        compiled_as |= {
            index: torch.float32 for index, sum_ in ((_PARTIAL_BIAS_ARGUMENT, dbias), (_PARTIAL_M, dm)) if sum_
        }
        self.launch = self.prepare_launch(
            scaled_backward_kernel, self.launch.grid + n_groups * parts, ([], [], []), compiled_as
        )

    def __call__(self, operands: Any) -> Any:
        dy = operands.layer.dy
        outputs = [made and dy.new_empty(made[0], dtype=made[1]) for made in self.outputs]
        self.launch(*self.arguments(operands, outputs, borrow_workspace(self.n_words, self.device)))
        if not self._learned:
            self.learn()
        dx, _, da, db, dbias, *_, dm, _ = outputs
        return Gradients(dx, da, db, dbias), dm

    def arguments(self, operands: Any, outputs: list[Tensor | None], workspace: Tensor) -> tuple:
        """Those of scaled_backward_kernel, but its constants; the scratch for dY is new."""
        *of_layer, dm, partial_m = outputs
        dy, weight, lora_b, _, *rest = super().arguments(operands.layer, of_layer, workspace)
        scaled = None if self.scratch_shape is None else dy.new_empty(self.scratch_shape)
        factors = operands.magnitude, operands.norm, operands.unscaled
        return dy, weight, lora_b, scaled, *rest, *factors, dm, partial_m


_DBIAS, _PARTIAL_BIAS = 4, 7  # among the outputs of BackwardLaunch
_PARTIAL_BIAS_ARGUMENT, _PARTIAL_M = (
    scaled_backward_kernel.arg_names.index(name) for name in ("partial_bias_ptr", "partial_m_ptr")
)
