"""One call of a LoRA layer whose rows lie in segments: operands, how a host finds the segments, the LaunchSpec.

Rows of x are sorted into G contiguous segments. Segment g multiplies by one of E weights and one of T
adapters, or none. Where segments end is a tensor on x's device; a GPU's is never read on the host.
"""

from typing import Any, NamedTuple

from torch import Tensor

from fastlora.operands import as_rows, as_vector, layout_of, uses_tf32
from fastlora.problem import Gradients, LaunchSpec, Needs, Sizes, Stacks, scales_branch

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


def describe_segments(
    operands: GroupedForward | GroupedBackward, needs: Needs = _NO_GRADIENT
) -> tuple[GroupedForward | GroupedBackward, LaunchSpec]:
    """The operands of a call as kernels take them (see fastlora.operands), and its description. Copied are a weight or
    rows without unit strides, and factors that are not contiguous."""
    forward = isinstance(operands, GroupedForward)
    weight, transposed = _as_stored(operands.weight, operands.transposed)
    segments = Segments(*(None if t is None else t.contiguous() for t in operands.segments))  # type: ignore[arg-type]
    scalings = None if operands.scalings is None else operands.scalings.contiguous()
    shared: dict[str, Any] = {
        "weight": weight,
        "transposed": transposed,
        "segments": segments,
        "scalings": scalings,
        "lora_a": operands.lora_a.contiguous(),
        "lora_b": operands.lora_b.contiguous(),
    }
    act, saved_x, n_biases = operands[0], None, 0
    if isinstance(operands, GroupedForward):
        act = as_rows(operands.x)
        bias = None if operands.bias is None else as_vector(operands.bias)
        if bias is not None:
            n_biases = 1 if bias.dim() == 1 else bias.shape[0]
        operands = operands._replace(x=act, bias=bias, **shared)
    else:
        act = as_rows(operands.dy)
        saved_x = as_rows(operands.x) if needs.da and operands.x is not None else None
        s = as_vector(operands.s) if needs.db and operands.s is not None else None
        if needs.dbias:
            n_biases = 1 if operands.bias_dims == 1 else weight.shape[0]
        operands = operands._replace(dy=act, x=saved_x, s=s, **shared)
    n, k = weight.shape[1:][::-1] if transposed else weight.shape[1:]
    stacks = Stacks(
        n_segments=segments.ends.shape[0],
        n_weights=weight.shape[0],
        n_adapters=operands.lora_a.shape[0],
        n_biases=n_biases,
        experts=None if segments.experts is None else segments.experts.dtype,
        adapters=None if segments.adapters is None else segments.adapters.dtype,
        scalings=None if scalings is None else scalings.dtype,
        weight=weight.dtype,
        weight_stride=weight.stride(0),
    )
    spec = LaunchSpec(
        "forward" if forward else "backward",
        Sizes(act.shape[0], n, k, operands.lora_a.shape[1]),
        act.dtype,
        (operands.lora_a.dtype, operands.lora_b.dtype),
        act.device,
        base_format="transposed" if transposed else "dense",
        branch="segments",
        dropout=operands.dropout_p > 0.0,
        bias=forward and n_biases > 0,
        needs=needs,
        tf32=uses_tf32(act.dtype),
        scales_branch=scalings is None and scales_branch(operands.scaling, act.dtype),
        stacks=stacks,
        **layout_of((act, weight[0], operands.lora_a[0], operands.lora_b[0], saved_x)),
    )
    return operands, spec


def _as_stored(weight: Tensor, transposed: bool) -> tuple[Tensor, bool]:
    """A stack of weights whose rows have unit inner strides and do not overlap, and whether each lies as [K, N]; a view
    that only swaps the last two dimensions is what it is a view of."""
    _, rows, columns = weight.shape
    if weight.stride(2) == 1 and (rows == 1 or weight.stride(1) >= columns):
        return weight, transposed
    if weight.stride(1) == 1 and (columns == 1 or weight.stride(2) >= rows):
        return weight.transpose(1, 2), not transposed
    return weight.contiguous(), transposed
