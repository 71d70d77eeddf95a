"""LoRA layers whose rows lie in segments: every variant is checked against float64, then timed in turn with others."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.bench.correctness import TOLERANCE, WrongResult
from fastlora.bench.cost import PASSES, Cost
from fastlora.bench.memory import allocation_peak, launches, saved_bytes
from fastlora.bench.timing import Stage, time_interleaved

FROZEN = "frozen"
# Two layers behind one another, and a gate between them, round a few times more than one layer does.
GROUPED_TOLERANCE = {**{dtype: 3 * bound for dtype, bound in TOLERANCE.items()}, torch.float32: 1e-4}


@dataclass
class Variant:
    """One way to compute a layer.

    call: x [tokens, ...] -> y.
    held: what keeps its parameters alive.
    trained: A and B in an order that all variants share; none of a frozen layer.
    """

    call: Callable[[Tensor], Tensor]
    held: nn.Module
    trained: list[Tensor]


def gradients(variant: Variant, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Y and the gradients of x, A and B."""
    x = x.detach().requires_grad_()
    y = variant.call(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *variant.trained], dy)]


def check(variants: dict[str, Variant], exact: Variant, x: Tensor, dy: Tensor) -> None:
    """Compares every variant that trains with ``exact``, whose parameters are the same in float64.

    Raises:
        WrongResult: naming the variant and its error.
    """
    wanted = gradients(exact, x.double(), dy.double())
    for name, variant in variants.items():
        if not variant.trained:
            continue
        for got, value in zip(gradients(variant, x, dy), wanted, strict=True):
            error = ((got.double() - value).norm() / value.norm()).item()
            if not error <= GROUPED_TOLERANCE[x.dtype]:
                raise WrongResult(f"{name} is wrong by {error:.3g} of a result's norm, and was not timed")


def stage_of(variant: Variant, x: Tensor, dy: Tensor) -> Stage:
    """Forward and backward over one set of inputs."""
    x = x.detach().requires_grad_()
    held: list = [None]

    def forward() -> None:
        held[0] = variant.call(x)

    def backward() -> None:
        torch.autograd.grad(held[0], [x, *variant.trained], dy)
        held[0] = None  # as in fastlora.bench.layer.make_stage

    return Stage(lambda: None, forward, backward)


def counts(variant: Variant, stage: Stage, device: str, held: Iterable[Tensor] = ()) -> dict[str, int]:
    """What a step launches, saves besides the parameters and ``held``, and allocates at its worst moment."""

    def step() -> None:
        stage.forward()
        stage.backward()

    return {
        "launches": launches(step, device),
        "saved_bytes": saved_bytes(stage.forward, [*variant.held.parameters(), *held]),
        "peak_bytes": allocation_peak(step, device),
    }


def measure(
    case: Any,
    variants: dict[str, Variant],
    inputs: tuple[Tensor, Tensor],
    cost: Callable[[str, bool], Cost],
    device: str,
    seconds: float,
) -> list[dict]:
    """Rows per variant and pass of variants that were checked.

    Args:
        case: a dataclass with ``name``, ``note`` and the dtype's name, whose fields go into every row.
        inputs: x and dY.
        cost: of a pass by its name, with or without LoRA.
        device: "cpu" or "cuda".
        seconds: time to spend on timing.
    """
    stages = {name: stage_of(variant, *inputs) for name, variant in variants.items()}
    timings = time_interleaved({name: [stage] for name, stage in stages.items()}, device, seconds, warm_up=1)
    rows = []
    for name, variant in variants.items():
        counted = counts(variant, stages[name], device)
        for which in PASSES:
            timing, least = timings[name][which], cost(which, bool(variant.trained))
            rows.append(
                {
                    "device": device,
                    "name": case.name,
                    "note": case.note,
                    "variant": name,
                    "pass": which,
                    **asdict(case),
                    **asdict(timing),
                    "tflops": least.flops / timing.median_us / 1e6,
                    "gbs": least.bytes / timing.median_us / 1e3,
                    "ratio_to_frozen": timing.median_us / timings[FROZEN][which].median_us,
                    **(counted if which == "step" else {}),
                }
            )
    return rows
