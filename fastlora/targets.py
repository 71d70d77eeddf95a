"""Which layers of a model a branch is put on: names, suffixes and patterns by PEFT's rules."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from fastlora.conv1d import LoRAConv1D, is_conv1d
from fastlora.experts import is_experts, projections
from fastlora.heads import is_head, lies_in, saved_modules
from fastlora.module import LoRALinear
from fastlora.quantised_module import QuantisedLoRALinear
from fastlora.quantised_weight import read_layer

ALL_LINEAR = "all-linear"
_NAMES_SHOWN = 20


class Narrowing(NamedTuple):
    """What ``inject`` leaves out of the layers that ``target_modules`` match; fields as its arguments."""

    exclude_modules: str | Iterable[str] | None = None
    layers_to_transform: int | Iterable[int] | None = None
    layers_pattern: str | Iterable[str] | None = None


def match_targets(
    model: nn.Module,
    target_modules: str | Iterable[str],
    saved: Iterable[str] = (),
    narrowing: Narrowing = Narrowing(),  # noqa: B008  (it does not change)
) -> list[str]:
    """The paths that ``inject`` would replace, in the model's order; raises as it does for a target without a match.

    Args:
        saved: paths of modules that are going to train whole, beside those that do.
        narrowing: which of the matches to leave out.
    """
    if not isinstance(target_modules, str):
        targets = list(target_modules) if isinstance(target_modules, Iterable) else [target_modules]
        if not all(isinstance(target, str) for target in targets):
            raise TypeError(f"target_modules must be a string or a list of strings, got {target_modules!r}")
        target_modules = targets
    whole = [*saved, *(name for name, _ in saved_modules(model))]
    modules = {name: module for name, module in model.named_modules() if name and not lies_in(name, whole)}
    if not list(model.children()):
        raise ValueError(f"{type(model).__name__} has no submodules to replace; LoRALinear.from_linear wraps one layer")
    if isinstance(target_modules, str):
        if target_modules.lower() == ALL_LINEAR:
            matched, unknown = _all_linear(model, modules), []
        else:
            try:
                pattern = re.compile(target_modules)
            except re.error as error:
                raise ValueError(f"target_modules {target_modules!r} is not a regular expression: {error}") from error
            matched, unknown = [name for name in modules if pattern.fullmatch(name)], [target_modules]
        unknown = [] if matched else (unknown or [target_modules])
    else:
        matched = [name for name in modules if any(is_suffix(target, name) for target in target_modules)]
        unknown = [t for t in target_modules if not any(is_suffix(t, name) for name in matched)]
    if unknown or not matched:
        as_names = "in a list, " if isinstance(target_modules, str) else ""  # a string has to match whole paths
        raise ValueError(
            f"target_modules {', '.join(map(repr, unknown)) or '(empty)'} match no module of {type(model).__name__}; "
            f"{as_names}names that would match: {_linear_names(modules)}"
        )
    matched = _without_excluded(matched, narrowing.exclude_modules)
    matched = _in_layers(matched, target_modules, narrowing)
    return [name for name in matched if not isinstance(modules[name], LoRALinear)]


def match_parameters(model: nn.Module, target_parameters: Iterable[str] | None) -> list[str]:
    """The paths of the parameters that ``target_parameters`` mean by PEFT's rule, in the model's order; within experts,
    in that in which they are multiplied by, which is the one that their class makes them in.

    Raises:
        ValueError: one matches nothing.
        TypeError: they are no list of strings.
    """
    targets = [] if target_parameters is None else target_parameters
    targets = targets if isinstance(targets, str) else list(targets)
    if isinstance(targets, str) or not all(isinstance(target, str) for target in targets):
        raise TypeError(f"target_parameters must be a list of strings, got {target_parameters!r}")
    if not targets:
        return []
    places = [(name, module) for name, module in model.named_modules() if name]
    paths = [f"{name}.{own}" for name, module in places for own in _own_names(module)]
    matched = [path for path in paths if any(is_suffix(target, path) for target in targets)]
    unknown = [target for target in targets if not any(is_suffix(target, path) for path in matched)]
    if unknown:
        raise ValueError(
            f"target_parameters {', '.join(map(repr, unknown))} match no parameter of {type(model).__name__}; "
            f"names that would match: {_parameter_names(places)}"
        )
    return matched


def _own_names(module: nn.Module) -> list[str]:
    own = [name for name, _ in module.named_parameters(recurse=False)]
    last = projections(module) if is_experts(module) else ()
    return [name for name in own if name not in last] + list(last)


def _parameter_names(places: list[tuple[str, nn.Module]]) -> str:
    """The last components of the paths of all parameters that may get a branch."""
    ends = {".".join(name.split(".")[-2:]): module for name, module in places}
    names = [f"{end}.{own}" for end, module in ends.items() if is_experts(module) for own in projections(module)]
    return ", ".join(sorted(names)) or "none (it has no experts that transformers calls by its ExpertsInterface)"


def _without_excluded(matched: list[str], exclude: str | Iterable[str] | None) -> list[str]:
    """The paths that ``exclude_modules`` leaves, by PEFT's rule: as for targets."""
    if exclude is None:
        return matched
    if isinstance(exclude, str):
        try:
            pattern = re.compile(exclude)
        except re.error as error:
            raise ValueError(f"exclude_modules {exclude!r} is not a regular expression: {error}") from error
        left, unknown = [name for name in matched if not pattern.fullmatch(name)], [exclude]
        unknown = unknown if len(left) == len(matched) else []
    else:
        names = list(exclude)
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"exclude_modules must be a string or a list of strings, got {names!r}")
        left = [path for path in matched if not any(is_suffix(name, path) for name in names)]
        unknown = [name for name in names if not any(is_suffix(name, path) for path in matched)]
    if unknown:
        as_names = "; names go in a list, and a string has to match whole paths" if isinstance(exclude, str) else ""
        raise ValueError(f"exclude_modules {', '.join(map(repr, unknown))} match none of the targets{as_names}")
    if not left:
        raise ValueError("exclude_modules leave none of the targets")
    return left


def _in_layers(matched: list[str], targets: str | list[str], narrowing: Narrowing) -> list[str]:
    """The paths within the blocks of these numbers, by PEFT's rule: the first number below ``layers_pattern``, or below
    any name that is itself below another; a target that is a whole path is taken all the same."""
    _, wanted, pattern = narrowing
    if wanted is None:
        if pattern is not None:
            raise ValueError("layers_pattern says where the numbers of layers_to_transform are: give both")
        return matched
    indices = [wanted] if isinstance(wanted, int) else list(wanted)
    if not indices or not all(isinstance(index, int) and not isinstance(index, bool) for index in indices):
        raise TypeError(f"layers_to_transform must be an integer or a list of integers, got {wanted!r}")
    if isinstance(targets, str):
        raise ValueError("layers_to_transform goes with a list of names; a pattern that is a string names the layers")
    patterns = [pattern] if isinstance(pattern, str) else list(pattern or ())
    forms = [rf"(?:^|.*?\.){each}\.(?P<idx>\d+)\." for each in patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    numbers = {}
    for path in matched:
        found = next((match for form in forms if (match := re.match(form, path))), None)
        numbers[path] = None if found is None else int(found["idx"])
    absent = [index for index in indices if index not in numbers.values()]
    if absent:
        there = sorted({number for number in numbers.values() if number is not None})
        raise ValueError(
            f"layers_to_transform {', '.join(map(str, absent))}: no target lies there; those of the targets are "
            f"{', '.join(map(str, there)) or 'none'}"
        )
    return [path for path in matched if path in targets or numbers[path] in indices]


def by_pattern(name: str, pattern: Mapping[str, Any] | None, paths: dict[str, str], default: Any) -> dict[str, Any]:
    """The value of each path by PEFT's rule: that of the first key which, as a regular expression, matches the end of
    the path from a dot on.

    Args:
        name: of the argument, for messages.
        pattern: key -> value, or None.
        paths: what the keys are matched with, by what they are returned under.
        default: where no key matches.

    Raises:
        ValueError: a key is no regular expression or matches no path.
    """
    pattern = pattern or {}
    used = set()
    values = dict.fromkeys(paths, default)
    for path, matched in paths.items():
        keys = [key for key in pattern if _ends_in(name, key, matched)]
        used.update(keys)
        if keys:
            values[path] = pattern[keys[0]]
    if unused := [key for key in pattern if key not in used]:
        raise ValueError(f"{name}: {', '.join(map(repr, unused))} match none of the layers that get a branch")
    return values


def _ends_in(name: str, key: str, path: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({key})$", path) is not None
    except re.error as error:
        raise ValueError(f"{name}: {key!r} is not a regular expression: {error}") from error


def is_suffix(target: str, name: str) -> bool:
    """Whether a path is the target or ends in it from a dot on."""
    return name == target or name.endswith(f".{target}")


def _all_linear(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    return [name for name, module in modules.items() if _is_plain_linear(module) and not is_head(model, name)]


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether "all-linear" means this module: a plain or a quantised layer, with a branch or without."""
    known = type(module) in (nn.Linear, LoRALinear, LoRAConv1D, QuantisedLoRALinear)
    return known or is_conv1d(module) or read_layer(module) is not None


def _linear_names(modules: dict[str, nn.Module]) -> str:
    """The last components of the paths of all plain linear layers, as a list of targets would hold them."""
    names = sorted({name.rpartition(".")[2] for name, module in modules.items() if _is_plain_linear(module)})
    if not names:
        return "none (the model has no nn.Linear)"
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")
