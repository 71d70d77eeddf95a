"""PEFT models on fastlora's kernels: one line, ``patch(model)``, and everything else stays PEFT's.

The adapters, their names, files, merging and switching remain PEFT's own; only the forward of its ``lora.Linear``
changes, of its layers over bitsandbytes' 4-bit and torchao's 8-bit weights, and of its ``lora.ParamWrapper`` over the
experts of a transformers model, and only where the fused layer computes the same thing. Any other call of any LoRA
layer, of whatever class, goes to PEFT's forward and is counted, by reason, in
``fastlora.dispatch_counts()["fallbacks"]``. Calls within a graph of ``torch.compile`` are served alike, but what falls
back there is not counted.
"""

from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraConfig, LoraModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from fastlora.integrations.peft_experts import FusedParamWrapper
from fastlora.integrations.peft_layer import FusedLinear, call_reason, fuse, restore, type_reason
from fastlora.integrations.peft_mixed import MixedLoraModel
from fastlora.own_forward import is_replaced
from fastlora.shared_input.plan import SharedInputs, observe, ungroup
from fastlora.shared_input.plan import group as group_layers
from fastlora.warming import warmup as warm_up

__all__ = ["FusedLinear", "FusedParamWrapper", "Patched", "patch", "register", "unpatch", "unserved"]

_NEVER_CALLED = "torch.nn.MultiheadAttention reads its weight and never calls it"
_FAST_PATH = "torch.nn.TransformerEncoderLayer in eval mode reads its weight and does not call it"
_NAMES_SHOWN = 3


class Patched(list):
    """Paths of the layers that a call would be served fused for now; printed, it says what becomes of the others.

    Attributes:
        unserved: every other LoRA layer's path, with the reason why PEFT's own forward serves it.
        groups: the layers that share an input and are computed together.
    """

    def __init__(self, served: list[str], unserved: dict[str, str], groups: SharedInputs | None = None):
        super().__init__(served)
        self.unserved = unserved
        self.groups = SharedInputs() if groups is None else groups

    @property
    def summary(self) -> str:
        """For example "14 of 16 LoRA layers fused; 2 by PEFT's forward: DoraLinearVariant (2): a.q_proj, b.q_proj"."""
        text = f"{len(self)} of {len(self) + len(self.unserved)} LoRA layers fused"
        if self.groups:
            text += f"; together: {self.groups}"
        if not self.unserved:
            return text
        names: dict[str, list[str]] = {}
        for name, reason in self.unserved.items():
            names.setdefault(reason, []).append(name)
        parts = [
            f"{reason} ({len(group)}): {', '.join(group[:_NAMES_SHOWN])}{', …' if len(group) > _NAMES_SHOWN else ''}"
            for reason, group in names.items()
        ]
        return f"{text}; {len(self.unserved)} by PEFT's forward: {'; '.join(parts)}"

    def __repr__(self) -> str:
        return self.summary


def patch(
    model: nn.Module, strict: bool = False, copy_input: bool = False, warmup: bool = False, group: Any = False
) -> Patched:
    """Turns every stock ``lora.Linear`` of a PEFT model into a ``FusedLinear``, in place, every ``lora.bnb.Linear4bit``
    and ``TorchaoLoraLinear`` into a fused class of it, and every ``ParamWrapper`` over experts that transformers calls
    through its ``ExpertsInterface`` into a ``FusedParamWrapper``.

    It works on what ``get_peft_model`` and ``from_pretrained`` return, on models inside trainers and on models that
    ``fully_shard`` has sharded; ``unpatch`` reverts it. Several active adapters are one fused call, their ranks
    stacked. A layer whose state keeps it from being served now (merged, disabled, several active adapters with dropout
    in training) is served as soon as its state allows. Layers that ``add_adapter`` makes later are turned when the
    model is called next, except within a graph of ``torch.compile``: patch again before that.

    Args:
        model: any module that holds PEFT LoRA layers.
        strict: refuse a model in which some LoRA layer, as it is now, would run PEFT's own forward.
        copy_input: save a copy of each layer's input for the backward, as PEFT does where it casts the input or drops
            elements of it, so that a model may modify the input in place after the layer (``x += layer(x)``).
        warmup: compile the layers' kernels now, side by side (``fastlora.warmup`` with its defaults), so that the model
            should be on its device and have its dtypes.
        group: compute layers together that receive the same tensor, as q, k and v do. Which ones those are one forward
            of the model says, in eval mode and without gradients, before anything is changed: True runs it on the
            model's own ``dummy_inputs`` (transformers has them), anything else is a batch to run it on (a dict, a
            tuple, a list or a tensor). Groups of an earlier call are forgotten. What differs with groups is said in
            ``fastlora.integrations``.

    Returns:
        Paths of the layers for which a call would be served fused now, given an input of the base weight's dtype:
        a list, with the other layers and their reasons in ``unserved``, the groups in ``groups``, and all of it in its
        printed form.

    Raises:
        ValueError: the model has no PEFT LoRA layer; or ``strict`` and some layer cannot be served, in which case all
            such layers are listed with their reasons and nothing is changed; or ``group`` is True and the model has no
            ``dummy_inputs`` that it runs on.
        TypeError: ``group`` is of another type.
    """
    layers = _lora_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no PEFT LoRA layer; call peft.get_peft_model first")
    refused = _reasons(layers)
    if strict and refused:
        listing = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ValueError(f"{len(refused)} of {len(layers)} LoRA layers cannot be served fused: {listing}")
    groups = {} if group is False else observe(model, group, [found.name for found in layers])
    ungroup(model)
    for found in layers:
        found.fuse(copy_input)
    groups = group_layers(model, groups, FusedLinear)
    for tuner in model.modules():
        if type(tuner) is LoraModel:
            tuner.__class__ = MixedLoraModel
    for home in _homes(model):
        _remove_watches(home)
        home.register_forward_pre_hook(_Watch(home, copy_input))
    if warmup and len(refused) < len(layers):
        warm_up(model)
    return Patched([found.name for found in layers if found.name not in refused], refused, groups)


def unpatch(model: nn.Module) -> list[str]:
    """Turns every ``FusedLinear`` and ``FusedParamWrapper`` back into PEFT's own class, in place, and ends the counting
    of all other layers, and all groups.

    Returns:
        The paths of the layers whose class it changed.
    """
    ungroup(model)
    for tuner in model.modules():
        if type(tuner) is MixedLoraModel:
            tuner.__class__ = LoraModel
    for home in _homes(model):
        _remove_watches(home)
    return [found.name for found in _lora_layers(model) if restore(found.layer)]


def register(lora_config: LoraConfig) -> LoraConfig:
    """Makes ``get_peft_model`` construct what ``patch`` would make of each layer. The entry is not saved with the
    configuration.

    Layers of other kinds still get the classes that PEFT, or another entry, has for them.

    Returns:
        The configuration given, changed.
    """
    others = {} if lora_config._custom_modules is None else lora_config._custom_modules
    lora_config._custom_modules = {nn.Module: _construct, **others}  # the first entry that fits decides
    return lora_config


def unserved(model: nn.Module) -> dict[str, str]:
    """Every PEFT LoRA layer that, as it is now, would run PEFT's own forward (or none), with the reason."""
    return _reasons(_lora_layers(model))


class _Found(NamedTuple):
    """A LoRA layer of a model and what torch's own modules around it do with it."""

    name: str
    layer: LoraLayer
    uncalled: str | None  # why the layer is never called, or None
    encoder: nn.TransformerEncoderLayer | None

    def reason(self) -> str | None:
        """Why a call would not be served fused now, or None."""
        reason = self.uncalled or type_reason(self.layer) or call_reason(self.layer)
        return _FAST_PATH if reason is None and self.encoder is not None and not self.encoder.training else reason

    def fuse(self, copy_input: bool) -> None:
        # A hook inside an encoder layer would end its fast path, and with it the support of nested tensors.
        if self.uncalled is None:
            fuse(self.layer, copy_input=copy_input, may_hook=self.encoder is None)


def _lora_layers(model: nn.Module) -> list[_Found]:
    found: list[_Found] = []
    uncalled: dict[nn.Module, str] = {}
    encoders: dict[nn.Module, nn.TransformerEncoderLayer] = {}
    for name, module in model.named_modules():  # a parent comes before its children
        if _is_torchs_own(module, nn.MultiheadAttention):
            uncalled[module.out_proj] = _NEVER_CALLED
        if is_replaced(module):
            around = [child for child in module.children() if isinstance(child, ParamWrapper)]
            uncalled.update(dict.fromkeys(around, f"a kernel has replaced the forward of the {type(module).__name__}"))
        if isinstance(module, ParamWrapper) and module in uncalled:
            uncalled[module.base_layer] = uncalled[module]
        if _is_torchs_own(module, nn.TransformerEncoderLayer):
            encoders.update(dict.fromkeys(module.modules(), module))
        if isinstance(module, LoraLayer):
            found.append(_Found(name, module, uncalled.get(module), encoders.get(module)))
    return found


def _is_torchs_own(module: nn.Module, kind: type[nn.Module]) -> bool:
    return isinstance(module, kind) and type(module).forward is kind.forward


def _reasons(layers: list[_Found]) -> dict[str, str]:
    reasons = {found.name: found.reason() for found in layers}
    return {name: reason for name, reason in reasons.items() if reason is not None}


class _Watch:
    """Forward pre-hook of a model that adapters were put into: patches what further adapters have added since."""

    def __init__(self, home: nn.Module, copy_input: bool):
        self.configs, self.copy_input = list(home.peft_config.values()), copy_input

    def __call__(self, home: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling():
            return
        configs = getattr(home, "peft_config", {}).values()  # PEFT deletes it with the last adapter
        if len(configs) == len(self.configs) and all(map(_is, configs, self.configs)):
            return
        self.configs = list(configs)
        for found in _lora_layers(home):
            found.fuse(self.copy_input)


def _is(one: object, other: object) -> bool:
    return one is other


def _homes(model: nn.Module) -> list[nn.Module]:
    """The models that PEFT has put adapters into: it leaves their configurations there."""
    return [
        module
        for module in model.modules()
        if isinstance(vars(module).get("peft_config"), dict)
        and not isinstance(module, (BaseTuner, PeftModel, nn.TransformerEncoderLayer))
    ]


def _remove_watches(home: nn.Module) -> None:
    hooks = home._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Watch)]:
        del hooks[key]


def _construct(target: nn.Module, adapter_name: str, *, config: LoraConfig, **kwargs: Any) -> nn.Module:
    """The factory behind ``register``: PEFT's own choice of a class, then what ``patch`` makes of it."""
    mapping = config._custom_modules
    config._custom_modules = {kind: factory for kind, factory in mapping.items() if factory is not _construct}
    try:
        layer = LoraModel._create_new_module(config, adapter_name, target, **kwargs)
    finally:
        config._custom_modules = mapping
    if isinstance(layer, LoraLayer):
        fuse(layer)
    return layer
