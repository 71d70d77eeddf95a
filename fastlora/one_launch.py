"""Calls of more than a dense layer: projections that share an input, a layer over a packed weight, a DoRA layer. Some
backends serve them by one launch; where none does, the reasons are counted, and the caller makes them of dense layers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlora import quantised_operands, scaled_operands, selection
from fastlora.backends import tuning
from fastlora.counts import fallbacks
from fastlora.problem import Gradients, LaunchSpec, Needs, ScaledBackward, ScaledForward
from fastlora.projections import (
    SharedGradients,
    SharedOutputs,
    backward_keys,
    describe_shared_backward,
    describe_shared_forward,
    forward_keys,
)
from fastlora.routes import by_key, counted, launching_route, remember, remember_unserved, unserved

# The backends that have one launch for several projections of one x, in order of preference. Each is asked
# ``why_unsupported`` of a LaunchSpec whose branch is "shared_input".
TOGETHER: tuple[str, ...] = ("cuda", "triton")


def may_launch_together(tensor: Tensor, requested: str | None) -> bool:
    """Whether a backend is to be asked for one launch of several projections, of which this is an operand."""
    if requested:
        return requested in TOGETHER
    return not tensor.is_cpu and tensor.device.type == "cuda"


def together_forward(operands: Any, requested: str | None) -> SharedOutputs | None:
    """Y and S of projections that share an input, by one launch; or None where no backend serves the call so: then the
    reasons are counted as fallbacks, and each projection is to be a launch of its own.

    Args:
        operands: the fields of SharedForward in order, of a call that ``may_launch_together``.
        requested: a backend's name to insist on, or None.
    """
    key = ("together", requested, forward_keys(operands))
    launch = in_one_launch(operands, requested, key, lambda: describe_shared_forward(operands), TOGETHER)
    return launch and launch()


def together_backward(operands: Any, requested: str | None) -> SharedGradients | None:
    """The gradients that the needs of each projection name, likewise, of the fields of SharedBackward in order."""
    key = ("together", requested, backward_keys(operands))
    launch = in_one_launch(operands, requested, key, lambda: describe_shared_backward(operands), TOGETHER)
    return launch and launch()


def launching_together(spec: LaunchSpec, requested: str | None) -> str | None:
    """The backend whose one launch serves such a call, if any."""
    if prefers_composed(spec, requested):
        return None
    return _launching(spec, tuple(name for name in TOGETHER if requested in (None, name)))[0]


def packed_forward(operands: Any, requested: str | None) -> tuple[Tensor, Tensor] | None:
    """Y and S of one launch that decodes its quantised weight, or None where none serves the call: then the reasons are
    counted as fallbacks, and the weight is to be decoded in front of a dense launch.

    Args:
        operands: the fields of ForwardOperands in order, with a QuantisedWeight.
        requested: a backend's name to insist on, or None.
    """
    if not may_launch(operands[0].device, requested):
        return None
    key = ("packed", requested, quantised_operands.forward_key(operands))
    launch = in_one_launch(operands, requested, key, lambda: quantised_operands.describe_forward(operands))
    return launch and launch()


def packed_backward(operands: Any, needs: Needs, requested: str | None) -> Gradients | None:
    """The gradients that ``needs`` names, likewise."""
    if not may_launch(operands[0].device, requested):
        return None
    key = ("packed", requested, quantised_operands.backward_key(operands, needs))
    launch = in_one_launch(operands, requested, key, lambda: quantised_operands.describe_backward(operands, needs))
    return launch and launch()


def scaled_forward(operands: ScaledForward, requested: str | None) -> Callable[[], Any] | None:
    """The one launch of a DoRA layer's forward, which returns Y, S and Z or None. None where none serves the call: then
    the reasons are counted as fallbacks, and the columns are to be scaled behind a launch without a scale.

    Where the composed layer is preferred (``selection.preference``), it is to be scaled likewise, and nothing is
    counted here.

    Args:
        operands: of the call.
        requested: a backend's name to insist on, or None.
    """
    if not may_launch(operands.layer.x.device, requested):
        return None
    key = (requested, scaled_operands.forward_key(operands))
    return in_one_launch(operands, requested, key, lambda: scaled_operands.describe_forward(operands))


def scaled_backward(operands: ScaledBackward, needs: Needs, requested: str | None) -> Callable[[], Any] | None:
    """Likewise of its backward, which returns Gradients and the magnitude's or None."""
    if not may_launch(operands.layer.dy.device, requested):
        return None
    key = (requested, scaled_operands.backward_key(operands, needs))
    return in_one_launch(operands, requested, key, lambda: scaled_operands.describe_backward(operands, needs))


_LAUNCHING = ("cuda", "triton")  # whose launches may decode a weight or scale columns, in order of preference


def may_launch(device: torch.device, requested: str | None) -> bool:
    """Whether to look for a launch that decodes a weight or scales columns: on a GPU, or where it is asked for."""
    return requested in _LAUNCHING or (requested is None and device.type == "cuda")


def served_in_launch(spec: LaunchSpec, requested: str | None) -> bool:
    """Whether a call over a quantised weight, or of a DoRA layer, is served by one launch."""
    if not may_launch(spec.device, requested) or spec.is_empty or prefers_composed(spec, requested):
        return False
    return _launching(spec, _LAUNCHING if requested is None else (requested,))[0] is not None


def prefers_composed(spec: LaunchSpec, requested: str | None) -> bool:
    """Of a DoRA layer, and of projections that share an input, whose launches nobody has tuned. A quantised weight
    would be decoded to memory in front of the composed layer."""
    if requested is not None or (spec.column_scale is None and not spec.members):
        return False
    order = selection.preference(spec, tuned=not spec.members)
    return order.index("composed") < order.index("triton")


def _launching(spec: LaunchSpec, backends: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """The first of the backends whose launch serves such a call, if any, and why not one before it. Over a packed
    weight the one that ``fastlora tune`` found fastest comes first."""
    passed_over: list[str] = []
    if spec.packed is not None and (fastest := tuning.tuned_backend(spec)) in backends:
        backends = (fastest, *(name for name in backends if name != fastest))
    for name in backends:
        reason = selection.why_unsupported(name, spec)
        if reason is None:
            return name, tuple(passed_over)
        passed_over.append(reason)
    return None, tuple(passed_over)


def in_one_launch(
    given: tuple,
    requested: str | None,
    key: tuple,
    describe: Callable[[], tuple[tuple, LaunchSpec]],
    backends: tuple[str, ...] | None = None,
) -> Callable[[], Any] | None:
    """A call as one launch of the first of the backends (``_LAUNCHING``) that can serves it, counted, or None."""
    operands, route = given, by_key.get(key)
    if route is None and key in unserved:
        fallbacks.update(unserved[key])
        return None
    if route is None:
        operands, spec = describe()
        name: str | None = None
        passed_over: tuple[str, ...] = ()
        if not (spec.is_empty or prefers_composed(spec, requested)):
            backends = _LAUNCHING if backends is None else backends
            name, passed_over = _launching(spec, backends if requested is None else (requested,))
        if name is None:
            fallbacks.update(passed_over)
            remember_unserved(key, passed_over)
            return None
        route = launching_route(spec, name, passed_over)
        remember(key, route, _flat(given), _flat(operands))
    return partial(counted(route), operands)


def _flat(operands: Sequence) -> tuple:
    """The operands of a call, also where some are lists of others."""
    found: list = []
    for each in operands:
        found += _flat(each) if isinstance(each, tuple | list) else (each,)
    return tuple(found)
