"""Projections that share an input by the CUDA kernels, host side: which calls they serve, and the two launches of all.

Each projection is to the kernels the layer that it would be alone. S is a tensor of its own for each: a backward by
single launches reads it as it is.
"""

from collections.abc import Sequence
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
        self.order = _order(spec)
        self.members = [spec.members[i] for i in self.order]
        self.words, self.partials = plan.workspace_words, plan.gradient_partial_floats
        strides, numbers = dict(shared), []
        for i, (member, each) in enumerate(zip(self.members, own, strict=True)):
            strides |= {_of(i, name): stride for name, stride in each.items()}
            if member.sizes.r:
                numbers += [_of(i, name) for name in (*single.NUMBERS, *(("seed",) if member.dropout else ()))]
        # By their names in a plan, in the order in which `bound` is given them.
        self.tensors = (*strides, "workspace", *(("gradient_partials",) if self.partials else ()))
        matrices = {name: (0, stride) for name, stride in strides.items() if stride}
        self.bound = plan.bind((*self.tensors, *numbers), **matrices, **constants)

    def launch(self, shared: Sequence[Tensor | None], own: Sequence[Tensor | None], projections: Sequence[Projection]):
        """A launch with these operands, of which None is one that it does not use. ``projections``: those of
        ``members``."""
        backward, dtype = self.spec.direction == "backward", self.spec.dtype
        tensors = [*shared, *own, borrow_workspace(self.words, self.device)]
        if self.partials:
            tensors.append(torch.empty(self.partials, dtype=torch.float32, device=self.device))
        numbers: list[float] = []
        for member, each in zip(self.members, projections, strict=True):
            if member.sizes.r:
                numbers += single.branch_numbers(each.scaling, each.dropout_p, dtype, backward)
            if member.dropout and each.seed is not None:
                numbers.append(single.by_address_or_value(each.seed)[1])
        single.launch_bound(self, tensors, numbers)


def _of(i: int, name: str) -> str:
    """The name in a plan of an operand of projection i."""
    return f"projections[{i}].{name}"


def _factors(member: LaunchSpec) -> dict[str, int]:
    """The rows' strides of the weight and the factors, which are contiguous where they have been cast."""
    _, _, k, r = member.sizes
    given, casts = member.row_strides, single.cast_factors(member)
    if not r:
        return {"weight": given.weight}
    return {
        "weight": given.weight,
        "lora_a": k if "lora_a" in casts else given.lora_a,
        "lora_b": r if "lora_b" in casts else given.lora_b,
    }


def _seeds(member: LaunchSpec) -> dict[str, int]:
    return {"seed_address": 0} if member.dropout and member.sizes.r else {}


def _factors_of(projection: Projection, dtype: torch.dtype) -> list[Any]:
    if projection.lora_a is None:
        return [projection.weight]
    return [projection.weight, cast(projection.lora_a, dtype), cast(projection.lora_b, dtype)]


def _seed_of(projection: Projection) -> list[Tensor | None]:
    """By its address, which is None where it is in reach of the CPU."""
    if projection.lora_a is None or projection.seed is None:
        return []
    return [single.by_address_or_value(projection.seed)[0]]


class _Forward(_Launch):
    """Y_i [M, N_i] and S_i [M, R_i] of all projections in one launch."""

    def __init__(self, spec: LaunchSpec, plan: Any):
        m, _, k, _ = spec.sizes
        own = []
        for i in _order(spec):
            member = spec.members[i]
            made = {"bias": 0, "out": member.sizes.n, **({"s": 0} if member.sizes.r else {})}
            own.append({**_factors(member), **made, **_seeds(member)})
        act = spec.members[0].row_strides.act
        super().__init__(spec, plan, {"act": act if m > 1 else k}, own)

    def __call__(self, operands: SharedForward) -> SharedOutputs:
        x, given = operands
        m, dtype = self.spec.sizes.m, self.spec.dtype
        projections = [given[i] for i in self.order]
        ys: list[Any] = [None] * len(given)
        ss: list[Tensor | None] = [None] * len(given)
        own: list[Tensor | None] = []
        for i, member, each in zip(self.order, self.members, projections, strict=True):
            ys[i] = x.new_empty(m, member.sizes.n)
            own += (*_factors_of(each, dtype), each.bias, ys[i])
            if member.sizes.r:
                ss[i] = s = x.new_empty(m, member.sizes.r)
                own.append(s)
            own += _seed_of(each)
        self.launch((x,), own, projections)
        return SharedOutputs(ys, ss)


class _Backward(_Launch):
    """The gradients that the description needs of all projections in one launch: one dX."""

    def __init__(self, spec: LaunchSpec, plan: Any):
        m, _, k, _ = spec.sizes
        dtypes = {spec.dtype, *(dtype for each in spec.members for dtype in each.adapter_dtypes)}
        # All gradients of factors are stored in one dtype; if the adapters differ in theirs, some are cast.
        self.grad_dtype = spec.dtype if len(dtypes) == 1 else torch.float32
        own = []
        for i in _order(spec):
            member = spec.members[i]
            act = {"act": member.row_strides.act if m > 1 else member.sizes.n}
            saved = {"saved_s": member.sizes.r} if member.needs.db else {}
            own.append({**act, **_factors(member), **saved, **dict.fromkeys(_made(member), 0), **_seeds(member)})
        readers = [each.row_strides.saved_x for each in spec.members if each.needs.da]
        shared = {"layer_input": readers[0] if m > 1 else k} if readers else {}
        shared |= {"out": k} if spec.needs.dx else {}
        super().__init__(spec, plan, shared, own, fp32_grads=self.grad_dtype != spec.dtype)

    def __call__(self, operands: SharedBackward) -> SharedGradients:
        dys, x, projections, ss, _ = operands
        needs, dtype = self.spec.needs, self.spec.dtype
        m, _, k, _ = self.spec.sizes
        present = [i for i, dy in enumerate(dys) if dy is not None]
        dx = torch.empty((m, k), dtype=dtype, device=self.device) if needs.dx else None
        shared = [t for t, needed in ((x, needs.da), (dx, needs.dx)) if needed]
        own: list[Tensor | None] = []
        launched, found = [], []
        for place, member in zip(self.order, self.members, strict=True):
            i = present[place]
            each, made = projections[i], {}
            for name, shape in _made(member).items():
                of_factor = name in ("grad_a", "grad_b")
                made[name] = torch.empty(shape, dtype=self.grad_dtype if of_factor else dtype, device=self.device)
            own += (dys[i], *_factors_of(each, dtype), *((ss[i],) if member.needs.db else ()))
            own += (*made.values(), *_seed_of(each))
            launched.append(each)
            found.append((i, made))
        self.launch(shared, own, launched)
        others = [NO_GRADIENTS] * len(dys)
        for i, made in found:
            _, a, b, *_ = projections[i]
            da, db = (cast(made[name], t.dtype) if name in made else None for name, t in (("grad_a", a), ("grad_b", b)))
            others[i] = Gradients(None, da, db, made.get("grad_bias"))
        return SharedGradients(dx, others)


def _made(member: LaunchSpec) -> dict[str, tuple[int, ...]]:
    """What a backward writes of a projection: names in a plan, and shapes."""
    m, n, k, r = member.sizes
    dx, da, db, dbias = member.needs
    shapes = {"s": (m, r), "grad_a": (r, k), "grad_b": (n, r), "grad_bias": (n,)}
    made = {"s": r and (dx or da), "grad_a": da, "grad_b": db, "grad_bias": dbias}
    return {name: shapes[name] for name, needed in made.items() if needed}
