"""``FusedLinear``, which a patched PEFT model has in the place of ``lora.Linear``; the count of all other layers."""

import importlib
from functools import lru_cache
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora.dispatch import count_fallback
from fastlora.integrations.fsdp import call_within, class_beneath, swap_class
from fastlora.integrations.peft_quantised import FUSED_NAMES, as_stock
from fastlora.integrations.peft_reasons import Parts, Units, input_reason, inspect, state_reason
from fastlora.ops import lora_linear
from fastlora.quantised_weight import QUANTISES_INPUT
from fastlora.sharding import is_dtensor, lora_linear_sharded


class FusedForward:
    """What stands in front of a PEFT class in the fused class of it: the forward, and nothing else."""

    copy_input = False  # whether to save a copy of the input for the backward; see patch

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in_features] -> [..., out_features]; further arguments go to PEFT's own forward."""
        if args or (kwargs and any(value is not None for value in kwargs.values())):
            served = "adapter_names" if kwargs.get("adapter_names") is not None else "extra forward arguments"
        else:
            served = inspect(self)
            if isinstance(served, Parts):
                served = input_reason(self, served, x) or served
        if isinstance(served, Parts):
            y = _fused_forward(served, x, self.copy_input)
            return y if isinstance(served.weight, Tensor) else as_stock(self.base_layer, x, y)
        if isinstance(served, Units):
            return _forward_within(self, served, x)
        if not torch.compiler.is_compiling():
            count_fallback(f"peft: {served}")
        return super().forward(x, *args, **kwargs)


class FusedLinear(FusedForward, Linear):
    """PEFT's ``lora.Linear`` with a fused forward for one active plain adapter over a frozen ``nn.Linear``.

    Same constructor, attributes, state dict and methods. ``patch`` turns existing layers into this class, ``register``
    makes PEFT construct it.
    """

    stock = Linear


def type_reason(layer: LoraLayer) -> str | None:
    """Why ``patch`` leaves this LoRA layer alone whatever its state, or None."""
    kind = class_beneath(layer)
    if not is_fused(kind) and _fused_class(kind) is None:
        if kind.__name__ == "Linear8bitLt":
            return f"LLM.int8 {QUANTISES_INPUT}"
        return f"a {kind.__module__}.{kind.__name__}, not a stock lora.Linear"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance"
    return None


@lru_cache
def _fused_class(kind: type) -> type | None:
    """The fused class of a class of PEFT's, or None. Those of quantised layers are made here, as PEFT's own exist only
    where the quantising library does."""
    if kind is Linear:
        return FusedLinear
    name = FUSED_NAMES.get(f"{kind.__module__}.{kind.__name__}")
    if name is None:
        return None
    about = f"PEFT's ``{kind.__name__}`` with a fused forward, as ``FusedLinear`` has it."
    return type(name, (FusedForward, kind), {"__module__": __name__, "__doc__": about, "stock": kind})


def is_fused(kind: type) -> bool:
    """Whether this is one of the classes that ``fuse`` gives to layers."""
    return "stock" in vars(kind) and issubclass(kind, FusedForward)


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
    """Makes a layer a ``FusedLinear`` if it can be one; any other layer's calls are counted from now on, by a hook."""
    if type_reason(layer) is None:
        _stop_counting(layer)
        kind = class_beneath(layer)
        if not is_fused(kind):
            swap_class(layer, _fused_class(kind))
        layer.copy_input = copy_input
    elif may_hook and not is_fused(class_beneath(layer)) and count_call not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(count_call)


def restore(layer: LoraLayer) -> bool:
    """Takes ``fuse`` back; whether the layer was of a fused class."""
    _stop_counting(layer)
    kind = class_beneath(layer)
    if not is_fused(kind):
        return False
    swap_class(layer, kind.stock)
    vars(layer).pop("copy_input", None)
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


def _fused_forward(parts: Parts, x: Tensor, copy_input: bool) -> Tensor:
    weight, bias, lora_a, lora_b, lora_bias, scaling, dropout_p, training = parts
    if lora_bias is not None:
        side = lora_bias * scaling
        bias = (side if bias is None else bias + side).to(weight.dtype)
    elif bias is not None and not isinstance(weight, Tensor) and bias.dtype != weight.dtype:
        bias = bias.to(weight.dtype)  # as bitsandbytes does
    if isinstance(scaling, Tensor):  # made one for hotswapping; its value is not waited for
        lora_b, scaling = lora_b * scaling, 1.0
    call = lora_linear_sharded if is_dtensor(weight) else lora_linear
    options = {"dropout_p": dropout_p, "training": training, "copy_input": copy_input}
    return call(x, weight, lora_a, lora_b, scaling, bias, **options)


def _forward_within(layer: Linear, units: Units, x: Tensor) -> Tensor:
    """The forward of a layer some of whose weights exist only within the calls of their FSDP units."""

    def compute(x: Tensor) -> Tensor:
        parts = inspect(layer, units.linears)
        reason = parts if isinstance(parts, str) else input_reason(layer, parts, x)
        if reason is None:
            return _fused_forward(parts, x, layer.copy_input)
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
