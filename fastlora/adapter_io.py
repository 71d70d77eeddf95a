"""Adapters on disk, in PEFT's format: ``adapter_model.safetensors`` and ``adapter_config.json``. Never a pickle."""

import json
import math
import os
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fastlora.model import canonical_name, lora_layers, replace_linears
from fastlora.module import LoRALinear

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
PICKLE_NAME = "adapter_model.bin"
_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<factor>[AB])\.weight")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHOWN = 10
# Fields that change what an adapter computes, and the values under which it is plain LoRA on linear layers.
_PLAIN = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
}
# Starts that leave the base weights as they are; the others (PiSSA, OLoRA, ...) subtract from them at every load.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", None)


class _Stored(NamedTuple):
    """One layer of an adapter file: header entries only."""

    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    dtype: torch.dtype


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Writes the A and B of every ``LoRALinear`` of a model, and a configuration that PEFT reads.

    Each file is written beside its place and renamed into it once complete, so an interrupted call or a full disk
    leaves what was there before. With more than one process, all call it and rank 0 writes.

    Args:
        model: a model that ``inject`` or ``load_adapter`` has treated; merged or not makes no difference.
        directory: made where it is missing.

    Raises:
        ValueError: the model has no LoRA layer.
        OSError: the directory cannot be written.
    """
    model = _unwrapped(model)
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRALinear layer to save; call fastlora.inject first")
    _warn_of_unsaved(model)
    tensors = {}
    for path, layer in layers.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = whole_value(layer.lora_A)
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = whole_value(layer.lora_B)
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
    directory, model = Path(directory), _unwrapped(model)
    config = _read_config(directory)
    with _open_weights(directory) as file:
        stored = _read_header(file, directory / WEIGHTS_NAME)
        _check_ranks(stored, config)
        layers = dict(lora_layers(model))
        _check_fit(model, layers, stored)
        alphas = {path: _pattern_value(config["alpha_pattern"], path, config["lora_alpha"]) for path in stored}
        if not layers:
            layers = _create_layers(model, stored, alphas, config)
        for path, layer in layers.items():
            _copy(layer, "lora_A", file.get_tensor(f"{_PREFIX}{path}.lora_A.weight"))
            _copy(layer, "lora_B", file.get_tensor(f"{_PREFIX}{path}.lora_B.weight"))
            layer.alpha = alphas[path]
            layer.rslora = bool(config.get("use_rslora", False))
            layer.scaling = layer.alpha / (math.sqrt(layer.r) if layer.rslora else layer.r)
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
        warnings.warn(f"an adapter file holds A and B alone; these train too: {_some(others)}", stacklevel=3)


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


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG_NAME} in {directory}: not an adapter directory")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path} describes no LoRA adapter: peft_type is {kind!r}")
    odd = [f"{k}={config[k]!r}" for k, plain in _PLAIN.items() if k in config and config[k] not in plain]
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        odd.append(f"init_lora_weights={config['init_lora_weights']!r} (it changes the base weights)")
    if odd:
        raise ValueError(f"{path} is not plain LoRA on linear layers: {', '.join(odd)}; load it with PEFT")
    for field, default in (("r", 8), ("lora_alpha", 8), ("lora_dropout", 0.0)):
        value = config.setdefault(field, default)
        if not _is_number(value):
            raise ValueError(f"{path}: {field} must be a number, got {value!r}")
    if not 0.0 <= config["lora_dropout"] <= 1.0:
        raise ValueError(f"{path}: lora_dropout must be between 0 and 1, got {config['lora_dropout']}")
    for field in ("rank_pattern", "alpha_pattern"):
        config[field] = config.get(field) or {}
        if not isinstance(config[field], dict) or not all(map(_is_number, config[field].values())):
            raise ValueError(f"{path}: {field} must map module paths to numbers, got {config[field]!r}")
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _open_weights(directory: Path):
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        if (directory / PICKLE_NAME).is_file():
            raise FileNotFoundError(
                f"{directory} holds only {PICKLE_NAME}, a pickle, which can run code when opened and is refused; "
                f"convert it where you trust it: load it with PEFT and save_pretrained(safe_serialization=True)"
            )
        raise FileNotFoundError(f"no {WEIGHTS_NAME} in {directory}")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or is not a safetensors file: {error}") from error


def _read_header(file, path: Path) -> dict[str, _Stored]:
    """Shapes by layer path, from the header alone."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    dtypes: dict[str, torch.dtype] = {}
    unexpected, wrong_dtype = [], []
    for key in file.keys():  # noqa: SIM118  (the handle is not iterable)
        match = _KEY.fullmatch(key)
        if match is None:
            unexpected.append(key)
            continue
        view = file.get_slice(key)
        dtype = _DTYPES.get(view.get_dtype())
        if dtype is None:
            wrong_dtype.append(f"{key} ({view.get_dtype()})")
        else:
            dtypes[match["path"]] = torch.promote_types(dtypes.get(match["path"], dtype), dtype)
        shapes.setdefault(match["path"], {})[match["factor"]] = tuple(view.get_shape())
    halves = [f"{_PREFIX}{p}.lora_{f}.weight" for p, found in shapes.items() for f in "AB" if f not in found]
    problems = []
    if unexpected:
        problems.append(f"unexpected: {_some(unexpected)}")
    if halves:
        problems.append(f"missing: {_some(halves)}")
    if wrong_dtype:
        problems.append(f"dtype not one of {', '.join(_DTYPES)}: {_some(wrong_dtype)}")
    if not shapes and not problems:
        problems.append("it holds no tensors")
    if problems:
        raise ValueError(f"{path} does not hold plain LoRA weights; {'; '.join(problems)}")
    return {name: _Stored(found["A"], found["B"], dtypes[name]) for name, found in shapes.items()}


def _check_ranks(stored: dict[str, _Stored], config: dict[str, Any]) -> None:
    """A and B of each layer agree with each other and with the configured rank."""
    wrong = []
    for path, (a, b, _) in stored.items():
        rank = _pattern_value(config["rank_pattern"], path, config["r"])
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] != rank or a[0] < 1:
            wrong.append(f"{path}: lora_A {list(a)}, lora_B {list(b)}, configured rank {rank}")
    if wrong:
        raise ValueError(f"ranks do not agree: {_some(wrong, '; ')}")


def _check_fit(model: nn.Module, layers: dict[str, LoRALinear], stored: dict[str, _Stored]) -> None:
    """The stored layers against the model's: its LoRA layers where it has any, else its linear layers."""
    problems = []
    if layers:
        expected = {p: ((m.r, m.in_features), (m.out_features, m.r)) for p, m in layers.items()}
        missing = [path for path in expected if path not in stored]
        if missing:
            problems.append(f"missing from the file: {_some(missing)}")
        merged = [path for path, layer in layers.items() if layer.merged]
        if merged:
            problems.append(f"merged, call fastlora.unmerge first: {_some(merged)}")
    else:
        expected = {
            canonical_name(name): ((stored[path].a_shape[0], m.in_features), (m.out_features, stored[path].b_shape[1]))
            for name, m in model.named_modules()
            if (path := canonical_name(name)) in stored and isinstance(m, nn.Linear)
        }
    unexpected = [path for path in stored if path not in expected]
    if unexpected:
        kind = "LoRA" if layers else "linear"
        problems.append(f"not {kind} layers of the model: {_some(unexpected)}")
    mismatched = [
        f"{path}: file lora_A {list(stored[path].a_shape)}, lora_B {list(stored[path].b_shape)}, "
        f"model {list(a)}, {list(b)}"
        for path, (a, b) in expected.items()
        if path in stored and (stored[path].a_shape, stored[path].b_shape) != (a, b)
    ]
    if mismatched:
        problems.append(f"shapes differ: {_some(mismatched, '; ')}")
    if problems:
        raise ValueError(f"the adapter does not fit {type(model).__name__}; {'; '.join(problems)}")


def _create_layers(
    model: nn.Module, stored: dict[str, _Stored], alphas: dict[str, float], config: dict[str, Any]
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
    if parameter.is_meta:  # nothing to copy into yet; the file's value becomes the parameter
        setattr(layer, name, nn.Parameter(value.to(parameter.dtype), requires_grad=parameter.requires_grad))
    elif hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        whole = value.to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))
    else:
        parameter.copy_(value)


def _pattern_value(pattern: dict[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, matches the end of the path from a dot on."""
    for key, value in pattern.items():
        try:
            found = re.match(rf"(.*\.)?({key})$", path)
        except re.error as error:
            raise ValueError(f"{CONFIG_NAME}: pattern key {key!r} is not a regular expression: {error}") from error
        if found:
            return value
    return default


def _some(names: list[str], separator: str = ", ") -> str:
    text = separator.join(names[:_SHOWN])
    return text + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
