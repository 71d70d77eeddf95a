"""Bytes that a LoRA layer moves, counted without a clock: ``python -m benchmarks.traffic``."""
