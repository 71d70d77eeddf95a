"""PEFT models on fastlora's kernels: one line, ``patch(model)``, and everything else stays PEFT's.

The adapters, their names, files, merging and switching remain PEFT's own; only the forward of its ``lora.Linear``
changes, and only where the fused layer computes the same thing. Any other call goes to PEFT's forward and is counted,
by reason, in ``fastlora.dispatch_counts()["fallbacks"]``.
"""

from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn

from fastlora.dispatch import count_fallback
from fastlora.ops import lora_linear
from fastlora.sharding import is_dtensor, lora_linear_sharded

_PLAIN_TENSORS = (nn.Parameter, Tensor)
# Tensors that stand in for plain ones while torch.export or torch.func look at a model.
_TRACING_TENSORS = ("FakeTensor", "FunctionalTensor")


class FusedLinear(Linear):
    """PEFT's ``lora.Linear`` with a fused forward for one active plain adapter over a frozen dense ``nn.Linear``.

    Same constructor, attributes, state dict and methods. ``patch`` turns existing layers into this class, ``register``
    makes PEFT construct it.
    """

    copy_input = False  # whether to save a copy of the input for the backward; see patch

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in_features] -> [..., out_features]; further arguments go to PEFT's own forward."""
        if args or (kwargs and any(value is not None for value in kwargs.values())):
            served = "adapter_names" if kwargs.get("adapter_names") is not None else "extra forward arguments"
        else:
            served = _inspect(self)
            if isinstance(served, _Parts):
                served = _input_reason(self, served, x) or served
        if isinstance(served, _Parts):
            return _fused_forward(served, x, self.copy_input)
        if not torch.compiler.is_compiling():
            count_fallback(f"peft: {served}")
        return super().forward(x, *args, **kwargs)


def patch(model: nn.Module, strict: bool = False, copy_input: bool = False) -> list[str]:
    """Turns every stock ``lora.Linear`` of a PEFT model into a ``FusedLinear``, in place.

    It works on what ``get_peft_model`` and ``from_pretrained`` return and on models inside trainers; ``unpatch``
    reverts it. Call it before ``fully_shard`` or a wrapper that replaces ``forward``, and again where ``add_adapter``
    has put LoRA on further layers, which are stock ones.

    Args:
        model: any module that holds PEFT LoRA layers.
        strict: refuse a model in which some LoRA layer, as it is now, would run PEFT's own forward.
        copy_input: save a copy of each layer's input for the backward, as PEFT does where it casts the input or drops
            elements of it, so that a model may modify the input in place after the layer (``x += layer(x)``).

    Returns:
        Paths of the layers that are fused now.

    Raises:
        ValueError: the model has no PEFT LoRA layer; or ``strict`` and some layer cannot be served, in which case all
            such layers are listed with their reasons and nothing is changed.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no PEFT LoRA layer; call peft.get_peft_model first")
    if strict:
        refused = unserved(model)
        if refused:
            listing = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
            raise ValueError(f"{len(refused)} of {len(layers)} LoRA layers cannot be served fused: {listing}")
    fused = []
    for name, module in layers.items():
        if type_reason(module) is None:
            module.__class__ = FusedLinear
            module.copy_input = copy_input
            fused.append(name)
    return fused


def unpatch(model: nn.Module) -> list[str]:
    """Turns every ``FusedLinear`` back into PEFT's own class, in place. Returns the paths of the layers it changed."""
    names = []
    for name, module in model.named_modules():
        if type(module) is FusedLinear:
            module.__class__ = Linear
            vars(module).pop("copy_input", None)
            names.append(name)
    return names


def register(lora_config: LoraConfig) -> LoraConfig:
    """Makes ``get_peft_model`` construct ``FusedLinear`` layers. The entry is not saved with the configuration.

    Quantised and other special layers, which subclass ``nn.Linear``, still get the classes that PEFT has for them.

    Returns:
        The configuration given, changed.
    """
    lora_config._register_custom_module({nn.Linear: _construct})
    return lora_config


def unserved(model: nn.Module) -> dict[str, str]:
    """Every PEFT LoRA layer that, as it is now, would run PEFT's own forward, with the reason."""
    reasons = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            reason = type_reason(module) or call_reason(module)
            if reason is not None:
                reasons[name] = reason
    return reasons


def type_reason(layer: LoraLayer) -> str | None:
    """Why ``patch`` leaves this LoRA layer alone whatever its state, or None."""
    if type(layer) not in (Linear, FusedLinear):
        return f"a {type(layer).__module__}.{type(layer).__name__}, not a stock lora.Linear"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance"
    return None


def call_reason(layer: Linear) -> str | None:
    """Why this layer's next call would not be fused, or None: everything that does not depend on the input."""
    found = _inspect(layer)
    return found if isinstance(found, str) else None


class _Parts(NamedTuple):
    """What one fused call uses. Looked up at every call: PEFT replaces weights and changes scalings in place."""

    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    lora_a: Tensor  # [R, K]
    lora_b: Tensor  # [N, R]
    lora_bias: Tensor | None  # [N]
    scaling: float | Tensor
    dropout_p: float
    training: bool


def _inspect(layer: Linear) -> _Parts | str:
    """The parts of a layer that can be served fused, or the reason why it cannot."""
    if layer._disable_adapters:
        return "adapters disabled"
    if layer.merged_adapters:
        return "merged"
    modules = layer._modules  # nn.Module's own lookup takes longer than all these checks
    lora_a = modules["lora_A"]._modules
    active = [name for name in layer.active_adapters if name in lora_a]
    if len(active) != 1:
        return f"{len(active)} active adapters"
    (adapter,) = active
    if adapter in layer.lora_variant:
        return type(layer.lora_variant[adapter]).__name__
    if layer.fan_in_fan_out:
        return "fan_in_fan_out"
    base, a, b = modules["base_layer"], lora_a[adapter], modules["lora_B"]._modules[adapter]
    reason = _linear_reason("base_layer", base) or _linear_reason("lora_A", a) or _linear_reason("lora_B", b)
    if reason is not None:
        return reason
    weight = base.weight
    if weight.requires_grad:
        return "the base weight trains"
    dropout = modules["lora_dropout"]._modules[adapter]
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"lora_dropout is a {type(dropout).__name__}"
    if _has_hooks(dropout):
        return "hooks on lora_dropout"
    p = dropout.p if type(dropout) is nn.Dropout else 0.0
    return _Parts(weight, base.bias, a.weight, b.weight, b.bias, layer.scaling[adapter], p, dropout.training)


def _linear_reason(role: str, linear: nn.Module) -> str | None:
    """Why a layer cannot be replaced by a product with its weight, or None."""
    if type(linear) is not nn.Linear:
        return f"{role} is a {type(linear).__name__}"
    if _has_hooks(linear):
        return f"hooks on {role}"
    weight = linear.weight
    if not (_is_plain(weight) or is_dtensor(weight)):
        return f"{role} holds a {type(weight).__name__}"
    return None


def _input_reason(layer: Linear, parts: _Parts, x: Tensor) -> str | None:
    """Why this input cannot be served fused by parts that can, or None."""
    weight, lora_a, lora_b = parts.weight, parts.lora_a, parts.lora_b
    if is_dtensor(weight):
        if not is_dtensor(x):
            return "DTensor base, plain input"
        if parts.dropout_p and parts.training:
            return "dropout over DTensors"
    elif is_dtensor(lora_a) or is_dtensor(lora_b):
        return "DTensor adapter, plain base"
    elif not _is_plain(x):
        return f"the input is a {type(x).__name__}"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "torch.func transform"
    dtype, weight_dtype, adapter_dtype = x.dtype, weight.dtype, lora_a.dtype
    if adapter_dtype != lora_b.dtype:
        return "lora_A and lora_B differ in dtype"
    if dtype != adapter_dtype and not layer.cast_input_dtype_enabled:
        return "input casting disabled"
    if x.device.type != "meta" and dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        dtype = weight_dtype = torch.get_autocast_dtype(x.device.type)
        adapter_dtype = adapter_dtype if adapter_dtype == torch.float32 else dtype
    if dtype != weight_dtype or not (
        adapter_dtype == dtype or (adapter_dtype == torch.float32 and dtype.itemsize == 2)
    ):
        return f"{dtype} input, {weight_dtype} base, {adapter_dtype} adapter"
    return None


def _fused_forward(parts: _Parts, x: Tensor, copy_input: bool) -> Tensor:
    weight, bias, lora_a, lora_b, lora_bias, scaling, dropout_p, training = parts
    if lora_bias is not None:
        side = lora_bias * scaling
        bias = (side if bias is None else bias + side).to(weight.dtype)
    if isinstance(scaling, Tensor):  # made one for hotswapping; its value is not waited for
        lora_b, scaling = lora_b * scaling, 1.0
    call = lora_linear_sharded if is_dtensor(weight) else lora_linear
    options = {"dropout_p": dropout_p, "training": training, "copy_input": copy_input}
    return call(x, weight, lora_a, lora_b, scaling, bias, **options)


def _has_hooks(module: nn.Module) -> bool:
    """Whether something (tensor parallelism, sharding, offload, the user) relies on this module being called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN_TENSORS or type(tensor).__name__ in _TRACING_TENSORS


def _construct(target: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> FusedLinear | None:
    """The factory behind ``register``; None hands the target on to PEFT's own dispatchers."""
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    config = kwargs.get("config")
    transposed = getattr(config, "fan_in_fan_out", False) or kwargs.get("fan_in_fan_out", False)
    if type(base) is not nn.Linear or not _is_plain(base.weight) or transposed or kwargs.get("parameter_name"):
        return None
    return FusedLinear(target, adapter_name, *args, **kwargs)
