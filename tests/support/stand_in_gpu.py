"""A machine with one GPU, for a process that rehearses a visit to one.

torch's questions about the device are answered for compute capability 9.0; tensors "on the GPU" stay where they are.
The CUDA backend's launches run through csrc's own host code and end in the emulated runtime; results are then those of
the reference, because the emulator takes seconds for a kernel. Triton's are the reference's without a launch. Nothing
of this is undone: it is for a process of its own, and its forks.
"""

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from fastlora.backends import reference
from fastlora.backends.cuda import extension
from fastlora.backends.cuda import launch as cuda
from fastlora.backends.triton import driver
from fastlora.problem import LaunchSpec
from tests.support import cuda_runtime

N_SMS = 2
Choice = Callable[[LaunchSpec, Any], bool]  # of a launch, by its description and tile


def _never(spec: LaunchSpec, tile: Any) -> bool:
    return False


@dataclass
class Faults:
    """Which launches are wrong in one block of 64 x 64 elements, never end, leave the context unusable."""

    wrong: Choice = _never
    hangs: Choice = _never
    spoils: Choice = _never


class StandInGpu:
    """The device; ``faults`` may be replaced between two visits."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.spoiled = False
        self.recorded: list[Callable[[], None]] | None = None  # the launches of the graph that is being captured

    def synchronize(self, device: object = None) -> None:
        if self.spoiled:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def prepare(self, real: Callable, spec: LaunchSpec, **choice: Any) -> Callable:
        """What a backend's ``prepare`` is replaced by; ``real`` is its own, or None for no launch at all."""
        launcher = real(spec, **choice) if real else None
        by_reference = reference.prepare(spec)
        tile = choice.get("tile") or choice.get("config")

        def call(operands: Any) -> Any:
            self.synchronize()
            if self.faults.hangs(spec, tile):
                time.sleep(3600)
            results = launcher(operands) if launcher else by_reference(operands)
            written = [result for result in results if result is not None]

            def compute() -> None:
                right = [result for result in by_reference(operands) if result is not None]
                for result, value in zip(written, right, strict=True):
                    result.copy_(value)
                if self.faults.wrong(spec, tile):
                    written[0][-64:, -64:] = 0
                self.spoiled |= self.faults.spoils(spec, tile)

            compute()
            if self.recorded is not None:
                self.recorded.append(compute)
            return results

        return call


class _Graph:
    """A CUDA graph of the stand-in: its launches, once more."""

    def __init__(self) -> None:
        self.launches: list[Callable[[], None]] = []

    def replay(self) -> None:
        for launch in self.launches:
            launch()


def _moved_nowhere(to: Callable) -> Callable:
    def replaced(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple("cpu" if str(each).startswith("cuda") else each for each in args)
        return to(self, *args, **kwargs)

    return replaced


def install() -> StandInGpu:
    """Makes this process one with a GPU."""
    gpu = StandInGpu()
    properties = SimpleNamespace(
        name="stand-in", major=9, minor=0, multi_processor_count=N_SMS, total_memory=1 << 30, uuid="0"
    )

    @contextmanager
    def graph(captured: _Graph):
        gpu.recorded = captured.launches
        yield
        gpu.recorded = None

    @contextmanager
    def stream(_: object):
        yield

    answers = {
        "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "stand-in", "get_device_properties": lambda device=None: properties,
        "current_stream": lambda device=None: SimpleNamespace(device_index=0, cuda_stream=0x5712EA),
        "synchronize": gpu.synchronize, "CUDAGraph": _Graph, "graph": graph, "Stream": object, "stream": stream,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.Tensor.to = _moved_nowhere(torch.Tensor.to)
    runtime = cuda_runtime.runtime()
    extension.load = lambda: (runtime.module, None)
    cuda.why_unsupported = cuda.why_not_compiled
    _replace_prepare(gpu, cuda, cuda.prepare)
    driver._driver_unusable = lambda: None
    from fastlora.backends.triton import launch as triton_lora

    _replace_prepare(gpu, triton_lora, None)
    return gpu


def _replace_prepare(gpu: StandInGpu, backend: ModuleType, real: Callable | None) -> None:
    backend.prepare = lambda spec, **choice: gpu.prepare(real, spec, **choice)
