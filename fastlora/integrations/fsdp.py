"""What FSDP, of either version, makes of a LoRA layer's modules and weights.

Blocks or whole models as units need nothing: while a block runs, its layers hold whole weights. Two things do:

- Units of a single ``nn.Linear`` (PEFT's own wrap policy makes one of every lora_A and lora_B): the weight exists only
  within the unit's own call, between its gather and its release, and only tensors that leave this call let FSDP gather
  the weight again for backward. So the fused call runs *within* the calls of its units, one inside the other, and its
  result leaves through all of them.
- FSDP1 with ``use_orig_params=True``: in forward a layer's weight is a view of one flat parameter, which requires a
  gradient as soon as any weight in it does. Whether this weight trains is known to its original parameter alone.
"""

from collections.abc import Callable
from functools import lru_cache

from torch import Tensor, nn

_FSDP = "torch.distributed.fsdp"


def class_beneath(module: nn.Module) -> type:
    """The class of a module before ``fully_shard`` put two in front of it; the module's own class otherwise."""
    kinds = type(module).__mro__
    is_torchs = [kind.__module__.startswith("torch.distributed.") for kind in kinds]
    return kinds[len(kinds) - is_torchs[::-1].index(True)] if True in is_torchs else kinds[0]


def swap_class(module: nn.Module, new: type) -> None:
    """Puts ``new`` in the place of ``class_beneath(module)``, and leaves what ``fully_shard`` added."""
    old = class_beneath(module)
    module.__class__ = new if type(module) is old else _sharded_class(type(module), old, new)


@lru_cache
def _sharded_class(sharded: type, old: type, new: type) -> type:
    bases = tuple(new if base is old else base for base in sharded.__bases__)
    names = {key: value for key, value in vars(sharded).items() if key not in ("__dict__", "__weakref__")}
    return type(sharded.__name__.replace(old.__name__, new.__name__), bases, names)


def is_unit(module: nn.Module) -> bool:
    """Whether a module is an FSDP unit, of either version."""
    return any(kind.__module__.startswith(_FSDP) for kind in type(module).__mro__)


def unit_linear(module: nn.Module) -> nn.Linear | None:
    """The plain ``nn.Linear`` that is all of an FSDP unit, if ``module`` is such a unit and has no hooks but FSDP's."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    if module._backward_hooks or module._backward_pre_hooks or not all(map(_is_own_hook, hooks)):
        return None
    if type(module).__name__ == "FullyShardedDataParallel" and type(module).__module__.startswith(_FSDP):
        linear = module.module
        is_plain = type(linear) is nn.Linear and not linear._forward_hooks and not linear._forward_pre_hooks
    else:
        linear = module
        is_plain = class_beneath(module) is nn.Linear and type(module) is not nn.Linear
    return linear if is_plain and "forward" not in vars(module) else None


def _is_own_hook(hook: Callable) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(_FSDP)


def call_within(units: list[nn.Module], x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """``compute(x)`` from within the calls of ``units``, whose own forwards do not run.

    Each unit's hooks see x and the result as if its own forward had made the one from the other.
    """
    if not units:
        return compute(x)
    unit, *others = units
    own = vars(unit_linear(unit))
    own["forward"] = lambda x: call_within(others, x, compute)
    try:
        return unit(x)
    finally:
        del own["forward"]


def is_frozen_view(linear: nn.Linear, name: str) -> bool:
    """Whether this weight or bias, which requires a gradient, is FSDP1's view of a parameter that does not."""
    node = getattr(linear, name).grad_fn
    while node is not None and not hasattr(node, "variable"):  # a view, a split, the flat parameter
        node = node.next_functions[0][0] if node.next_functions else None
    flat = None if node is None else node.variable
    parameters = getattr(flat, "_params", None)  # None without use_orig_params, where all of them train or none
    if not getattr(flat, "_is_flat_param", False) or parameters is None:
        return False
    for info, parameter in zip(flat._param_infos, parameters, strict=True):
        if info.module is linear and info.param_name == name:
            return not parameter.requires_grad
    return False
