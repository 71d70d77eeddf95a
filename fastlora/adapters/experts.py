"""LoRA on parameters of experts in PEFT's files, whose entries are named by nested modules and not by parameters."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastlora.adapters.config import EXPERTS_LAYOUT
from fastlora.adapters.files import StoredShapes, listed
from fastlora.experts import is_experts, matrix_sizes
from fastlora.experts_module import ExpertsBranch, LoRAExperts, peft_paths
from fastlora.model import canonical_name
from fastlora.refusals import experts_refusal, parameter_owners
from fastlora.targets import is_suffix, match_parameters

_BASE = re.compile(r"(\.base_layer)+$")
_Sizes = dict[str, tuple[int, int, int]]


def file_paths(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """What a file calls the place of each LoRA layer."""
    parameters = [path for path, layer in layers.items() if isinstance(layer, ExpertsBranch)]
    return {path: path for path in layers} | peft_paths(parameters)


class StoredExperts:
    """Which parameters of a model the entries of experts in a file belong to.

    Args:
        model: what the file is for.
        layers: its LoRA layers by path; where it has none, the configuration's target_parameters count.
        config: the file's configuration.

    Attributes:
        sizes: of each parameter: number of experts, out_features, in_features; by path without what wrappers insert.
        counts: the number of experts alone.
        names: the path as the model has it.

    Raises:
        ValueError: target parameters match nothing, something that cannot get a branch, or others than have one in the
            model; or nothing tells in which order the factors of square matrices lie.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], config: dict[str, Any]) -> None:
        targets = config["target_parameters"]
        found = _sizes_of_layers(layers, targets) if layers else _sizes_in_model(model, targets)
        self.names = {canonical_name(name): name for name in found}
        self.sizes = {canonical_name(name): sizes for name, sizes in found.items()}
        self.counts = {path: count for path, (count, _, _) in self.sizes.items()}
        named = model.named_modules()
        self._modules = {
            canonical_name(n) for n, module in named if isinstance(module, LoRAExperts) or is_experts(module)
        }
        square = [path for path, (_, n, k) in self.sizes.items() if n == k]
        if square and not _has_layout(config.get("peft_version")):
            raise ValueError(
                f"the file is of a PEFT before {EXPERTS_LAYOUT}, which may have the factors of experts the other way "
                f"round, and nothing shows it where matrices are square: {listed(square)}"
            )

    def by_parameter(self, stored: dict[str, StoredShapes]) -> dict[str, StoredShapes]:
        """The header's layers, with those of experts under the paths of their parameters.

        Raises:
            ValueError: more parameters of experts have entries than the configuration names.
        """
        parameters = {place: path for path, place in peft_paths(self.sizes).items()}
        unnamed = [place for place in stored if place not in parameters and _BASE.sub("", place) in self._modules]
        if unnamed:
            raise ValueError(f"entries of experts that target_parameters do not name: {listed(unnamed)}")
        return {parameters.get(place, place): shapes for place, shapes in stored.items()}


def _sizes_of_layers(layers: Mapping[str, nn.Module], targets: list[str]) -> _Sizes:
    """Those of a model's branches on experts, which have to be the ones that the targets name."""
    found = {path: layer for path, layer in layers.items() if isinstance(layer, ExpertsBranch)}
    odd = [path for path in found if not any(is_suffix(target, path) for target in targets)]
    odd += [target for target in targets if not any(is_suffix(target, path) for path in found)]
    if odd:
        raise ValueError(f"LoRA on parameters of the model or of the file alone: {listed(odd)}")
    return {path: (layer.num_experts, layer.out_features, layer.in_features) for path, layer in found.items()}


def _sizes_in_model(model: nn.Module, targets: list[str]) -> _Sizes:
    """Those of the parameters of a model without branches that the targets name."""
    names = match_parameters(model, targets)
    modules, owners = dict(model.named_modules(remove_duplicate=False)), parameter_owners(model)
    problems = [problem for name in names if (problem := experts_refusal(name, modules, owners))]
    if problems:
        raise ValueError(f"cannot put LoRA on {listed(problems, '; ')}")
    places = {name: name.rpartition(".") for name in names}
    return {name: matrix_sizes(modules[module], parameter) for name, (module, _, parameter) in places.items()}


def _has_layout(version: Any) -> bool:
    """Whether a file's peft_version is EXPERTS_LAYOUT or later."""
    numbers = re.match(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})", version) if isinstance(version, str) else None
    wanted = tuple(map(int, EXPERTS_LAYOUT.split(".")))
    return numbers is not None and tuple(map(int, numbers.groups())) >= wanted
