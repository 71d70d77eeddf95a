"""PEFT's layers in groups that share an input: what a call computes with, so that the next one finds the same."""

from typing import Any

from torch import Tensor, nn

from fastlora.integrations.peft_parts import Parts
from fastlora.integrations.peft_reasons import dtype_reason, inspect


def shared_parts(layer: Any, x: Tensor | None) -> tuple | str:
    """What a call of a fused layer computes with now, or why it has to be a call of its own (see
    fastlora.shared_input.scope.Sharer)."""
    if layer.fan_in_fan_out:
        return "fan_in_fan_out"
    active = layer._active_adapter
    if type(active) is not str and len([name for name in active if name in layer.lora_A]) > 1:
        return "several active adapters"  # whose stacks are new tensors at every call
    parts = inspect(layer)
    if not isinstance(parts, Parts):
        return parts if isinstance(parts, str) else "FSDP units of single layers"
    weight, bias, lora_a, lora_b, lora_bias, scaling, dropout_p, training, magnitude, *_ = parts
    if magnitude is not None or lora_bias is not None:
        return "DoRA" if lora_bias is None else "lora_bias"
    if not isinstance(weight, Tensor):
        return "a quantised base"
    if type(weight) is not nn.Parameter:
        return "a base weight that is no parameter"  # FSDP1's is another view at every call
    if type(scaling) not in (float, int):
        return "a scaling that is no number"
    if x is not None:
        reason = dtype_reason(layer, weight.dtype, (lora_a.dtype, lora_b.dtype), x.dtype, x.device.type)
        if reason is not None:
            return reason
    return weight, lora_a, lora_b, bias, scaling, dropout_p if training else 0.0
