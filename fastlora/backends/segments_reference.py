"""A LoRA layer on rows in segments in plain PyTorch, for CPUs, where reading the ends of segments costs nothing.

Base products are made for each run of rows with one weight, branches for each run with one adapter, both written where
they belong: a batch of several adapters over one weight has one base product, and nothing as large as a stack of
weights is ever made. Rows without a segment are 0, their gradients, too. An adapter's gradients are one product over
all of its rows.
"""

from collections import defaultdict

import torch
from torch import Tensor

from fastlora.backends import reference
from fastlora.philox import drop_mask, inverse_keep
from fastlora.problem import Gradients, Launcher, LaunchSpec, Needs, split_scaling
from fastlora.segments import NO_ADAPTER, GroupedBackward, GroupedForward, Run, read_ends, read_indices, runs


def why_unsupported(spec: LaunchSpec) -> str | None:
    """Why a call cannot be served here, or None."""
    if spec.device.type != "cpu":
        return "the reference reads on the host where segments end, and would wait for the device"
    return None


def prepare(spec: LaunchSpec) -> Launcher:
    """What serves every call of this description."""
    if spec.direction == "forward":
        return lambda operands: _forward(operands)
    return lambda operands: _backward(operands, spec.needs)


def _forward(operands: GroupedForward) -> tuple[Tensor, Tensor]:
    """Y [M, N] and S [M, R], both in x's dtype."""
    x, weight, lora_a, lora_b, bias, _, _, _, transposed, dropout_p, seed = operands
    m, dtype = x.shape[0], x.dtype
    base, branch, last = _runs(operands, m)
    dropped, kept_scale = x, 1.0
    if dropout_p > 0.0:
        dropped = x.masked_fill(drop_mask(seed, dropout_p, x.shape[0], x.shape[1], x.device), 0.0)  # type: ignore[arg-type]
        kept_scale = inverse_keep(dropout_p)
    y = x.new_empty(m, weight.shape[1 if not transposed else 2])
    for run in base:
        up = _matrix(weight, run.owner, not transposed, dtype)  # [K, N]
        if bias is None:
            torch.mm(x[run.rows], up, out=y[run.rows])
        else:
            torch.addmm(bias if bias.dim() == 1 else bias[run.owner], x[run.rows], up, out=y[run.rows])
    y[last:].zero_()
    s = x.new_zeros(m, lora_a.shape[1])
    scalings = _scalings(operands)
    for run in branch:
        a, b = lora_a[run.owner].to(dtype), lora_b[run.owner].to(dtype)
        shrunk, on_branch = reference.shrink(dropped[run.rows], a.t(), scalings[run.owner], kept_scale)
        s[run.rows] = shrunk
        y[run.rows].addmm_(shrunk, b.t(), alpha=on_branch)
    return y, s


def _backward(operands: GroupedBackward, needs: Needs) -> Gradients:
    """dX [M, K] in dY's dtype, dA [T, R, K] and dB [T, N, R] in their parameters', dbias [E, N] or [N] in dY's."""
    dy, x, weight, lora_a, lora_b, s, bias_dims, _, _, _, transposed, dropout_p, seed = operands
    m, dtype, k = dy.shape[0], dy.dtype, lora_a.shape[2]
    base, branch, last = _runs(operands, m)
    dx = da = db = dbias = drop = None
    kept_scale = 1.0
    if dropout_p > 0.0 and (needs.dx or needs.da):
        drop = drop_mask(seed, dropout_p, m, k, dy.device)  # type: ignore[arg-type]
        kept_scale = inverse_keep(dropout_p)
    if needs.dx:
        dx = dy.new_empty(m, k)
        for run in base:
            torch.mm(dy[run.rows], _matrix(weight, run.owner, transposed, dtype), out=dx[run.rows])
        dx[last:].zero_()
    if needs.da:
        da = torch.zeros_like(lora_a, memory_format=torch.contiguous_format)
    if needs.db:
        db = torch.zeros_like(lora_b, memory_format=torch.contiguous_format)
    scalings = _scalings(operands)
    for index, of_adapter in _by_owner(branch).items():
        scaling, some_dy = scalings[index], _rows_of(dy, of_adapter)
        if needs.dx or needs.da:
            ds = reference.shrink_once(some_dy, lora_b[index].to(dtype), scaling)
            some_drop = None if drop is None else _rows_of(drop, of_adapter)
        if dx is not None:
            _add_side(dx, of_adapter, ds, lora_a[index].to(dtype), some_drop, kept_scale)
        if da is not None:
            seen = _rows_of(x, of_adapter)  # type: ignore[arg-type]  # x is there
            seen = seen if some_drop is None else seen.masked_fill(some_drop, 0.0)
            da[index] = reference.gradient(ds.t(), seen, kept_scale, lora_a[index])
        if db is not None:
            on_branch = split_scaling(scaling, dtype).on_branch
            some_s = _rows_of(s, of_adapter)  # type: ignore[arg-type]  # so is s
            db[index] = reference.gradient(some_s.t(), some_dy, on_branch, lora_b[index].t()).t()
    if needs.dbias and bias_dims == 1:
        dbias = dy[:last].sum(0)
    elif needs.dbias:
        dbias = dy.new_zeros(weight.shape[0], dy.shape[1])
        for index, of_weight in _by_owner(base).items():
            dbias[index] = _rows_of(dy, of_weight).sum(0)
    return Gradients(dx, da, db, dbias)


def _add_side(
    dx: Tensor, of_adapter: list[Run], ds: Tensor, lora_a: Tensor, drop: Tensor | None, kept_scale: float
) -> None:
    """Adds what comes to X through the branch, dS [rows, R]·A [R, K], to the rows of an adapter's runs."""
    side = None if drop is None else torch.mm(ds, lora_a).masked_fill_(drop, 0.0)
    first = 0
    for run in of_adapter:
        here = slice(first, first := first + run.end - run.start)
        if side is None:
            dx[run.rows].addmm_(ds[here], lora_a)
        else:
            dx[run.rows].add_(side[here], alpha=kept_scale)


def _runs(operands: GroupedForward | GroupedBackward, m: int) -> tuple[list[Run], list[Run], int]:
    """Runs with one weight, runs with one adapter, and where the last segment ends."""
    segments = operands.segments
    if m == 0 and not segments.ends.is_cpu:  # a call without work comes here wherever it is
        return [], [], 0
    ends = read_ends(segments, m)
    n_weights, n_adapters = operands.weight.shape[0], operands.lora_a.shape[0]
    experts = read_indices("experts", segments.experts, n_weights, len(ends))
    adapters = read_indices("adapters", segments.adapters, n_adapters, len(ends), NO_ADAPTER)
    branch = [run for run in runs(ends, adapters) if run.owner != NO_ADAPTER]
    return runs(ends, experts), branch, ends[-1] if ends else 0


def _by_owner(found: list[Run]) -> dict[int, list[Run]]:
    grouped = defaultdict(list)
    for run in found:
        grouped[run.owner].append(run)
    return grouped


def _rows_of(matrix: Tensor, found: list[Run]) -> Tensor:
    """The rows of some runs; a copy only where there are several runs."""
    return matrix[found[0].rows] if len(found) == 1 else torch.cat([matrix[run.rows] for run in found])


def _matrix(stack: Tensor, index: int, flip: bool, dtype: torch.dtype) -> Tensor:
    """One matrix of a stack in x's dtype, which under autocast is not the stack's."""
    matrix = stack[index].to(dtype)
    return matrix.t() if flip else matrix


def _scalings(operands: GroupedForward | GroupedBackward) -> list[float]:
    """Each adapter's scaling."""
    if operands.scalings is None:
        return [operands.scaling] * operands.lora_a.shape[0]
    return operands.scalings.tolist()
