"""A LoRA layer in one kernel launch forward and one backward."""

from fastlora.dispatch import available_backends, dispatch_counts, reset_dispatch_counts
from fastlora.ops import LoRALinearFunction, lora_linear

__version__ = "0.1.0"

__all__ = [
    "LoRALinearFunction",
    "available_backends",
    "dispatch_counts",
    "lora_linear",
    "reset_dispatch_counts",
]
