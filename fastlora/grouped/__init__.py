"""A LoRA layer whose rows lie in segments: MoE experts, several adapters in one batch, or both."""

from fastlora.grouped.ops import GroupedLoRAFunction, grouped_lora_linear

__all__ = ["GroupedLoRAFunction", "grouped_lora_linear"]
