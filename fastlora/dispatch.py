"""Brings a call of a layer to the backend that serves it, and counts it (fastlora.counts)."""

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from torch import Tensor

from fastlora import quantised_operands, selection
from fastlora.backends import reference
from fastlora.counts import calls
from fastlora.one_launch import launching_together
from fastlora.operands import backward_key, describe_backward, describe_forward, forward_key
from fastlora.problem import BackwardOperands, ForwardOperands, Gradients, LaunchSpec, Needs
from fastlora.quantised_weight import QuantisedWeight
from fastlora.routes import by_key, counted, find_route, remember

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
        calls["reference"] += 1
        return reference.lora_forward(*operands)
    key = (requested, forward_key(operands))
    route = by_key.get(key)
    if route is None:
        given = operands
        operands, spec = describe_forward(given)
        route = find_route(spec, requested)
        remember(key, route, given, operands)
    return counted(route)(operands)


_ADD_IN_PLACE = ("composed", "reference")  # whose launchers add dX to a given one


def backward(operands: Any, needs: Needs, requested: str | None, into: Tensor | None = None) -> Gradients:
    """The gradients that ``needs`` names, likewise, of the fields of BackwardOperands in order.

    Args:
        into: a contiguous dX [M, K] that this call's is added to in place, and that is returned as dX.
    """
    if operands[0].is_cpu and requested in _PLAIN:
        calls["reference"] += 1
        return reference.lora_backward(*operands, needs, into)  # type: ignore[call-arg]  # nine fields
    key = (requested, backward_key(operands, needs))
    route = by_key.get(key)
    if route is None:
        given = operands
        operands, spec = describe_backward(given, needs)
        route = find_route(spec, requested)
        remember(key, route, given, operands)
    launcher = counted(route)
    if into is None or not needs.dx:
        return launcher(operands)
    if route.name in _ADD_IN_PLACE:
        return launcher(operands, into)
    computed = launcher(operands)
    return computed._replace(dx=into.add_(computed.dx))


def segmented(operands: Any, spec: LaunchSpec, requested: str | None) -> Any:
    """Likewise for rows in segments: what a forward or backward of such operands returns.

    Args:
        operands: GroupedForward or GroupedBackward of fastlora.segments, as described.
        spec: their description.
        requested: a backend's name to insist on, or None.
    """
    return counted(find_route(spec, requested))(operands)


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
        name = launching_together(spec, requested) if spec.members else selection.select_backend(spec, requested)[0]
        if name == "triton" or (name == "composed" and spec.dropout):
            by_name[name].append((selection.serving_module(name, spec).prepare(spec), operands))
    return sum(selection.backend_module(name).compile_all(found, workers) for name, found in by_name.items() if found)
