"""Brings a call to the backend that serves it, and counts how often each did, and why not a faster one."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora import quantised_operands, scaled_operands, selection
from fastlora.backends import reference, tuning
from fastlora.operands import backward_key, describe_backward, describe_forward, forward_key
from fastlora.problem import (
    BACKENDS,
    BackwardOperands,
    ForwardOperands,
    Gradients,
    Launcher,
    LaunchSpec,
    Needs,
    PassingReason,
    ScaledBackward,
    ScaledForward,
)
from fastlora.projections import (
    SharedGradients,
    SharedOutputs,
    backward_keys,
    describe_shared_backward,
    describe_shared_forward,
    forward_keys,
)
from fastlora.quantised_weight import QuantisedWeight

ENVIRONMENT_VARIABLE = "FASTLORA_BACKEND"

GROUPS = "groups"  # their count, among those of backends

_calls: Counter[str] = Counter()
_fallbacks: Counter[str] = Counter()


class _Route(NamedTuple):
    """Who serves the calls of one description, with what, and why nobody faster."""

    name: str
    passed_over: tuple[str, ...]
    launcher: Launcher


@lru_cache(maxsize=4096)
def _route(spec: LaunchSpec, requested: str | None) -> _Route:
    name, passed_over = selection.select_backend(spec, requested)
    if name == "reference" and passed_over:
        _warn_once(spec, passed_over)
    return _Route(name, passed_over, selection.serving_module(name, spec).prepare(spec))


_MOST_KEYS = 4096
_by_key: dict[tuple, _Route] = {}  # of calls whose operands kernels take as they are


def forget_routes() -> None:
    """Has every route found anew."""
    _by_key.clear()
    _route.cache_clear()
    _launching_route.cache_clear()


tuning.on_change(forget_routes)


def _remember(key: tuple, route: _Route, given: tuple, described: tuple) -> None:
    """Spares later calls of this key their description, where that changes nothing in their operands."""
    passing = any(isinstance(reason, PassingReason) for reason in route.passed_over)
    if passing or any(one is not other for one, other in zip(given, described, strict=True)):
        return
    if len(_by_key) >= _MOST_KEYS:
        _by_key.clear()
    _by_key[key] = route


_warned = False


def _warn_once(spec: LaunchSpec, passed_over: tuple[str, ...]) -> None:
    """Says that a GPU's user gets the slow path, why, and what helps; once a process."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"fastlora serves a {spec.direction} of {spec.dtype} on {spec.device} by its reference in plain PyTorch,"
            f" which is slow there. It helps to mend one of these: {'; '.join(passed_over)}. This is said once;"
            " fastlora.dispatch_counts() has every call",
            stacklevel=2,
        )


def _counted(route: _Route) -> Launcher:
    """The launcher of the call at hand. Where a reason may have passed by the next call, routes are found anew."""
    _calls[route.name] += 1
    for reason in route.passed_over:
        _fallbacks[reason] += 1
        if isinstance(reason, PassingReason):
            forget_routes()
    return route.launcher


# Calls on the CPU that only the reference could serve: a small layer is spared its description.
_PLAIN = (None, "reference")


def forward(operands: Any, requested: str | None) -> tuple[Tensor, Tensor]:
    """Y [M, N] and S [M, R] by the backend that serves the call; counts it, and every fallback.

    Args:
        operands: the fields of ForwardOperands, in order.
        requested: a backend's name to insist on, or None.

    Raises:
        ValueError: as for selection.select_backend.
    """
    if operands[0].is_cpu and requested in _PLAIN:
        _calls["reference"] += 1
        return reference.lora_forward(*operands)
    key = (requested, forward_key(operands))
    route = _by_key.get(key)
    if route is None:
        given = operands
        operands, spec = describe_forward(given)
        route = _route(spec, requested)
        _remember(key, route, given, operands)
    return _counted(route)(operands)


_ADD_IN_PLACE = ("composed", "reference")  # whose launchers add dX to a given one


def backward(operands: Any, needs: Needs, requested: str | None, into: Tensor | None = None) -> Gradients:
    """The gradients that ``needs`` names, likewise, of the fields of BackwardOperands in order.

    Args:
        into: a contiguous dX [M, K] that this call's is added to in place, and that is returned as dX.
    """
    if operands[0].is_cpu and requested in _PLAIN:
        _calls["reference"] += 1
        return reference.lora_backward(*operands, needs, into)  # type: ignore[call-arg]  # nine fields
    key = (requested, backward_key(operands, needs))
    route = _by_key.get(key)
    if route is None:
        given = operands
        operands, spec = describe_backward(given, needs)
        route = _route(spec, requested)
        _remember(key, route, given, operands)
    launcher = _counted(route)
    if into is None or not needs.dx:
        return launcher(operands)
    if route.name in _ADD_IN_PLACE:
        return launcher(operands, into)
    computed = launcher(operands)
    return computed._replace(dx=into.add_(computed.dx))


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
    launch = _in_launch(operands, requested, key, lambda: describe_shared_forward(operands), TOGETHER)
    return launch and launch()


def together_backward(operands: Any, requested: str | None) -> SharedGradients | None:
    """The gradients that the needs of each projection name, likewise, of the fields of SharedBackward in order."""
    key = ("together", requested, backward_keys(operands))
    launch = _in_launch(operands, requested, key, lambda: describe_shared_backward(operands), TOGETHER)
    return launch and launch()


def _launching_together(spec: LaunchSpec, requested: str | None) -> str | None:
    """The backend whose one launch serves such a call, if any."""
    if _prefers_composed(spec, requested):
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
    launch = _in_launch(operands, requested, key, lambda: quantised_operands.describe_forward(operands))
    return launch and launch()


def packed_backward(operands: Any, needs: Needs, requested: str | None) -> Gradients | None:
    """The gradients that ``needs`` names, likewise."""
    if not may_launch(operands[0].device, requested):
        return None
    key = ("packed", requested, quantised_operands.backward_key(operands, needs))
    launch = _in_launch(operands, requested, key, lambda: quantised_operands.describe_backward(operands, needs))
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
    return _in_launch(operands, requested, key, lambda: scaled_operands.describe_forward(operands))


def scaled_backward(operands: ScaledBackward, needs: Needs, requested: str | None) -> Callable[[], Any] | None:
    """Likewise of its backward, which returns Gradients and the magnitude's or None."""
    if not may_launch(operands.layer.dy.device, requested):
        return None
    key = (requested, scaled_operands.backward_key(operands, needs))
    return _in_launch(operands, requested, key, lambda: scaled_operands.describe_backward(operands, needs))


_LAUNCHING = ("cuda", "triton")  # whose launches may decode a weight or scale columns, in order of preference


def may_launch(device: torch.device, requested: str | None) -> bool:
    """Whether to look for a launch that decodes a weight or scales columns: on a GPU, or where it is asked for."""
    return requested in _LAUNCHING or (requested is None and device.type == "cuda")


def served_in_launch(spec: LaunchSpec, requested: str | None) -> bool:
    """Whether a call over a quantised weight, or of a DoRA layer, is served by one launch."""
    if not may_launch(spec.device, requested) or spec.is_empty or _prefers_composed(spec, requested):
        return False
    return _launching(spec, _LAUNCHING if requested is None else (requested,))[0] is not None


def _prefers_composed(spec: LaunchSpec, requested: str | None) -> bool:
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


def _in_launch(
    given: tuple,
    requested: str | None,
    key: tuple,
    describe: Callable[[], tuple[tuple, LaunchSpec]],
    backends: tuple[str, ...] | None = None,
) -> Callable[[], Any] | None:
    """A call as one launch of the first of the backends (``_LAUNCHING``) that can serves it, counted, or None."""
    operands, route = given, _by_key.get(key)
    if route is None:
        operands, spec = describe()
        if spec.is_empty or _prefers_composed(spec, requested):
            return None
        backends = _LAUNCHING if backends is None else backends
        name, passed_over = _launching(spec, backends if requested is None else (requested,))
        if name is None:
            _fallbacks.update(passed_over)
            return None
        route = _launching_route(spec, name, passed_over)
        _remember(key, route, _flat(given), _flat(operands))
    return partial(_counted(route), operands)


def _flat(operands: Sequence) -> tuple:
    """The operands of a call, also where some are lists of others."""
    found: list = []
    for each in operands:
        found += _flat(each) if isinstance(each, tuple | list) else (each,)
    return tuple(found)


@lru_cache(maxsize=4096)
def _launching_route(spec: LaunchSpec, name: str, passed_over: tuple[str, ...]) -> _Route:
    return _Route(name, passed_over, selection.serving_module(name, spec).prepare(spec))


def segmented(operands: Any, spec: LaunchSpec, requested: str | None) -> Any:
    """Likewise for rows in segments: what a forward or backward of such operands returns.

    Args:
        operands: GroupedForward or GroupedBackward of fastlora.segments, as described.
        spec: their description.
        requested: a backend's name to insist on, or None.
    """
    return _counted(_route(spec, requested))(operands)


def launch_forward(backend: ModuleType, operands: ForwardOperands, **choice: Any) -> tuple[Tensor, Tensor]:
    """Y and S by a given backend, uncounted: for tests, tuning and benchmarks.

    Args:
        backend: a module with ``prepare``.
        operands: of one call; the weight may be a QuantisedWeight, where the module takes one.
        choice: what ``prepare`` uses instead of its own choice of a configuration.
    """
    describe: Callable = quantised_operands.describe_forward if _is_packed(operands) else describe_forward
    described, spec = describe(operands)
    return (reference.prepare(spec) if spec.is_empty else backend.prepare(spec, **choice))(described)


def launch_backward(backend: ModuleType, operands: BackwardOperands, needs: Needs, **choice: Any) -> Gradients:
    """The gradients that ``needs`` names, likewise."""
    describe: Callable = quantised_operands.describe_backward if _is_packed(operands) else describe_backward
    described, spec = describe(operands, needs)
    return (reference.prepare(spec) if spec.is_empty else backend.prepare(spec, **choice))(described)


def _is_packed(operands: ForwardOperands | BackwardOperands) -> bool:
    return isinstance(operands.weight, QuantisedWeight)


def compile_ahead(calls: Iterable[tuple[Any, LaunchSpec]], requested: str | None, workers: int) -> int:
    """Compiles what calls of these operands and descriptions would compile, and launches nothing.

    Args:
        calls: operands, which may be on the "meta" device, and the description of such a call on its real one.
        requested: a backend's name to insist on, or None.
        workers: threads that compile.

    Returns:
        The number of kernels: Triton's, for the CUDA backend and the reference have nothing to compile.

    Raises:
        ValueError: as for selection.select_backend.
    """
    by_name: dict[str, list] = {"triton": [], "composed": []}
    for operands, spec in calls:
        name = _launching_together(spec, requested) if spec.members else selection.select_backend(spec, requested)[0]
        if name == "triton" or (name == "composed" and spec.dropout):
            by_name[name].append((selection.serving_module(name, spec).prepare(spec), operands))
    return sum(selection.backend_module(name).compile_all(found, workers) for name, found in by_name.items() if found)


# The mapping within os.environ, which a change of that changes: the search through its layers takes as long as a check
# of all arguments.
_environment: Any = getattr(os.environ, "_data", None)
_encoded_name = None if _environment is None else os.environ.encodekey(ENVIRONMENT_VARIABLE)


def environment_backend() -> str | None:
    """The backend that the environment insists on, if any."""
    if _environment is not None and _encoded_name not in _environment:
        return None
    return os.environ.get(ENVIRONMENT_VARIABLE) or None


def count_fallback(reason: str) -> None:
    """Counts a call that something above the kernels (an integration, say) served without fastlora."""
    _fallbacks[reason] += 1


def count_group() -> None:
    """Counts a forward in which layers of a model that share an input were computed together."""
    _calls[GROUPS] += 1


def dispatch_counts() -> dict:
    """Calls since the last reset: ``{"cuda": n, "triton": n, "composed": n, "reference": n}`` and, under "fallbacks",
    ``{reason: n}``.

    Each forward and each backward pass of a layer is one call. Where layers that share an input were computed together
    (``group=``), "groups" says in how many forward passes of a group.
    """
    groups = {GROUPS: _calls[GROUPS]} if _calls[GROUPS] else {}
    return {**{name: _calls[name] for name in BACKENDS}, **groups, "fallbacks": dict(_fallbacks)}


def reset_dispatch_counts() -> None:
    """Sets every count to zero."""
    _calls.clear()
    _fallbacks.clear()
