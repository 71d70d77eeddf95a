"""Operands of a DoRA layer in the form that kernels take, and the LaunchSpec that describes them.

They are those of the layer without a scale, with the factors of the columns behind them."""

from torch import Tensor

from fastlora import operands
from fastlora.operands import as_vector
from fastlora.problem import ColumnScale, LaunchSpec, Needs, ScaledBackward, ScaledForward

_ALIGNMENT = 16  # bytes


def describe_forward(given: ScaledForward) -> tuple[ScaledForward, LaunchSpec]:
    """The operands of a forward as kernels take them, and their description."""
    layer, spec = operands.describe_forward(given.layer)
    factors = as_vector(given.magnitude), as_vector(given.norm)
    scale = ColumnScale(given.magnitude.dtype, given.norm.dtype, given.keeps_unscaled)
    return ScaledForward(layer, *factors, given.keeps_unscaled), spec._replace(column_scale=scale)


def describe_backward(given: ScaledBackward, needs: Needs) -> tuple[ScaledBackward, LaunchSpec]:
    """Likewise of a backward."""
    layer, spec = operands.describe_backward(given.layer, needs)
    factors = as_vector(given.magnitude), as_vector(given.norm)
    unscaled = None if given.unscaled is None else as_vector(given.unscaled)
    scale = ColumnScale(given.magnitude.dtype, given.norm.dtype, unscaled is not None)
    return ScaledBackward(layer, *factors, unscaled), spec._replace(column_scale=scale)


def forward_key(given: ScaledForward) -> tuple:
    """What ``describe_forward`` reads of operands: calls of one key have one description, and are in one form."""
    factors = _layouts(given.magnitude, given.norm)
    return "scaled", *operands.forward_key(given.layer), *factors, given.keeps_unscaled


def backward_key(given: ScaledBackward, needs: Needs) -> tuple:
    """Likewise of ``describe_backward``."""
    factors = _layouts(given.magnitude, given.norm, given.unscaled)
    return "scaled", *operands.backward_key(given.layer, needs), *factors


def _layouts(*tensors: Tensor | None) -> tuple:
    return tuple(t is None or (t.dtype, t.stride(), t.data_ptr() % _ALIGNMENT) for t in tensors)
