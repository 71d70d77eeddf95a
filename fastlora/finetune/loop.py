"""One training run of a model with adapters, which can stop after any step and go on later bit for bit."""

import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields

import torch
from torch import nn
from torch.nn import functional as F

import fastlora
from fastlora.errors import CommandError
from fastlora.finetune.data import IGNORED, Sequences, TokenBlocks, batch_at
from fastlora.finetune.interrupt import Interruption
from fastlora.finetune.memory import SavedTensors, count_bytes, peak_bytes, reset_peak
from fastlora.finetune.settings import Settings

WARMUP_SHARE = 0.1
FINAL_SHARE = 0.1
REMEDY = "lower --learning-rate, or use --dtype float32"


class DivergedError(CommandError):
    """A loss is not finite."""


@dataclass
class Record:
    """What a run has measured so far.

    Attributes:
        losses: mean cross entropy per learned token of each step's batch, before its update; one entry a finished step,
            as in the three lists that follow.
        learning_rates: that of the update.
        step_tokens: tokens of the batch, without padding.
        step_seconds: time spent in the step.
        held_out: (step, mean cross entropy per learned token of the held-out sequences); step 0 is before training.
        peak_bytes: measured peak memory of training; 0 where it could not be measured.
        tensor_bytes: weights, gradients, optimiser state and tensors saved for backward, counted in the first step.
        calls: fastlora's dispatch counts in training steps.
    """

    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    peak_bytes: int = 0
    tensor_bytes: dict[str, int] = field(default_factory=dict)
    calls: dict = field(default_factory=dict)

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def seconds(self) -> float:
        """Time spent in training steps."""
        return sum(self.step_seconds)

    @property
    def held_out_before(self) -> float:
        return self.held_out[0][1]

    @property
    def held_out_after(self) -> float:
        return self.held_out[-1][1]

    def to_dict(self) -> dict:
        return asdict(self)

    def add_calls(self, counts: dict) -> None:
        """Adds dispatch counts to those of before an interruption."""
        fallbacks = Counter(self.calls.get("fallbacks", {})) + Counter(counts["fallbacks"])
        self.calls = {name: self.calls.get(name, 0) + n for name, n in counts.items() if name != "fallbacks"}
        self.calls["fallbacks"] = dict(fallbacks)

    @classmethod
    def from_dict(cls, values: dict) -> "Record":
        """Raises TypeError where the keys are not those of a record."""
        if set(values) != {entry.name for entry in fields(cls)}:
            raise TypeError("not a record of this version")
        return cls(**{**values, "held_out": [(step, loss) for step, loss in values["held_out"]]})


@dataclass
class Arm:
    """One model in training: fastlora's, or PEFT's for comparison. `optimizer` is None once the arm has finished."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    record: Record = field(default_factory=Record)

    def adapter(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """AdamW on what trains, without weight decay, as is usual for adapters."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth of the steps, then a cosine down to a tenth of the peak."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress)))


def causal_loss(model: nn.Module, sequences: Sequences) -> torch.Tensor:
    """Mean next-token cross entropy over the sequences' targets, computed in float32 from the model's logits."""
    logits = model(input_ids=sequences.ids, use_cache=False).logits
    targets = sequences.labels[:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED)


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    blocks: TokenBlocks,
    batch_size: int,
    device: torch.device,
    on_batch: Callable[[int], object] = lambda sequences: None,
) -> float:
    """Mean loss over the held-out targets with dropout off; the model's mode is as before afterwards.

    Args:
        on_batch: gets the number of sequences of each batch that is done.

    Raises:
        DivergedError: it is not finite.
    """
    training = model.training
    model.eval()
    total = 0.0
    for batch in blocks.held_out.split(batch_size):
        total += causal_loss(model, batch.trimmed().to(device)).item() * batch.targets
        on_batch(len(batch))
    model.train(training)
    mean = total / blocks.held_out.targets
    if not math.isfinite(mean):
        raise DivergedError(f"the held-out loss is {mean}: {REMEDY}")
    return mean


def train(
    arm: Arm,
    blocks: TokenBlocks,
    settings: Settings,
    interruption: Interruption,
    on_step: Callable[[float], None],
    until: int | None = None,
) -> None:
    """Runs the steps that the arm's record still lacks, adding each to it; `on_step` gets every loss.

    Args:
        until: the step to stop after, if not the last.

    Raises:
        Interrupted: between steps, with model, optimiser and record in agreement.
        DivergedError: a loss is not finite; the weights are as before that step.
    """
    device = torch.device(settings.device)
    record, until = arm.record, settings.steps if until is None else until
    if record.step >= until:
        return
    arm.model.train()
    with interruption.deferred():
        reset_peak(device)  # collects garbage, in whose callbacks Python would drop an Interrupted
    fastlora.reset_dispatch_counts()
    try:
        while record.step < until:
            with interruption.deferred():
                size = settings.batch_size * settings.grad_accum
                batch = batch_at(blocks.train, record.step, size, settings.seed)
                start = time.perf_counter()
                loss = _step(arm, batch, settings)
                record.step_seconds.append(time.perf_counter() - start)
                record.learning_rates.append(arm.optimizer.param_groups[0]["lr"])
                record.step_tokens.append(batch.tokens)
                record.losses.append(loss)
                on_step(loss)
    finally:
        record.peak_bytes = max(record.peak_bytes, peak_bytes(device))
        record.add_calls(fastlora.dispatch_counts())


def _step(arm: Arm, batch: Sequences, settings: Settings) -> float:
    """One update of the arm's model; returns the loss before it, the mean over all targets of its parts."""
    optimizer, first = arm.optimizer, not arm.record.losses
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(arm.record.step, settings.steps, settings.learning_rate)
    optimizer.zero_grad(set_to_none=True)
    targets, mean, kept = batch.targets, 0.0, 0
    for part in batch.split(settings.batch_size):
        share = part.targets / targets
        part = part.trimmed().to(torch.device(settings.device))
        with SavedTensors(arm.model.parameters()) if first else nullcontext() as saved:
            loss = causal_loss(arm.model, part) * share
        kept = max(kept, saved.bytes if saved else 0)
        mean += loss.item()
        if not math.isfinite(mean):
            raise DivergedError(f"the loss is {mean} at step {arm.record.step + 1}: {REMEDY}")
        loss.backward()
    optimizer.step()
    if first:
        arm.record.tensor_bytes = count_bytes(arm.model, optimizer, kept)
    return mean
