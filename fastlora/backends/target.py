"""What a launch needs to know of the machine it runs on."""

from functools import lru_cache
from typing import NamedTuple

import torch


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
