"""Adapters on disk, in PEFT's format: ``adapter_model.safetensors`` and ``adapter_config.json``. Never a pickle."""

import json
import os
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fastlora.adapters.files import (
    CONFIG_NAME,
    PREFIX,
    WEIGHTS_NAME,
    StoredShapes,
    alpha_of,
    check_ranks,
    listed,
    open_weights,
    read_config,
    read_header,
    scaling_of,
)
from fastlora.model import canonical_name, lora_layers, replace_linears
from fastlora.module import LoRALinear
from fastlora.placement import is_offloaded, require_values, store, stored


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Writes the A and B of every ``LoRALinear`` of a model, and a configuration that PEFT reads.

    Each file is written beside its place and renamed into it once complete, so an interrupted call or a full disk
    leaves what was there before. With more than one process, all call it and rank 0 writes.

    Args:
        model: a model that ``inject`` or ``load_adapter`` has treated; merged or not makes no difference.
        directory: made where it is missing.

    Raises:
        ValueError: the model has no LoRA layer, or the values of one are not here (on "meta", sharded by FSDP1 or
            ZeRO-3, offloaded by a hook of its parent).
        OSError: the directory cannot be written.
    """
    model = _unwrapped(model)
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRALinear layer to save; call fastlora.inject first")
    require_values(model, layers.items(), "save", ("lora_A", "lora_B"))
    _warn_of_unsaved(model)
    tensors = {}
    for path, layer in layers.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = whole_value(stored(layer, "lora_A"))
        tensors[f"{PREFIX}{path}.lora_B.weight"] = whole_value(stored(layer, "lora_B"))
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    directory = Path(directory)
    config = json.dumps(_config_of(model, layers), indent=2, sort_keys=True) + "\n"
    payload = {WEIGHTS_NAME: serialize(tensors, metadata={"format": "pt"}), CONFIG_NAME: config.encode()}
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    temporary = {name: directory / f".{name}.{os.getpid()}.tmp" for name in payload}
    try:
        for name, data in payload.items():
            with open(temporary[name], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name in payload:
            os.replace(temporary[name], directory / name)
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        if made and not any(directory.iterdir()):
            directory.rmdir()
        raise


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> list[str]:
    """Reads an adapter that ``save_adapter`` or PEFT wrote.

    A model without LoRA layers gets them where the file has them, with the ranks of its tensors and the configuration's
    alpha and dropout. A model that has LoRA layers must have the same ones; it takes over the values and the alpha, and
    keeps its dtypes and dropout. Configuration and header (names, shapes, dtypes, ranks) are checked first: nothing is
    read, allocated or changed before all of it fits.

    Returns:
        Paths of the loaded layers.

    Raises:
        FileNotFoundError: no adapter there, or only a pickled one, which is never opened.
        ValueError: the files are damaged or are no plain LoRA on linear layers, or do not fit the model; the message
            lists what is missing, unexpected or mismatched.
    """
    directory, given, model = Path(directory), model, _unwrapped(model)
    config = read_config(directory)
    with open_weights(directory) as file:
        stored = read_header(file, directory / WEIGHTS_NAME)
        check_ranks(stored, config)
        layers = dict(lora_layers(model))
        require_values(model, layers.items(), "load into", ("lora_A", "lora_B"), allow_meta=True)
        _check_fit(model, layers, stored)
        alphas = {path: alpha_of(path, config) for path in stored}
        if not layers:
            if any(isinstance(module, DistributedDataParallel) for module in given.modules()):
                raise ValueError("DistributedDataParallel would not see new parameters: load the adapter, then wrap")
            layers = _create_layers(model, stored, alphas, config)
        for path, layer in layers.items():
            _copy(layer, "lora_A", file.get_tensor(f"{PREFIX}{path}.lora_A.weight"))
            _copy(layer, "lora_B", file.get_tensor(f"{PREFIX}{path}.lora_B.weight"))
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
            model = model._orig_mod
        else:
            return model


def whole_value(parameter: Tensor) -> Tensor:
    """The unsharded, contiguous value on the CPU."""
    value = parameter.detach()
    if hasattr(value, "full_tensor"):  # a DTensor; every process takes part
        value = value.full_tensor()
    return value.cpu().contiguous()


def _warn_of_unsaved(model: nn.Module) -> None:
    adapters = {id(p) for _, layer in lora_layers(model) for p in (layer.lora_A, layer.lora_B)}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in adapters]
    if others:
        warnings.warn(f"an adapter file holds A and B alone; these train too: {listed(others)}", stacklevel=3)


def _config_of(model: nn.Module, layers: dict[str, LoRALinear]) -> dict[str, Any]:
    rslora = all(layer.rslora for layer in layers.values())
    # The file has one rsLoRA flag. Where layers differ in it, each one's scaling is expressed by its alpha.
    mixed = not rslora and any(layer.rslora for layer in layers.values())
    ranks = {path: layer.r for path, layer in layers.items()}
    alphas = {path: layer.scaling * layer.r if mixed else layer.alpha for path, layer in layers.items()}
    # The dropout too: it matters to further training only, so the most common one stands for all.
    dropout = _most_common([layer.dropout for layer in layers.values()])
    rank, alpha = _most_common(list(ranks.values())), _most_common(list(alphas.values()))
    base = getattr(model, "config", None)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": getattr(base, "_name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "rank_pattern": {_pattern(p, ranks): value for p, value in ranks.items() if value != rank},
        "alpha_pattern": {_pattern(p, alphas): value for p, value in alphas.items() if value != alpha},
        "target_modules": _targets(model, layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "modules_to_save": None,
    }


def _most_common(values: list) -> Any:
    return Counter(values).most_common(1)[0][0]


def _pattern(path: str, paths: dict[str, Any]) -> str:
    """A key that PEFT's ``(.*\\.)?(key)$`` finds in this path only."""
    matches = [other for other in paths if re.match(rf"(.*\.)?({path})$", other)]
    return path if matches == [path] else f"^{re.escape(path)}"


def _targets(model: nn.Module, layers: dict[str, LoRALinear]) -> list[str]:
    """Last path components where these mean exactly the layers that carry a branch, else whole paths."""
    leaves = {path.rpartition(".")[2] for path in layers}
    named = [canonical_name(name) for name, _ in model.named_modules()]
    meant = {name for name in named if name.rpartition(".")[2] in leaves}
    return sorted(leaves if meant == set(layers) else layers)


def _check_fit(model: nn.Module, layers: dict[str, LoRALinear], stored: dict[str, StoredShapes]) -> None:
    """The stored layers against the model's: its LoRA layers where it has any, else its linear layers."""
    problems = []
    if layers:
        expected = {p: ((m.r, m.in_features), (m.out_features, m.r)) for p, m in layers.items()}
        missing = [path for path in expected if path not in stored]
        if missing:
            problems.append(f"missing from the file: {listed(missing)}")
        merged = [path for path, layer in layers.items() if layer.merged]
        if merged:
            problems.append(f"merged, call fastlora.unmerge first: {listed(merged)}")
    else:
        expected = {
            canonical_name(name): ((stored[path].a_shape[0], m.in_features), (m.out_features, stored[path].b_shape[1]))
            for name, m in model.named_modules()
            if (path := canonical_name(name)) in stored and isinstance(m, nn.Linear)
        }
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
    if mismatched:
        problems.append(f"shapes differ: {listed(mismatched, '; ')}")
    if problems:
        raise ValueError(f"the adapter does not fit {type(model).__name__}; {'; '.join(problems)}")


def _create_layers(
    model: nn.Module, stored: dict[str, StoredShapes], alphas: dict[str, float], config: dict[str, Any]
) -> dict[str, LoRALinear]:
    modules = {canonical_name(name): (name, module) for name, module in model.named_modules()}
    options = {}
    for path, (a_shape, _, dtype) in stored.items():
        name, linear = modules[path]
        # Over a 16-bit weight float32 loses nothing of any stored value; elsewhere A and B have the weight's dtype.
        widen = linear.weight.dtype.itemsize == 2 and dtype != linear.weight.dtype
        options[name] = {
            "r": a_shape[0],
            "alpha": alphas[path],
            "dropout": config["lora_dropout"],
            "rslora": bool(config.get("use_rslora", False)),
            "adapter_dtype": torch.float32 if widen else None,
        }
    replace_linears(model, options)
    return dict(lora_layers(model))


@torch.no_grad()
def _copy(layer: LoRALinear, name: str, value: Tensor) -> None:
    parameter = getattr(layer, name)
    if is_offloaded(layer):
        store(layer, name, value.to(parameter.dtype))
    elif parameter.is_meta:  # nothing to copy into yet; the file's value becomes the parameter
        setattr(layer, name, nn.Parameter(value.to(parameter.dtype), requires_grad=parameter.requires_grad))
    elif hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        whole = value.to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))
    else:
        parameter.copy_(value)
