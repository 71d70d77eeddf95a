"""Projections that share an input: computed together, and found in models."""

from fastlora.shared_input.ops import SharedInputFunction, lora_linears
from fastlora.shared_input.plan import SharedInputs, shared_inputs

__all__ = ["SharedInputFunction", "SharedInputs", "lora_linears", "shared_inputs"]
