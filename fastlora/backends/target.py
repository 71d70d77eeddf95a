"""What a launch needs to know of the machine it runs on, and of a kind of machine."""

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


class Multiprocessor(NamedTuple):
    """What a multiprocessor has room for at once: bytes of shared memory, threads, programs (CTAs)."""

    shared: int
    threads: int
    programs: int


REGISTERS = 65536  # of a multiprocessor, on every one below
_REGISTER_GRAIN = 256  # a warp gets a multiple of so many
_SHARED_RESERVED = 1024  # that the system takes of each program
# By compute capability; "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide.
MULTIPROCESSORS = {
    80: Multiprocessor(164 << 10, 2048, 32),
    86: Multiprocessor(100 << 10, 1536, 16),
    87: Multiprocessor(164 << 10, 1536, 16),
    89: Multiprocessor(100 << 10, 1536, 24),
    90: Multiprocessor(228 << 10, 2048, 32),
    100: Multiprocessor(228 << 10, 2048, 32),
    103: Multiprocessor(228 << 10, 2048, 32),
    120: Multiprocessor(100 << 10, 1536, 24),
}


def resident_programs(arch: int, registers: int, shared: int, threads: int) -> int:
    """How many programs of a compiled kernel run on a multiprocessor at once; at least 1.

    Args:
        arch: compute capability; of one that is not listed, the next lower one's figures.
        registers: of a thread; below 1 where nobody knows them.
        shared: bytes of shared memory of a program.
        threads: of a program, whole warps.
    """
    room = MULTIPROCESSORS[max((known for known in MULTIPROCESSORS if known <= arch), default=80)]
    warps = -(-threads // 32)
    of_warp = -(-32 * registers // _REGISTER_GRAIN) * _REGISTER_GRAIN
    limits = [room.programs, room.threads // (32 * warps), room.shared // (shared + _SHARED_RESERVED)]
    if registers > 0:
        limits.append(REGISTERS // of_warp // warps)
    return max(1, min(limits))


def multiplies_by_warpgroup(arch: int) -> bool:
    """Whether products of 64 rows and more are a warpgroup's (wgmma) or the tensor memory's (tcgen05), whose least
    height is 64; elsewhere a warp's, of 16 (mma.sync): on sm_120, too."""
    return 90 <= arch < 120


@lru_cache
def target_of(device: torch.device) -> Target:
    """The target of ``device``; off a GPU, where Triton interprets or compiles only, a small stand-in."""
    if device.type != "cuda":
        return Target(arch=80, n_sms=2)
    properties = torch.cuda.get_device_properties(device)
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count)
