"""Several projections of one input: one launch where a backend has it, else a launch each and one dX.

Without one launch for all, each projection is the call that it would be alone, and its values have the same bits; the
backward adds each dX to one tensor in place, where autograd would write one for each and add them up.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastlora import dispatch, one_launch
from fastlora.problem import Gradients, Needs
from fastlora.projections import NO_GRADIENTS


def forward(
    x: Tensor, projections: Sequence[tuple], requested: str | None
) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """Y [M, N] and S [M, R] of each projection of x [M, K]; S is None without an adapter.

    Args:
        projections: the fields of Projection in order, of each.
        requested: a backend's name to insist on, or None.
    """
    if one_launch.may_launch_together(x, requested):
        made = one_launch.together_forward((x, projections), requested)
        if made is not None:
            return made
    ys: list[Tensor] = []
    ss: list[Tensor | None] = []
    for p in projections:
        if p[1] is None:
            y, s = linear(x, p[0], p[3]), None
        else:
            y, s = dispatch.forward((x, *p), requested)
        ys += (y,)
        ss += (s,)
    return ys, ss


def backward(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    projections: Sequence[tuple],
    ss: Sequence[Tensor | None],
    needs: Sequence[Needs],
    requested: str | None,
) -> tuple[Tensor | None, Sequence[Gradients]]:
    """dX [M, K] over all projections, and the other gradients of each.

    Args:
        dys: [M, N] of each; None where nothing depends on an output.
        x: [M, K], read for dA alone.
        projections: as for ``forward``; a bias is not read.
        ss: what the forward returned, read for dB alone.
        needs: the gradients to compute, of each projection; dx is the same in all.
        requested: a backend's name to insist on, or None.
    """
    if one_launch.may_launch_together(projections[0][0], requested):
        made = one_launch.together_backward((dys, x, projections, ss, needs), requested)
        if made is not None:
            return made
    dx, others = None, []
    for dy, (weight, lora_a, lora_b, _, *numbers), s, need in zip(dys, projections, ss, needs, strict=True):
        if dy is None:
            found = NO_GRADIENTS
        elif lora_a is None:
            if need.dx:
                dx = torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)
            found = Gradients(dx, None, None, dy.sum(0) if need.dbias else None)
        else:
            found = dispatch.backward((dy, x, weight, lora_a, lora_b, s, *numbers), need, requested, dx)
            dx = found.dx
        others.append(found)
    return dx, others
