"""Launches of one backend with a configuration of the test's choice."""

from typing import Any

from torch import Tensor

from fastlora.dispatch import launch_backward, launch_forward
from fastlora.problem import BackwardOperands, ForwardOperands, Gradients


def forward(backend: Any, *operands: Any, **choice: Any) -> tuple[Tensor, Tensor]:
    """Y and S of one launch of ``backend``, a module with ``prepare``.

    Args:
        operands: the fields of fastlora.problem.ForwardOperands, in order.
        choice: what ``prepare`` uses instead of its own choice (config=, tile=, ctas=).
    """
    return launch_forward(backend, ForwardOperands(*operands), **choice)


def backward(backend: Any, *operands: Any, **choice: Any) -> Gradients:
    """The gradients of one launch; ``operands`` are the fields of BackwardOperands in order, and the Needs."""
    *tensors, needs = operands
    return launch_backward(backend, BackwardOperands(*tensors), needs, **choice)
