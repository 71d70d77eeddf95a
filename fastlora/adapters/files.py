"""What an adapter directory holds, in PEFT's format, read and checked without a model. Never a pickle."""

import json
import math
import os
import re
import reprlib
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlora.adapters.patterns import Patterns
from fastlora.files import read_together

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
PICKLE_NAME = "adapter_model.bin"
PREFIX = "base_model.model."
_KEY = re.compile(
    r"base_model\.model\.(?P<path>.+)\.(?:lora_(?P<factor>[AB])\.weight|(?P<magnitude>lora_magnitude_vector))",
    re.DOTALL,
)
_MAGNITUDE = "M"  # in the place of a factor
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHOWN = 10
# An adapter of 70,000 experts stays below these by half; what is larger is not read.
MAX_CONFIG, MAX_HEADER = 8 << 20, 32 << 20  # bytes
_MAX_NAMES = 1000
# Fields that change what an adapter computes, and the values under which it is plain LoRA on linear layers.
_PLAIN: dict[str, tuple] = {
    "bias": ("none",),
    "use_dora": (False, True),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    "ensure_weight_tying": (False,),
    "megatron_config": (None, {}),
}
# Fields that change nothing in an adapter that is plain by the others: where it comes from, how it was started, where;
# and how the base weights lie, which the layers themselves say.
_HARMLESS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
    "use_rslora",
}
# Starts that leave the base weights as they are; the others (PiSSA, OLoRA, ...) subtract from them at every load.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", None)


class StoredShapes(NamedTuple):
    """One layer of an adapter file: header entries only."""

    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    dtype: torch.dtype
    dora: bool = False  # whether there is a magnitude [out] besides


class AdapterLayer(NamedTuple):
    """One layer of an adapter file: A [r, in] and B [out, r] as stored, and the factor of B·A."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float


def read_adapter(directory: str | os.PathLike) -> dict[str, AdapterLayer]:
    """Reads an adapter that ``save_adapter`` or PEFT wrote, without a model: its layers by path, on the CPU.

    Modules that were saved whole are left out.
    The layers are in the order of their numbers, 2 before 10, which the file does not keep.

    Raises:
        FileNotFoundError: no adapter there, or only a pickled one, which is never opened.
        ValueError: the files are damaged or are no plain LoRA on linear layers.
    """
    directory = Path(directory)
    layers = {}
    config, file = open_adapter(directory)
    with file:
        if config["target_parameters"]:
            raise ValueError(f"{directory} has LoRA on parameters of experts: merge it to look at what it changes")
        stored, _ = read_header(file, directory / WEIGHTS_NAME, config)
        check_ranks(stored, config)
        if config.get("use_dora", False):
            raise ValueError(
                f"{directory} is DoRA, whose change of a weight is not B·A alone; merge it to look at that"
            )
        for path in sorted(stored, key=_by_number):
            a, b = (file.get_tensor(f"{PREFIX}{path}.lora_{factor}.weight") for factor in "AB")
            layers[path] = AdapterLayer(a, b, scaling_of(alpha_of(path, config), a.shape[0], config))
    return layers


def entry_name(path: str, parameter: str) -> str:
    """What a file calls a parameter of a layer, behind the prefix."""
    return f"{path}.{parameter}" + (".weight" if parameter in ("lora_A", "lora_B") else "")


def _by_number(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]


def open_adapter(directory: Path):
    """The configuration and the open weights of one save, also where another process saves at the same time."""
    paths = [directory / CONFIG_NAME, directory / WEIGHTS_NAME]
    return read_together(paths, lambda: (read_config(directory), open_weights(directory)))


def alpha_of(path: str, config: dict[str, Any]) -> float:
    """The alpha that the configuration gives a layer."""
    return config["alpha_pattern"].value(path, config["lora_alpha"])


def scaling_of(alpha: float, rank: int, config: dict[str, Any]) -> float:
    """The factor of B·A, by the configuration's rule."""
    return alpha / (math.sqrt(rank) if config.get("use_rslora", False) else rank)


def read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG_NAME} in {directory}: not an adapter directory")
    with open(path, "rb") as file:
        data = file.read(MAX_CONFIG + 1)
    if len(data) > MAX_CONFIG:
        raise ValueError(f"{path} is larger than {MAX_CONFIG:,} bytes: no adapter's configuration")
    try:
        config = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply for an adapter's configuration") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path} describes no LoRA adapter: peft_type is {_shown(kind)}")
    odd = [f"{k}={_shown(config[k])}" for k, plain in _PLAIN.items() if k in config and config[k] not in plain]
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        odd.append(f"init_lora_weights={_shown(config['init_lora_weights'])} (it changes the base weights)")
    # What a later PEFT may have added: off where it is empty, else something that would be lost here.
    unknown = [k for k, value in config.items() if value and k not in _HARMLESS and k not in _PLAIN]
    odd += [f"{_shown(key)[1:-1]}={_shown(config[key])} (unknown here)" for key in unknown]
    if odd:
        raise ValueError(f"{path} is not plain LoRA on linear layers: {listed(odd)}; load it with PEFT")
    for field, default in (("r", 8), ("lora_alpha", 8), ("lora_dropout", 0.0)):
        value = config.setdefault(field, default)
        if not is_number(value):
            raise ValueError(f"{path}: {field} must be a number, got {_shown(value)}")
    if not 0.0 <= config["lora_dropout"] <= 1.0:
        raise ValueError(f"{path}: lora_dropout must be between 0 and 1, got {config['lora_dropout']}")
    if not isinstance(config.setdefault("use_rslora", False), bool):
        raise ValueError(f"{path}: use_rslora must be true or false, got {_shown(config['use_rslora'])}")
    for field in ("rank_pattern", "alpha_pattern"):
        config[field] = config.get(field) or {}
        if not isinstance(config[field], dict) or not all(map(is_number, config[field].values())):
            raise ValueError(f"{path}: {field} must map module paths to numbers, got {_shown(config[field])}")
        try:
            config[field] = Patterns(config[field])
        except ValueError as error:
            raise ValueError(f"{path}: {field}: {error}") from error
    for field, kind in (("modules_to_save", "module"), ("target_parameters", "parameter")):
        names = config[field] = config.get(field) or []
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"{path}: {field} must be a list of {kind} names, got {_shown(names)}")
        if len(names) > _MAX_NAMES:
            raise ValueError(f"{path}: {field} has {len(names)} names, {_MAX_NAMES} are the most")
    return config


def _shown(value: Any) -> str:
    """A value in a message, cut where it is long or deep."""
    return reprlib.repr(value)


def is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond floating point
        return False


def open_weights(directory: Path):
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        if (directory / PICKLE_NAME).is_file():
            raise FileNotFoundError(
                f"{directory} holds only {PICKLE_NAME}, a pickle, which can run code when opened and is refused; "
                f"convert it where you trust it: load it with PEFT and save_pretrained(safe_serialization=True)"
            )
        raise FileNotFoundError(f"no {WEIGHTS_NAME} in {directory}")
    with open(path, "rb") as file:
        start = file.read(8)
    size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if size > MAX_HEADER:
        raise ValueError(
            f"{path} is damaged or is not a safetensors file: its header claims {size:,} bytes, "
            f"{MAX_HEADER:,} are the most"
        )
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or is not a safetensors file: {error}") from error


def read_header(file, path: Path, config: dict[str, Any]) -> tuple[dict[str, StoredShapes], dict[str, tuple]]:
    """From the header alone: shapes by layer path, and shapes of the parameters of modules that were saved whole."""
    names = tuple(config["modules_to_save"])
    saved: dict[str, tuple[int, ...]] = {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    dtypes: dict[str, torch.dtype] = {}
    unexpected, wrong_dtype = [], []
    for key in file.keys():  # noqa: SIM118  (the handle is not iterable)
        match = _KEY.fullmatch(key)
        if match is None:
            parameter = key.removeprefix(PREFIX)
            if key.startswith(PREFIX) and _lies_in_one(parameter, names):
                saved[parameter] = tuple(file.get_slice(key).get_shape())
            else:
                unexpected.append(key)
            continue
        view = file.get_slice(key)
        dtype = _DTYPES.get(view.get_dtype())
        if dtype is None:
            wrong_dtype.append(f"{key} ({view.get_dtype()})")
        else:
            dtypes[match["path"]] = torch.promote_types(dtypes.get(match["path"], dtype), dtype)
        shapes.setdefault(match["path"], {})[match["factor"] or _MAGNITUDE] = tuple(view.get_shape())
    halves = [f"{PREFIX}{p}.lora_{f}.weight" for p, found in shapes.items() for f in "AB" if f not in found]
    problems = []
    dora = bool(config.get("use_dora", False))
    magnitudes = [f"{PREFIX}{path}.lora_magnitude_vector" for path, found in shapes.items() if _MAGNITUDE in found]
    if dora and len(magnitudes) < len(shapes):
        lacking = [f"{PREFIX}{path}.lora_magnitude_vector" for path, found in shapes.items() if _MAGNITUDE not in found]
        halves += lacking
    if magnitudes and not dora:
        unexpected += magnitudes
    if unexpected:
        problems.append(f"unexpected: {listed(unexpected)}")
    if halves:
        problems.append(f"missing: {listed(halves)}")
    if wrong_dtype:
        problems.append(f"dtype not one of {', '.join(_DTYPES)}: {listed(wrong_dtype)}")
    if not shapes and not saved and not problems:
        problems.append("it holds no tensors")
    if problems:
        raise ValueError(f"{path} does not hold plain LoRA weights; {'; '.join(problems)}")
    layers = {name: StoredShapes(found["A"], found["B"], dtypes[name], dora) for name, found in shapes.items()}
    wrong = [
        f"{name}: lora_magnitude_vector {list(found[_MAGNITUDE])}, lora_B {list(found['B'])}"
        for name, found in shapes.items()
        if dora and found[_MAGNITUDE] != found["B"][:1]
    ]
    if wrong:
        raise ValueError(f"{path} does not hold DoRA weights; shapes differ: {listed(wrong, '; ')}")
    return layers, saved


def _lies_in_one(parameter: str, names: tuple[str, ...]) -> bool:
    """Whether a module above the parameter is one of these, by PEFT's rule: its path ends in the name."""
    return any(parameter[: dot.start()].endswith(names) for dot in re.finditer(r"\.", parameter)) if names else False


def check_ranks(
    stored: dict[str, StoredShapes], config: dict[str, Any], experts: Mapping[str, int] = MappingProxyType({})
) -> None:
    """A and B of each layer agree with each other and with the configured rank.

    Args:
        experts: how many of them the factors of a path are of, where they are of experts.
    """
    wrong = []
    for path, (a, b, *_) in stored.items():
        rank = config["rank_pattern"].value(path, config["r"]) * experts.get(path, 1)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] != rank or a[0] < 1:
            wrong.append(f"{path}: lora_A {list(a)}, lora_B {list(b)}, configured rank {rank}")
    if wrong:
        raise ValueError(f"ranks do not agree: {listed(wrong, '; ')}")


def listed(names: list[str], separator: str = ", ") -> str:
    text = separator.join(names[:_SHOWN])
    return text + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
