"""One call of several projections that share an input: operands, and the LaunchSpec that describes them together.

Projection i is Y_i = x·W_iᵀ + s_i·(drop_i(x)·A_iᵀ)·B_iᵀ + bias_i, and dX is one sum over all of them. Each is described
as the call that it would be alone, so that what a kernel reads of a single layer it reads of each of several.
"""

from typing import NamedTuple, TypeAlias

from torch import Tensor

from fastlora.operands import (
    as_rows,
    as_stored,
    as_vector,
    backward_key,
    describe_backward,
    describe_forward,
    forward_key,
    layout_of,
    uses_tf32,
)
from fastlora.problem import ForwardOperands, Gradients, LaunchSpec, Needs, Sizes

NO_GRADIENTS = Gradients(None, None, None, None)
NO_NEEDS = Needs(False, False, False, False)


class Projection(NamedTuple):
    """What one of several projections of x [M, K] reads besides x."""

    weight: Tensor  # [N, K]
    lora_a: Tensor | None  # [R, K]; None: no adapter, the base product alone
    lora_b: Tensor | None  # [N, R]
    bias: Tensor | None  # [N]
    scaling: float
    dropout_p: float
    seed: Tensor | None = None


class SharedForward(NamedTuple):
    """What a forward reads. On the way to a launch its fields, and those of each Projection, are in plain tuples: to
    name them takes longer than a call can afford."""

    x: Tensor  # [M, K]
    projections: tuple[Projection, ...]


class SharedBackward(NamedTuple):
    """What a backward reads; x for dA alone, S for dB alone."""

    dys: tuple[Tensor | None, ...]  # [M, N] each; None: nothing depends on this output
    x: Tensor | None  # [M, K]
    projections: tuple[Projection, ...]
    ss: tuple[Tensor | None, ...]  # [M, R] each
    needs: tuple[Needs, ...]  # of each projection; none where its dY is None


# What a forward returns: Y [M, N] of each, tensors of their own (autograd forbids to modify one of several views in
# place); S [M, R] of each, None without an adapter.
SharedOutputs: TypeAlias = tuple[list[Tensor], list[Tensor | None]]

# What a backward returns: dX [M, K] over all projections; the gradients of each, without dX.
SharedGradients: TypeAlias = tuple[Tensor | None, list[Gradients]]


def forward_keys(operands: SharedForward) -> tuple:
    """What ``describe_shared_forward`` reads of operands: calls of one key have one description."""
    x, projections = operands
    keys: tuple = ()
    for p in projections:
        keys += (_key(x, p, NO_NEEDS) if p[1] is None else forward_key((x, *p)),)  # type: ignore[arg-type]
    return keys


def backward_keys(operands: SharedBackward) -> tuple:
    """Likewise of ``describe_shared_backward``."""
    dys, x, projections, ss, of_each = operands
    keys: tuple = ()
    for dy, p, s, needs in zip(dys, projections, ss, of_each, strict=True):
        if dy is None:
            keys += (None,)
        elif p[1] is None:
            keys += (_key(dy, p, needs),)
        else:
            keys += (backward_key(_alone(dy, x, p, s), needs),)  # type: ignore[arg-type]
    return keys


def describe_shared_forward(operands: SharedForward) -> tuple[SharedForward, LaunchSpec]:
    """The operands of a forward as kernels take them, and the call's description."""
    given, of_each = operands
    x, projections, members = as_rows(given), [], []
    for p in map(Projection._make, of_each):
        if p.lora_a is None:
            p, spec = _describe_base("forward", x, p, NO_NEEDS)
        else:
            described, spec = describe_forward(ForwardOperands(x, *p))  # type: ignore[arg-type]  # B is there, too
            p = Projection(*described[1:])
        projections.append(p)
        members.append(spec)
    return SharedForward(x, tuple(projections)), _together(members)


def describe_shared_backward(operands: SharedBackward) -> tuple[SharedBackward, LaunchSpec]:
    """The operands of a backward as kernels take them, and the call's description, whose members are the projections
    that have a dY."""
    of_each = operands[0], map(Projection._make, operands[2]), *operands[3:]
    x = None if operands[1] is None else as_rows(operands[1])
    dys, projections, ss, members = [], [], [], []
    for dy, p, s, needs in zip(*of_each, strict=True):
        if dy is not None:
            if p.lora_a is None:
                dy = as_rows(dy)
                p, spec = _describe_base("backward", dy, p, needs)
            else:
                described, spec = describe_backward(_alone(dy, x, p, s), needs)  # type: ignore[arg-type]
                dy, s = described.dy, described.s
                p = Projection(*described[2:5], p.bias, *described[6:])
            members.append(spec)
        dys.append(dy)
        projections.append(p)
        ss.append(s)
    return SharedBackward(tuple(dys), x, tuple(projections), tuple(ss), operands[4]), _together(members)


def _alone(dy: Tensor, x: Tensor | None, p: Projection, s: Tensor | None) -> tuple:
    """The fields of BackwardOperands of one projection as a call of its own."""
    weight, lora_a, lora_b, _, scaling, dropout_p, seed = p
    return dy, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed


def _key(act: Tensor, p: Projection, needs: Needs) -> tuple:
    weight, _, _, bias, *_ = p
    return (
        act.dtype, act.device, act.shape, act.stride(), act.data_ptr() % 16, needs,
        weight.shape, weight.stride(), weight.data_ptr() % 16,
        bias is None or (bias.stride(), bias.data_ptr() % 16), uses_tf32(act.dtype),
    )  # fmt: skip


def _describe_base(direction, act: Tensor, p: Projection, needs: Needs) -> tuple[Projection, LaunchSpec]:
    """A projection without an adapter: the base product alone."""
    weight, stored = as_stored(p.weight)
    bias = None if p.bias is None else as_vector(p.bias)
    spec = LaunchSpec(
        direction,
        Sizes(act.shape[0], weight.shape[0], weight.shape[1], 0),
        act.dtype,
        (act.dtype, act.dtype),
        act.device,
        base_format="dense" if stored is weight else "transposed",
        branch="none",
        bias=direction == "forward" and bias is not None,
        needs=needs,
        tf32=uses_tf32(act.dtype),
        **layout_of((act, stored, None, None, None)),
    )
    return p._replace(weight=weight, bias=bias), spec


def _together(members: list[LaunchSpec]) -> LaunchSpec:
    """The description of a call that does what all of these do, of one direction and one x."""
    first = members[0]
    m, _, k, _ = first.sizes
    return LaunchSpec(
        first.direction,
        Sizes(m, sum(each.sizes.n for each in members), k, sum(each.sizes.r for each in members)),
        first.dtype,
        first.adapter_dtypes,
        first.device,
        branch="shared_input",
        dropout=any(each.dropout for each in members),
        bias=any(each.bias for each in members),
        needs=Needs(*(any(column) for column in zip(*(each.needs for each in members), strict=True))),
        tf32=first.tf32,
        members=tuple(members),
    )
