"""LoRA over a whole model: put it in, fold it into the weights and out again, count what trains."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from fastlora.conv1d import LoRAConv1D, is_conv1d
from fastlora.heads import (
    clear_marks,
    keep_marks,
    lies_in,
    mark_saved,
    modules_ending_in,
    note_newly_drawn,
    saved_modules,
)
from fastlora.layer_checks import check_hyperparameters, weight_reason
from fastlora.merging import MERGE_READS
from fastlora.module import LoRALinear
from fastlora.placement import require_values
from fastlora.quantised_module import QuantisedLoRALinear
from fastlora.quantised_weight import read_layer
from fastlora.targets import Narrowing, by_pattern, match_targets

_PEFT_NAMES = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "init_lora_weights": "init",
}
# What compilation, data-parallel and checkpointing wrappers insert into module paths.
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Modules that have taken charge of the parameters that they found, and would neither shard nor synchronise new ones.
_MANAGERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


class TrainableParameters(NamedTuple):
    """Parameters that train, all parameters, and the former as a share (0…1) of the latter."""

    trainable: int
    total: int
    share: float

    def __str__(self) -> str:
        return f"trainable: {self.trainable:,} of {self.total:,} parameters ({self.share:.4%})"


def inject(
    model: nn.Module,
    target_modules: str | Iterable[str],
    *,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    rslora: bool = False,
    init: str = "kaiming",
    copy_input: bool = False,
    dora: bool = False,
    adapter_dtype: torch.dtype | None = None,
    modules_to_save: Iterable[str] | None = None,
    exclude_modules: str | Iterable[str] | None = None,
    layers_to_transform: int | Iterable[int] | None = None,
    layers_pattern: str | Iterable[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    **unknown,
) -> list[str]:
    """Replaces the targeted ``nn.Linear`` layers of a model by ``LoRALinear``, and transformers' ``Conv1D`` (GPT-2) by
    its subclass ``LoRAConv1D``; freezes every other parameter.

    Layers that bitsandbytes (``Linear4bit``) or torchao (int8 and float8 weights) has quantised stay quantised: they
    become ``QuantisedLoRALinear``.

    Targets are matched as PEFT does: a list holds names or dotted suffixes of module paths, a string is a regular
    expression that must match a whole path. "all-linear" stands for every such layer but the output heads of a
    transformers model (lm_head, score, classifier, qa_outputs, ...), which PEFT leaves out, too. Layers that carry a
    branch already keep it. Nothing changes unless every target can be served.

    Args:
        model: any module; changed in place.
        target_modules: list of suffixes, a regular expression, or "all-linear".
        r, alpha, dropout, rslora, init, copy_input, dora, adapter_dtype: as for ``LoRALinear.from_linear``.
        modules_to_save: modules that train whole and that ``save_adapter`` saves, such as the newly drawn head of a
            classifier. As in PEFT, every module whose path ends in one of these names is meant, and nothing in them
            gets a branch. Unlike in PEFT they train in place: the model keeps no copy of their old values.
        exclude_modules: targets that get no branch all the same: a list of names or suffixes, or a regular expression
            for whole paths.
        layers_to_transform: number or numbers of the blocks to which targets are confined that are names or suffixes.
        layers_pattern: name or names of the lists whose numbers these are ("layers", "h"); by default any.
        rank_pattern, alpha_pattern: other values of r and alpha for some layers. As in PEFT, the first key counts that,
            as a regular expression, matches the end of the layer's path from a dot on. ``save_adapter`` writes what
            comes of all five.

    Returns:
        The paths of the layers replaced by this call, in the model's order.

    Raises:
        ValueError: a target matches nothing (the message names what would match); a match is not a plain ``nn.Linear``,
            shares its weight with another module, carries hooks or is sharded already; a hyperparameter is out of
            range; ``modules_to_save`` names no module, or one that shares a parameter with another or has a branch;
            something to exclude, a number of a block or a key of a pattern matches nothing (in PEFT: nothing happens).
        TypeError: ``target_modules`` is neither a string nor a list of strings, or r is not an integer; an argument has
            PEFT's name for it.
    """
    for name in unknown:
        hint = f"; here it is called {_PEFT_NAMES[name]!r}" if name in _PEFT_NAMES else ""
        raise TypeError(f"inject() got an unexpected keyword argument {name!r}{hint}")
    check_hyperparameters(r, alpha, dropout, init)
    saved = _match_saved(model, modules_to_save)
    narrowing = Narrowing(exclude_modules, layers_to_transform, layers_pattern)
    names = match_targets(model, target_modules, saved, narrowing)
    paths = {name: canonical_name(name) for name in names}
    ranks = by_pattern("rank_pattern", rank_pattern, paths, r)
    alphas = by_pattern("alpha_pattern", alpha_pattern, paths, alpha)
    for name in names:
        check_hyperparameters(ranks[name], alphas[name], dropout, init)
    replace_linears(
        model,
        {
            name: {
                "r": ranks[name],
                "alpha": alphas[name],
                "dropout": dropout,
                "rslora": rslora,
                "init": init,
                "copy_input": copy_input,
                "dora": dora,
                "adapter_dtype": adapter_dtype,
            }
            for name in names
        },
        saved,
    )
    return names


def _match_saved(model: nn.Module, names: Iterable[str] | None) -> list[str]:
    names = [] if names is None else names if isinstance(names, str) else list(names)
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"modules_to_save must be a list of strings, got {names!r}")
    unknown = [name for name in names if not modules_ending_in(model, [name])]
    if unknown:
        children = ", ".join(name for name, _ in model.named_children())
        raise ValueError(
            f"modules_to_save {', '.join(map(repr, unknown))} match no module of {type(model).__name__}, "
            f"which is made of {children}"
        )
    return modules_ending_in(model, names) if names else []


def replace_linears(model: nn.Module, options: dict[str, dict], saved: Iterable[str] = ()) -> None:
    """Replaces layers by path, each with its own ``from_linear`` options, after checking that all can be; then freezes
    all else but the modules at the paths ``saved``, which train whole from then on.

    Raises:
        ValueError: as for ``inject``; the model is unchanged then.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = _parameter_owners(model)
    problems = [problem for name in options if (problem := _refusal(name, modules, owners))]
    if problems:
        raise ValueError("cannot put LoRA on " + "; ".join(problems))
    saved = list(saved)
    problems = [problem for name in saved if (problem := _saved_refusal(name, modules, owners, saved))]
    if problems:
        raise ValueError("cannot train and save the whole of " + "; ".join(problems))
    note_newly_drawn(model, known=(layer for _, layer in lora_layers(model)))
    layers = {name: branched(modules[name], **kwargs) for name, kwargs in options.items()}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        keep_marks(modules[name], layer)
        setattr(modules[parent], child, layer)
    mark_saved(modules[name] for name in saved)
    _freeze_all_but_adapters(model)


def branched(linear: nn.Module, **options) -> LoRALinear:
    """The LoRA layer around a plain ``nn.Linear``, a ``Conv1D`` or a quantised layer; options as for
    ``LoRALinear.from_linear``."""
    kind: type[LoRALinear] = LoRAConv1D if is_conv1d(linear) else LoRALinear
    kind = kind if read_layer(linear) is None else QuantisedLoRALinear
    return kind.from_linear(linear, **options)  # type: ignore[arg-type]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Path and module of every ``LoRALinear``. Paths leave out what compile, FSDP and checkpoint wrappers insert."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield canonical_name(name), module


def canonical_name(name: str) -> str:
    """A module or parameter path without the components that wrappers insert."""
    return _WRAPPER.sub("", name)


def merge(model: nn.Module, safe: bool = False, keep_base: bool = True) -> None:
    """Folds every branch into its weight: from then on each layer is one ``F.linear``. Merged layers stay as they are.

    Args:
        safe: refuse results that are not finite, and leave the whole model as it was.
        keep_base: as for ``LoRALinear.merge``; False frees the frozen weights, for serving.

    Raises:
        ValueError: the model has no LoRA layer; ``safe`` and a merged weight is not finite; or the values of a layer
            are not here (sharded, offloaded by its parent, on "meta", computed), or it shares its weight. All such
            layers are named, and nothing is merged.
    """
    layers = _require_layers(model)
    unmerged = [(name, layer) for name, layer in layers if not layer.merged]
    for name, layer in unmerged:
        if isinstance(layer, QuantisedLoRALinear):
            raise ValueError(f"cannot merge {name or type(layer).__name__}: {layer.merge_reason()}")
    require_values(model, unmerged, "merge", MERGE_READS, writes="weight")
    _require_own_weights(model, unmerged)
    if safe:
        broken = [name for name, layer in unmerged if not torch.isfinite(layer.merged_weight()).all()]
        if broken:
            raise ValueError(
                f"merging would give weights that are not finite in {', '.join(broken)}; nothing was merged: "
                "look for NaN or overflow in their lora_A and lora_B"
            )
    for _, layer in unmerged:
        layer.merge(keep_base=keep_base)


def unmerge(model: nn.Module) -> None:
    """Restores every merged weight.

    Raises:
        ValueError: the model has no LoRA layer, or the values of a merged one are not here, as in ``merge``.
    """
    merged = [(name, layer) for name, layer in _require_layers(model) if layer.merged]
    require_values(model, merged, "unmerge", MERGE_READS, writes="weight")
    for _, layer in merged:
        layer.unmerge()


def merge_and_unload(model: nn.Module, safe: bool = False) -> nn.Module:
    """Merges every branch and turns the LoRA layers back into plain ``nn.Linear``, as PEFT's method of that name does.

    The layers stay the objects that they are, so all that holds on to them (several parents, hooks, device maps) sees
    plain layers from then on. The state dict has the plain model's keys. Weights stay frozen; A and B are gone.

    Args:
        model: any module with LoRA layers, or one LoRA layer; changed in place.
        safe: as for ``merge``.

    Returns:
        The model.

    Raises:
        ValueError: as for ``merge``.
    """
    layers = _require_layers(model)
    merge(model, safe=safe, keep_base=False)
    for _, layer in layers:
        layer.unload()
    clear_marks(model)
    return model


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """Counts parameters; one that several modules share is counted once.

    Returns:
        TrainableParameters(trainable, total, share); printed, it reads as one line.
    """
    total = trainable = 0
    for parameter in model.parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            trainable += parameter.numel()
    return TrainableParameters(trainable, total, trainable / total if total else 0.0)


def _require_layers(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRALinear layer; call fastlora.inject first")
    return layers


def _require_own_weights(model: nn.Module, layers: list[tuple[str, LoRALinear]]) -> None:
    """Merging replaces a parameter's data, which every module that shares the parameter would see."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(f"{name}.{own}".lstrip("."))
    tied = {name: others for name, layer in layers if len(others := holders[id(layer.weight)]) > 1}
    if tied:
        raise ValueError(
            "cannot merge weights that are tied: "
            + "; ".join(" and ".join(names) for names in tied.values())
            + "; give the layer a weight of its own first"
        )


def _parameter_owners(model: nn.Module) -> dict[int, list[str]]:
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


def _refusal(name: str, modules: dict[str, nn.Module], owners: dict[int, list[str]]) -> str | None:
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
    forward = vars(module).get("forward")
    wrapped = (
        forward is not None and getattr(forward, "__func__", None) is not type(module).forward
    )  # as hooks leave it
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or wrapped:
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


def _manager(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The class of what has taken charge of the parameters at this path."""
    parts = name.split(".")
    for depth in range(len(parts)):
        ancestor = type(modules[".".join(parts[:depth])])
        if any(base.__name__ in _MANAGERS for base in ancestor.__mro__):
            return ancestor.__name__
    return None


def _saved_refusal(
    name: str, modules: dict[str, nn.Module], owners: dict[int, list[str]], saved: list[str]
) -> str | None:
    """Why the module of this name cannot train and be saved whole, or None."""
    module = modules[name]
    if any(isinstance(child, LoRALinear) for child in module.modules()):
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


def _freeze_all_but_adapters(model: nn.Module) -> None:
    adapters = {id(p) for _, layer in lora_layers(model) for p in layer.adapter_parameters().values()}
    adapters |= {id(p) for _, module in saved_modules(model) for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)
