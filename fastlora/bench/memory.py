"""What a step keeps and needs: bytes saved for backward, peak of allocations, launches."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastlora.finetune.memory import SavedTensors


@contextmanager
def _profiled(*activities: ProfilerActivity, memory: bool = False) -> Iterator[profile]:
    """A profile whose library does not write its progress to stderr, as torch 2.13's does for every one."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        with profile(activities=activities, profile_memory=memory) as profiler:
            yield profiler
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def saved_bytes(forward: Callable[[], Tensor], held_anyway: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for backward: unique storages, without those of ``held_anyway`` (the parameters)."""
    with SavedTensors(held_anyway) as saved:
        output = forward()
    del output
    return saved.bytes


def allocation_peak(step: Callable[[], None], device: str) -> int:
    """Peak bytes that the step allocates on top of what was there before."""
    step()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _profiled(ProfilerActivity.CPU, memory=True) as profiler:
        step()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def launches(call: Callable[[], None], device: str) -> int:
    """GPU kernels that a call launches; on the CPU, the ATen calls that make no further ATen call."""
    if device == "cuda":
        with _profiled(ProfilerActivity.CPU, ProfilerActivity.CUDA) as profiler:
            call()
            torch.cuda.synchronize()
        kernels = (e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA)
        return sum(1 for e in kernels if not e.name.startswith(("Memcpy", "Memset")) and not _is_annotation(e))
    with _profiled(ProfilerActivity.CPU) as profiler:
        call()
    return sum(1 for event in profiler.events() if event.name.startswith("aten::") and not _calls_aten(event))


def _calls_aten(event) -> bool:
    return any(child.name.startswith("aten::") or _calls_aten(child) for child in event.cpu_children)


def _is_annotation(event) -> bool:
    """A named range on the device's timeline, which is no kernel; older torch does not say."""
    return getattr(event, "is_user_annotation", False)
