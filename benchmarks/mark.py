"""The mark of the Hopper kernels: M = 8192, K = N = 4096, bf16, R = 16 and 64, against cuBLAS, all variants in turn.

    python -m benchmarks.mark --backend cuda --output mark.json

Forward against F.linear, the whole backward (dX, dA, dB) against the frozen layer's dX product. Every variant is
compared with fp64 before anything is timed, on outputs that were full of NaN (benchmarks.judge); then all that are
right run in one rotation, there and back, with cuBLAS and with the first variant once more, which shows the noise. The
clocks are sampled meanwhile. Variants run in a process that may die of one: it is written down as what stopped it, and
a new process goes on without it. The file is complete after every rotation; the exit code is 1 where anything was
wrong.
"""

import faulthandler
import json
import shlex
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import click
import torch
from torch.nn import functional

from benchmarks.clocks import Clocks
from benchmarks.gpu.child import Child
from benchmarks.judge import Judge
from fastlora.backends import composed
from fastlora.bench.cases import GPU_HEADLINE, LayerCase
from fastlora.bench.layer import input_sets
from fastlora.bench.peers import SCALING, LayerTensors
from fastlora.bench.timing import EventClock, HostClock, time_rounds
from fastlora.dispatch import launch_backward, launch_forward
from fastlora.environment import describe
from fastlora.problem import BackwardOperands, ForwardOperands, Needs

MARKS = {("forward", 16): 1.00, ("forward", 64): 1.03, ("backward", 16): 1.05, ("backward", 64): 1.10}
DIRECTIONS = ("forward", "backward")
NEEDS = Needs(True, True, True, False)
WARM_UP_ROUNDS = 5
CHECK_LIMIT_S = 30.0  # for a variant's first launch, and its comparison
LOST_CODE = 70
STOPPED = "did not return"

Launch = Callable[[LayerTensors], dict[str, torch.Tensor]]
Variant = tuple[ModuleType, dict]


def variants(backend: str) -> dict[str, Variant]:
    """Name -> (backend's module, keyword arguments of prepare): what the backend chooses itself first, then, of CUDA,
    the queue orders that the schedule model cannot settle, and what a call would get if it lost: cuBLAS's products."""
    if backend == "triton":
        from fastlora.backends.triton import launch as triton_lora

        return {"triton": (triton_lora, {}), "composed": (composed, {})}
    from fastlora.backends.cuda import launch as cuda
    from fastlora.backends.cuda.tiles import CudaTile

    wide = CudaTile(128, 256, group_m=16)
    return {
        "cuda": (cuda, {}),
        "cuda, fused shrink": (cuda, {"tile": replace(wide, fused=True)}),
        "cuda, separate shrink": (cuda, {"tile": wide}),
        "cuda group 8": (cuda, {"tile": replace(wide, group_m=8)}),
        "cuda group 32": (cuda, {"tile": replace(wide, group_m=32)}),
        "composed": (composed, {}),
    }


def launch_of(direction: str, backend: ModuleType, options: dict, needs: Needs = NEEDS) -> Launch:
    """One launch of a direction; returns its results by the names of fastlora.bench.correctness.expected."""

    def forward(t: LayerTensors) -> dict[str, torch.Tensor]:
        operands = ForwardOperands(t.x, t.weight, t.lora_a, t.lora_b, None, SCALING, 0.0, None)
        return {"y": launch_forward(backend, operands, **options)[0]}

    def backward(t: LayerTensors) -> dict[str, torch.Tensor]:
        operands = BackwardOperands(t.dy, t.x, t.weight, t.lora_a, t.lora_b, saved_s(t), SCALING, 0.0, None)
        found = launch_backward(backend, operands, needs, **options)
        results = {"dx": found.dx, "lora_a": found.da, "lora_b": found.db}
        return {name: result for name, result in results.items() if result is not None}

    return forward if direction == "forward" else backward


_saved: dict[int, tuple[weakref.ref, torch.Tensor]] = {}


def saved_s(tensors: LayerTensors) -> torch.Tensor:
    """The S that a forward pass would have saved, made once for each set of inputs."""
    owner, s = _saved.get(id(tensors), (None, None))
    if s is None or owner() is not tensors:  # another set may have lain at this address
        s = functional.linear(tensors.x, tensors.lora_a).mul_(SCALING)
        _saved[id(tensors)] = weakref.ref(tensors), s
    return s


def frozen(direction: str, tensors: LayerTensors) -> torch.Tensor:
    if direction == "forward":
        return functional.linear(tensors.x, tensors.weight)
    return torch.mm(tensors.dy, tensors.weight)


def device_lost() -> bool:
    """Whether nothing runs in this process any more: an error of the GPU that does not pass."""
    if not torch.cuda.is_initialized():
        return False
    for _ in range(2):  # one that passes is reported once
        try:
            torch.cuda.synchronize()
            return False
        except RuntimeError:
            pass
    return True


class Rotation:
    """Every variant of one direction at one case: checked, then timed in turn with cuBLAS.

    write: keeps the rows; called before a variant may end the process and after each result.
    """

    def __init__(self, direction: str, case: LayerCase, sets: list[LayerTensors], write: Callable[[list[dict]], None]):
        self.direction, self.case, self.sets, self.write = direction, case, sets, write
        self.rows: list[dict] = []

    def check(self, launches: dict[str, Launch]) -> dict[str, Launch]:
        """Those that are right, by name."""
        judge = Judge(self.case, self.sets[0])
        right = {}
        for name, launch in launches.items():
            row = {"pass": self.direction, "variant": name, **asdict(self.case)}
            row |= {"mark": MARKS.get((self.direction, self.case.r)), "failure": STOPPED}
            self.rows.append(row)
            self.write(self.rows)
            faulthandler.dump_traceback_later(CHECK_LIMIT_S, exit=True)
            try:
                row |= judge.verdict(launch)
            except Exception as problem:  # whatever it is, it is this variant's, and the others go on
                row["failure"] = f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"
                if device_lost():
                    self.write(self.rows)
                    sys.exit(LOST_CODE)
            faulthandler.cancel_dump_traceback_later()
            if row["failure"] is None:
                del row["failure"]
                right[name] = launch
        self.write(self.rows)
        return right

    def time(self, launches: dict[str, Launch], rounds: int) -> None:
        """Adds times, cuBLAS's and their ratio to the rows; the noise is the ratio of the first variant to itself."""
        if not launches:
            return
        first = next(iter(launches.values()))
        turns = (partial(frozen, self.direction), *launches.values(), first)
        calls = [[partial(call, tensors) for tensors in self.sets] for call in turns]
        device = self.sets[0].x.device.type
        timed = [row for row in self.rows if row["variant"] in launches]
        faulthandler.dump_traceback_later(CHECK_LIMIT_S + rounds, exit=True)
        try:
            with Clocks() as clocks:
                clock = EventClock() if device == "cuda" else HostClock()
                base, *times, again = time_rounds(calls, clock, rounds, WARM_UP_ROUNDS)
        except RuntimeError as problem:
            for row in timed:
                row["failure"] = f"right, but timing it failed: {' '.join(str(problem).split())[:200]}"
        else:
            noise = max(again.median_us / times[0].median_us, times[0].median_us / again.median_us) - 1
            for row, ours in zip(timed, times, strict=True):
                row |= asdict(ours) | {"frozen_us": base.median_us, "ratio": ours.median_us / base.median_us}
                row |= {"noise": noise, "clocks": clocks.summary()}
        faulthandler.cancel_dump_traceback_later()
        self.write(self.rows)


def as_line(row: dict) -> str:
    what = f"{row['pass']:8} R={row['r']:<3} {row['variant']:14}"
    if "failure" in row:
        return f"{what} {row['failure']}"
    if "ratio" not in row:
        return f"{what} right, not timed"
    times = f"{row['median_us']:7.1f} µs, {row['ratio']:.3f}x of {row['frozen_us']:.1f} µs ± {row['noise']:.1%}"
    return f"{what} {times}" + (f" (mark {row['mark']:.2f}x)" if row["mark"] else "")


def run_all(plan: list[tuple[LayerCase, str]], backend: str, device: str, rounds: int, output: Path) -> None:
    """Runs what the file does not hold yet, in this process."""
    report = json.loads(output.read_text())
    report["environment"] = report["environment"] or describe(device)
    for case, direction in plan:
        earlier = [row for row in report["rows"] if _place(row) == (case.r, direction)]
        stopped = [row for row in earlier if row.get("stopped")]
        if {row["variant"] for row in earlier if _is_settled(row)} == set(variants(backend)):
            continue
        others = [row for row in report["rows"] if row not in earlier]

        def write(rows: list[dict], others: list[dict] = others, stopped: list[dict] = stopped) -> None:
            report["rows"] = [*others, *stopped, *rows]
            output.write_text(json.dumps(report, indent=1) + "\n")

        rotation = Rotation(direction, case, input_sets(case, device), write)
        out = {row["variant"] for row in stopped}
        chosen = {name: each for name, each in variants(backend).items() if name not in out}
        rotation.time(rotation.check({name: launch_of(direction, *each) for name, each in chosen.items()}), rounds)
        for row in (*stopped, *rotation.rows):
            print(as_line(row), flush=True)


def _is_settled(row: dict) -> bool:
    return "ratio" in row or row.get("failure", STOPPED) != STOPPED


def _place(row: dict) -> tuple[int, str]:
    return row["r"], row["pass"]


def note_what_stopped(output: Path, code: int | None) -> bool:
    """Marks the variant that ended the process, which the next one leaves out. Whether there is one."""
    report = json.loads(output.read_text())
    fresh = [row for row in report["rows"] if not row.get("stopped")]
    if code == LOST_CODE:  # the last one's own error is written
        culprits = fresh[-1:]
    else:
        culprits = [row for row in fresh if row.get("failure") == STOPPED]
        for row in culprits:
            how = f"within {CHECK_LIMIT_S:.0f} s" if code == 1 else f"and ended the process (exit code {code})"
            row["failure"] = f"{STOPPED} {how}"
    for row in culprits:
        row["stopped"] = True
    output.write_text(json.dumps(report, indent=1) + "\n")
    return bool(culprits)


@click.command()
@click.option("--output", default="mark.json", show_default=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--backend", default="cuda", show_default=True, type=click.Choice(("cuda", "triton")))
@click.option("--rounds", default=60, show_default=True, type=click.IntRange(5))
@click.option("--case", "sizes", type=(int, int, int), default=None, metavar="M N K", help="Another size.")
@click.option("--device", default="cuda", hidden=True)
def main(output: Path, backend: str, rounds: int, sizes: tuple[int, int, int] | None, device: str) -> None:
    """Time forward and backward against cuBLAS at the mark's size."""
    cases = [replace(case, **dict(zip("mnk", sizes, strict=True))) if sizes else case for case in GPU_HEADLINE]
    plan = [(case, direction) for case in cases for direction in DIRECTIONS]
    command = shlex.join(["python", "-m", "benchmarks.mark", *sys.argv[1:]])
    output.write_text(json.dumps({"command": command, "environment": None, "rows": []}) + "\n")
    most = len(plan) * len(variants(backend)) + 1
    for _ in range(most):  # a process each for what remains behind a variant that ended the one before
        child = Child(partial(run_all, plan, backend, device, rounds, output), leads=False)
        try:
            code = child.wait(float("inf"))
        except KeyboardInterrupt:
            child.stop()
            raise
        if code == 0 or not note_what_stopped(output, code):
            break
    rows = json.loads(output.read_text())["rows"]
    if code != 0 or not rows or any("failure" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
