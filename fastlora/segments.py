"""One call of a LoRA layer whose rows lie in segments: operands, how a host finds the segments, the LaunchSpec.

Rows of x are sorted into G contiguous segments. Segment g multiplies by one of E weights and one of T
adapters, or none. Where segments end is a tensor on x's device; a GPU's is never read on the host.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.problem import Gradients, LaunchSpec, Needs, Sizes

NO_ADAPTER = -1
_NO_GRADIENT = Needs(False, False, False, False)


class Segments(NamedTuple):
    """Which rows, weight and adapter each segment has. Rows past the last end belong to none."""

    ends: Tensor  # int32 [G], cumulative
    experts: Tensor | None  # int [G]; None: its own number, or the only weight
    adapters: Tensor | None  # int [G], NO_ADAPTER for none; None: its own number


class GroupedForward(NamedTuple):
    """What a forward reads. For the rows of a segment with weight W and adapter t:
    Y = x·Wᵀ + scaling_t·(drop(x)·lora_a_tᵀ)·lora_b_tᵀ + bias; rows without a segment are 0."""

    x: Tensor  # [M, K]
    weight: Tensor  # [E, N, K]; [E, K, N] where transposed
    lora_a: Tensor  # [T, R, K]
    lora_b: Tensor  # [T, N, R]
    bias: Tensor | None  # [E, N] or [N]
    scaling: float
    scalings: Tensor | None  # [T]; in the place of scaling
    segments: Segments
    transposed: bool
    dropout_p: float
    seed: Tensor | None


class GroupedBackward(NamedTuple):
    """What a backward reads; x for dA alone, s for dB alone."""

    dy: Tensor  # [M, N]
    x: Tensor | None  # [M, K]
    weight: Tensor  # [E, N, K]; [E, K, N] where transposed
    lora_a: Tensor  # [T, R, K]
    lora_b: Tensor  # [T, N, R]
    s: Tensor | None  # [M, R], what the forward returned
    bias_dims: int  # of the bias, whose gradient has as many
    scaling: float
    scalings: Tensor | None  # [T]
    segments: Segments
    transposed: bool
    dropout_p: float
    seed: Tensor | None


class Run(NamedTuple):
    """Neighbouring segments of one weight, or of one adapter: rows from ``start`` to before ``end``."""

    start: int
    end: int
    owner: int  # number of the weight, or of the adapter

    @property
    def rows(self) -> slice:
        return slice(self.start, self.end)


def read_ends(segments: Segments, m: int) -> list[int]:
    """Where the segments of a call on the CPU end.

    Raises:
        ValueError: the ends decrease, begin below 0 or pass M.
    """
    ends = segments.ends.tolist()
    before = 0
    for g, end in enumerate(ends):
        if not before <= end <= m:
            raise ValueError(
                f"offsets are cumulative ends of segments, from 0 to at most the {m} rows of x, and must not decrease: "
                f"offsets[{g}] is {end} after {before}"
            )
        before = end
    return ends


def read_indices(name: str, indices: Tensor | None, count: int, n_segments: int, first: int = 0) -> list[int]:
    """Which of ``count`` matrices each segment of a call on the CPU uses.

    Args:
        name: what the indices are called in errors.
        indices: int [G], or None for the defaults of Segments.
        first: the smallest index allowed.

    Raises:
        ValueError: an index out of range.
    """
    if indices is None:
        return [0] * n_segments if count == 1 else list(range(n_segments))
    values = indices.tolist()
    for g, value in enumerate(values):
        if not first <= value < count:
            raise ValueError(f"{name}[{g}] is {value}; it must be from {first} to {count - 1}")
    return values


def runs(ends: list[int], owners: list[int]) -> list[Run]:
    """Segments with rows, those of one owner joined where they lie side by side."""
    found: list[Run] = []
    start = 0
    for end, owner in zip(ends, owners, strict=True):
        if end > start:
            if found and found[-1].owner == owner:  # whatever lies between two runs has no rows
                found[-1] = found[-1]._replace(end=end)
            else:
                found.append(Run(start, end, owner))
        start = end
    return found


def as_gradients(computed: list[Tensor], needs: Needs) -> Gradients:
    """The gradients that ``needs`` names, from a list of them."""
    left = iter(computed)
    return Gradients(*(next(left) if need else None for need in needs))


def describe_segments(operands: GroupedForward | GroupedBackward, needs: Needs = _NO_GRADIENT) -> LaunchSpec:
    """The description of a call."""
    forward = isinstance(operands, GroupedForward)
    act = operands.x if isinstance(operands, GroupedForward) else operands.dy
    n, k = operands.weight.shape[1:][::-1] if operands.transposed else operands.weight.shape[1:]
    return LaunchSpec(
        "forward" if forward else "backward",
        Sizes(act.shape[0], n, k, operands.lora_a.shape[1]),
        act.dtype,
        (operands.lora_a.dtype, operands.lora_b.dtype),
        act.device,
        base_format="transposed" if operands.transposed else "dense",
        branch="segments",
        dropout=operands.dropout_p > 0.0,
        bias=isinstance(operands, GroupedForward) and operands.bias is not None,
        needs=needs,
        tf32=False if act.dtype != torch.float32 else torch.backends.cuda.matmul.allow_tf32,
    )
