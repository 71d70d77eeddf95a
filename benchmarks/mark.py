"""The mark of the Hopper kernels: M = 8192, K = N = 4096, bf16, R = 16 and 64, against cuBLAS, each variant in turn.

    python -m benchmarks.mark --output mark.json

Forward against F.linear, the whole backward (dX, dA, dB) against the frozen layer's dX product. A variant is compared
with fp64 before it is timed; one that is wrong, or fails, is written down as such and does not stop the others. Each is
timed in turn with cuBLAS, so that both see the same clocks. The file is complete after every variant.
"""

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import click
import torch
from torch.nn import functional

from fastlora.bench.cases import GPU_HEADLINE, LayerCase
from fastlora.bench.correctness import TOLERANCE, expected
from fastlora.bench.layer import input_sets
from fastlora.bench.peers import SCALING, LayerTensors
from fastlora.bench.timing import EventClock, HostClock, time_rounds
from fastlora.dispatch import launch_backward, launch_forward
from fastlora.environment import describe
from fastlora.problem import BackwardOperands, ForwardOperands, Needs

MARKS = {("forward", 16): 1.00, ("forward", 64): 1.03, ("backward", 16): 1.05, ("backward", 64): 1.10}
NEEDS = Needs(True, True, True, False)
WARM_UP_ROUNDS = 5

Launch = Callable[[LayerTensors], dict[str, torch.Tensor]]


def variants() -> dict[str, tuple[ModuleType, dict]]:
    """Name -> (backend's module, keyword arguments of prepare): the backends, and the queue orders that the schedule
    model cannot settle. The one expected to win comes first: time may run out."""
    from fastlora.backends.cuda import launch as cuda
    from fastlora.backends.cuda.tiles import CudaTile
    from fastlora.backends.triton import launch as triton_lora

    wide = CudaTile(128, 256, group_m=16)
    return {
        "cuda": (cuda, {}),
        "triton": (triton_lora, {}),
        "cuda, fused shrink": (cuda, {"tile": replace(wide, fused=True)}),
        "cuda, separate shrink": (cuda, {"tile": wide}),
        "cuda group 8": (cuda, {"tile": replace(wide, group_m=8)}),
        "cuda group 32": (cuda, {"tile": replace(wide, group_m=32)}),
    }


def launch_of(direction: str, backend: ModuleType, options: dict) -> Launch:
    """One launch of a direction; returns its results by the names of fastlora.bench.correctness.expected."""

    def forward(t: LayerTensors) -> dict[str, torch.Tensor]:
        operands = ForwardOperands(t.x, t.weight, t.lora_a, t.lora_b, None, SCALING, 0.0, None)
        return {"y": launch_forward(backend, operands, **options)[0]}

    def backward(t: LayerTensors) -> dict[str, torch.Tensor]:
        s = saved_s(t)
        operands = BackwardOperands(t.dy, t.x, t.weight, t.lora_a, t.lora_b, s, SCALING, 0.0, None)
        found = launch_backward(backend, operands, NEEDS, **options)
        return {"dx": found.dx, "lora_a": found.da, "lora_b": found.db}

    return forward if direction == "forward" else backward


_saved: dict[int, torch.Tensor] = {}


def saved_s(tensors: LayerTensors) -> torch.Tensor:
    """The S that a forward pass would have saved, made once for each set of inputs."""
    if id(tensors) not in _saved:
        _saved[id(tensors)] = functional.linear(tensors.x, tensors.lora_a).mul_(SCALING)
    return _saved[id(tensors)]


def frozen(direction: str, tensors: LayerTensors) -> torch.Tensor:
    if direction == "forward":
        return functional.linear(tensors.x, tensors.weight)
    return torch.mm(tensors.dy, tensors.weight)


def largest_error(launch: Launch, tensors: LayerTensors) -> float:
    """The largest relative Frobenius error of a launch's results against fp64."""
    wanted = expected(tensors, None, 0.0, lora=True)
    found = launch(tensors)
    return max(((found[n].double() - wanted[n]).norm() / wanted[n].norm()).item() for n in found)


def measure(direction: str, name: str, launch: Launch, case: LayerCase, sets: list[LayerTensors], rounds: int) -> dict:
    """One row: the variant's times, cuBLAS's, and their ratio; or why there are none."""
    row = {"pass": direction, "variant": name, **asdict(case), "mark": MARKS[direction, case.r]}
    try:
        error = largest_error(launch, sets[0])
        row["error"] = error
        if not error <= TOLERANCE[case.torch_dtype]:
            return {**row, "failure": f"wrong: off by {error:.2e} of its norm"}
        calls = [[partial(call, tensors) for tensors in sets] for call in (launch, partial(frozen, direction))]
        clock = EventClock() if sets[0].x.is_cuda else HostClock()
        ours, base = time_rounds(calls, clock, rounds, WARM_UP_ROUNDS)
    except (RuntimeError, ValueError) as problem:
        return {**row, "failure": " ".join(str(problem).split())[:300]}
    return {**row, **asdict(ours), "frozen_us": base.median_us, "ratio": ours.median_us / base.median_us}


def as_line(row: dict) -> str:
    what = f"{row['pass']:8} R={row['r']:<3} {row['variant']:14}"
    if "failure" in row:
        return f"{what} {row['failure']}"
    times = f"{row['median_us']:7.1f} µs, {row['ratio']:.3f}x of {row['frozen_us']:.1f} µs"
    return f"{what} {times} (mark {row['mark']:.2f}x)"


@click.command()
@click.option("--output", default="mark.json", show_default=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--rounds", default=60, show_default=True, type=click.IntRange(5))
@click.option("--case", "sizes", type=(int, int, int), default=None, metavar="M N K", help="Another size.")
def main(output: Path, rounds: int, sizes: tuple[int, int, int] | None) -> None:
    """Time forward and backward against cuBLAS at the mark's size."""
    if not torch.cuda.is_available():
        raise click.UsageError("this measures a GPU, and torch finds none here")
    cases = [replace(case, **dict(zip("mnk", sizes, strict=True))) if sizes else case for case in GPU_HEADLINE]
    command = shlex.join(["python", "-m", "benchmarks.mark", *sys.argv[1:]])
    report = {"command": command, "environment": describe("cuda"), "rows": []}
    inputs = {case: input_sets(case, "cuda") for case in cases}
    for name, (backend, options) in variants().items():
        for case in cases:
            for direction in ("forward", "backward"):
                launch = launch_of(direction, backend, options)
                report["rows"].append(measure(direction, name, launch, case, inputs[case], rounds))
                click.echo(as_line(report["rows"][-1]))
        output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
