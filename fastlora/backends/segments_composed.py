"""A LoRA layer on rows in segments, composed of torch's own grouped products, where Triton's kernels cannot serve it.

Nothing is read on the host: torch's product takes the ends as they lie on the device, where it has a kernel, in
bfloat16 on compute capability 9.0 and 10.0; elsewhere torch itself reads them there, so such calls are refused. Three
grouped products forward and five backward. S and dS are rounded before they are scaled, and an adapter's gradient is
rounded once a segment, as a layer of framework operations has it.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.backends.target import target_of
from fastlora.philox import drop_mask, inverse_keep
from fastlora.problem import Gradients, Launcher, LaunchSpec
from fastlora.segments import NO_ADAPTER, GroupedBackward, GroupedForward

_ARCHITECTURES = (90, 100)  # on which torch's grouped product does not read the ends on the host
_ALIGNED = 8  # elements of bfloat16 in 16 bytes


def why_unsupported(spec: LaunchSpec) -> str | None:
    """Why a call cannot be composed, or None. Of a device that is no GPU only the rules of shapes and dtypes hold."""
    _, n, k, _ = spec.sizes
    if not hasattr(F, "grouped_mm"):
        return "torch has no grouped_mm before 2.10"
    if spec.dtype != torch.bfloat16:
        return f"torch's grouped product of {spec.dtype} would wait for the device; cast to bfloat16"
    if n % _ALIGNED or k % _ALIGNED:
        return f"torch's grouped product takes multiples of {_ALIGNED}, not out_features {n} and in_features {k}"
    if spec.device.type == "cuda" and (arch := target_of(spec.device).arch) not in _ARCHITECTURES:
        return f"torch's grouped product would wait for a device of compute capability {arch / 10}"
    return None


def prepare(spec: LaunchSpec) -> Launcher:
    """What serves every call of this description."""
    return partial(_forward if spec.direction == "forward" else _backward, spec)


def _forward(spec: LaunchSpec, operands: GroupedForward) -> tuple[Tensor, Tensor]:
    """Y [M, N] and S [M, R]; see backends.segments_reference."""
    x, weight, lora_a, lora_b, bias, _, _, segments, transposed, dropout_p, seed = operands
    x, rank = _aligned_rows(x), lora_a.shape[1]
    segment = _segment_of_rows(segments.ends, x.shape[0])
    covered = (segment < segments.ends.shape[0])[:, None]
    y = _base_product(x, weight, segments.experts, segments.ends, flip=not transposed)
    if bias is not None:
        y += bias if bias.dim() == 1 else bias[_of_rows(_experts(operands), segment)]
    dropped = x
    if spec.dropout:
        drop = drop_mask(seed, dropout_p, x.shape[0], x.shape[1], x.device)  # type: ignore[arg-type]
        dropped = x.masked_fill(drop, 0.0).mul_(inverse_keep(dropout_p))
    a, b = _factors(operands, x.dtype)
    s = _scaled(operands, segment, F.grouped_mm(dropped, a.transpose(1, 2), offs=segments.ends))
    y += F.grouped_mm(s, b.transpose(1, 2), offs=segments.ends)
    return torch.where(covered, y, 0.0), s[:, :rank].contiguous()


def _backward(spec: LaunchSpec, operands: GroupedBackward) -> Gradients:
    """The gradients that the description needs; see backends.segments_reference."""
    dy, x, weight, lora_a, lora_b, s, bias_dims, _, _, segments, transposed, dropout_p, seed = operands
    dy, needs, (rank, k) = _aligned_rows(dy), spec.needs, lora_a.shape[1:]
    segment = _segment_of_rows(segments.ends, dy.shape[0])
    covered = (segment < segments.ends.shape[0])[:, None]
    dy = torch.where(covered, dy, 0.0)
    dx = da = db = dbias = drop = None
    if spec.dropout and (needs.dx or needs.da):
        drop = drop_mask(seed, dropout_p, dy.shape[0], k, dy.device)  # type: ignore[arg-type]
    a, b = _factors(operands, dy.dtype)
    if needs.dx or needs.da:
        ds = _scaled(operands, segment, F.grouped_mm(dy, b, offs=segments.ends))
    if needs.dx:
        dx = _base_product(dy, weight, segments.experts, segments.ends, flip=transposed)
        side = F.grouped_mm(ds, a, offs=segments.ends)
        dx += side if drop is None else side.masked_fill_(drop, 0.0).mul_(inverse_keep(dropout_p))
        dx = torch.where(covered, dx, 0.0)
    if needs.da:
        seen = x if drop is None else x.masked_fill(drop, 0.0).mul_(inverse_keep(dropout_p))  # type: ignore[union-attr]
        da = _by_adapter(operands, F.grouped_mm(ds.t(), _aligned_rows(seen), offs=segments.ends), lora_a)  # type: ignore[arg-type]
    if needs.db:
        some_s = _padded(s, 1)  # type: ignore[arg-type]
        db = _by_adapter(operands, F.grouped_mm(dy.t(), some_s, offs=segments.ends)[..., :rank], lora_b)
    if needs.dbias and bias_dims == 1:
        dbias = dy.sum(0)
    elif needs.dbias:
        dbias = _added_up(dy, _of_rows(_experts(operands), segment), weight.shape[0]).to(dy.dtype)
    return Gradients(dx, None if da is None else da[:, :rank].contiguous(), db, dbias)


def _base_product(rows: Tensor, weight: Tensor, experts: Tensor | None, ends: Tensor, flip: bool) -> Tensor:
    """rows [M, ·] times the weight of each row's segment, flipped or not. A weight that is not the segment's own number
    is copied once a segment."""
    if weight.shape[0] == 1:
        return torch.mm(rows, weight[0].to(rows.dtype).t() if flip else weight[0].to(rows.dtype))
    weight = weight if experts is None else weight.index_select(0, experts)
    weight = weight.to(rows.dtype)
    return F.grouped_mm(rows, weight.transpose(1, 2) if flip else weight, offs=ends)


def _factors(operands: GroupedForward | GroupedBackward, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [G, R', K] and B [G, N, R'] of every segment, R' the rank filled up with zeros to 16 bytes; zeros where there
    is no adapter."""
    a, b = _padded(operands.lora_a.to(dtype), 1), _padded(operands.lora_b.to(dtype), 2)
    adapters = operands.segments.adapters
    if adapters is None:
        return a, b
    none = (adapters == NO_ADAPTER)[:, None, None]
    index = adapters.clamp(min=0)
    return torch.where(none, 0.0, a.index_select(0, index)), torch.where(none, 0.0, b.index_select(0, index))


def _padded(factor: Tensor, dim: int) -> Tensor:
    missing = -factor.shape[dim] % _ALIGNED
    if not missing:
        return factor.contiguous()
    return torch.cat([factor, factor.new_zeros(*factor.shape[:dim], missing, *factor.shape[dim + 1 :])], dim)


def _aligned_rows(rows: Tensor) -> Tensor:
    """A matrix whose rows start on 16 bytes, contiguous."""
    rows = rows.contiguous()
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def _segment_of_rows(ends: Tensor, m: int) -> Tensor:
    """[M]: the segment of each row; G of a row past them all."""
    return torch.searchsorted(ends, torch.arange(m, dtype=ends.dtype, device=ends.device), right=True)


def _of_rows(values: Tensor, segment: Tensor) -> Tensor:
    """The values [G] of each row's segment; a row without one gets the last value."""
    return values.index_select(0, segment.clamp(max=values.shape[0] - 1))


def _experts(operands: GroupedForward | GroupedBackward) -> Tensor:
    """[G]: the weight of each segment."""
    experts, ends = operands.segments.experts, operands.segments.ends
    if experts is not None:
        return experts
    return torch.zeros_like(ends) if operands.weight.shape[0] == 1 else torch.arange(ends.shape[0], device=ends.device)


def _adapters(operands: GroupedForward | GroupedBackward) -> Tensor:
    """[G]: the adapter of each segment."""
    adapters, ends = operands.segments.adapters, operands.segments.ends
    return torch.arange(ends.shape[0], device=ends.device) if adapters is None else adapters


def _scaled(operands: GroupedForward | GroupedBackward, segment: Tensor, values: Tensor) -> Tensor:
    """S or dS [M, R] times the scaling of each row's adapter, rounded once more; 0 where a row has none."""
    adapters = _of_rows(_adapters(operands), segment)
    if operands.scalings is None:
        scaled = values * operands.scaling
    else:
        scalings = operands.scalings.index_select(0, adapters.clamp(min=0)).float()
        scaled = (values.float() * scalings[:, None]).to(values.dtype)
    has_adapter = (segment < operands.segments.ends.shape[0]) & (adapters != NO_ADAPTER)
    return torch.where(has_adapter[:, None], scaled, 0.0)


def _by_adapter(operands: GroupedBackward, of_segments: Tensor, parameter: Tensor) -> Tensor:
    """Gradients by adapter [T, ...] from those by segment [G, ...], in the parameter's dtype, in a fixed order.
    What torch's product leaves in a segment without rows is not looked at."""
    ends = operands.segments.ends
    has_rows = torch.diff(ends, prepend=ends.new_zeros(1)) > 0
    of_segments = torch.where(has_rows[:, None, None], of_segments, 0.0)
    if operands.segments.adapters is None:
        return of_segments.to(parameter.dtype)
    return _added_up(of_segments, operands.segments.adapters, parameter.shape[0]).to(parameter.dtype)


def _added_up(values: Tensor, index: Tensor, count: int) -> Tensor:
    """[count, ...] in float32: for each index the sum of its values [·, ...], none for NO_ADAPTER. By torch's sorting
    index_put_, which is deterministic; a product with zeros and ones would carry a NaN of one sum into every other."""
    total = values.new_zeros(count + 1, *values.shape[1:], dtype=torch.float32)
    index = torch.where(index == NO_ADAPTER, count, index).long()
    return total.index_put_((index,), values.float(), accumulate=True)[:count]
