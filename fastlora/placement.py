"""Where the values of a layer are: in its parameters, in the map of an offloading hook, or not in this process.

accelerate's hooks (``cpu_offload``, ``disk_offload``, ``dispatch_model``, device maps) leave a parameter on "meta"
between two calls and hold its value in ``weights_map``; what is written into the parameter is gone after the next call.
FSDP1 and DeepSpeed ZeRO-3 leave parameters of another shape or without memory. All of it is recognised by attributes:
none of these libraries is imported.
"""

from collections import ChainMap
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from fastlora.sharding import is_dtensor

_UNMANAGED = "gather the whole state dict, load it into a model that is neither sharded nor offloaded"
_SHOWN = 5


def stored(module: nn.Module, name: str) -> Tensor:
    """The value of a parameter: that of the offloading hook where there is one, else the parameter itself."""
    parameter = getattr(module, name)
    hook = _offload_hook(module) if parameter.is_meta else None
    return parameter if hook is None else hook.weights_map[name]


def store(module: nn.Module, name: str, value: Tensor) -> None:
    """Makes this tensor the value of a parameter, in the offloading hook's map too; a value on disk moves to memory.

    The map's old tensors and files are left as they are: others may read them.
    """
    parameter = getattr(module, name)
    hook = _offload_hook(module)
    if hook is not None:
        if not isinstance(hook.weights_map, ChainMap):
            hook.weights_map = ChainMap({}, hook.weights_map)
        hook.weights_map[name] = value.detach().to("cpu")
    if not parameter.is_meta:
        parameter.data = value.to(parameter.device)


def forget(module: nn.Module, *names: str) -> None:
    """To be called when tensors leave a module: the offloading hook would otherwise restore them when it is removed."""
    for name in names:
        getattr(_offload_hook(module), "original_devices", {}).pop(name, None)


def is_offloaded(module: nn.Module) -> bool:
    return _offload_hook(module) is not None


def unusable(layer: Any, names: Iterable[str], writes: str | None = None, allow_meta: bool = False) -> str | None:
    """Why the values of a LoRA layer's parameters are not in this process, or None.

    Args:
        names: which of weight, lora_A and lora_B are to be read.
        writes: the one that is to be replaced as a whole: then it must also be a plain parameter of this layer alone.
        allow_meta: plain parameters on "meta" are about to get their values.
    """
    rank = layer.lora_A.shape[0] if layer.lora_A.dim() else 0
    shapes = {
        "weight": layer.weight_shape,
        "lora_A": (rank, layer.in_features),
        "lora_B": (layer.out_features, rank),
        "lora_magnitude_vector": (layer.out_features,),
    }
    for name in names:
        if getattr(layer, name, None) is None:  # a magnitude, which DoRA alone has
            continue
        tensor, replaced = getattr(layer, name), name == writes
        owner, attribute = layer.place(name)
        if is_dtensor(tensor):
            if replaced:
                return f"the {name} is sharded (a DTensor), and others hold on to its shards: {_UNMANAGED}"
            continue
        whole = tuple(tensor.shape) == shapes[name]
        if hasattr(tensor, "ds_id") and (replaced or not whole):
            return (
                f"DeepSpeed ZeRO-3 partitions {name}: {_UNMANAGED}"
                if replaced
                else f"DeepSpeed ZeRO-3 partitions {name}: use deepspeed.zero.GatheredParameters around the call"
            )
        freed = not tensor.is_meta and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0
        if freed or (getattr(tensor, "_fsdp_flattened", False) and (replaced or not whole)):
            return (
                f"FSDP1 holds the value of {name}: {_UNMANAGED}"
                if replaced
                else f"FSDP1 holds the value of {name}: use FullyShardedDataParallel.summon_full_params around the call"
            )
        if not whole:
            return f"{name} is a placeholder of shape {list(tensor.shape)}, not {list(shapes[name])}: {_UNMANAGED}"
        if replaced and attribute not in owner._parameters:
            return (
                f"{name} is no parameter of the layer: FSDP1 or a parametrization holds its value, and would undo the "
                f"change; remove the parametrization, or {_UNMANAGED}"
            )
        if tensor.is_meta and not is_offloaded(owner) and not allow_meta:
            return (
                f"{name} is on the meta device, which holds no values: load them first; where a device map or an "
                "offloading hook around the layer put it there, load the model without it, or call "
                "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
            )
    return None


def require_values(
    model: nn.Module, layers: Iterable[tuple[str, nn.Module]], action: str, names: Iterable[str], **how: Any
) -> None:
    """Refuses an action on LoRA layers unless the values that it needs are there.

    Args:
        model: what holds the layers; hooks around them are found in it.
        layers: path and layer.
        action: the verb of the message.
        names, how: as for ``unusable``.

    Raises:
        ValueError: some are not; the message names the layers, the reason and the remedy.
    """
    placed, flattened = _inside(model, _places_children), _inside(model, _flattens_children)
    reasons: dict[str, list[str]] = {}
    for path, layer in layers:
        options = {**how, "allow_meta": how.get("allow_meta", False) and id(layer) not in placed}
        reason = unusable(layer, names, **options)
        if reason is None and "writes" in how and id(layer) in flattened:  # all parameters summoned, for the moment
            reason = f"FSDP1 holds the value of {how['writes']}: {_UNMANAGED}"
        if reason is not None:
            reasons.setdefault(reason, []).append(path or type(layer).__name__)
    if reasons:
        raise ValueError(f"cannot {action} " + "; ".join(f"{_listed(paths)}: {why}" for why, paths in reasons.items()))


def _listed(paths: list[str]) -> str:
    return ", ".join(paths[:_SHOWN]) + (f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else "")


def _offload_hook(module: nn.Module) -> Any:
    """accelerate's hook that holds this module's own values, or None."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):  # accelerate chains several in one
        if getattr(each, "offload", False) is True and getattr(each, "weights_map", None) is not None:
            return each
    return None


def _inside(model: nn.Module, manages: Callable[[nn.Module], bool]) -> set[int]:
    """The ids of all modules below those that manage their children's parameters."""
    return {id(child) for module in model.modules() if manages(module) for child in module.modules()}


def _flattens_children(module: nn.Module) -> bool:
    return any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__)


def _places_children(module: nn.Module) -> bool:
    hook = _offload_hook(module)
    return hook is not None and getattr(hook, "place_submodules", False) and bool(module._modules)
