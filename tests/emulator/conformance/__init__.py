"""One small kernel for each instruction, with what a plain model says it computes; runs in the emulator and on GPUs."""

from . import asynchronous, cluster, floating, functions, integer, matrix, memory, protocol, warp
from .case import Case
from .runners import CudaRunner, EmulatorRunner

__all__ = ["Case", "CudaRunner", "EmulatorRunner", "all_cases"]

_FAMILIES = (integer, floating, functions, memory, warp, matrix, asynchronous, cluster, protocol)


def all_cases():
    """Every case, grouped by family of instructions."""
    for family in _FAMILIES:
        yield from family.cases()
