"""Adapter state dicts of other libraries, in memory: loralib's and torchtune's, besides PEFT's and this package's own.

Files in PEFT's format are the business of ``fastlora.save_adapter`` and ``fastlora.load_adapter``.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastlora.adapters.io import whole_value
from fastlora.experts_module import ExpertsBranch
from fastlora.model import lora_layers
from fastlora.placement import is_offloaded, require_values, store, stored

# What follows a module's path in the names of its A and B. loralib names them as this package does.
LAYOUTS = {
    "fastlora": ("", "lora_A", "lora_B"),
    "loralib": ("", "lora_A", "lora_B"),
    "torchtune": ("", "lora_a.weight", "lora_b.weight"),
    "peft": ("base_model.model.", "lora_A.weight", "lora_B.weight"),
}
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<factor>[abAB])(?:\.weight)?")


def adapter_state_dict(model: nn.Module, layout: str = "fastlora") -> dict[str, Tensor]:
    """A and B of every ``LoRALinear``, under the names that another library gives them.

    Args:
        model: a model with LoRA layers.
        layout: "fastlora", "loralib", "torchtune" or "peft".

    Returns:
        Name -> tensor on the CPU. None of these layouts holds alpha: note it beside.

    Raises:
        ValueError: an unknown layout, a model without LoRA layers, or with layers whose values are not here.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    prefix, name_a, name_b = LAYOUTS[layout]
    _refuse_others(dict(lora_layers(model)))
    require_values(model, lora_layers(model), "read", ("lora_A", "lora_B"))
    state = {}
    for path, layer in lora_layers(model):
        state[f"{prefix}{path}.{name_a}"] = whole_value(stored(layer, "lora_A"))
        state[f"{prefix}{path}.{name_b}"] = whole_value(stored(layer, "lora_B"))
    if not state:
        raise ValueError(f"{type(model).__name__} has no LoRALinear layer; call fastlora.inject first")
    return state


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Copies A and B from a state dict in any of the layouts into the model's LoRA layers, which must be the same ones.

    The layers keep their alpha, which must be the one that they were trained with (loralib's default is 1): none of
    these state dicts holds it.

    Args:
        model: a model with LoRA layers that are neither merged nor sharded.
        state: adapter entries only (``loralib.lora_state_dict``, torchtune's ``get_adapter_state_dict``).

    Returns:
        Paths of the layers loaded.

    Raises:
        ValueError: entries that are not A or B of a LoRA layer of the model, or are missing, or have another shape, and
            merged layers; all are listed and nothing is changed.
    """
    layers = dict(lora_layers(model))
    _refuse_others(layers)
    targets = {(path, factor): getattr(layer, f"lora_{factor}") for path, layer in layers.items() for factor in "AB"}
    found, problems = {}, []
    for key, value in state.items():
        match = _KEY.fullmatch(key)
        target = (match["path"], match["factor"].upper()) if match else None
        if target not in targets:
            problems.append(f"unexpected {key}")
            continue
        found[target] = value
        if value.shape != targets[target].shape:
            problems.append(f"{key} is {list(value.shape)}, the model's {list(targets[target].shape)}")
    problems += [f"missing {path}.lora_{factor}" for path, factor in targets if (path, factor) not in found]
    problems += [f"{path} is merged" for path, layer in layers.items() if layer.merged]
    if problems or not layers:
        listing = "; ".join(problems) or "it has no LoRALinear layer"
        raise ValueError(f"the adapter does not fit {type(model).__name__}: {listing}")
    require_values(model, layers.items(), "load into", ("lora_A", "lora_B"))
    for (path, factor), value in found.items():
        if is_offloaded(layers[path]):
            store(layers[path], f"lora_{factor}", value.to(targets[path, factor].dtype))
        else:
            targets[path, factor].copy_(value)
    return list(layers)


def _refuse_others(layers: Mapping) -> None:
    """Raises ValueError for layers that are more than an A and a B of one weight."""
    experts = [path for path, layer in layers.items() if isinstance(layer, ExpertsBranch)]
    if experts:
        raise ValueError(f"no layout here holds LoRA on experts ({', '.join(experts[:5])}): save_adapter does")
    found = [path for path, layer in layers.items() if layer.dora]
    if found:
        names = ", ".join(found[:5])
        raise ValueError(f"no layout here holds the magnitudes of DoRA layers ({names}): save_adapter does")
