"""Layers of one parent that receive the same tensor, computed together at the first one's call.

The plan is lists of children's names that the parent carries (see fastlora.shared_input.plan). While the parent's
forward runs, a scope of this thread holds what was computed ahead; its hooks open and close it. The rule: a result is
handed out only to a call that would compute the very same thing. In every other case the layer computes on its own, the
same values, and the reason is counted.

Whatever copies, pickles or replicates a parent copies names and hooks alone, so that it computes with its own children.
"""

import threading
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastlora.backends.target import raw_stream
from fastlora.checks import check_arguments
from fastlora.counts import count_fallback, count_group
from fastlora.selection import environment_backend
from fastlora.shared_input.ops import PLAIN, alone_reason, checked, together

PLAN = "_fastlora_shared_inputs"  # attribute of a parent: tuples of names of its children

_APART = "checkpointed, or without gradients, apart from its parent"
_CHANGED = "the input or the layer has changed since its group was computed"
_REFUSED = "operands that the layer itself refuses"
_UNVERSIONED = "inference tensors, whose changes nobody sees"

_is_compiling = torch.compiler.is_dynamo_compiling  # where nothing is traced but run, a dispatch mode says so
_is_grad_enabled, _is_inference = torch.is_grad_enabled, torch.is_inference_mode_enabled
_is_autocast_enabled, _autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
_saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state


class Sharer(Protocol):
    """What a layer of a group has besides nn.Module's attributes."""

    shares_input: bool  # whether it is in a group of its parent's
    copy_input: bool

    def shared_parts(self, x: Tensor | None) -> tuple | str:
        """weight, lora_a, lora_b, bias, scaling and dropout_p of a call now, of which the next call finds the same
        objects; or why it has to be a call of its own. With x, that includes what x itself is refused for."""


class _Scope:
    """One forward of one parent.

    Attributes:
        parent: whose forward it is.
        outer: the scope within which it runs, or None.
        started: who packed saved tensors, and whether gradients were recorded, when it began. Either differs within a
            region that is checkpointed apart from the parent, whose recomputation would meet other siblings, and draw
            other seeds, than its forward did.
        seen: layers that were called, or computed ahead: the output that is held for the layer's call, with all that
            must not have changed until then; None once it was called.
    """

    __slots__ = ("outer", "parent", "seen", "started")

    parent: nn.Module
    outer: "_Scope | None"
    started: tuple
    seen: dict[Any, tuple | None]


class _Thread(threading.local):
    scope: _Scope | None = None


_thread = _Thread()


def open_scope(parent: nn.Module, args: tuple) -> None:
    """Forward pre-hook of a parent of groups."""
    if _is_compiling():
        return
    scope = outer = _thread.scope
    while scope is not None:
        if scope.parent is parent:  # left open by a KeyboardInterrupt, or the parent runs within itself
            outer = scope.outer
        scope = scope.outer
    _thread.scope = scope = _Scope()
    scope.parent, scope.outer, scope.seen = parent, outer, {}
    scope.started = _saved_tensor_hooks(True), _is_grad_enabled()


def close_scope(parent: nn.Module, args: tuple, output: object) -> None:
    """Forward hook of a parent of groups, called where its forward raises as well."""
    if _is_compiling():
        return
    scope = _thread.scope
    while scope is not None and scope.parent is not parent:
        scope = scope.outer
    if scope is not None:
        _thread.scope = scope.outer
        for layer in scope.seen:
            if scope.seen[layer] is not None:
                count_fallback("shared input: computed ahead and never called for")


def shared_output(layer: Any, kind: type, x: Tensor) -> Tensor | None:
    """A layer's output [..., N] for x, from what its group has computed together, or None: then it is to compute on its
    own.

    Args:
        layer: of a group, in its own forward.
        kind: the class whose forward this is; nothing but layers of exactly this class is computed together.
        x: [..., K], what it was called with.
    """
    if _is_compiling():
        return None
    scope = _thread.scope
    found: Tensor | str
    if scope is None:
        found = "outside its parent's forward"
    elif layer not in scope.seen:
        found = _compute(scope, layer, kind, x)
    elif (held := scope.seen[layer]) is None:
        found = "called again"
    else:
        scope.seen[layer] = None
        held_x, version, needs_gradient, around, before, stamps, output = held
        # As the scope began, too: nothing is held otherwise.
        if x is held_x and x._version == version and x.requires_grad == needs_gradient and _around(x) == around:
            parts = layer.shared_parts(None)
            if parts.__class__ is tuple and _is_unchanged(parts, before, stamps):
                return output
        found = alone_reason() or _apart(scope) or _CHANGED
    if found.__class__ is not str:
        return found  # type: ignore[return-value]  # a Tensor
    count_fallback(f"shared input: {found}")
    return None


def _compute(scope: _Scope, layer: Any, kind: type, x: Tensor) -> Tensor | str:
    """The layer's output, those of its siblings being held from now on; or why it computes on its own."""
    siblings, seen = _siblings(scope.parent, layer), scope.seen
    if siblings is None:
        return "outside its parent's forward"
    seen[layer] = None
    hooks, grad, _, dtype, alone, _ = around = _around(x)
    if alone:
        return alone_reason() or "a transform"
    if (hooks, grad) != scope.started:
        return _APART
    if layer.__class__ is not kind:
        return f"a {type(layer).__name__}, not a {kind.__name__}"
    if x.__class__ not in PLAIN or x.is_nested:
        return f"a {type(x).__name__}, or a nested one"
    try:
        version = x._version
    except RuntimeError:  # an inference tensor's
        return _UNVERSIONED
    cast = x if dtype is None else x.to(dtype)
    found = _usable(layer, x, cast, dtype)
    if found.__class__ is str:
        return found
    projections, ahead, copies = [found[0]], [], layer.copy_input
    for sibling in siblings:
        if sibling.__class__ is kind and sibling not in seen and not _acts_on_its_call(sibling):
            found = _usable(sibling, x, cast, dtype)
            if found.__class__ is tuple:
                projections += (found[0],)
                ahead += ((sibling, *found[1:]),)
                copies = copies or sibling.copy_input
    if not ahead:
        return "no sibling that could be computed ahead"
    output, *others = together(cast, projections, environment_backend(), copies and cast is x)
    needs_gradient = x.requires_grad
    for (sibling, parts, stamps), other in zip(ahead, others, strict=True):
        seen[sibling] = x, version, needs_gradient, around, parts, stamps, other
    count_group()
    return output


def _apart(scope: _Scope) -> str | None:
    return _APART if (_saved_tensor_hooks(True), _is_grad_enabled()) != scope.started else None


def _siblings(parent: nn.Module, layer: nn.Module) -> list[Any] | None:
    """The group that a layer is in, as the children that the parent has by its names now; None if it is in none."""
    for names in parent.__dict__.get(PLAN, ()):
        found = [*map(parent._modules.get, names)]  # None, which is of no served class, where there is no such child
        if layer in found:
            return found
    return None


def _usable(layer: Any, x: Tensor, cast: Tensor, dtype: torch.dtype | None) -> tuple[tuple, tuple, tuple] | str:
    """A layer's projection as it is computed with x (``cast`` to autocast's dtype), its parts and their stamps; or why
    the layer's own call is to see to it, or to raise."""
    parts = layer.shared_parts(x)
    if parts.__class__ is str:
        return parts
    weight, a, b, bias, _, dropout_p = parts
    if not (weight.__class__ in PLAIN and a.__class__ in PLAIN and b.__class__ in PLAIN):
        return f"a {next(type(t).__name__ for t in (weight, a, b) if type(t) not in PLAIN)}"
    if bias is not None and bias.__class__ not in PLAIN:
        return f"a {type(bias).__name__}"
    try:
        stamps = _stamps(parts)
    except RuntimeError:  # from a tensor without a version
        return _UNVERSIONED
    if not 0.0 <= dropout_p <= 1.0:
        return _REFUSED
    try:
        if dtype is None and not weight.requires_grad:
            check_arguments(x, weight, a, b, bias)
            return parts, parts, stamps
        return checked(cast, parts, dtype), parts, stamps
    except (ValueError, TypeError):
        return _REFUSED


def _acts_on_its_call(layer: nn.Module) -> bool:
    """Whether something (offloading, sharding, a compiled form, the user) may load, gather or change what a layer
    computes with, or what it is given, as soon as it is called."""
    if layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return True
    return layer._compiled_call_impl is not None or "forward" in layer.__dict__


def _around(x: Tensor) -> tuple:
    """What a result depends on besides x and the parts: who packs saved tensors, whether gradients are recorded, which
    tensors are made, autocast's dtype for x, whether something is active that takes each call apart, the stream."""
    device_type, stream = "cpu", None
    if not x.is_cpu:
        device_type = x.device.type
        stream = raw_stream(x.device.index) if device_type == "cuda" else None
    casts = device_type != "meta" and _is_autocast_enabled(device_type) and x.dtype != torch.float64
    return (
        _saved_tensor_hooks(True),
        _is_grad_enabled(),
        _is_inference(),
        _autocast_dtype(device_type) if casts else None,
        _dispatch_modes() or _transforms_active() or forward_ad._current_level >= 0 or _tracing_state() is not None,
        stream,
    )


def _stamps(parts: tuple) -> tuple:
    """Versions of a layer's tensors, and which of them train.

    Raises:
        RuntimeError: one is an inference tensor.
    """
    weight, a, b, bias, _, _ = parts
    of_bias = None if bias is None else (bias._version, bias.requires_grad)
    return weight._version, weight.requires_grad, a._version, a.requires_grad, b._version, b.requires_grad, of_bias


def _is_unchanged(parts: tuple, before: tuple, stamps: tuple) -> bool:
    """Whether these are the very same tensors as before, of these stamps, and equal numbers."""
    weight, a, b, bias, scaling, dropout_p = parts
    weight_before, a_before, b_before, bias_before, scaling_before, dropout_before = before
    same = weight is weight_before and a is a_before and b is b_before and bias is bias_before
    return same and scaling == scaling_before and dropout_p == dropout_before and _stamps(parts) == stamps
