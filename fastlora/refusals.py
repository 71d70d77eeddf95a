"""Which modules of a model cannot be given a branch, or train whole, and why."""

from typing import Any

import torch
from torch import nn

from fastlora.branch import Branch
from fastlora.conv1d import is_conv1d
from fastlora.experts import is_experts, projections
from fastlora.experts_module import LoRAExperts
from fastlora.heads import lies_in
from fastlora.layer_checks import matrices_reason, weight_reason
from fastlora.own_forward import has_own_forward, is_replaced
from fastlora.quantised_weight import read_layer

# Modules that have taken charge of the parameters that they found, and would neither shard nor synchronise new ones.
_MANAGERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


def parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """A path for every place that holds each parameter, by its id. A block with several parents is one place; a layer
    that is itself a child of several parents is several, since each parent has to be given its replacement."""
    owners: dict[int, list[str]] = {}
    for parent_name, parent in (("", None), *model.named_modules()):
        children = {"": model} if parent is None else parent._modules
        for child_name, child in children.items():
            path = f"{parent_name}.{child_name}".strip(".")
            for name, parameter in child._parameters.items() if child is not None else ():
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    return owners


def linear_refusal(name: str, modules: dict[str, nn.Module], owners: dict[int, list[str]]) -> str | None:
    """Why the module of this name cannot be replaced, or None."""
    module: Any = modules[name]
    packed = read_layer(module)
    if isinstance(packed, str):
        return f"{name}: {packed}"
    if not (type(module) is nn.Linear or is_conv1d(module)) and packed is None:
        return f"{name}: it is a {type(module).__module__}.{type(module).__qualname__}, not a plain nn.Linear"
    if (manager := _manager(name, modules)) is not None:
        return f"{name}: {manager} manages the parameters around it; put LoRA in first, then wrap or shard"
    weight: Any = module.weight
    if id(weight) not in owners:
        return f"{name}: its weight is no parameter (pruning, weight norm and the like compute it)"
    if packed is None and weight_reason(weight):
        return f"{name}: its weight does not do: {weight_reason(weight)}"
    shared = [owner for owner in owners[id(weight)] if owner != f"{name}.weight"]
    if shared:
        return f"{name}: its weight is tied to {', '.join(shared)}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or has_own_forward(module):
        return (
            f"{name}: it carries hooks, which a replacement would lose; remove them first (device maps add such), "
            "or put LoRA in first (tensor parallelism)"
        )
    parent = modules[name.rpartition(".")[0]]
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return (
            f"{name}: the inference fast path of nn.TransformerEncoderLayer would read its weight and skip the branch; "
            "call torch.backends.mha.set_fastpath_enabled(False) first"
        )
    return None


def experts_refusal(path: str, modules: dict[str, nn.Module], owners: dict[int, list[str]]) -> str | None:
    """Why the parameter at this path cannot get a branch, or None."""
    name, _, parameter = path.rpartition(".")
    module: Any = modules[name]
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if isinstance(module, LoRAExperts):
        return f"{path}: its module carries branches already; name all of its parameters in one call"
    if not is_experts(module):
        return f"{path}: it belongs to a {kind}, which transformers does not call by its ExpertsInterface"
    if parameter not in projections(module):
        return f"{path}: a {kind} multiplies by {' and '.join(projections(module))} alone"
    parent = modules[name.rpartition(".")[0]]
    if hasattr(parent, "base_layer"):
        return f"{path}: a {type(parent).__name__} has a branch on it already"
    if (manager := _manager(f"{name}.", modules)) is not None:
        return f"{path}: {manager} manages the parameters around it; put LoRA in first, then wrap or shard"
    for each in projections(module):  # the one without a branch is multiplied by, too
        weight: Any = module._parameters.get(each)
        if weight is None:
            return f"{name}.{each}: it is no parameter (parametrizations and the like compute it)"
        if type(weight) is not nn.Parameter:
            return f"{name}.{each}: it is a {type(weight).__name__}"
        if why := matrices_reason(weight):
            return f"{name}.{each}: {why}"
        if len(weight) != module.num_experts or module._is_expert_parallel:
            return f"{name}.{each}: something has shared its experts out; put LoRA in first"
    if module.num_experts < 2:
        return f"{path}: it has {module.num_experts} expert, and rows in segments are served of 2 or more"
    shared = [owner for owner in owners[id(getattr(module, parameter))] if owner != path]
    if shared:
        return f"{path}: it is tied to {', '.join(shared)}"
    if has_own_forward(module):
        return f"{path}: hooks have replaced its module's forward; remove them first (device maps add such)"
    if is_replaced(parent):
        return f"{path}: a kernel has replaced the forward of the {type(parent).__name__} around it and reads it"
    return None


def _manager(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The class of what has taken charge of the parameters at this path."""
    parts = name.split(".")
    for depth in range(len(parts)):
        ancestor = type(modules[".".join(parts[:depth])])
        if any(base.__name__ in _MANAGERS for base in ancestor.__mro__):
            return ancestor.__name__
    return None


def saved_refusal(
    name: str, modules: dict[str, nn.Module], owners: dict[int, list[str]], saved: list[str]
) -> str | None:
    """Why the module of this name cannot train and be saved whole, or None."""
    module = modules[name]
    if any(isinstance(child, Branch) for child in module.modules()):
        return f"{name}: it carries a branch already; name it in the call that injects, or save it without"
    parameters = list(module.parameters())
    if not all(parameter.is_floating_point() for parameter in parameters):
        return f"{name}: it has parameters that are not floating-point and cannot train"
    tied = sorted({o for p in parameters for o in owners.get(id(p), ()) if not lies_in(o, saved)})
    if tied:
        return f"{name}: it shares a parameter with {', '.join(tied)}; name both modules, or untie them first"
    if (manager := _manager(name, modules)) is not None:
        return f"{name}: {manager} manages the parameters around it; inject first, then wrap or shard"
    return None
