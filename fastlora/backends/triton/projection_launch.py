"""Projections that share an input by the Triton kernels, host side: which calls they serve, and the two launches.

What the kernels take of each projection comes in tuples, whose numbers Triton compiles for. Those that change from call
to call (seeds) are compiled as others of their type, see ``_ODD``. Matrices are loaded by pointers, on Hopper too: a
program cannot select one of several descriptors without loading by each in turn.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora import philox
from fastlora.backends.configs import FUSED_RANK, TileConfig, choose_config, gradients_last, padded_rank
from fastlora.backends.target import Target, target_of
from fastlora.backends.triton import launch as single
from fastlora.backends.triton.launch import (
    PreparedLaunch,
    ceil_div,
    forward_rank,
    forward_scales,
    has_aligned_rows,
    overwrites_act,
    seed_arguments,
)
from fastlora.backends.triton.projection_kernels import projections_backward_kernel, projections_forward_kernel
from fastlora.backends.triton.schedule import N_COUNTERS
from fastlora.backends.workspace import borrow_workspace
from fastlora.problem import Gradients, Launcher, LaunchSpec, split_scaling
from fastlora.projections import NO_GRADIENTS, SharedBackward, SharedForward, SharedGradients, SharedOutputs

MOST = 8  # projections of one launch: each takes a hundred bytes of the kernel's parameters, and a selection of each


def why_unsupported(spec: LaunchSpec) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    members = spec.members
    if spec.branch != "shared_input":
        return "no kernel here is for a call of one projection"
    if len(members) > MOST:
        return f"{len(members)} projections share an input, and a launch has {MOST} at most"
    adapted = [each for each in members if each.branch == "single"]
    if not adapted:
        return "no projection has an adapter"
    if len({each.adapter_dtypes for each in adapted}) > 1:
        return "adapters of projections that share an input differ in their dtype"
    for i, each in enumerate(members):
        if each.base_format != "dense":
            return f"no kernel for a {each.base_format} base weight (projection {i}) of projections that share an input"
        if each.sizes.n == 0 or (each.sizes.r == 0 and each.branch == "single"):
            return f"projection {i} has {each.sizes.n} columns and an adapter of rank {each.sizes.r}"
        reason = single.why_unsupported(each._replace(branch="single"))
        if reason is not None:
            return f"projection {i}: {reason}"
    return None


def prepare(spec: LaunchSpec, config: TileConfig | None = None) -> Launcher:
    """What serves every call of this description, with SharedForward or SharedBackward; ``config`` overrides the
    tables."""
    target = target_of(spec.device)
    config = without_spill(config or _choose(spec, target), spec, target)
    return _Forward(spec, config, target) if spec.direction == "forward" else _Backward(spec, config, target)


def largest_rank(spec: LaunchSpec) -> int:
    return max(each.sizes.r for each in spec.members)


def has_wide_rows(spec: LaunchSpec) -> bool:
    """Whether wide loads serve every projection."""
    return all(map(has_aligned_rows, spec.members))


def _choose(spec: LaunchSpec, target: Target) -> TileConfig:
    """The tables' choice for one product with all columns (of dX, with all that is contracted)."""
    m, n, k, _ = spec.sizes
    aligned = has_wide_rows(spec)
    return choose_config(
        spec.direction, m, n, k, largest_rank(spec),
        arch=target.arch, n_sms=target.n_sms, element_size=spec.dtype.itemsize, aligned=aligned, dropout=spec.dropout,
    )  # fmt: skip


# Of the tables' tiles, those that spill with S made in one of the two ways: (architecture, direction, block_m, block_n)
# -> whether the shrink is to be fused.
_WITHOUT_SPILL = {
    (100, "forward", 16, 64): False,
    (100, "backward", 128, 128): False,
    (120, "backward", 32, 64): False,
    (120, "forward", 16, 32): True,
}


def without_spill(config: TileConfig, spec: LaunchSpec, target: Target) -> TileConfig:
    """A tile of the tables, with S made as it does not spill."""
    arch = 100 if target.arch == 103 else target.arch
    key = (arch, spec.direction, config.block_m, config.block_n)
    return replace(config, fused=_WITHOUT_SPILL.get(key, config.fused))


# Numbers of another value than the first call's are not multiples of 16, as that may be.
_ODD = {torch.int64: (1 << 62) + 1, torch.int32: 3}


class _Shared(PreparedLaunch):
    """What the calls of one description share."""

    def __init__(self, spec: LaunchSpec, config: TileConfig, target: Target, *, fused: bool):
        members = spec.members
        forward = spec.direction == "forward"
        rank = largest_rank(spec)
        as_one = spec._replace(sizes=spec.sizes._replace(r=rank))
        block_r = forward_rank(as_one, config, target) if forward else padded_rank(rank)
        super().__init__(as_one, config, target, block_r=block_r, fused=fused and block_r <= FUSED_RANK)
        contracted = [spec.sizes.k] if forward else [each.sizes.n for each in members]
        self.variant = replace(
            self.variant,
            tma=False,
            tma_down=False,
            even_k=all(size % config.block_k == 0 for size in contracted),
            projections=len(members),
        )
        alone = tuple(each._replace(sizes=each.sizes._replace(m=0)) for each in members)
        self.kernel_key = (alone, self.variant)
        self.members = members
        self.Ns, self.ranks = tuple(each.sizes.n for each in members), tuple(each.sizes.r for each in members)
        strides = [each.row_strides for each in members]
        self.weight_strides = tuple(each.weight for each in strides)
        self.lora_a_strides = tuple(each.lora_a for each in strides)
        self.lora_b_strides = tuple(each.lora_b for each in strides)
        self.act_strides = tuple(each.act for each in strides)
        adapters = next(each.adapter_dtypes for each in members if each.branch == "single")
        self.adapter_dtypes = adapters
        self.matrices = (self.weight_strides, self.lora_a_strides, self.lora_b_strides)

    def of_each(self, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """What a tuple of pointers is compiled as, of which any may be null."""
        return (dtype,) * len(self.members)

    def compiled_dropout(self) -> tuple:
        """What the argument ``dropout`` is compiled as."""
        count = len(self.members)
        return self.of_each(torch.int64), (_ODD[torch.int64],) * count, (_ODD[torch.int32],) * count, (None,) * count

    def dropout_arguments(
        self, seeds: Sequence[Tensor | None], thresholds: tuple[int, ...], inverse_keeps: tuple[float, ...]
    ) -> tuple | None:
        """Addresses of seeds, seeds, thresholds and factors of what is kept."""
        if not self.spec.dropout:
            return None
        ptrs, values = zip(*[_NO_SEED if seed is None else seed_arguments(seed) for seed in seeds], strict=True)
        return ptrs, values, thresholds, inverse_keeps


_NO_SEED = (None, 0)


class _Numbers(NamedTuple):
    """Of each projection: see launch.forward_scales and backward_scales; where float16 splits no scaling, in_s is None;
    and philox's threshold and inverse_keep."""

    of_sum: tuple[float, ...]
    in_s: tuple[float, ...] | None
    on_branch: tuple[float, ...]
    scaling: tuple[float, ...]
    thresholds: tuple[int, ...]
    inverse_keeps: tuple[float, ...]


@lru_cache(maxsize=256)
def _numbers(scaling: tuple[float, ...], dropouts: tuple[float, ...], dtype: torch.dtype) -> _Numbers:
    """Of scaling and dropout_p of each projection."""
    factors = zip(scaling, dropouts, strict=True)
    of_sum, in_s, _ = zip(*(forward_scales(*each, dtype) for each in factors), strict=True)
    return _Numbers(
        of_sum,
        in_s if dtype == torch.float16 else None,
        tuple(split_scaling(each, dtype).on_branch for each in scaling),
        scaling,
        tuple(map(philox.threshold, dropouts)),
        tuple(map(philox.inverse_keep, dropouts)),
    )


class _Forward(_Shared):
    """Y [M, N] and S [M, R] of each projection in one launch."""

    def __init__(self, spec: LaunchSpec, config: TileConfig, target: Target):
        super().__init__(spec, config, target, fused=config.fused and not overwrites_act(spec, config, target))
        count, variant = len(self.members), self.variant
        columns = [ceil_div(n, config.block_n) + variant.shrink_columns - 1 for n in self.Ns]
        self.n_words = N_COUNTERS.value + count * self.n_rows
        self.columns, self.n_columns = tuple(columns), count + sum(columns)
        adapters = self.adapter_dtypes
        compiled_as: dict[int, Any] = {
            _IN_FORWARD("lora_as"): self.of_each(adapters[0]),
            _IN_FORWARD("lora_bs"): self.of_each(adapters[1]),
            _IN_FORWARD("s_ptrs"): self.of_each(spec.dtype),
        }
        self.bias_sizes = tuple(each.sizes.n * each.bias for each in self.members)
        if any(self.bias_sizes):
            compiled_as[_IN_FORWARD("bias_ptrs")] = self.of_each(spec.dtype)
        if spec.dropout:
            compiled_as[_IN_FORWARD("dropout")] = self.compiled_dropout()
        self.launch = self.prepare_launch(
            projections_forward_kernel, self.n_rows * self.n_columns, ([], [], []), compiled_as
        )

    def __call__(self, operands: SharedForward) -> SharedOutputs:
        (x, _), m = operands, self.spec.sizes.m
        ys = [x.new_empty(m, n) for n in self.Ns]
        ss = [x.new_empty(m, r) if r else None for r in self.ranks]
        self.launch(*self.arguments(operands, ys, ss, borrow_workspace(self.n_words, self.device)))
        if not self._learned:
            self.learn()
        return ys, ss

    def compile(self, operands: SharedForward) -> None:
        """Compiles for such a call; the operands may be on the "meta" device."""
        like = torch.empty(0, dtype=self.spec.dtype, device="meta")
        outputs = [like] * len(self.members)
        self.launch.compile(*self.arguments(operands, outputs, outputs, like.to(torch.int32)))

    def arguments(
        self, operands: SharedForward, ys: Sequence[Tensor], ss: Sequence[Tensor | None], workspace: Tensor
    ) -> tuple:
        """Those of projections_forward_kernel, but its constants."""
        x, projections = operands
        weights, lora_as, lora_bs, biases, scalings, dropouts, seeds = zip(*projections, strict=True)
        m, _, k, _ = self.spec.sizes
        numbers = _numbers(scalings, dropouts, self.spec.dtype)
        return (
            x, weights, lora_as, lora_bs, biases if any(self.bias_sizes) else None, tuple(ys), tuple(ss), workspace,
            m, k, self.Ns, self.ranks, self.bias_sizes, self.columns, self.n_words, self.wave, self.n_columns,
            self.act_strides[0], *self.matrices, numbers.of_sum, numbers.in_s,
            None if numbers.in_s is None else numbers.on_branch,
            self.dropout_arguments(seeds, numbers.thresholds, (1.0,) * len(seeds)),
        )  # fmt: skip


class _Backward(_Shared):
    """The gradients that the description needs, in one launch. Its members are the projections that have a dY."""

    def __init__(self, spec: LaunchSpec, config: TileConfig, target: Target):
        members, needs = spec.members, spec.needs
        count, (m, _, k, _) = len(members), spec.sizes
        # Column 0 of dX makes every dS, so every projection has to have one.
        fused = config.fused and needs.dx and all(each.sizes.r for each in members)
        super().__init__(spec, config, target, fused=fused)
        fused, n_columns = self.variant.fused, 0
        if needs.dx:
            n_columns = ceil_div(k, config.block_n) + (0 if fused else count)
        elif needs.da:
            n_columns = count
        tiles_of = [ceil_div(n, config.gradient_n) for n in self.Ns]
        self.tiles = tuple(
            tuple(tiles * getattr(each.needs, name) for tiles, each in zip(of, members, strict=True))
            for name, of in (("da", [ceil_div(k, config.gradient_n)] * count), ("db", tiles_of), ("dbias", tiles_of))
        )
        n_gradients, n_chunks = sum(map(sum, self.tiles)), ceil_div(self.n_rows, config.group_m)
        self.n_words = N_COUNTERS.value + count * self.n_rows + n_gradients
        last = int(needs.dx and gradients_last(m, k, spec.sizes.n, config.block_m, config.block_n))
        saved_x = max(each.row_strides.saved_x for each in members)
        self.numbers = n_columns, last, self.act_strides, saved_x, *self.matrices
        adapters, serial = self.adapter_dtypes, n_chunks > 1
        ranks, makes_ds = sum(self.ranks), needs.dx or needs.da
        products = sum(n * r for n, r in zip(self.Ns, self.ranks, strict=True))
        # (elements, dtype) of dS, then of the fp32 sums between row chunks, each of all projections; None: not made.
        self.scratch = (
            (m * ranks, spec.dtype) if makes_ds else None,
            (k * ranks, torch.float32) if needs.da and serial else None,
            (products, torch.float32) if needs.db and serial else None,
            (sum(self.Ns), torch.float32) if needs.dbias and serial else None,
        )
        # (shape, dtype) of dA, dB and dbias of each.
        self.outputs = tuple(
            [(shape(each.sizes), dtype) if getattr(each.needs, name) else None for each in members]
            for name, shape, dtype in (
                ("da", lambda sizes: (sizes.r, k), adapters[0]),
                ("db", lambda sizes: (sizes.n, sizes.r), adapters[1]),
                ("dbias", lambda sizes: (sizes.n,), spec.dtype),
            )
        )
        compiled_as: dict[int, Any] = {
            _IN_BACKWARD("lora_as"): self.of_each(adapters[0]),
            _IN_BACKWARD("lora_bs"): self.of_each(adapters[1]),
            _IN_BACKWARD("s_ptrs"): self.of_each(spec.dtype),
        }
        if makes_ds:  # one kernel serves with dX and without it
            compiled_as[_IN_BACKWARD("dx_ptr")] = spec.dtype
        for name, need, dtype in (
            ("a", needs.da, adapters[0]), ("b", needs.db, adapters[1]), ("bias", needs.dbias, spec.dtype)
        ):  # fmt: skip
            if need:
                compiled_as[_IN_BACKWARD(f"partial_{name}_ptr")] = torch.float32
                compiled_as[_IN_BACKWARD(f"d{name}_ptrs")] = self.of_each(dtype)
        if spec.dropout:
            compiled_as[_IN_BACKWARD("dropout")] = self.compiled_dropout()
        self.launch = self.prepare_launch(
            projections_backward_kernel, self.n_rows * n_columns + n_chunks * n_gradients, ([], [], []), compiled_as
        )

    def __call__(self, operands: SharedBackward) -> SharedGradients:
        all_dys = operands[0]
        given = [i for i, dy in enumerate(all_dys) if dy is not None]
        like = all_dys[given[0]]
        assert like is not None
        needs, (m, _, k, _) = self.spec.needs, self.spec.sizes
        dx = like.new_empty(m, k) if needs.dx else None
        made = [[each and like.new_empty(each[0], dtype=each[1]) for each in of_kind] for of_kind in self.outputs]
        scratch = [each and like.new_empty(each[0], dtype=each[1]) for each in self.scratch]
        workspace = borrow_workspace(self.n_words, self.device)
        self.launch(*self.arguments(operands, dx, made, scratch, workspace))
        if not self._learned:
            self.learn()
        others = [NO_GRADIENTS] * len(all_dys)
        for i, of_one in zip(given, zip(*made, strict=True), strict=True):
            others[i] = Gradients(None, *of_one)
        return dx, others

    def compile(self, operands: SharedBackward) -> None:
        """Compiles for such a call; the operands may be on the "meta" device."""

        def meta(made: tuple | None) -> Tensor | None:
            return None if made is None else torch.empty(0, dtype=made[1], device="meta")

        dx = torch.empty(0, dtype=self.spec.dtype, device="meta") if self.spec.needs.dx else None
        made, scratch = [[*map(meta, of_kind)] for of_kind in self.outputs], [*map(meta, self.scratch)]
        self.launch.compile(
            *self.arguments(operands, dx, made, scratch, torch.empty(0, dtype=torch.int32, device="meta"))
        )

    def arguments(
        self, operands: SharedBackward, dx: Tensor | None, made: list[list], scratch: list, workspace: Tensor
    ) -> tuple:
        """Those of projections_backward_kernel, but its constants."""
        given, x, of_each, saved, _ = operands
        kept = [each for each in zip(given, of_each, saved, strict=True) if each[0] is not None]
        dys, projections, ss = zip(*kept, strict=True)
        weights, lora_as, lora_bs, _, scalings, dropouts, seeds = zip(*projections, strict=True)
        needs, (m, _, k, _) = self.spec.needs, self.spec.sizes
        das, dbs, dbiases = (tuple(of_kind) if need else None for of_kind, need in zip(made, needs[1:], strict=True))
        ds, *partials = scratch
        numbers = _numbers(scalings, dropouts, self.spec.dtype)
        return (
            dys, weights, lora_bs, x if needs.da else None, lora_as, ss if needs.db else None, dx, ds,
            das, dbs, dbiases, *partials, workspace, m, k, self.Ns, self.ranks, *self.tiles, self.n_words, self.wave,
            *self.numbers, numbers.scaling, numbers.on_branch,
            self.dropout_arguments(seeds, numbers.thresholds, numbers.inverse_keeps),
        )  # fmt: skip


_IN_FORWARD, _IN_BACKWARD = (
    kernel.arg_names.index for kernel in (projections_forward_kernel, projections_backward_kernel)
)
