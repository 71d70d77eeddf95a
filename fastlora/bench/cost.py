"""The least a pass must compute and move, and the time that takes at this machine's measured peaks."""

from dataclasses import dataclass

from fastlora.bench.cases import LayerCase

PASSES = ("forward", "backward", "step")


@dataclass(frozen=True)
class Cost:
    """flops of the multiplications; bytes if every operand crosses device memory once."""

    flops: int
    bytes: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def floor_us(self, peak_tflops: float, peak_gbs: float) -> float:
        """The larger of the times that the arithmetic and the traffic take at the peaks, in µs."""
        return max(self.flops / (peak_tflops * 1e6), self.bytes / (peak_gbs * 1e3))


def pass_cost(
    case: LayerCase, which: str, lora: bool, weight_bytes: float | None = None, *, weights: int = 1, adapters: int = 1
) -> Cost:
    """The cost of one pass of a layer that trains A and B and passes dX on, or of the frozen layer (``lora`` False).

    A step is the forward and the backward pass. The fused layer reads X, W0, A, B and writes Y and S; backward it reads
    dY, W0, A, B, X, S and writes dX, dA, dB.

    Args:
        weight_bytes: of an element of W0, where it is not in the case's dtype.
        weights, adapters: how many W0, and how many A and B, the rows have between them, each row one.
    """
    if which == "step":
        stacks = {"weights": weights, "adapters": adapters}
        forward, backward = (pass_cost(case, each, lora, weight_bytes, **stacks) for each in PASSES[:2])
        return forward + backward
    m, n, k, r = case.m, case.n, case.k, case.r if lora else 0
    size = case.torch_dtype.itemsize
    weight = weights * (size * n * k if weight_bytes is None else round(weight_bytes * n * k))
    base = Cost(2 * m * n * k, size * (m * k + m * n) + weight)
    branch_flops, branch_bytes = 2 * m * r * (n + k), size * r * (adapters * (n + k) + m)
    if which == "forward":
        return base + Cost(branch_flops, branch_bytes)
    if which == "backward":
        extra_read = m * k if lora else 0
        return base + Cost(2 * branch_flops, size * (extra_read + adapters * r * (n + k)) + branch_bytes)
    raise ValueError(f"unknown pass {which!r}; choose one of {', '.join(PASSES)}")


def model_cost(case, which: str, lora: bool, whole: bool) -> Cost:
    """The cost of one pass of a model of ``fastlora.bench.models.ModelCase``: its projections, the products of causal
    attention (half of the L×L scores) and, of a whole model, of the head. Norms, activations and the optimiser, and the
    scores' traffic, which a fused attention keeps to itself, are left out.
    """
    if which == "step":
        return model_cost(case, "forward", lora, whole) + model_cost(case, "backward", lora, whole)
    tokens, dtype = case.batch * case.length, str(case.dtype).removeprefix("torch.")
    times = 1 if which == "forward" else 2  # each product's backward is two products
    rows = 2 * case.hidden + 2 * case.key_value_width  # of Q, K, V and the output
    attention = Cost(times * 2 * tokens * case.length * case.hidden, times * tokens * rows * case.dtype.itemsize)
    total = Cost(0, 0)
    for n, k in case.projections:
        total += pass_cost(LayerCase(tokens, n, k, case.r, 0.0, dtype), which, lora)
    total += attention
    total = Cost(case.layers * total.flops, case.layers * total.bytes)
    if whole:
        total += pass_cost(LayerCase(tokens, case.vocabulary, case.hidden, 1, 0.0, dtype), which, lora=False)
    return total
