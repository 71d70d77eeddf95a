"""``FusedParamWrapper``: what a patched PEFT model has for ``lora.ParamWrapper`` over transformers' experts.

PEFT wraps an experts module once for each parameter that it targets, one wrapper around the other. The outermost one
decides for them all.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from fastlora.counts import count_fallback
from fastlora.differentiable import transform_reason
from fastlora.experts import (
    Factors,
    Tenants,
    is_experts,
    is_serving,
    layers_ahead,
    per_expert,
    projections,
    serving,
)
from fastlora.grouped.ahead import GroupedLayer
from fastlora.integrations.peft_parts import scaled, split_scalings
from fastlora.integrations.peft_reasons import BASE, dtype_reason, is_plain, segments_reason
from fastlora.segments import NO_ADAPTER


class FusedParamWrapper(ParamWrapper):
    """PEFT's ``lora.ParamWrapper`` over the experts of a transformers model, without W + ΔW.

    Same constructor, attributes, state dict and methods.
    """

    stock = ParamWrapper

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [tokens, hidden] and what the experts module takes besides."""
        experts = self.get_base_layer()
        if is_serving(experts):  # for a wrapper around this one
            kwargs.pop("adapter_names", None)
            return self.base_layer(x, *args, **kwargs)
        names = kwargs.get("adapter_names")
        served = inspect_experts(self, x, names)
        if isinstance(served, str):
            if not torch.compiler.is_compiling():
                count_fallback(f"peft: {served}")
            return super().forward(x, *args, **kwargs)
        if names is None:
            with serving(experts, served):
                return self.base_layer(x, *args, **kwargs)
        del kwargs["adapter_names"]
        with serving(experts, served, _tenants(self, x, names)):
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


def wrappers_ahead(layer: ParamWrapper, names: Sequence[str] | None) -> tuple[int, list[GroupedLayer]]:
    """How many wrappers an experts module has, and its two calls, before it is called, for tokens of one sample each of
    a batch with these adapter_names. Of a wrapper within another: nothing.
    """
    x = None
    if names is not None:
        x = getattr(layer.get_base_layer(), layer.parameter_name).new_empty(len(names), 1)
    served = inspect_experts(layer, x, names)
    if isinstance(served, str):
        return 0, []
    n_tenants = None if names is None else len(_used(layer, names))
    return len(served), layers_ahead(layer.get_base_layer(), served, n_tenants)


def inspect_experts(
    layer: ParamWrapper, x: Tensor | None, names: Sequence[str] | None = None
) -> dict[str, Factors] | str:
    """The factors of a wrapper and of those within it, by the name of their parameter; or why PEFT has to serve it.

    Args:
        layer: the wrapper that is called.
        x: its input [tokens, hidden], or None for one of the weights' dtype.
        names: PEFT's adapter_names, one for each sample of the batch whose tokens x holds, sample by sample.
    """
    experts = layer.get_base_layer()
    if experts.num_experts < 2:
        return "1 expert"
    found: dict[str, Factors] = {}
    if names is not None and (reason := _names_reason(layer, x, names)):
        return reason
    for wrapper in _wrappers(layer):
        factors = _factors(wrapper, experts, _used(wrapper, names), _summed if names is None else _side_by_side)
        if isinstance(factors, str):
            return factors
        if factors is not None:
            found[wrapper.parameter_name] = factors
    if not found:
        return "0 active adapters"
    if parametrize.is_parametrized(experts):
        return "experts that PEFT serves for a wrapper around this one"
    if x is not None and x.dim() != 2:
        return f"an input of {x.dim()} dimensions"
    if x is not None and not is_plain(x):
        return f"the input is a {type(x).__name__}"
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


def _used(wrapper: ParamWrapper, names: Sequence[str] | None) -> list[str]:
    """The adapters that a call uses, in the order of their numbers."""
    given = wrapper.active_adapters if names is None else dict.fromkeys(name for name in names if name != BASE)
    return [name for name in given if name in wrapper.lora_A]


def _names_reason(layer: ParamWrapper, x: Tensor | None, names: Sequence[str]) -> str | None:
    """Why several adapters over experts cannot be served, or None."""
    if x is None or x.dim() != 2 or not names or x.shape[0] % len(names):
        return f"{len(names)} adapter_names for an input {None if x is None else list(x.shape)}"
    if len({tuple(_used(wrapper, names)) for wrapper in _wrappers(layer)}) > 1:
        return "adapter_names of adapters on one of two parameters"
    return None


def _tenants(layer: ParamWrapper, x: Tensor, names: Sequence[str]) -> Tenants:
    """Which adapter each token has."""
    used = _used(layer, names)
    owners = torch.tensor([used.index(name) if name in used else NO_ADAPTER for name in names], device=x.device)
    return Tenants(owners.repeat_interleave(x.shape[0] // len(names)), len(used))


def _factors(
    wrapper: ParamWrapper, experts: nn.Module, used: list[str], join: Callable[[list[Factors]], Factors]
) -> Factors | str | None:
    """A wrapper's factors of the adapters that a call uses, or why it is not served, or None where there are none.

    Args:
        join: what is made of several.
    """
    if wrapper._disable_adapters:
        return "adapters disabled"
    if wrapper.merged_adapters:
        return "merged"
    if wrapper.parameter_name not in projections(experts):
        return f"LoRA on {wrapper.parameter_name} of experts"
    if wrapper.num_experts != experts.num_experts:
        return "experts that something shares out"
    if getattr(wrapper, "_did_swap_in_out_features", None) is not (not experts.is_transposed):
        return "factors of experts in the layout of an older PEFT"
    weight = getattr(experts, wrapper.parameter_name)
    if not is_plain(weight):
        return f"the experts module holds a {type(weight).__name__}"
    if weight.requires_grad:
        return "the base weight trains"
    found = [_factors_of(wrapper, adapter, experts.num_experts) for adapter in used]
    if not found:
        return None
    for factor in (tensor for factors in found for tensor in factors[:2]):
        if not is_plain(factor):
            return f"lora_A or lora_B holds a {type(factor).__name__}"
    if len({factor.dtype for factors in found for factor in factors[:2]}) > 1:
        return "lora_A and lora_B differ in dtype"
    return found[0] if len(found) == 1 else join(found)


def _summed(found: list[Factors]) -> Factors:
    """One adapter that computes the sum of several: their ranks stacked, as ``peft_parts.stacked`` has it."""
    scaling, factors = split_scalings([each.scaling for each in found])
    lora_b = [scaled(each.lora_b, factor) for each, factor in zip(found, factors, strict=True)]
    return Factors(torch.cat([each.lora_a for each in found], 1), torch.cat(lora_b, 2), scaling)


def _side_by_side(found: list[Factors]) -> Factors:
    """Several adapters, of which each row has one."""
    rank = max(factors.lora_a.shape[1] for factors in found)
    n_experts, device = len(found[0].lora_a), found[0].lora_a.device
    scalings = torch.tensor([factors.scaling for factors in found], device=device)
    return Factors(
        torch.cat([F.pad(a, (0, 0, 0, rank - a.shape[1])) for a, _, _ in found]),
        torch.cat([F.pad(b, (0, rank - b.shape[2])) for _, b, _ in found]),
        scalings.repeat_interleave(n_experts),
    )


def _factors_of(wrapper: ParamWrapper, adapter: str, n_experts: int) -> Factors:
    """One adapter's factors, as views of PEFT's parameters."""
    a, b, scaling = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight, wrapper.scaling[adapter]
    lora_a, lora_b = per_expert(a, b, n_experts)
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
    if not torch.compiler.is_compiling() and (reason := transform_reason()):
        return reason
    adapters = (weight.dtype, weight.dtype) if factors is None else (factors.lora_a.dtype, factors.lora_b.dtype)
    _, n, k = weight.shape if not experts.is_transposed else weight.transpose(1, 2).shape
    sizes = (1 if x is None else x.shape[0], n, k, 1 if factors is None else factors.lora_a.shape[1])
    return dtype_reason(layer, weight.dtype, adapters, dtype, device.type) or segments_reason(
        dtype, device, adapters, sizes
    )
