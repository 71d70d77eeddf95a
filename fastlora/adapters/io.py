"""Adapters on disk, in PEFT's format: ``adapter_model.safetensors`` and ``adapter_config.json``. Never a pickle."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fastlora.adapters.config import most_common, plain_config
from fastlora.adapters.experts import StoredExperts, file_paths
from fastlora.adapters.files import (
    CONFIG_NAME,
    PREFIX,
    WEIGHTS_NAME,
    StoredShapes,
    alpha_of,
    check_ranks,
    entry_name,
    listed,
    open_adapter,
    read_header,
    scaling_of,
)
from fastlora.conv1d import LoRAConv1D, linear_features
from fastlora.experts_module import ExpertsBranch
from fastlora.files import write_files
from fastlora.heads import lies_in, modules_ending_in, newly_drawn, saved_modules
from fastlora.merging import MAGNITUDE
from fastlora.model import canonical_name, lora_layers, put_layers
from fastlora.module import LoRALinear
from fastlora.placement import is_offloaded, require_values, store, stored
from fastlora.quantised_weight import QuantisedWeight, read_layer

ADAPTER = ("lora_A", "lora_B", MAGNITUDE)


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Writes the A and B of every LoRA layer of a model, the modules that it saves whole, and a configuration that
    PEFT reads.

    Both files are replaced as one: an interrupted call, a killed process or a full disk leaves the old adapter or the
    new one. With more than one process, all call it and rank 0 writes. What an adapter file cannot hold and the result
    depends on is named in a warning: other parameters that train, and heads that no checkpoint holds.

    Args:
        model: a model that ``inject`` or ``load_adapter`` has treated; merged or not makes no difference.
        directory: made where it is missing.

    Raises:
        ValueError: the model has no LoRA layer, or the values of one are not here (on "meta", sharded by FSDP1 or
            ZeRO-3, offloaded by a hook of its parent); or PEFT has no file for layers of these kinds together.
        OSError: the directory cannot be written.
    """
    model = _unwrapped(model)
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRALinear layer to save; call fastlora.inject first")
    require_values(model, layers.items(), "save", ADAPTER)
    _warn_of_unsaved(model)
    tensors = _values(model, layers)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    config = json.dumps(_config_of(model, layers), indent=2, sort_keys=True) + "\n"
    payload = {WEIGHTS_NAME: serialize(tensors, metadata={"format": "pt"}), CONFIG_NAME: config.encode()}
    write_files(directory, payload)


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> list[str]:
    """Reads an adapter that ``save_adapter`` or PEFT wrote.

    A model without LoRA layers gets them where the file has them, with the ranks of its tensors and the configuration's
    alpha and dropout. A model that has LoRA layers must have the same ones; it takes over the values and the alpha, and
    keeps its dtypes and dropout. Modules that were saved whole take over their values in place, and train from then
    on. Configuration and header (names, shapes, dtypes, ranks) are checked first: nothing is read, allocated or changed
    before all of it fits. Both files are of one save, also while another process saves.

    Returns:
        Paths of the loaded layers, and of the parameters of experts.

    Raises:
        FileNotFoundError: no adapter there, or only a pickled one, which is never opened.
        ValueError: the files are damaged or are no plain LoRA on linear layers and experts, or do not fit the model, or
            are of a PEFT whose factors of experts may lie the other way round without showing it; the message
            lists what is missing, unexpected or mismatched. A configuration that is huge, deep or makes matching its
            patterns take long, a header that claims more than a header has.
        OSError: the files are replaced all the time while they are read.
    """
    directory, given, model = Path(directory), model, _unwrapped(model)
    config, file = open_adapter(directory)
    with file:
        stored, stored_whole = read_header(file, directory / WEIGHTS_NAME, config)
        layers = dict(lora_layers(model))
        experts = StoredExperts(model, layers, config)
        stored = experts.by_parameter(stored)
        check_ranks(stored, config, experts.counts)
        require_values(model, layers.items(), "load into", ADAPTER, allow_meta=True)
        found = modules_ending_in(model, config["modules_to_save"]) if config["modules_to_save"] else []
        saved = dict(saved_modules(model)) | {name: model.get_submodule(name) for name in found}
        whole = _parameters_of(saved)
        _check_fit(model, layers, stored, whole, stored_whole, experts)
        _check_tied(layers, whole, file)
        alphas = {path: alpha_of(path, config) for path in stored}
        new = [name for name in found if not lies_in(name, [marked for marked, _ in saved_modules(model)])]
        if (new or not layers) and any(isinstance(module, DistributedDataParallel) for module in given.modules()):
            raise ValueError("DistributedDataParallel would not see new parameters: load the adapter, then wrap")
        options, parameters = ({}, {}) if layers else _options(model, stored, alphas, config, experts)
        put_layers(model, options, new, parameters)
        layers = dict(lora_layers(model))
        places = file_paths(layers)
        for name, (module, attribute) in whole.items():
            _copy(module, attribute, file.get_tensor(PREFIX + name))
        for path, layer in layers.items():
            for name in layer.adapter_parameters():
                _copy(layer, name, file.get_tensor(PREFIX + entry_name(places[path], name)))
            layer.alpha = alphas[path]
            layer.rslora = bool(config.get("use_rslora", False))
            layer.scaling = scaling_of(layer.alpha, layer.r, config)
    return list(layers)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and the data-parallel wrappers, whose paths the file's names are."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def whole_value(parameter: Tensor, name: str = "a parameter") -> Tensor:
    """The unsharded, contiguous value on the CPU. Raises ValueError where there is none."""
    value = parameter.detach()
    if value.is_meta:
        raise ValueError(f"cannot save {name}: it is on the meta device, which holds no values; load them first")
    if hasattr(value, "full_tensor"):  # a DTensor; every process takes part
        value = value.full_tensor()
    return value.cpu().contiguous()


def _parameters_of(saved: dict[str, nn.Module]) -> dict[str, tuple[nn.Module, str]]:
    """What the state dicts of modules hold, by path: the module that owns it, and its name there."""
    found = {}
    for path, root in saved.items():
        for key in root.state_dict(keep_vars=True):
            owner, _, attribute = key.rpartition(".")
            found[canonical_name(f"{path}.{key}")] = (root.get_submodule(owner), attribute)
    return found


def _values(model: nn.Module, layers: dict[str, LoRALinear | ExpertsBranch]) -> dict[str, Tensor]:
    """The tensors of an adapter file, whole and on the CPU, each in memory of its own: a file has no ties."""
    places: list[tuple[str, tuple[nn.Module, str]]]
    paths = file_paths(layers)
    places = [(entry_name(paths[p], f), (layer, f)) for p, layer in layers.items() for f in layer.adapter_parameters()]
    places += _parameters_of(dict(saved_modules(model))).items()
    values: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    storages, tied = set(), []
    for name, (module, attribute) in places:
        tensor = getattr(module, attribute)
        if first.setdefault(id(tensor), name) != name:
            tied.append(f"{name} to {first[id(tensor)]}")
        value = whole_value(stored(module, attribute), name)
        storage = value.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != value.nbytes:
            value = value.clone()
        storages.add(storage.data_ptr())
        values[PREFIX + name] = value
    if tied:
        warnings.warn(
            f"an adapter file has no ties, and holds a copy for each of these: {listed(tied)}; "
            "a model into which it is loaded keeps its own ties, or has to be tied again",
            stacklevel=3,
        )
    return values


def _warn_of_unsaved(model: nn.Module) -> None:
    whole = [name for name, _ in saved_modules(model)]
    adapters = {id(p) for _, layer in lora_layers(model) for p in layer.adapter_parameters().values()}
    others = [
        canonical_name(name)
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in adapters and not lies_in(name, whole)
    ]
    if others:
        warnings.warn(
            f"an adapter file holds A and B alone; these train too: {listed(others)}; "
            "inject(..., modules_to_save=[...]) saves whole modules",
            stacklevel=3,
        )
    drawn = [
        canonical_name(name)
        for name, module in newly_drawn(model)
        if not lies_in(name, whole) and not all(p.requires_grad for p in module.parameters(recurse=False))
    ]
    if drawn:
        warnings.warn(
            f"frozen, not in the adapter file, and in no checkpoint by all that is known: {listed(drawn)}; "
            "a model that loads the adapter has other values there. Train and save them with "
            "inject(..., modules_to_save=[...]), or save the whole model once and load the adapter into that",
            stacklevel=3,
        )


def _config_of(model: nn.Module, layers: dict[str, LoRALinear | ExpertsBranch]) -> dict[str, Any]:
    parameters = [path for path, layer in layers.items() if isinstance(layer, ExpertsBranch)]
    transposed = [path for path, layer in layers.items() if isinstance(layer, LoRAConv1D)]
    if parameters and transposed:
        raise ValueError(f"cannot save {listed(transposed)} beside LoRA on experts: PEFT has no file for both")
    rslora = all(layer.rslora for layer in layers.values())
    # The file has one rsLoRA flag. Where layers differ in it, each one's scaling is expressed by its alpha.
    mixed = not rslora and any(layer.rslora for layer in layers.values())
    return plain_config(
        model,
        {path: layer.r for path, layer in layers.items()},
        {path: layer.scaling * layer.r if mixed else layer.alpha for path, layer in layers.items()},
        rslora=rslora,
        # It matters to further training only, so the most common one stands for all; PEFT has none beside experts.
        dropout=0.0 if parameters else most_common([layer.dropout for layer in layers.values()]),
        transposed=bool(transposed),
        dora=_is_dora(layers),
        parameters=parameters,
    )


def _is_dora(layers: dict[str, LoRALinear | ExpertsBranch]) -> bool:
    """Raises ValueError where some layers are DoRA and others not: a configuration has one flag."""
    plain = [path for path, layer in layers.items() if not layer.dora]
    if plain and len(plain) < len(layers):
        raise ValueError(f"cannot save DoRA layers beside others in one adapter file: {listed(plain)} are no DoRA")
    return not plain


def _check_fit(
    model: nn.Module,
    layers: dict[str, LoRALinear | ExpertsBranch],
    stored: dict[str, StoredShapes],
    whole: dict[str, tuple[nn.Module, str]],
    stored_whole: dict[str, tuple[int, ...]],
    experts: StoredExperts,
) -> None:
    """The stored layers against the model's: its LoRA layers where it has any, else its linear layers and the experts
    that the configuration names. And what was saved whole against what the modules of the model hold."""
    problems = []
    if layers:
        rows = {path: layer.r * layer.num_experts for path, layer in layers.items()}
        expected = {p: ((rows[p], m.in_features), (m.out_features, rows[p])) for p, m in layers.items()}
        missing = [path for path in expected if path not in stored]
        if missing:
            problems.append(f"missing from the file: {listed(missing)}")
        other = [path for path, layer in layers.items() if path in stored and layer.dora != stored[path].dora]
        if other:
            problems.append(f"DoRA in the file or in the model alone: {listed(other)}")
        merged = [path for path, layer in layers.items() if layer.merged]
        if merged:
            problems.append(f"merged, call fastlora.unmerge first: {listed(merged)}")
    else:
        expected = {
            path: ((stored[path].a_shape[0], sizes[1]), (sizes[0], stored[path].b_shape[1]))
            for name, m in model.named_modules()
            if (path := canonical_name(name)) in stored and (sizes := linear_features(m)) is not None
        }
        for path, (_, n, k) in experts.sizes.items():
            if path in stored:
                expected[path] = ((stored[path].a_shape[0], k), (n, stored[path].b_shape[1]))
            else:
                problems.append(f"missing from the file: {path}")
    unexpected = [path for path in stored if path not in expected]
    if unexpected:
        kind = "LoRA" if layers else "linear"
        problems.append(f"not {kind} layers of the model: {listed(unexpected)}")
    mismatched = [
        f"{path}: file lora_A {list(stored[path].a_shape)}, lora_B {list(stored[path].b_shape)}, "
        f"model {list(a)}, {list(b)}"
        for path, (a, b) in expected.items()
        if path in stored and (stored[path].a_shape, stored[path].b_shape) != (a, b)
    ]
    if missing := [name for name in whole if name not in stored_whole]:
        problems.append(f"missing from the file: {listed(missing)}")
    if unexpected := [name for name in stored_whole if name not in whole]:
        problems.append(f"saved whole, and not in the model: {listed(unexpected)}")
    for name, shape in stored_whole.items():
        if name in whole and (own := tuple(getattr(*whole[name]).shape)) != shape:
            mismatched.append(f"{name}: file {list(shape)}, model {list(own)}")
    if mismatched:
        problems.append(f"shapes differ: {listed(mismatched, '; ')}")
    if problems:
        raise ValueError(f"the adapter does not fit {type(model).__name__}; {'; '.join(problems)}")


def _check_tied(layers: dict[str, LoRALinear | ExpertsBranch], whole: dict[str, tuple[nn.Module, str]], file) -> None:
    """Raises where one tensor of the model would be given two values."""
    tensors: dict[str, Tensor]
    paths = file_paths(layers)
    tensors = {entry_name(paths[p], f): t for p, layer in layers.items() for f, t in layer.adapter_parameters().items()}
    tensors |= {name: getattr(module, attribute) for name, (module, attribute) in whole.items()}
    places: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        places.setdefault(id(tensor), []).append(name)
    for first, *others in places.values():
        for other in others:
            if not torch.equal(file.get_tensor(PREFIX + first), file.get_tensor(PREFIX + other)):
                raise ValueError(f"{first} and {other} are one tensor in the model, and differ in the file: untie them")


def _options(
    model: nn.Module,
    stored: dict[str, StoredShapes],
    alphas: dict[str, float],
    config: dict[str, Any],
    experts: StoredExperts,
) -> tuple[dict[str, dict], dict[str, dict]]:
    """What ``put_layers`` makes the stored layers of: options of layers, and of parameters of experts."""
    modules = {canonical_name(name): (name, module) for name, module in model.named_modules()}
    options, parameters = {}, {}
    for path, (a_shape, _, dtype, dora) in stored.items():
        if path in experts.sizes:
            parameters[experts.names[path]] = {
                "r": a_shape[0] // experts.counts[path],
                "alpha": alphas[path],
                "rslora": bool(config.get("use_rslora", False)),
                "adapter_dtype": _adapter_dtype(model.get_parameter(experts.names[path]).dtype, dtype),
            }
            continue
        name, linear = modules[path]
        packed = read_layer(linear)
        own = packed.dtype if isinstance(packed, QuantisedWeight) else linear.weight.dtype
        options[name] = {
            "r": a_shape[0],
            "alpha": alphas[path],
            "dropout": config["lora_dropout"],
            "rslora": bool(config.get("use_rslora", False)),
            "dora": dora,
            "adapter_dtype": _adapter_dtype(own, dtype),
        }
    return options, parameters


def _adapter_dtype(own: torch.dtype, stored_dtype: torch.dtype) -> torch.dtype | None:
    """Over a 16-bit weight float32 loses nothing of any stored value; elsewhere A and B have the weight's dtype."""
    return torch.float32 if own.itemsize == 2 and stored_dtype != own else None


@torch.no_grad()
def _copy(module: nn.Module, name: str, value: Tensor) -> None:
    parameter = getattr(module, name)
    if is_offloaded(module) and parameter.is_meta:
        store(module, name, value.to(parameter.dtype))
    elif parameter.is_meta:  # nothing to copy into yet; the file's value becomes the parameter
        value = value.to(parameter.dtype)
        if isinstance(parameter, nn.Parameter):
            value = nn.Parameter(value, requires_grad=parameter.requires_grad)
        setattr(module, name, value)
    elif hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        whole = value.to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))
    else:
        parameter.copy_(value)
