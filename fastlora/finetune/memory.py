"""What a run needs in memory: peaks that were measured, and bytes counted tensor by tensor."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastlora.quantised_weight import QuantisedWeight, read_weight

_STATUS = "/proc/self/status"
_CLEAR_REFS = "/proc/self/clear_refs"
_RESET_PEAK = "5"  # what proc(5) says to write there to reset VmHWM


def peak_method(device: torch.device) -> str | None:
    """How `peak_bytes` measures on this device, in words; None where it cannot."""
    if device.type == "cuda":
        return "largest total of CUDA allocations"
    return "largest resident set of this process" if os.access(_CLEAR_REFS, os.W_OK) else None


def reset_peak(device: torch.device) -> None:
    """Starts a measurement. Memory that is in use by now counts, as it does for the user."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif peak_method(device):
        _return_free_memory()
        with open(_CLEAR_REFS, "w") as file:
            file.write(_RESET_PEAK)


def peak_bytes(device: torch.device) -> int:
    """The peak since `reset_peak`; 0 where it cannot be measured."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes(_STATUS, "VmHWM") if peak_method(device) else 0


def _return_free_memory() -> None:
    """Asks glibc to hand freed pages back: a phase should not be charged for what an earlier one left behind."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _status_bytes(path: str, key: str) -> int:
    with open(path) as file:
        for line in file:
            name, _, value = line.partition(":")
            if name == key:
                return int(value.split()[0]) * 1024
    return 0


def free_memory(device: torch.device) -> int:
    """Bytes that could still be allocated on the device; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        free = _status_bytes("/proc/meminfo", "MemAvailable")
    except OSError:
        return 0
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as current:
            return min(free, int(limit.read()) - int(current.read()))
    except (OSError, ValueError):  # no control group, or one whose limit reads "max"
        return free


class SavedTensors:
    """While entered, counts the bytes that autograd keeps for backward, each storage once.

    Storages of the given tensors (parameters, which exist anyway) do not count. What was saved must live until it has
    been counted: an address that is used twice counts once.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        self._existing = {part.untyped_storage().data_ptr() for tensor in existing for part in parts_of(tensor)}
        self._storages: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """What was saved so far."""
        return sum(self._storages.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        for part in parts_of(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in self._existing:
                self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self) -> "SavedTensors":
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._hooks.__exit__(*exception)


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    parts = [part.untyped_storage() for tensor in tensors for part in parts_of(tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in parts}.values())


def parts_of(tensor: Tensor) -> Iterable[Tensor]:
    """The tensors that have the memory of this one: itself, or of a quantised weight its codes and its scales."""
    packed = read_weight(tensor)
    if isinstance(packed, QuantisedWeight):
        return packed.tensors
    if hasattr(tensor, "__tensor_flatten__"):  # a wrapper of other kinds
        return [part for name in tensor.__tensor_flatten__()[0] for part in parts_of(getattr(tensor, name))]
    return (tensor,)


def count_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, saved: int) -> dict[str, int]:
    """Bytes of weights, gradients, optimiser state and saved activations after a backward pass and a step."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return {
        "weights": distinct_bytes(model.parameters()),
        "gradients": sum(parameter.nbytes for parameter in trainable),
        "optimizer": distinct_bytes(states),
        "saved for backward": saved,
    }


def estimate_full_finetuning(model: nn.Module) -> dict[str, int]:
    """Bytes that AdamW on every weight needs without activations: the weights, as many gradients, two moments."""
    weights = distinct_bytes(model.parameters())
    return {"weights": weights, "gradients": weights, "optimizer": 2 * weights}
