"""What full fine-tuning of the same model would need: one real step of it where memory allows, a bound otherwise."""

from dataclasses import dataclass

import torch
from torch import nn

from fastlora.finetune.data import Sequences
from fastlora.finetune.loop import causal_loss, make_optimizer
from fastlora.finetune.memory import (
    SavedTensors,
    count_bytes,
    estimate_full_finetuning,
    free_memory,
    peak_bytes,
    reset_peak,
)
from fastlora.finetune.settings import Settings

MARGIN = 2  # activations and temporaries on top of what the estimate knows


@dataclass(frozen=True)
class FullFinetuning:
    """Memory of AdamW on every weight.

    Attributes:
        peak_bytes: measured over one step; 0 where none was run.
        tensor_bytes: counted in that step, or the estimate (without saved activations) where none was run.
    """

    peak_bytes: int
    tensor_bytes: dict[str, int]

    @property
    def measured(self) -> bool:
        return self.peak_bytes > 0


def measure_full_finetuning(
    model: nn.Module, batch: Sequences, settings: Settings, estimate: dict[str, int] | None = None
) -> FullFinetuning:
    """Takes one full fine-tuning step where the settings say so and memory allows. The step changes the model: nothing
    may need its weights afterwards.

    Args:
        estimate: of the model before anything in it was quantised, where something was.
    """
    estimate = estimate_full_finetuning(model) if estimate is None else estimate
    device = torch.device(settings.device)
    if not settings.measure_full or sum(estimate.values()) * MARGIN > free_memory(device):
        return FullFinetuning(0, estimate)
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    model.train()
    model.requires_grad_(True)
    reset_peak(device)
    optimizer = make_optimizer(model, settings.learning_rate)
    with SavedTensors(model.parameters()) as saved:
        loss = causal_loss(model, batch.to(device))
    loss.backward()
    optimizer.step()
    result = FullFinetuning(peak_bytes(device), count_bytes(model, optimizer, saved.bytes))
    # Parameters that are shared with the adapted model go back to being frozen there.
    model.zero_grad(set_to_none=True)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return result
