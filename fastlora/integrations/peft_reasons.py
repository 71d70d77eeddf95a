"""Whether a call of PEFT's ``lora.Linear`` can be served fused, with which tensors, and if not, the reason."""

import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastlora.integrations.fsdp import is_frozen_view, is_unit, unit_linear
from fastlora.integrations.peft_parts import Parts, stacked
from fastlora.problem import LaunchSpec, Sizes
from fastlora.quantised_weight import QuantisedWeight, read_layer
from fastlora.selection import why_no_backend
from fastlora.sharding import is_dtensor

_PLAIN_TENSORS = (nn.Parameter, Tensor)
# Tensors that stand in for plain ones while torch.export or torch.func look at a model.
_TRACING_TENSORS = ("FakeTensor", "FunctionalTensor")
BASE = "__base__"  # PEFT's name for a sample without an adapter
_ROLES = ("base_layer", "lora_A", "lora_B")


class Units(NamedTuple):
    """Where some of base_layer, lora_A and lora_B are FSDP units: the fused call has to run within their calls."""

    modules: list[nn.Module]
    linears: list[nn.Linear]  # all three, beneath their units


def state_reason(layer: LoraLayer) -> str | None:
    """Why a LoRA layer of any class computes no branch at all, or None."""
    if layer._disable_adapters:
        return "adapters disabled"
    if layer.merged_adapters:
        return "merged"
    adapters = layer.lora_A.keys() | layer.lora_embedding_A.keys()
    return None if adapters.intersection(layer.active_adapters) else "0 active adapters"


def call_reason(layer: Linear) -> str | None:
    """Why this layer's next call would not be fused, or None, for an input of the base weight's dtype."""
    found = inspect(layer)
    if isinstance(found, Parts):
        return _dtype_reason(layer, found, found.weight.dtype, found.weight.device.type)
    return None if isinstance(found, Units) else found


def inspect(layer: Linear, linears: list[nn.Linear] | None = None, adapter: str | None = None) -> Parts | Units | str:
    """The parts of a layer that can be served fused; or units to serve it within; or the reason why it cannot be.

    Args:
        layer: the layer to be called.
        linears: those of its FSDP units, once the call is within theirs.
        adapter: one of several active ones, to look at it alone.
    """
    if layer._disable_adapters:
        return "adapters disabled"
    if layer.merged_adapters:
        return "merged"
    modules = layer._modules  # nn.Module's own lookup takes longer than all these checks
    lora_a = modules["lora_A"]._modules
    if adapter is None:
        active = layer._active_adapter  # what PEFT's own property makes a list of at every look
        active = [name for name in ((active,) if type(active) is str else active) if name in lora_a]
        if len(active) != 1:
            return _inspect_several(layer, active)
        (adapter,) = active
    magnitude = None
    if adapter in layer.lora_variant:
        magnitude = _magnitude(layer, adapter)
        if isinstance(magnitude, str):
            return magnitude
    dropout = dropout_of(layer, adapter)
    if isinstance(dropout, str):
        return dropout
    base, a, b = linears or (modules["base_layer"], lora_a[adapter], modules["lora_B"]._modules[adapter])
    transposed, packed = layer.fan_in_fan_out, None
    if linears is None:
        kind = Conv1D if transposed else nn.Linear
        reason = _linear_reason("base_layer", base, kind) or _linear_reason("lora_A", a) or _linear_reason("lora_B", b)
        if reason is not None:
            packed = None if transposed else read_layer(base)
            if packed is None:
                return reason if transposed or magnitude is not None else _find_units((base, a, b))
            reason = packed if isinstance(packed, str) else "hooks on base_layer" if _has_hooks(base) else None
            reason = reason or _linear_reason("lora_A", a) or _linear_reason("lora_B", b)
            if reason is not None:
                return reason
    weight, bias = base.weight if packed is None else packed, base.bias
    stored = weight
    if weight.requires_grad:
        if not is_frozen_view(base, "weight"):
            return "the base weight trains"
        weight = weight.detach()
        if bias is not None and bias.requires_grad and is_frozen_view(base, "bias"):
            bias = bias.detach()
    if transposed:
        if is_dtensor(weight):
            return "fan_in_fan_out over DTensors"
        weight = weight.t()
    if magnitude is None:
        return Parts(weight, bias, a.weight, b.weight, b.bias, layer.scaling[adapter], *dropout)
    if reason := _dora_reason(layer, adapter, magnitude, weight, a.weight, b):
        return reason
    factors = (a.weight, b.weight, None, layer.scaling[adapter], 0.0, False)
    return Parts(weight, bias, *factors, magnitude, adapter, stored)


def _magnitude(layer: Linear, adapter: str) -> Tensor | str:
    """The magnitude [N] of a DoRA adapter, or the name of another variant, or why it cannot be served."""
    variant = type(layer.lora_variant[adapter])
    if variant is not DoraLinearVariant:
        return variant.__name__
    module = layer.lora_magnitude_vector[adapter]
    if type(module) is not DoraLinearLayer:
        return f"lora_magnitude_vector is a {type(module).__name__}"
    return "hooks on lora_magnitude_vector" if _has_hooks(module) else module.weight


def _dora_reason(
    layer: Linear, adapter: str, magnitude: Tensor, weight: Tensor | QuantisedWeight, lora_a: Tensor, lora_b: nn.Linear
) -> str | None:
    if type(layer.lora_dropout[adapter]) is not nn.Identity and layer.training:
        return "DoRA with dropout"  # PEFT drops the base product's input as well
    if isinstance(weight, QuantisedWeight):
        return "DoRA over a quantised base"
    if lora_b.bias is not None:
        return "DoRA with a lora_bias"
    if any(map(is_dtensor, (magnitude, weight, lora_a, lora_b.weight))):
        return "DoRA over DTensors"
    if magnitude.device != weight.device:
        return f"lora_magnitude_vector on {magnitude.device}"
    return None


def _inspect_several(layer: Linear, active: list[str]) -> Parts | str:
    """The parts of all active adapters as those of one, or the reason why they cannot be served fused."""
    found = []
    for adapter in active:
        parts = inspect(layer, adapter=adapter)
        if isinstance(parts, str):
            return parts
        if isinstance(parts, Units):
            return f"{len(active)} active adapters in FSDP units of single layers"
        found.append(parts)
    return stacked(found) if found else "0 active adapters"


def _linear_reason(role: str, linear: Any, kind: type = nn.Linear) -> str | None:
    """Why a layer cannot be replaced by a product with its weight, or None."""
    if type(linear) is not kind:
        return f"{role} is a {type(linear).__name__}"
    if _has_hooks(linear):
        return f"hooks on {role}"
    weight = linear.weight
    if not (is_plain(weight) or is_dtensor(weight)):
        return f"{role} holds a {type(weight).__name__}"
    return None


def _find_units(modules: tuple[nn.Module, ...]) -> Units | str:
    """The FSDP units among three layers that can be served, or why one of the three cannot be."""
    if torch.compiler.is_compiling() and any(map(is_unit, modules)):  # no forward can be replaced within a trace
        return "torch.compile over FSDP units of single layers"
    units, linears = [], []
    for role, module in zip(_ROLES, modules, strict=True):
        linear = unit_linear(module)
        if linear is not None:
            units.append(module)
        else:
            linear, reason = module, _linear_reason(role, module)
            if reason is not None:
                return _warn_of_unit(role) if is_unit(module) else reason
        linears.append(linear)
    return Units(units, linears)


@lru_cache
def _warn_of_unit(role: str) -> str:
    """The reason, and once a warning: a whole model trains unfused for the way it was wrapped."""
    reason = f"{role} is an FSDP unit with hooks of others, or of more than a plain nn.Linear"
    warnings.warn(f"PEFT's forward serves LoRA layers whose {reason}; wrap blocks instead", stacklevel=2)
    return reason


def input_reason(layer: Linear, parts: Parts, x: Tensor) -> str | None:
    """Why this input cannot be served fused by parts that can, or None."""
    weight, lora_a, lora_b = parts.weight, parts.lora_a, parts.lora_b
    if is_dtensor(weight):
        if not is_dtensor(x):
            return "DTensor base, plain input"
        if parts.dropout_p and parts.training:
            return "dropout over DTensors"
    elif is_dtensor(lora_a) or is_dtensor(lora_b):
        return "DTensor adapter, plain base"
    elif not is_plain(x):
        return f"the input is a {type(x).__name__}"
    if parts.magnitude is not None and x.dim() < 2:
        return "DoRA of a vector"  # of which PEFT makes a row
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "torch.func transform"
    return _dtype_reason(layer, parts, x.dtype, x.device.type)


def _dtype_reason(layer: Linear, parts: Parts, dtype: torch.dtype, device_type: str) -> str | None:
    """Why an input of this dtype cannot be served fused, or None."""
    adapters = (parts.lora_a.dtype, parts.lora_b.dtype)
    weight, bias = parts.weight, parts.bias
    is_4bit = isinstance(weight, QuantisedWeight) and weight.is_4bit
    by_torchao = isinstance(weight, QuantisedWeight) and not is_4bit
    casts = device_type != "meta" and torch.is_autocast_enabled(device_type)
    if by_torchao and bias is not None and bias.dtype != dtype and not casts:
        return f"{dtype} input, {bias.dtype} bias"  # torchao's formats differ in what they make of it
    return dtype_reason(layer, weight.dtype, adapters, dtype, device_type, own_dtype=is_4bit)


def dtype_reason(
    layer: LoraLayer,
    weight_dtype: torch.dtype,
    adapters: tuple[torch.dtype, torch.dtype],
    dtype: torch.dtype,
    device_type: str,
    own_dtype: bool = False,
) -> str | None:
    """Why an input of this dtype cannot be served fused by a base weight and by A and B of those, or None.

    own_dtype: the base layer computes in the weight's dtype whatever autocast says, as bitsandbytes' 4-bit ones do.
    """
    adapter_dtype = adapters[0]
    if adapter_dtype != adapters[1]:
        return "lora_A and lora_B differ in dtype"
    if dtype != adapter_dtype and not layer.cast_input_dtype_enabled:
        return "input casting disabled"
    if device_type != "meta" and dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        weight_dtype = weight_dtype if own_dtype else dtype
        adapter_dtype = adapter_dtype if adapter_dtype == torch.float32 else dtype
    if dtype != weight_dtype and own_dtype:
        return f"{dtype} input, compute dtype {weight_dtype}: set bnb_4bit_compute_dtype, or torch.autocast, to match"
    if dtype != weight_dtype or not (
        adapter_dtype == dtype or (adapter_dtype == torch.float32 and dtype.itemsize == 2)
    ):
        return f"{dtype} input, {weight_dtype} base, {adapter_dtype} adapter"
    return None


def _has_hooks(module: nn.Module) -> bool:
    """Whether something (tensor parallelism, sharding, offload, the user) relies on this module being called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is no subclass with a behaviour of its own."""
    return type(tensor) in _PLAIN_TENSORS or type(tensor).__name__ in _TRACING_TENSORS


def dropout_of(layer: Linear, adapter: str) -> tuple[float, bool] | str:
    """An adapter's dropout and whether it applies now, or why it cannot be fused."""
    dropout = layer._modules["lora_dropout"]._modules[adapter]
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"lora_dropout is a {type(dropout).__name__}"
    if _has_hooks(dropout):
        return "hooks on lora_dropout"
    return (dropout.p if type(dropout) is nn.Dropout else 0.0), dropout.training


def base_reason(layer: Linear, *factors: tuple[str, nn.Module]) -> str | None:
    """Why a layer's base, or its given factors by role, cannot be replaced by products with weights, or None."""
    if layer.fan_in_fan_out:
        return "fan_in_fan_out"
    for role, linear in factors or (("base_layer", layer.base_layer),):
        reason = _linear_reason(role, linear)
        if reason is not None:
            return reason
        if not is_plain(linear.weight):
            return f"{role} holds a {type(linear.weight).__name__}"
    return None if factors or not layer.base_layer.weight.requires_grad else "the base weight trains"


def segments_reason(
    dtype: torch.dtype,
    device: torch.device,
    adapters: tuple[torch.dtype, torch.dtype],
    sizes: tuple[int, int, int, int],
) -> str | None:
    """Why no backend serves rows in segments of an input of this dtype and of these sizes (M, N, K, R), or None."""
    if device.type != "cuda":
        return None
    if dtype != torch.float64 and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return why_no_backend(LaunchSpec("forward", Sizes(*sizes), dtype, adapters, device, branch="segments"))
