"""``FusedLinear``, which a patched PEFT model has in the place of ``lora.Linear``; the count of all other layers."""

import importlib
from functools import lru_cache
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora.counts import count_fallback
from fastlora.dora import Norms, dora_linear
from fastlora.integrations.fsdp import call_within, class_beneath, swap_class
from fastlora.integrations.peft_experts import FusedParamWrapper, experts_reason, wraps_experts
from fastlora.integrations.peft_mixed import (
    ACTIVATED,
    Mixed,
    activated_reason,
    inspect_activated,
    inspect_mixed,
    mixed_forward,
)
from fastlora.integrations.peft_quantised import FUSED_NAMES, as_stock
from fastlora.integrations.peft_reasons import Parts, Units, input_reason, inspect, state_reason
from fastlora.integrations.peft_reasons import call_reason as linear_reason
from fastlora.integrations.peft_shared import shared_parts
from fastlora.ops import lora_linear
from fastlora.quantised_weight import QUANTISES_INPUT
from fastlora.sharding import is_dtensor, lora_linear_sharded
from fastlora.shared_input.scope import shared_output

_SERVED_ARGUMENTS = ("adapter_names", "alora_offsets")
_NORMS = "_fastlora_norms"  # attribute of a layer: by adapter, what DoRA keeps between calls


class FusedForward:
    """What stands in front of a PEFT class in the fused class of it: the forward, and nothing else."""

    copy_input = False  # whether to save a copy of the input for the backward; see patch
    shares_input = False  # whether it is in a group; see patch
    shared_parts = shared_parts

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in_features] -> [..., out_features]; of further arguments, ``adapter_names`` or ``alora_offsets`` are
        served as well, the rest by PEFT's own forward."""
        if self.shares_input and not args and not kwargs and (y := shared_output(self, FusedLinear, x)) is not None:
            return y
        served: Parts | Units | Mixed | str
        names, offsets = kwargs.get("adapter_names"), kwargs.get("alora_offsets")
        if args or any(value is not None for name, value in kwargs.items() if name not in _SERVED_ARGUMENTS):
            served = "extra forward arguments"
        elif names is not None:
            served = inspect_mixed(self, x, names) if offsets is None else "adapter_names and alora_offsets"
        else:
            served = inspect(self)
            if isinstance(served, Parts):
                served = input_reason(self, served, x) or served
            elif served == ACTIVATED:
                served = inspect_activated(self, x, offsets)
        if isinstance(served, Mixed):
            return mixed_forward(served, x.clone() if self.copy_input else x)
        if isinstance(served, Parts):
            y = _fused_forward(self, served, x)
            return y if isinstance(served.weight, Tensor) else as_stock(self.base_layer, x, y)
        if isinstance(served, Units):
            return _forward_within(self, served, x)
        if not torch.compiler.is_compiling():
            count_fallback(f"peft: {served}")
        return super().forward(x, *args, **kwargs)


class FusedLinear(FusedForward, Linear):
    """PEFT's ``lora.Linear`` with a fused forward for active plain adapters over a frozen dense ``nn.Linear``.

    Same constructor, attributes, state dict and methods. ``patch`` turns existing layers into this class, ``register``
    makes PEFT construct it.
    """

    stock = Linear


_FUSED: dict[type, type] = {Linear: FusedLinear, ParamWrapper: FusedParamWrapper}


def type_reason(layer: LoraLayer) -> str | None:
    """Why ``patch`` leaves this LoRA layer alone whatever its state, or None."""
    kind = class_beneath(layer)
    if not is_fused(kind) and _fused_class(kind) is None:
        if kind.__name__ == "Linear8bitLt":
            return f"LLM.int8 {QUANTISES_INPUT}"
        return f"a {kind.__module__}.{kind.__name__}, not a stock lora.Linear"
    if issubclass(kind, ParamWrapper) and not wraps_experts(layer):
        return f"a {kind.__module__}.{kind.__name__}, not a stock lora.Linear"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance"
    return None


def call_reason(layer: LoraLayer) -> str | None:
    """Why the next call of a layer without a ``type_reason`` would not be fused, or None; see ``patch``."""
    if isinstance(layer, ParamWrapper):
        return experts_reason(layer)
    reason = linear_reason(layer)
    return activated_reason(layer) if reason == ACTIVATED else reason


@lru_cache
def _fused_class(kind: type) -> type | None:
    """The fused class of a class of PEFT's, or None. Those of quantised layers are made here, as PEFT's own exist only
    where the quantising library does."""
    if kind in _FUSED:
        return _FUSED[kind]
    name = FUSED_NAMES.get(f"{kind.__module__}.{kind.__name__}")
    if name is None:
        return None
    about = f"PEFT's ``{kind.__name__}`` with a fused forward, as ``FusedLinear`` has it."
    return type(name, (FusedForward, kind), {"__module__": __name__, "__doc__": about, "stock": kind})


def is_fused(kind: type) -> bool:
    """Whether this is one of the classes that ``fuse`` gives to layers."""
    return "stock" in vars(kind) and issubclass(kind, (FusedForward, FusedParamWrapper))


def __getattr__(name: str) -> type:
    """The fused classes of quantised layers by name, as pickle finds them."""
    for path, fused in FUSED_NAMES.items():
        if fused == name:
            module, _, kind = path.rpartition(".")
            found = _fused_class(getattr(importlib.import_module(module), kind))
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def fuse(layer: LoraLayer, copy_input: bool = False, may_hook: bool = True) -> None:
    """Gives a layer the fused class if there is one; any other layer's calls are counted from now on, by a hook."""
    kind = class_beneath(layer)
    if type_reason(layer) is None:
        _stop_counting(layer)
        if not is_fused(kind):
            swap_class(layer, _fused_class(kind))
        layer.copy_input = copy_input
    elif may_hook and not is_fused(kind) and count_call not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(count_call)


def restore(layer: LoraLayer) -> bool:
    """Takes ``fuse`` back; whether the layer had a fused class."""
    _stop_counting(layer)
    kind = class_beneath(layer)
    if not is_fused(kind):
        return False
    swap_class(layer, kind.stock)
    for name in ("copy_input", "shares_input", _NORMS):
        vars(layer).pop(name, None)
    return True


def count_call(layer: LoraLayer, args: tuple) -> None:
    """Forward pre-hook of a LoRA layer that PEFT serves itself. A graph of torch.compile has no trace of it."""
    if not torch.compiler.is_compiling():
        reason = state_reason(layer) or type_reason(layer) or "stock again since patch has seen it"
        count_fallback(f"peft: {reason}")


def _stop_counting(layer: LoraLayer) -> None:
    hooks = layer._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is count_call]:
        del hooks[key]


def _fused_forward(layer: Any, parts: Parts, x: Tensor) -> Tensor:
    weight, bias, lora_a, lora_b, lora_bias, scaling, dropout_p, training, magnitude, adapter, stored = parts
    if magnitude is not None:
        options = {"norms": _norms(layer, adapter), "stored": stored, "copy_input": layer.copy_input}
        return dora_linear(x, weight, lora_a, lora_b, scaling, magnitude, bias, **options)
    if lora_bias is not None:
        side = lora_bias * scaling
        bias = (side if bias is None else bias + side).to(weight.dtype)
    elif bias is not None and not isinstance(weight, Tensor) and bias.dtype != weight.dtype:
        bias = bias.to(weight.dtype)  # as bitsandbytes does
    if isinstance(scaling, Tensor):  # made one for hotswapping; its value is not waited for
        lora_b, scaling = lora_b * scaling, 1.0
    call = lora_linear_sharded if is_dtensor(weight) else lora_linear
    options = {"dropout_p": dropout_p, "training": training, "copy_input": layer.copy_input}
    return call(x, weight, lora_a, lora_b, scaling, bias, **options)


def _norms(layer: Any, adapter: str | None) -> Norms | None:
    """What DoRA keeps between calls of an adapter; nothing within a graph, which makes it itself."""
    if torch.compiler.is_compiling():
        return None
    return vars(layer).setdefault(_NORMS, {}).setdefault(adapter, Norms())


def _forward_within(layer: Linear, units: Units, x: Tensor) -> Tensor:
    """The forward of a layer some of whose weights exist only within the calls of their FSDP units."""

    def compute(x: Tensor) -> Tensor:
        parts = inspect(layer, units.linears)
        reason = parts if isinstance(parts, str) else input_reason(layer, parts, x)
        if reason is None:
            return _fused_forward(layer, parts, x)
        count_fallback(f"peft: {reason}")
        return _stock_forward(layer, units.linears, x)

    return call_within(units.modules, x, compute)


def _stock_forward(layer: Linear, linears: list[nn.Linear], x: Tensor) -> Tensor:
    """PEFT's own products for one active plain adapter, for where its forward cannot call the layers."""
    base, a, b = linears
    (adapter,) = [name for name in layer.active_adapters if name in layer.lora_A]
    y = F.linear(x, base.weight, base.bias)
    x = layer.lora_dropout[adapter](layer._cast_input_dtype(x, a.weight.dtype))
    side = F.linear(F.linear(x, a.weight), b.weight, b.bias)
    return (y + side * layer.scaling[adapter]).to(y.dtype)
