"""What a launch needs to know of the machine it runs on."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

# What torch.cuda answers by objects and a look at whether CUDA is initialised, as it is where a tensor is: the device
# that is current, and the handle of the stream that is current on a device.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
raw_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream
)


class Target(NamedTuple):
    """Compute capability as one number (90 for 9.0) and the number of multiprocessors."""

    arch: int
    n_sms: int


@lru_cache
def target_of(device: torch.device) -> Target:
    """The target of ``device``; off a GPU, where Triton interprets or compiles only, a small stand-in."""
    if device.type != "cuda":
        return Target(arch=80, n_sms=2)
    properties = torch.cuda.get_device_properties(device)
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count)
