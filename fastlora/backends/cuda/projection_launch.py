"""Projections that share an input by the CUDA kernels, host side: which calls they serve, and the two launches of all.

Each projection is to the kernels the layer that it would be alone. S is a tensor of its own for each: a backward by
single launches reads it as it is.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastlora.backends.cuda import extension
from fastlora.backends.cuda import launch as single
from fastlora.backends.cuda.launch import cast
from fastlora.backends.cuda.tiles import CudaTile, choose_tile
from fastlora.backends.workspace import borrow_workspace
from fastlora.problem import Gradients, Launcher, LaunchSpec
from fastlora.projections import NO_GRADIENTS, Projection, SharedBackward, SharedForward, SharedGradients, SharedOutputs

MAX_PROJECTIONS = 4  # kMaxProjections of csrc/host/params.h


def why_unsupported(spec: LaunchSpec) -> str | None:
    """Why these kernels cannot serve a call here, or None."""
    if spec.device.type != "cuda":
        return f"the tensors are on {spec.device}"
    return single.unusable(spec.device) or why_not_compiled(spec)


def why_not_compiled(spec: LaunchSpec) -> str | None:
    """Why these kernels do not compute such a call on any device, or None. The extension must be built."""
    members = spec.members
    if len(members) > MAX_PROJECTIONS:
        return f"{len(members)} projections are more than the {MAX_PROJECTIONS} of a launch"
    adapted = [each for each in members if each.sizes.r]
    if not adapted:
        return "no projection has an adapter"
    if len({each.dropout for each in adapted}) > 1:
        return "some of the projections drop elements, and others do not"
    for i, each in enumerate(members):
        reason = _why_refused(each)
        if reason is not None:
            return f"projection {i}: {reason}"
    return None


def _why_refused(member: LaunchSpec) -> str | None:
    if member.sizes.r == 0 and member.needs.dbias:
        return "no kernel makes the bias's gradient without an adapter"
    return single.why_not_compiled(member._replace(branch="shared_input"), branch="shared_input")


def prepare(spec: LaunchSpec, tile: CudaTile | None = None, ctas: int | None = None) -> Launcher:
    """What serves every call of this description. ``tile`` overrides choose_tile, ``ctas`` the number of CTAs:
    one for each multiprocessor."""
    m, n, k, _ = spec.sizes
    backward, needs = spec.direction == "backward", spec.needs
    members = [spec.members[i] for i in _order(spec)]
    ctas = ctas or single.multiprocessors(spec.device)
    r = max(each.sizes.r for each in members)
    out_columns, contracted = (k, n) if backward else (n, k)
    kernel = {"dropout": spec.dropout, "backward": backward}
    tile = tile or choose_tile(m, out_columns, contracted, r, ctas, **kernel, projections=len(members))
    plan = extension.loaded().Plan(
        **kernel, fp16=spec.dtype == torch.float16, m=m, n=out_columns, k=contracted, r=r,
        projections=[(each.sizes.n, each.sizes.r, *each.needs[1:]) for each in members],
        block_m=tile.block_m, block_n=tile.block_n, group_m=tile.group_m, splits=1,
        fused=tile.fused and (needs.dx or not backward), gradients_last=tile.gradients_last and needs.dx, ctas=ctas,
        makes_out=needs.dx or not backward,
    )  # fmt: skip
    return (_Backward if backward else _Forward)(spec, plan)


def _order(spec: LaunchSpec) -> list[int]:
    """The members as the kernels take them: those without an adapter last."""
    return sorted(range(len(spec.members)), key=lambda i: spec.members[i].sizes.r == 0)


class _Launch:
    """What the calls of one description share: the plan with all that does not change, and scratch memory.

    Args:
        spec: the calls' description.
        plan: of its members in the order of ``_order``.
        shared: rows' strides of the matrices that all projections have, by their names in a plan.
        own: likewise of those of each projection; 0: not a matrix.
        constants: other operands that do not change.
    """

    def __init__(
        self, spec: LaunchSpec, plan: Any, shared: dict[str, int], own: Sequence[dict[str, int]], **constants: Any
    ):
        self.spec, self.plan, self.device = spec, plan, spec.device
        self.casts = any(each.branch == "single" and single.cast_factors(each) for each in spec.members)
        self.words, self.partials = plan.workspace_words, plan.gradient_partial_floats
        strides = shared | {_of(i, name): stride for i, each in enumerate(own) for name, stride in each.items()}
        adapted = [i for i, each in enumerate(own) if "lora_a" in each]
        numbers = [_of(i, name) for i in adapted for name in single.NUMBERS]
        seeds = [_of(i, "seed") for i in adapted if spec.dropout]
        # By their names in a plan, in the order in which `bound` is given them.
        self.tensors = (*strides, "workspace", *(("gradient_partials",) if self.partials else ()))
        matrices = {name: (0, stride) for name, stride in strides.items() if stride}
        self.bound = plan.bind((*self.tensors, *numbers, *seeds), **matrices, **constants)

    def given(self, projections: Sequence[Projection], order: list[int]) -> tuple[list, tuple, list[int]]:
        """Of each projection, in this order, the tensors of ``_factors``; of those with an adapter the arguments of
        ``launch``."""
        tensors: list = []
        branches: tuple = ()
        seeds: list[int] = []
        for i in order:
            weight, lora_a, lora_b, _, scaling, dropout_p, seed = projections[i]
            if lora_a is None:
                tensors += ((weight,),)
                continue
            branches += ((scaling, dropout_p),)
            if self.casts:
                lora_a, lora_b = cast(lora_a, self.spec.dtype), cast(lora_b, self.spec.dtype)
            if seed is None:
                tensors += ((weight, lora_a, lora_b),)
            else:
                address, value = single.by_address_or_value(seed)
                tensors += ((weight, lora_a, lora_b, address),)
                seeds += (value,)
        return tensors, branches, seeds

    def launch(self, tensors: list[Tensor | None], branches: tuple[tuple[float, float], ...], seeds: list[int]) -> None:
        """A launch with these operands, of which None is one that it does not use.

        Args:
            branches: scaling and probability of each projection with an adapter.
            seeds: of each of these that drops elements; 0 where it is among the tensors.
        """
        tensors += (borrow_workspace(self.words, self.device),)
        if self.partials:
            tensors += (torch.empty(self.partials, dtype=torch.float32, device=self.device),)
        numbers = _numbers(branches, self.spec.dtype, self.spec.direction == "backward")
        single.launch_bound(self, tensors, (*numbers, *seeds))


def _of(i: int, name: str) -> str:
    """The name in a plan of an operand of projection i."""
    return f"projections[{i}].{name}"


@lru_cache(maxsize=256)
def _numbers(branches: tuple[tuple[float, float], ...], dtype: torch.dtype, backward: bool) -> tuple[float, ...]:
    """The values of NUMBERS, of each branch."""
    return tuple(number for each in branches for number in single.branch_numbers(*each, dtype, backward))


def _factors(member: LaunchSpec) -> dict[str, int]:
    """The rows' strides of the weight and the factors, which are contiguous where they have been cast; then, whether
    a seed may have an address."""
    _, _, k, r = member.sizes
    given, casts = member.row_strides, single.cast_factors(member)
    if not r:
        return {"weight": given.weight}
    return {
        "weight": given.weight,
        "lora_a": k if "lora_a" in casts else given.lora_a,
        "lora_b": r if "lora_b" in casts else given.lora_b,
        **({"seed_address": 0} if member.dropout else {}),
    }


class _Forward(_Launch):
    """Y_i [M, N_i] and S_i [M, R_i] of all projections in one launch."""

    def __init__(self, spec: LaunchSpec, plan: Any):
        m, _, k, _ = spec.sizes
        self.order, self.count = _order(spec), len(spec.members)
        members = [spec.members[i] for i in self.order]
        self.sizes = [(each.sizes.n, each.sizes.r) for each in members]
        own = [
            {**_factors(each), "bias": 0, "out": each.sizes.n, **({"s": 0} if each.sizes.r else {})} for each in members
        ]
        act = spec.members[0].row_strides.act
        super().__init__(spec, plan, {"act": act if m > 1 else k}, own)

    def __call__(self, operands: SharedForward) -> SharedOutputs:
        x, given = operands
        m = self.spec.sizes.m
        factors, branches, seeds = self.given(given, self.order)
        tensors: list[Tensor | None] = [x]
        ys: list[Any] = [None] * self.count
        ss: list[Tensor | None] = [None] * self.count
        for i, of_each, (n, r) in zip(self.order, factors, self.sizes, strict=True):
            ys[i] = y = x.new_empty(m, n)
            tensors += (*of_each, given[i][3], y)
            if r:
                ss[i] = s = x.new_empty(m, r)
                tensors += (s,)
        self.launch(tensors, branches, seeds)
        return ys, ss


class _Backward(_Launch):
    """The gradients that the description needs of all projections in one launch: one dX."""

    def __init__(self, spec: LaunchSpec, plan: Any):
        m, _, k, _ = spec.sizes
        dtypes = {spec.dtype, *(dtype for each in spec.members for dtype in each.adapter_dtypes)}
        # All gradients of factors are stored in one dtype; if the adapters differ in theirs, some are cast.
        self.grad_dtype = spec.dtype if len(dtypes) == 1 else torch.float32
        self.order = _order(spec)
        members = [spec.members[i] for i in self.order]
        self.made = [_made(each, self.grad_dtype) for each in members]
        self.reads_s = [each.needs.db for each in members]
        own = []
        for each, made in zip(members, self.made, strict=True):
            act = {"act": each.row_strides.act if m > 1 else each.sizes.n}
            saved = {"saved_s": each.sizes.r} if each.needs.db else {}
            written = {name: 0 for name, how in zip(_WRITTEN, made, strict=True) if how}
            own.append({**act, **_factors(each), **saved, **written})
        readers = [each.row_strides.saved_x for each in members if each.needs.da]
        shared = {"layer_input": readers[0] if m > 1 else k} if readers else {}
        shared |= {"out": k} if spec.needs.dx else {}
        super().__init__(spec, plan, shared, own, fp32_grads=self.grad_dtype != spec.dtype)

    def __call__(self, operands: SharedBackward) -> SharedGradients:
        dys, x, given, ss, _ = operands
        m, _, k, _ = self.spec.sizes
        needs = self.spec.needs
        present = [i for i, dy in enumerate(dys) if dy is not None]
        order = [present[i] for i in self.order]
        factors, branches, seeds = self.given(given, order)
        tensors: list[Tensor | None] = [x] if needs.da else []
        dx = None
        if needs.dx:
            dx = torch.empty((m, k), dtype=self.spec.dtype, device=self.device)
            tensors += (dx,)
        others = [NO_GRADIENTS] * len(dys)
        for i, of_each, reads_s, hows in zip(order, factors, self.reads_s, self.made, strict=True):
            tensors += (dys[i], *of_each)
            if reads_s:
                tensors += (ss[i],)
            made = [how and torch.empty(how[0], dtype=how[1], device=self.device) for how in hows]
            tensors += [each for each in made if each is not None]
            others[i] = Gradients(None, *made[1:])
        self.launch(tensors, branches, seeds)
        if self.grad_dtype != self.spec.dtype:
            others = [
                each if lora_a is None or lora_b is None else _cast(each, lora_a.dtype, lora_b.dtype)
                for each, (_, lora_a, lora_b, *_) in zip(others, given, strict=True)
            ]
        return dx, others


def _cast(gradients: Gradients, of_a: torch.dtype, of_b: torch.dtype) -> Gradients:
    return gradients._replace(da=cast(gradients.da, of_a), db=cast(gradients.db, of_b))


_WRITTEN = ("s", "grad_a", "grad_b", "grad_bias")  # names in a plan


def _made(member: LaunchSpec, grad_dtype: torch.dtype) -> tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]:
    """Shape and dtype of each of _WRITTEN that a backward makes of a projection."""
    m, n, k, r = member.sizes
    dx, da, db, dbias = member.needs
    made = (
        (r > 0 and (dx or da), (m, r), member.dtype), (da, (r, k), grad_dtype), (db, (n, r), grad_dtype),
        (dbias, (n,), member.dtype),
    )  # fmt: skip
    return tuple((shape, dtype) if needed else None for needed, shape, dtype in made)
