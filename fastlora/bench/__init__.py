"""Measures what a LoRA layer costs on this machine, beside the frozen layer and its peers in the same run."""
