"""LoRA on parameters of experts in PEFT's files, whose entries are named by nested modules and not by parameters."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastlora.adapters.config import EXPERTS_LAYOUT
from fastlora.adapters.files import StoredShapes, listed
from fastlora.experts import matrix_sizes
from fastlora.experts_module import ExpertsBranch, is_experts_parameter, peft_paths
from fastlora.model import canonical_name
from fastlora.targets import is_suffix, match_parameters


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
        names: path in the model of each parameter, by the path without what wrappers insert.
        sizes: of each parameter: number of experts, out_features, in_features.
        counts: the number of experts alone.

    Raises:
        ValueError: target parameters match nothing, something that is no experts module's, or others than have LoRA in
            the model; or nothing tells in which order the factors of square matrices lie.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], config: dict[str, Any]) -> None:
        if layers:
            found = [path for path, layer in layers.items() if isinstance(layer, ExpertsBranch)]
            targets = config["target_parameters"]
            odd = [path for path in found if not any(is_suffix(target, path) for target in targets)]
            odd += [target for target in targets if not any(is_suffix(target, path) for path in found)]
            if odd:
                raise ValueError(f"LoRA on parameters of the model or of the file alone: {listed(odd)}")
            self.names = {path: path for path in found}
            branches = [layer for layer in layers.values() if isinstance(layer, ExpertsBranch)]
            sizes = [(branch.num_experts, branch.out_features, branch.in_features) for branch in branches]
        else:
            found = match_parameters(model, config["target_parameters"])
            owners = [(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in found]
            others = [path for path, own in zip(found, owners, strict=True) if not is_experts_parameter(*own)]
            if others:
                raise ValueError(
                    "these target_parameters are none of experts that transformers calls by its ExpertsInterface: "
                    f"{listed(others)}; load the adapter with PEFT"
                )
            self.names = {canonical_name(path): path for path in found}
            sizes = [matrix_sizes(*own) for own in owners]
        self.sizes = dict(zip(self.names, sizes, strict=True))
        self.counts = {path: count for path, (count, _, _) in self.sizes.items()}
        square = [path for path, (_, n, k) in self.sizes.items() if n == k]
        if square and config["target_parameters"] and not _has_layout(config.get("peft_version")):
            raise ValueError(
                f"the file is of a PEFT before {EXPERTS_LAYOUT}, which may have the factors of experts the other way "
                f"round, and nothing shows it where matrices are square: {listed(square)}"
            )

    def by_parameter(self, stored: dict[str, StoredShapes]) -> dict[str, StoredShapes]:
        """The header's layers, with those of experts under the paths of their parameters."""
        parameters = {place: path for path, place in peft_paths(self.names).items()}
        return {parameters.get(place, place): shapes for place, shapes in stored.items()}


def _has_layout(version: Any) -> bool:
    """Whether a file's peft_version is EXPERTS_LAYOUT or later."""
    numbers = re.match(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})", version) if isinstance(version, str) else None
    wanted = tuple(map(int, EXPERTS_LAYOUT.split(".")))
    return numbers is not None and tuple(map(int, numbers.groups())) >= wanted
