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


def pass_cost(case: LayerCase, which: str, lora: bool) -> Cost:
    """The cost of one pass of a layer that trains A and B and passes dX on, or of the frozen layer (``lora`` False).

    A step is the forward and the backward pass. The fused layer reads X, W0, A, B and writes Y and S; backward it reads
    dY, W0, A, B, X, S and writes dX, dA, dB.
    """
    if which == "step":
        return pass_cost(case, "forward", lora) + pass_cost(case, "backward", lora)
    m, n, k, r = case.m, case.n, case.k, case.r if lora else 0
    size = case.torch_dtype.itemsize
    base = Cost(2 * m * n * k, size * (m * k + n * k + m * n))
    branch_flops, branch_bytes = 2 * m * r * (n + k), size * r * (n + k + m)
    if which == "forward":
        return base + Cost(branch_flops, branch_bytes)
    if which == "backward":
        extra_read = m * k if lora else 0
        return base + Cost(2 * branch_flops, size * (extra_read + r * (n + k)) + branch_bytes)
    raise ValueError(f"unknown pass {which!r}; choose one of {', '.join(PASSES)}")
