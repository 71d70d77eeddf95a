"""Backends and configurations that ``fastlora tune`` found faster on a GPU: the user's own, in the user's cache
directory, and behind them those that fastlora ships, which ``fastlora tune --output fastlora/tuned`` made.

One file per device name in each. It is read once per process; what does not hold up (another format, another device,
values that are no choice) is ignored with a warning, and the order of ``dispatch`` and the tables of ``configs.py``
serve instead.
"""

import json
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from fastlora.backends.configs import TileConfig, padded_rank
from fastlora.files import write_file
from fastlora.problem import BACKENDS, LaunchSpec

FORMAT = 2
SHIPPED = Path(__file__).parent.parent / "tuned"
DIRECTIONS = ("forward", "backward")
DECODING = ("cuda", "triton")  # the backends whose launches decode a packed weight
_LARGEST = 1 << 16  # no field of a configuration is larger than this
_POWERS_OF_TWO = ("block_m", "block_n", "block_k", "gradient_m", "gradient_n", "slice_n")


class Tuned(NamedTuple):
    """What was found for a class of shapes: the fastest backend, and the configuration of Triton's kernels, whichever
    backend that is; None where that is not on record. Over a packed weight, by backend, whether products should decode
    it in their loop, instead of tiles ahead of them: the configuration is for Triton's way."""

    backend: str | None
    config: TileConfig | None
    in_loop: Mapping[str, bool] = {}


def cache_directory() -> Path:
    """The user's cache directory for fastlora: platformdirs' answer, or its Linux rule where that is not installed.
    A user without a home directory, as containers have, gets one that does not exist, and so no choices."""
    try:
        from platformdirs import user_cache_path
    except ImportError:
        return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fastlora"
    return user_cache_path("fastlora", appauthor=False)


def cache_file(device_name: str, directory: Path | None = None) -> Path:
    """Where the choices for a device of this name are kept: in the user's cache directory, or in ``directory``."""
    name = re.sub("[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return (directory or cache_directory()) / f"tuned-{name}.json"


def shape_class(
    direction: str, m: int, n: int, k: int, r: int, dtype: torch.dtype, dropout: bool, packed: str | None = None
) -> str:
    """The class of shapes that share a choice: every size rounded up to a power of two, the rank as tiles hold it.
    ``packed``: the format of the base weight, if it is packed.

    Raises:
        ValueError: the direction is neither "forward" nor "backward".
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    sizes = " ".join(f"{name}{1 << (size - 1).bit_length()}" for name, size in (("m", m), ("n", n), ("k", k)))
    tail = (" dropout" if dropout else "") + (f" {packed}" if packed else "")
    return f"{direction} {sizes} r{padded_rank(r)} {str(dtype).removeprefix('torch.')}{tail}"


def parse_choices(text: str, device_name: str) -> dict[str, Tuned]:
    """Shape class -> choice, from a cache file's text.

    Raises:
        ValueError: the text is not such a file, is another device's, or holds a value that is no choice.
    """
    try:
        stored = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:  # the latter: a thousand brackets
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT or not isinstance(stored.get("choices"), dict):
        raise ValueError(f"not a file of format {FORMAT}")
    if stored.get("device") != device_name:
        raise ValueError(f"made for {stored.get('device')!r}, not for {device_name!r}")
    return {key: _parse_choice(key, entry) for key, entry in stored["choices"].items()}


def _parse_choice(key: str, entry: object) -> Tuned:
    if not isinstance(entry, dict) or not {"backend", "config"} <= set(entry):
        raise ValueError(f"{key}: not a choice of this version")
    backend, values = entry["backend"], entry["config"]
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{key}: backend cannot be {backend!r}")
    in_loop = entry.get("in_loop", {})
    if not isinstance(in_loop, dict) or not all(
        name in DECODING and type(value) is bool for name, value in in_loop.items()
    ):
        raise ValueError(f"{key}: in_loop cannot be {in_loop!r}")
    return Tuned(backend, None if values is None else _parse_config(key, values), in_loop)


def _parse_config(key: str, values: object) -> TileConfig:
    if not isinstance(values, dict) or set(values) != {field.name for field in fields(TileConfig)}:
        raise ValueError(f"{key}: not a configuration of this version")
    for name, value in values.items():
        valid = type(value) is bool if name == "fused" else type(value) is int and 0 < value <= _LARGEST
        if name in _POWERS_OF_TWO:
            valid = valid and value >= 16 and value & (value - 1) == 0
        if not valid:
            raise ValueError(f"{key}: {name} cannot be {value!r}")
    return TileConfig(**values)


def load_choices(device_name: str, directory: Path | None = None) -> dict[str, Tuned]:
    """The choices of one file (see cache_file); empty, with a warning, where it does not hold up."""
    path = cache_file(device_name, directory)
    try:
        return parse_choices(path.read_text(encoding="utf-8"), device_name)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"ignoring {path}: {error}; run `fastlora tune` to make it anew", stacklevel=2)
        return {}


def save_choices(
    device_name: str, choices: dict[str, dict], dropped: Collection[str] = (), directory: Path | None = None
) -> Path:
    """Adds choices to the device's file, which readers find whole at any moment, and forgets what was read before.

    Args:
        device_name: as torch.cuda.get_device_name says it.
        choices: shape class -> {"backend": its name or None, "config": TileConfig or None, ...}: over a packed weight
            "in_loop", as Tuned has it, and whatever else should be on record.
        dropped: shape classes whose earlier choice, if any, no longer holds.
        directory: the user's cache directory by default.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    path = cache_file(device_name, directory)
    kept: dict = {}
    try:
        text = path.read_text(encoding="utf-8")
        parse_choices(text, device_name)
        kept = json.loads(text)["choices"]
    except (FileNotFoundError, ValueError):
        pass  # nothing there, or nothing worth keeping
    kept = {key: entry for key, entry in kept.items() if key not in dropped}
    for key, entry in choices.items():
        config = entry["config"]
        kept[key] = {**entry, "config": None if config is None else asdict(config)}
    content = json.dumps({"format": FORMAT, "device": device_name, "choices": kept}, indent=1) + "\n"
    write_file(path, content.encode())
    forget_choices()
    return path


@cache
def _choices_of(device_name: str) -> dict[str, Tuned]:
    return load_choices(device_name, SHIPPED) | load_choices(device_name)


_on_change: list[Callable[[], None]] = []


def on_change(callback: Callable[[], None]) -> None:
    """Has ``callback`` called whenever the choices may have changed: by what has kernels prepared from them."""
    _on_change.append(callback)


def forget_choices() -> None:
    """Makes the next look-up read the files again."""
    _choices_of.cache_clear()
    tuned_config.cache_clear()
    for callback in _on_change:
        callback()


@lru_cache(maxsize=4096)
def tuned_config(
    direction: str, device: torch.device, m: int, n: int, k: int, r: int, dtype: torch.dtype, dropout: bool
) -> TileConfig | None:
    """The user's own choice for a call with aligned rows, else the shipped one, or None where its class was never tuned
    on such a device."""
    return _choice(direction, device, m, n, k, r, dtype, dropout).config


def tuned_backend(spec: LaunchSpec) -> str | None:
    """Likewise the backend for a call; None where its rows are not aligned, too, as those of what was timed were."""
    if not all(spec.aligned):
        return None
    return _choice_of(spec).backend


def tuned_in_loop(backend: str, spec: LaunchSpec) -> bool | None:
    """Likewise whether products of such a call's packed weight should decode it in their loop."""
    return _choice_of(spec).in_loop.get(backend) if all(spec.aligned) else None


def tuned_way(spec: LaunchSpec, in_loop: bool) -> TileConfig | None:
    """Likewise the configuration of Triton's kernels over such a call's packed weight, where it was found for this way
    to decode it."""
    choice = _choice_of(spec)
    return choice.config if choice.in_loop.get("triton", False) == in_loop and all(spec.aligned) else None


def _choice_of(spec: LaunchSpec) -> Tuned:
    packed = None if spec.packed is None else spec.base_format
    return _choice(spec.direction, spec.device, *spec.sizes, spec.dtype, spec.dropout, packed)


def _choice(
    direction: str, device: torch.device, m: int, n: int, k: int, r: int, dtype: torch.dtype, dropout: bool,
    packed: str | None = None,
) -> Tuned:  # fmt: skip
    choices = _choices_for(device)
    return choices.get(shape_class(direction, m, n, k, r, dtype, dropout, packed), _NOTHING) if choices else _NOTHING


def _choices_for(device: torch.device) -> dict[str, Tuned]:
    if device.type != "cuda":
        return {}
    try:
        return _choices_of(torch.cuda.get_device_name(device))
    except (RuntimeError, AssertionError):
        return {}  # a device that cannot be asked now


_NOTHING = Tuned(None, None)
