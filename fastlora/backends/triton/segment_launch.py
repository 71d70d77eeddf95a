"""Rows in segments by the Triton kernels, host side: which calls they serve, and the two launches of a layer.

Nothing is read of the tensors that say where segments end and what they use: the grid has a program for every tile that
there may be. Matrices are loaded by pointers, on Hopper too: a descriptor's bounds are not a segment's.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastlora import philox
from fastlora.backends.configs import FUSED_RANK, TileConfig, choose_config, gradients_last, padded_rank
from fastlora.backends.target import Target, target_of
from fastlora.backends.triton import launch as single
from fastlora.backends.triton.launch import (
    PreparedLaunch,
    backward_scales,
    ceil_div,
    forward_rank,
    forward_scales,
    has_aligned_rows,
    overwrites_act,
    seed_arguments,
    seed_types,
    threshold_argument,
)
from fastlora.backends.triton.schedule import N_COUNTERS
from fastlora.backends.triton.segment_kernels import segments_backward_kernel, segments_forward_kernel
from fastlora.backends.triton.segments import OWNERS
from fastlora.backends.workspace import borrow_workspace
from fastlora.problem import Gradients, Launcher, LaunchSpec
from fastlora.segments import GroupedBackward, GroupedForward

_FEW, _MANY = 32, 256  # segments that a program looks at together: a warp's worth, or several each thread


def why_unsupported(spec: LaunchSpec) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if spec.base_format not in single.BASE_FORMATS:
        return f"no kernel for a {spec.base_format} base weight of rows in segments"
    return single.why_unsupported(spec._replace(base_format="dense", branch="single"))


def prepare(spec: LaunchSpec, config: TileConfig | None = None) -> Launcher:
    """What serves every call of this description; ``config`` overrides the tables."""
    target = target_of(spec.device)
    config = config or _choose(spec, target)
    return _Forward(spec, config, target) if spec.direction == "forward" else _Backward(spec, config, target)


def most_blocks(m: int, n_segments: int, block_m: int) -> int:
    """Row blocks that m rows in so many segments come to at most: all but one row of a segment fill its last block."""
    return min(m, (m + n_segments * (block_m - 1)) // block_m)


def _choose(spec: LaunchSpec, target: Target) -> TileConfig:
    """The tables' choice: a tile is as tall as a segment's rows are many on average."""
    aligned = has_aligned_rows(spec)
    config = choose_config(
        spec.direction, *spec.sizes,
        arch=target.arch, n_sms=target.n_sms, element_size=spec.dtype.itemsize, aligned=aligned, dropout=spec.dropout,
        n_segments=_stacks(spec).n_segments,
    )  # fmt: skip
    return without_spill(config, spec.sizes.r, aligned and spec.dtype.itemsize == 2)


def without_spill(config: TileConfig, rank: int, wide: bool) -> TileConfig:
    """A tile of the tables, narrower where these kernels would spill: they hold addresses where others have
    descriptors, and the segments' numbers besides.

    Args:
        rank: of the adapters.
        wide: whether loads are wide and elements have 16 bits.
    """
    if config.block_k > 64 and config.block_m > 16:
        config = replace(config, block_k=64)
    if padded_rank(rank) <= FUSED_RANK:
        return config
    narrow = config.block_m == 16 and not wide
    block_n = min(config.block_n, 128)
    return replace(config, block_n=block_n, slice_n=32, gradient_n=16 if narrow else config.gradient_n)


def _stacks(spec: LaunchSpec) -> Any:
    assert spec.stacks is not None, "fastlora.segments.describe_segments says them"
    return spec.stacks


class _Segmented(PreparedLaunch):
    """What the calls of one description share."""

    def __init__(self, spec: LaunchSpec, config: TileConfig, target: Target, *, block_r: int, fused: bool):
        super().__init__(spec, config, target, block_r=block_r, fused=fused)
        self.stacks = _stacks(spec)
        self.variant = replace(
            self.variant,
            tma=False,
            tma_down=False,
            segments=True,
            block_g=_FEW if self.stacks.n_segments < _FEW else _MANY,
        )
        # The rows past the last end are one segment more.
        self.n_rows = most_blocks(spec.sizes.m, self.stacks.n_segments + 1, config.block_m)
        self.counts = (
            *spec.sizes, self.stacks.n_segments, self.stacks.n_weights, self.stacks.n_adapters, self.stacks.n_biases,
        )  # fmt: skip

    def segment_arguments(self, operands: GroupedForward | GroupedBackward) -> tuple:
        """Those from ends_ptr to n_biases."""
        ends, experts, adapters = operands.segments
        of_biases = experts if self.stacks.n_biases == self.stacks.n_weights else None
        return ends, experts, adapters, of_biases, operands.scalings, *self.counts


class _Forward(_Segmented):
    """Y [M, N] and S [M, R] in one launch; see backends.segments_reference."""

    def __init__(self, spec: LaunchSpec, config: TileConfig, target: Target):
        m, n, _, r = spec.sizes
        block_r = forward_rank(spec, config, target)
        fused = config.fused and block_r <= FUSED_RANK and not overwrites_act(spec, config, target)
        super().__init__(spec, config, target, block_r=block_r, fused=fused)
        self.y_shape, self.s_shape = (m, n), (m, r)
        self.n_words = N_COUNTERS.value + self.n_rows
        self.numbers = spec.row_strides.act, spec.row_strides.weight, self.stacks.weight_stride
        self.launch = self.prepare_launch(
            segments_forward_kernel,
            self.n_rows * (ceil_div(n, config.block_n) + (not fused)),
            ([], [], []),
            seed_types(segments_forward_kernel) if spec.dropout else {},
        )

    def __call__(self, operands: GroupedForward) -> tuple[Tensor, Tensor]:
        x = operands.x
        y, s = x.new_empty(self.y_shape), x.new_empty(self.s_shape)
        self.launch(*self.arguments(operands, y, s, borrow_workspace(self.n_words, self.device)))
        if not self._learned:
            self.learn()
        return y, s

    def compile(self, operands: GroupedForward) -> None:
        """Compiles for such a call; the operands may be on the "meta" device."""
        like = torch.empty(0, dtype=self.spec.dtype, device="meta")
        self.launch.compile(*self.arguments(operands, like, like, like.to(torch.int32)))

    def arguments(self, operands: GroupedForward, y: Tensor, s: Tensor, workspace: Tensor) -> tuple:
        """Those of segments_forward_kernel, but its constants."""
        o, dtype = operands, self.spec.dtype
        if o.scalings is None:
            scales = forward_scales(o.scaling, o.dropout_p, dtype)
        else:  # 1.0: to be split on the device
            scales = philox.inverse_keep(o.dropout_p), 1.0 if dtype == torch.float16 else None, None
        return (
            o.x, o.weight, o.lora_a, o.lora_b, o.bias, y, s, workspace, *self.segment_arguments(o),
            self.n_words, self.wave, *self.numbers, *scales, *seed_arguments(o.seed), threshold_argument(o.dropout_p),
        )  # fmt: skip


class _Backward(_Segmented):
    """The gradients that the description needs in one launch; see backends.segments_reference."""

    def __init__(self, spec: LaunchSpec, config: TileConfig, target: Target):
        m, n, k, r = spec.sizes
        needs = spec.needs
        block_r = padded_rank(r)
        fused = config.fused and needs.dx and block_r <= FUSED_RANK
        super().__init__(spec, config, target, block_r=block_r, fused=fused)
        n_adapters, n_biases = self.stacks.n_adapters, self.stacks.n_biases
        n_groups = ceil_div(self.n_rows, config.group_m)
        n_columns = ceil_div(k, config.block_n) + (not fused) if needs.dx else int(needs.da)
        tiles_a = ceil_div(k, config.gradient_n) if needs.da else 0
        tiles_b = ceil_div(n, config.gradient_n) if needs.db else 0
        tiles_bias = ceil_div(n, config.gradient_n) if needs.dbias else 0
        self.n_words = N_COUNTERS.value + self.n_rows + n_adapters * (tiles_a + tiles_b) + n_biases * tiles_bias
        last = int(needs.dx and gradients_last(m, k, n, config.block_m, config.block_n))
        strides = spec.row_strides
        self.numbers = (
            n_columns, last, self.n_rows, strides.act, strides.saved_x, strides.weight, self.stacks.weight_stride,
        )  # fmt: skip
        adapters, makes_ds, makes_sums = spec.adapter_dtypes, needs.dx or needs.da, (needs.da, needs.db, needs.dbias)
        # A sum has one step where its rows are one segment's in one row group.
        serial = n_groups > 1 or self.stacks.adapters is not None
        serial_bias = n_groups > 1 or self.stacks.experts is not None or n_biases < self.stacks.n_segments
        # (shape, dtype) of dX, dS, dA, dB, dbias, then of the fp32 sums between steps; None: not made.
        made = (
            (needs.dx, (m, k), spec.dtype), (makes_ds, (m, r), spec.dtype), (needs.da, (n_adapters, r, k), adapters[0]),
            (needs.db, (n_adapters, n, r), adapters[1]), (needs.dbias, (n_biases, n), spec.dtype),
            (serial and needs.da, (n_adapters, k, r), torch.float32),
            (serial and needs.db, (n_adapters, n, r), torch.float32),
            (serial_bias and needs.dbias, (n_biases, n), torch.float32),
        )  # fmt: skip
        self.outputs = tuple((shape, dtype) if need else None for need, shape, dtype in made)
        # Where dS is made, one kernel serves with dX and without it.
        compiled_as: dict[int, Any] = {_DX: spec.dtype} if makes_ds else {}
        compiled_as |= {_PARTIALS + i: torch.float32 for i, need in enumerate(makes_sums) if need}
        compiled_as |= seed_types(segments_backward_kernel) if spec.dropout else {}
        self.launch = self.prepare_launch(
            segments_backward_kernel,
            self.n_rows * n_columns
            + n_groups * (tiles_a + tiles_b + tiles_bias)
            + ceil_div(n_adapters, OWNERS.value) * (tiles_a + tiles_b)
            + ceil_div(n_biases, OWNERS.value) * tiles_bias,
            ([], [], []),
            compiled_as,
        )

    def __call__(self, operands: GroupedBackward) -> Gradients:
        dy = operands.dy
        outputs = [made and dy.new_empty(made[0], dtype=made[1]) for made in self.outputs]
        self.launch(*self.arguments(operands, outputs, borrow_workspace(self.n_words, self.device)))
        if not self._learned:
            self.learn()
        dx, _, da, db, dbias, *_ = outputs
        return Gradients(dx, da, db, dbias[0] if dbias is not None and operands.bias_dims == 1 else dbias)

    def compile(self, operands: GroupedBackward) -> None:
        """Compiles for such a call; the operands may be on the "meta" device."""
        outputs = [made and torch.empty(0, dtype=made[1], device="meta") for made in self.outputs]
        self.launch.compile(*self.arguments(operands, outputs, torch.empty(0, dtype=torch.int32, device="meta")))

    def arguments(self, operands: GroupedBackward, outputs: list[Tensor | None], workspace: Tensor) -> tuple:
        """Those of segments_backward_kernel, but its constants."""
        o, dtype = operands, self.spec.dtype
        scaling = o.scaling if o.scalings is None else 1.0
        return (
            o.dy, o.weight, o.lora_b, o.x, o.lora_a, o.s, *outputs, workspace, *self.segment_arguments(o),
            self.n_words, self.wave, *self.numbers,
            *backward_scales(scaling, o.dropout_p, dtype), *seed_arguments(o.seed), threshold_argument(o.dropout_p),
        )  # fmt: skip


_DX, _PARTIALS = (segments_backward_kernel.arg_names.index(name) for name in ("dx_ptr", "partial_a_ptr"))
