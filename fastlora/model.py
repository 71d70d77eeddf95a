"""LoRA over a whole model: put it in, fold it into the weights and out again, count what trains."""

import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from fastlora.conv1d import LoRAConv1D, is_conv1d
from fastlora.experts_module import ExpertsBranch, LoRAExperts, make_branches, put_branches
from fastlora.heads import (
    clear_marks,
    keep_marks,
    lies_in,
    mark_saved,
    modules_ending_in,
    note_newly_drawn,
    saved_modules,
)
from fastlora.layer_checks import check_hyperparameters
from fastlora.merging import MERGE_READS
from fastlora.module import LoRALinear
from fastlora.own_forward import end_watches, watch
from fastlora.placement import require_values
from fastlora.quantised_module import QuantisedLoRALinear
from fastlora.quantised_weight import read_layer
from fastlora.refusals import experts_refusal, linear_refusal, parameter_owners, saved_refusal
from fastlora.shared_input.plan import group as group_layers
from fastlora.shared_input.plan import observe, ungroup
from fastlora.targets import Narrowing, by_pattern, match_parameters, match_targets

_PEFT_NAMES = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "init_lora_weights": "init",
}
# What compilation, data-parallel and checkpointing wrappers insert into module paths.
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class TrainableParameters(NamedTuple):
    """Parameters that train, all parameters, and the former as a share (0…1) of the latter."""

    trainable: int
    total: int
    share: float

    def __str__(self) -> str:
        return f"trainable: {self.trainable:,} of {self.total:,} parameters ({self.share:.4%})"


def inject(
    model: nn.Module,
    target_modules: str | Iterable[str] | None,
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
    target_parameters: Iterable[str] | None = None,
    group: Any = False,
    **unknown,
) -> list[str]:
    """Replaces the targeted ``nn.Linear`` layers of a model by ``LoRALinear``, and transformers' ``Conv1D`` (GPT-2) by
    its subclass ``LoRAConv1D``; freezes every other parameter.

    Layers that bitsandbytes (``Linear4bit``) or torchao (int8 and float8 weights) has quantised stay quantised: they
    become ``QuantisedLoRALinear``. Experts modules that transformers calls by its ``ExpertsInterface`` (Mixtral,
    Qwen3-MoE, gpt-oss, ...) get branches on the parameters that ``target_parameters`` name: they stay the objects that
    they are, and become ``LoRAExperts``.

    Targets are matched as PEFT does: a list holds names or dotted suffixes of module paths, a string is a regular
    expression that must match a whole path. "all-linear" stands for every such layer but the output heads of a
    transformers model (lm_head, score, classifier, qa_outputs, ...), which PEFT leaves out, too. Layers that carry a
    branch already keep it. Nothing changes unless every target can be served.

    Args:
        model: any module; changed in place.
        target_modules: list of suffixes, a regular expression, or "all-linear"; empty or None where
            ``target_parameters`` are all.
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
            comes of all five. For ``target_parameters`` a path is the parameter's, and only these two count.
        target_parameters: list of parameters of experts modules, by path or dotted suffix
            ("mlp.experts.gate_up_proj"); every expert gets a branch of rank r. As in PEFT, without dropout and DoRA.
        group: compute layers together that receive the same tensor, as q, k and v do. Which ones those are one forward
            of the model says, in eval mode and without gradients, before anything is replaced: True runs it on the
            model's own ``dummy_inputs`` (transformers has them), anything else is a batch to run it on (a dict, a
            tuple, a list or a tensor). ``fastlora.shared_inputs(model)`` shows the groups; what differs with them is
            said in ``fastlora.integrations``.

    Returns:
        The paths of the layers replaced by this call, and of the parameters of experts, in the model's order.

    Raises:
        ValueError: a target matches nothing (the message names what would match); a match is not a plain ``nn.Linear``,
            shares its weight with another module, carries hooks or is sharded already; a hyperparameter is out of
            range; ``modules_to_save`` names no module, or one that shares a parameter with another or has a branch;
            something to exclude, a number of a block or a key of a pattern matches nothing (in PEFT: nothing happens);
            a target parameter is none of an experts module that is called so, is not dense or has a branch already, or
            dropout or DoRA is asked for with it; ``group`` is True and the model has no ``dummy_inputs`` that it runs
            on.
        TypeError: ``target_modules`` is neither a string nor a list of strings, or r is not an integer; an argument has
            PEFT's name for it; ``group`` is of another type.
    """
    for name in unknown:
        hint = f"; here it is called {_PEFT_NAMES[name]!r}" if name in _PEFT_NAMES else ""
        raise TypeError(f"inject() got an unexpected keyword argument {name!r}{hint}")
    check_hyperparameters(r, alpha, dropout, init)
    saved = _match_saved(model, modules_to_save)
    narrowing = Narrowing(exclude_modules, layers_to_transform, layers_pattern)
    parameters = match_parameters(model, target_parameters)
    names: list[str] = []
    if parameters:
        _check_parameters(dropout, dora, narrowing if target_modules in (None, []) else Narrowing())
    elif target_modules is None:
        raise TypeError("target_modules must be a string or a list of strings, got None without target_parameters")
    if target_modules is not None and (target_modules != [] or not parameters):
        names = match_targets(model, target_modules, saved, narrowing)
    paths = {name: canonical_name(name) for name in [*names, *parameters]}
    ranks = by_pattern("rank_pattern", rank_pattern, paths, r)
    alphas = by_pattern("alpha_pattern", alpha_pattern, paths, alpha)
    for name in paths:
        check_hyperparameters(ranks[name], alphas[name], dropout, init)
    groups = {} if group is False else observe(model, group, names)
    put_layers(
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
        {
            name: {
                "r": ranks[name],
                "alpha": alphas[name],
                "rslora": rslora,
                "init": init,
                "adapter_dtype": adapter_dtype,
            }
            for name in parameters
        },
    )
    group_layers(model, groups, LoRALinear)
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    return sorted(paths, key=lambda name: order[name] if name in order else order[name.rpartition(".")[0]])


def _check_parameters(dropout: float, dora: bool, unused: Narrowing) -> None:
    """Raises ValueError for what ``target_parameters`` do not go with.

    Args:
        unused: what would narrow ``target_modules``, where there are none.
    """
    odd = [name for name, value in (("dropout", dropout), ("dora", dora)) if value]
    if odd:
        raise ValueError(
            f"{' and '.join(odd)} with target_parameters: PEFT has neither for parameters, nor has this; leave it out, "
            "or inject the layers in a call of their own, without target_parameters"
        )
    given = [name for name, value in unused._asdict().items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: as in PEFT, this narrows target_modules, and there are none")


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


def put_layers(
    model: nn.Module,
    options: dict[str, dict],
    saved: Iterable[str] = (),
    parameters: Mapping[str, dict] = MappingProxyType({}),
) -> None:
    """Replaces layers by path and puts branches on parameters of experts modules, after checking that all can be; then
    freezes all else but the modules at the paths ``saved``, which train whole from then on.

    Args:
        options: ``from_linear`` options by path.
        parameters: ``ExpertsBranch`` options by path of a parameter.

    Raises:
        ValueError: as for ``inject``; the model is unchanged then.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = parameter_owners(model)
    problems = [problem for name in options if (problem := linear_refusal(name, modules, owners))]
    problems += [problem for path in parameters if (problem := experts_refusal(path, modules, owners))]
    if problems:
        raise ValueError("cannot put LoRA on " + "; ".join(problems))
    saved = list(saved)
    whole = [*saved, *(name for name, _ in saved_modules(model))]
    if problems := [path for path in parameters if lies_in(path, whole)]:
        raise ValueError(f"cannot put LoRA on {', '.join(problems)}: modules_to_save has the whole of it trained")
    problems = [problem for name in saved if (problem := saved_refusal(name, modules, owners, saved))]
    if problems:
        raise ValueError("cannot train and save the whole of " + "; ".join(problems))
    note_newly_drawn(model, known=(layer for _, layer in lora_layers(model)))
    layers = {name: branched(modules[name], **kwargs) for name, kwargs in options.items()}
    branches = {name: make_branches(modules[name], given) for name, given in _by_module(parameters).items()}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        keep_marks(modules[name], layer)
        setattr(modules[parent], child, layer)
    for name, made in branches.items():
        put_branches(modules[name], made)
        block, _, child = name.rpartition(".")
        if name:
            watch(modules[block], child)
    mark_saved(modules[name] for name in saved)
    _freeze_all_but_adapters(model)


def _by_module(parameters: Mapping[str, dict]) -> dict[str, dict[str, dict]]:
    """What belongs to each path of a parameter, by path of its module and by its name there."""
    found: dict[str, dict[str, dict]] = {}
    for path, given in parameters.items():
        module, _, name = path.rpartition(".")
        found.setdefault(module, {})[name] = given
    return found


def branched(linear: nn.Module, **options) -> LoRALinear:
    """The LoRA layer around a plain ``nn.Linear``, a ``Conv1D`` or a quantised layer; options as for
    ``LoRALinear.from_linear``."""
    kind: type[LoRALinear] = LoRAConv1D if is_conv1d(linear) else LoRALinear
    kind = kind if read_layer(linear) is None else QuantisedLoRALinear
    return kind.from_linear(linear, **options)  # type: ignore[arg-type]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear | ExpertsBranch]]:
    """Path and module of every ``LoRALinear``, and of every branch on experts, whose path is that of the parameter that
    it is on. Paths leave out what compile, FSDP and checkpoint wrappers insert."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield canonical_name(name), module
        elif isinstance(module, LoRAExperts):
            for branch in module.branches():
                yield canonical_name(f"{name}.{branch.parameter_name}".lstrip(".")), branch


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
    """Merges every branch and turns the LoRA layers back into plain ``nn.Linear`` and plain experts, as PEFT's method
    of that name does.

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
    ungroup(model)
    for _, layer in layers:
        if isinstance(layer, LoRALinear):
            layer.unload()
    for module in list(model.modules()):
        if isinstance(module, LoRAExperts):
            module.unload()
    end_watches(model)
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


def _require_layers(model: nn.Module) -> list[tuple[str, LoRALinear | ExpertsBranch]]:
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRALinear layer; call fastlora.inject first")
    return layers


def _require_own_weights(model: nn.Module, layers: list[tuple[str, LoRALinear | ExpertsBranch]]) -> None:
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


def _freeze_all_but_adapters(model: nn.Module) -> None:
    adapters = {id(p) for _, layer in lora_layers(model) for p in layer.adapter_parameters().values()}
    adapters |= {id(p) for _, module in saved_modules(model) for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)
