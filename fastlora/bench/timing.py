"""Interleaved timing: CUDA events on a GPU, perf_counter on the CPU, graph replay where launches would be the time."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

GRAPH_BELOW_US = 300.0  # a step whose floor is shorter than this may be bound by its launches
MIN_ROUNDS = 5
MAX_ROUNDS = 200
WARM_UP_CALLS = 3
Name = TypeVar("Name")


@dataclass(frozen=True)
class Timing:
    """Times of one variant in µs: median, quartiles, fastest; how many; "graph", "events" or "host".

    cpu_share: this thread's CPU time over wall time while it and the others were timed. On a machine that has nothing
        else to do it is close to 1; None where the time is the GPU's, or the thread's own.
    """

    median_us: float
    q25_us: float
    q75_us: float
    min_us: float
    rounds: int
    method: str
    cpu_share: float | None = None


class CpuShare:
    """CPU time over wall time of this thread since this was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.thread_time()

    def value(self) -> float:
        return (time.thread_time() - self._cpu) / (time.perf_counter() - self._wall)


def summarise(samples: list[float], method: str, cpu_share: float | None = None) -> Timing:
    """Median and quartiles of samples in µs."""
    low, middle, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return Timing(middle, low, high, min(samples), len(samples), method, cpu_share)


class HostClock:
    """Times work that is done when the call returns."""

    method = "host"

    def mark(self) -> float:
        return time.perf_counter()

    def elapsed_us(self, start: float, end: float) -> float:
        return (end - start) * 1e6

    def finish(self) -> None:
        pass


class EventClock:
    """Times work on the current CUDA stream, between recorded events."""

    method = "events"

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_us(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) * 1e3

    def finish(self) -> None:
        torch.cuda.synchronize()


@dataclass
class Stage:
    """One variant over one set of inputs: ``prepare`` untimed, then ``forward`` and ``backward``, timed one by one."""

    prepare: Callable[[], None]
    forward: Callable[[], None]
    backward: Callable[[], None]
    method: str | None = None  # how it is timed, where that is not the clock's own way


def turns(names: Iterable[Name], index: int) -> list[Name]:
    """Who runs in a round: all in turn, every other round backwards. What follows what changes, so that no variant
    always inherits a warm cache."""
    return list(names)[:: 1 if index % 2 == 0 else -1]


def time_interleaved(
    variants: dict[str, list[Stage]], device: str, seconds: float, warm_up: int = WARM_UP_CALLS
) -> dict[str, dict[str, Timing]]:
    """Times variants in turn (A B A B …), each round on the next set of inputs.

    Args:
        variants: name -> one Stage per set of inputs.
        device: "cpu" or "cuda".
        seconds: time to spend, warm-up not counted; at least MIN_ROUNDS rounds run.
        warm_up: untimed steps of each variant; never fewer than it has sets.

    Returns:
        name -> pass ("forward", "backward", "step") -> Timing.
    """
    clock = EventClock() if device == "cuda" else HostClock()
    for stages in variants.values():
        for call in range(max(warm_up, len(stages))):
            _run(stages[call % len(stages)], clock)
    clock.finish()
    marks: dict[str, list] = {name: [] for name in variants}
    started, cpu = time.perf_counter(), CpuShare()
    for index in range(MAX_ROUNDS):
        for name in turns(variants, index):
            stages = variants[name]
            marks[name].append(_run(stages[index % len(stages)], clock))
        if index % MIN_ROUNDS == MIN_ROUNDS - 1:
            clock.finish()
            if time.perf_counter() - started > seconds:
                break
    clock.finish()
    share = None if device == "cuda" else cpu.value()
    result = {}
    for name, rounds in marks.items():
        method = variants[name][0].method or clock.method
        spans = {
            "forward": [clock.elapsed_us(start, middle) for start, middle, _ in rounds],
            "backward": [clock.elapsed_us(middle, end) for _, middle, end in rounds],
            "step": [clock.elapsed_us(start, end) for start, _, end in rounds],
        }
        result[name] = {which: summarise(samples, method, share) for which, samples in spans.items()}
    return result


def time_rounds(
    calls: Sequence[Sequence[Callable[[], object]]], clock: HostClock | EventClock, rounds: int, warm_up: int
) -> list[Timing]:
    """Times calls in turn for a number of rounds; the first ``warm_up`` rounds are more and are not counted.

    Args:
        calls: for each, its versions, one a set of inputs: each round takes the next.
    """
    marks: list[list[tuple]] = [[] for _ in calls]
    for index in range(warm_up + rounds):
        for which in turns(range(len(calls)), index):
            start = clock.mark()
            calls[which][index % len(calls[which])]()
            marks[which].append((start, clock.mark()))
    clock.finish()
    return [summarise([clock.elapsed_us(*span) for span in spans[warm_up:]], clock.method) for spans in marks]


def _run(stage: Stage, clock: HostClock | EventClock) -> tuple:
    stage.prepare()
    start = clock.mark()
    stage.forward()
    middle = clock.mark()
    stage.backward()
    return start, middle, clock.mark()


def captured(stage: Stage) -> Stage:
    """The stage as two CUDA graphs, forward and backward, sharing one memory pool.

    Raises:
        RuntimeError: something in it cannot be captured.
    """
    stage.prepare()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            stage.forward()
            stage.backward()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward):
        stage.forward()
    with torch.cuda.graph(backward, pool=forward.pool()):
        stage.backward()
    return Stage(lambda: None, forward.replay, backward.replay, method="graph")


def time_calls(
    variants: dict[str, Callable[[], None]],
    device: str,
    seconds: float,
    calls: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time per call of short functions, in interleaved blocks of ``calls``; the device is waited for once a block.

    ``clock=time.thread_time`` counts this thread's own work alone, which other processes do not lengthen as long as it
    waits for no other thread.
    """
    method = "host" if clock is time.perf_counter else "thread CPU time"
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        for _ in range(calls):
            call()
    started, cpu = time.perf_counter(), CpuShare()
    for index in range(MAX_ROUNDS):
        for name in turns(variants, index):
            call = variants[name]
            if device == "cuda":
                torch.cuda.synchronize()
            begin = clock()
            for _ in range(calls):
                call()
            if device == "cuda":
                torch.cuda.synchronize()
            samples[name].append((clock() - begin) / calls * 1e6)
        if index + 1 >= MIN_ROUNDS and time.perf_counter() - started > seconds:
            break
    share = cpu.value() if method == "host" and device != "cuda" else None
    return {name: summarise(values, method, share) for name, values in samples.items()}
