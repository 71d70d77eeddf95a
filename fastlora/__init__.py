"""A LoRA layer in one kernel launch forward and one backward."""

from fastlora import analysis, integrations
from fastlora.adapters.io import load_adapter, save_adapter
from fastlora.backends import reference
from fastlora.counts import dispatch_counts, reset_dispatch_counts
from fastlora.grouped import GroupedLoRAFunction, grouped_lora_linear
from fastlora.model import inject, merge, merge_and_unload, trainable_parameters, unmerge
from fastlora.module import LoRALinear
from fastlora.op_tools import decompositions
from fastlora.ops import LoRALinearFunction, lora_linear
from fastlora.quantised_weight import QuantisedWeight, quantised
from fastlora.selection import available_backends
from fastlora.shared_input import lora_linears, shared_inputs
from fastlora.warming import warmup

__version__ = "0.1.0"

__all__ = [
    "GroupedLoRAFunction",
    "LoRALinear",
    "LoRALinearFunction",
    "QuantisedWeight",
    "analysis",
    "available_backends",
    "decompositions",
    "dispatch_counts",
    "grouped_lora_linear",
    "inject",
    "integrations",
    "load_adapter",
    "lora_linear",
    "lora_linears",
    "merge",
    "merge_and_unload",
    "quantised",
    "reference",
    "reset_dispatch_counts",
    "save_adapter",
    "shared_inputs",
    "trainable_parameters",
    "unmerge",
    "warmup",
]
