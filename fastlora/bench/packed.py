"""Inputs of a layer over a packed base weight: those of the dense one, with its weight packed by its library."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from fastlora.bench.cases import LayerCase, PackedCase
from fastlora.bench.layer import input_sets
from fastlora.bench.peers import LayerTensors
from fastlora.finetune.quantise import quantised_linear
from fastlora.quantised_weight import QuantisedWeight, quantised


def packed_weight(weight: Tensor, base: str) -> QuantisedWeight:
    """The weight [N, K] in one of finetune.settings.BASE_QUANTS, decoded to its dtype."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    with torch.no_grad():
        return quantised(quantised_linear(linear, base, weight.dtype).weight, weight.dtype)


def sets_of(case: LayerCase, device: str) -> list[LayerTensors]:
    """input_sets of the case; the weights of a PackedCase are QuantisedWeights."""
    sets = input_sets(case, device)
    if not isinstance(case, PackedCase):
        return sets
    return [replace(each, weight=packed_weight(each.weight, case.base)) for each in sets]  # type: ignore[arg-type]


def decoded(tensors: LayerTensors) -> LayerTensors:
    """The inputs over the dense weight that a packed one holds."""
    weight = tensors.weight
    return replace(tensors, weight=weight.dequantize()) if isinstance(weight, QuantisedWeight) else tensors
