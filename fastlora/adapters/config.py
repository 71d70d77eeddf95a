"""``adapter_config.json`` as PEFT reads it, for layers of any ranks and alphas."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from fastlora.heads import lies_in, modules_ending_in, saved_modules, task_of
from fastlora.model import canonical_name

# The first PEFT whose factors of experts lie as they do here; where a matrix is square, nothing else tells.
EXPERTS_LAYOUT = "0.19.1"


def plain_config(
    model: nn.Module,
    ranks: dict[str, int],
    alphas: dict[str, float],
    *,
    rslora: bool = False,
    dropout: float = 0.0,
    transposed: bool = False,
    dora: bool = False,
    parameters: Iterable[str] = (),
) -> dict[str, Any]:
    """The configuration of LoRA or DoRA on linear layers, and of LoRA on parameters of experts.

    Args:
        model: what the layers are of.
        ranks, alphas: by path of a module or parameter, for the same paths.
        rslora: whether the scaling is alpha / sqrt(r).
        dropout: of the branches' inputs.
        transposed: whether layers among them keep their weights as [in, out].
        dora: whether each has a magnitude besides.
        parameters: which of the paths are those of parameters.
    """
    parameters = list(parameters)
    rank, alpha = most_common(list(ranks.values())), most_common(list(alphas.values()))
    base = getattr(model, "config", None)
    saved = [canonical_name(name) for name, _ in saved_modules(model)]
    layout = {"target_parameters": _targets(_parameter_paths(model), parameters, 2), "peft_version": EXPERTS_LAYOUT}
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model, saved),
        "base_model_name_or_path": getattr(base, "_name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "rank_pattern": {_pattern(p, ranks): value for p, value in ranks.items() if value != rank},
        "alpha_pattern": {_pattern(p, alphas): value for p, value in alphas.items() if value != alpha},
        "target_modules": _targets(_module_paths(model), [path for path in ranks if path not in parameters], 1),
        "bias": "none",
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
        "use_dora": dora,
        "modules_to_save": saved or None,
        **(layout if parameters else {}),
    }


def most_common(values: list) -> Any:
    return Counter(values).most_common(1)[0][0]


def _task_type(model: nn.Module, saved: list[str]) -> str | None:
    """PEFT's name of the task. For some, PEFT expects certain modules in the file, if the model has them."""
    task, heads = task_of(model)
    expected = [canonical_name(name) for name in modules_ending_in(model, heads)] if heads else []
    return task if all(lies_in(name, saved) for name in expected) else None


def _pattern(path: str, paths: dict[str, Any]) -> str:
    """A key that PEFT's ``(.*\\.)?(key)$`` finds in this path only."""
    matches = [other for other in paths if re.match(rf"(.*\.)?({path})$", other)]
    return path if matches == [path] else f"^{re.escape(path)}"


def _targets(named: list[str], paths: list[str], length: int) -> list[str]:
    """So many last components of the paths where these mean exactly them among all that are named, else whole paths."""
    ends = {_end(path, length) for path in paths}
    meant = {name for name in named if _end(name, length) in ends}
    return sorted(ends if meant == set(paths) else paths)


def _end(path: str, length: int) -> str:
    return ".".join(path.split(".")[-length:])


def _module_paths(model: nn.Module) -> list[str]:
    return [canonical_name(name) for name, _ in model.named_modules()]


def _parameter_paths(model: nn.Module) -> list[str]:
    return [canonical_name(name) for name, _ in model.named_parameters(remove_duplicate=False)]
