"""``FusedParamWrapper``: what a patched PEFT model has for ``lora.ParamWrapper`` over transformers' experts.

PEFT wraps an experts module once for each parameter that it targets, one wrapper around the other. The outermost one
decides for them all.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastlora.dispatch import count_fallback, why_no_backend
from fastlora.integrations.experts import Factors, is_experts, is_serving, projections, serving
from fastlora.integrations.peft_reasons import dtype_reason, is_plain
from fastlora.problem import LaunchSpec, Sizes


class FusedParamWrapper(ParamWrapper):
    """PEFT's ``lora.ParamWrapper`` over the experts of a transformers model, without W + ΔW.

    Same constructor, attributes, state dict and methods.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [tokens, hidden] and what the experts module takes besides."""
        experts = self.get_base_layer()
        if is_serving(experts):  # for a wrapper around this one
            return self.base_layer(x, *args, **kwargs)
        if kwargs.get("adapter_names") is not None:
            served: dict[str, Factors] | str = "adapter_names"
        else:
            served = inspect_experts(self, x)
        if isinstance(served, str):
            if not torch.compiler.is_compiling():
                count_fallback(f"peft: {served}")
            return super().forward(x, *args, **kwargs)
        with serving(experts, served):
            return self.base_layer(x, *args, **kwargs)


# PEFT knows a wrapper by the name of its class when a further adapter comes. Pickles hold the qualified name.
FusedParamWrapper.__name__ = "ParamWrapper"


def wraps_experts(layer: ParamWrapper) -> bool:
    """Whether a wrapper is one of transformers' experts, whatever its state."""
    return is_experts(layer.get_base_layer())


def experts_reason(layer: ParamWrapper) -> str | None:
    """Why this wrapper's next call would not be served, or None, for an input of the weights' dtype."""
    found = inspect_experts(layer, None)
    return found if isinstance(found, str) else None


def inspect_experts(layer: ParamWrapper, x: Tensor | None) -> dict[str, Factors] | str:
    """The factors of a wrapper and of those within it, by the name of their parameter; or why PEFT has to serve it.

    Args:
        layer: the wrapper that is called.
        x: its input [tokens, hidden], or None for one of the weights' dtype.
    """
    experts = layer.get_base_layer()
    if experts.num_experts < 2:
        return "1 expert"
    found: dict[str, Factors] = {}
    for wrapper in _wrappers(layer):
        factors = _factors(wrapper, experts)
        if isinstance(factors, str):
            return factors
        if factors is not None:
            found[wrapper.parameter_name] = factors
    if not found:
        return "0 active adapters"
    if parametrize.is_parametrized(experts):
        return "experts that PEFT serves for a wrapper around this one"
    if x is not None and not is_plain(x):
        return f"the input is a {type(x).__name__}"
    if x is not None and x.dim() != 2:
        return f"an input of {x.dim()} dimensions"
    for name in projections(experts):
        reason = _call_reason(layer, getattr(experts, name), experts, found.get(name), x)
        if reason is not None:
            return reason
    return found


def _wrappers(layer: nn.Module) -> Iterator[ParamWrapper]:
    """A wrapper and those within it."""
    while isinstance(layer, ParamWrapper):
        yield layer
        layer = layer.base_layer


def _factors(wrapper: ParamWrapper, experts: nn.Module) -> Factors | str | None:
    """A wrapper's factors, or why it is not served, or None where no adapter of it is active."""
    if wrapper._disable_adapters:
        return "adapters disabled"
    if wrapper.merged_adapters:
        return "merged"
    if wrapper.parameter_name not in projections(experts):
        return f"LoRA on {wrapper.parameter_name} of experts"
    active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    if not active:
        return None
    if len(active) > 1:
        return f"{len(active)} active adapters"
    if getattr(wrapper, "_did_swap_in_out_features", None) is not (not experts.is_transposed):
        return "factors of experts in the layout of an older PEFT"
    (adapter,) = active
    a, b, scaling = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight, wrapper.scaling[adapter]
    weight = getattr(experts, wrapper.parameter_name)
    for role, tensor in (("lora_A", a), ("lora_B", b), ("the experts module", weight)):
        if not is_plain(tensor):
            return f"{role} holds a {type(tensor).__name__}"
    if weight.requires_grad:
        return "the base weight trains"
    n_experts = experts.num_experts
    lora_a = a.view(n_experts, -1, a.shape[1])  # the expert varies slowest
    lora_b = b.view(b.shape[0], -1, n_experts).permute(2, 0, 1)  # here fastest
    if isinstance(scaling, Tensor):  # made one for hotswapping; its value is not waited for
        lora_b, scaling = lora_b * scaling, 1.0
    return Factors(lora_a, lora_b, scaling)


def _call_reason(
    layer: ParamWrapper, weight: Tensor, experts: nn.Module, factors: Factors | None, x: Tensor | None
) -> str | None:
    """Why a product by one of the experts' parameters cannot be served, or None."""
    dtype, device = (weight.dtype, weight.device) if x is None else (x.dtype, x.device)
    if not is_plain(weight):
        return f"the experts module holds a {type(weight).__name__}"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "torch.func transform"
    adapters = (weight.dtype, weight.dtype) if factors is None else (factors.lora_a.dtype, factors.lora_b.dtype)
    reason = dtype_reason(layer, weight.dtype, adapters, dtype, device.type)
    if reason is not None or device.type != "cuda":
        return reason
    _, n, k = weight.shape if not experts.is_transposed else weight.transpose(1, 2).shape
    sizes = Sizes(1 if x is None else x.shape[0], n, k, 1 if factors is None else factors.lora_a.shape[1])
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    spec = LaunchSpec("forward", sizes, dtype, adapters, device, branch="segments")
    return why_no_backend(spec)
