"""Runs compiled kernels (PTX) on the CPU and proves them free of races, deadlocks and stray accesses. See README.md."""

from .arguments import Struct
from .errors import (
    AlignmentError,
    AsyncCopyError,
    BarrierError,
    BoundsError,
    DeadlockError,
    DivergenceError,
    EmulatorError,
    EmulatorTimeoutError,
    LaunchError,
    LivelockError,
    ProxyError,
    PtxError,
    RaceError,
    ReadOnlyError,
    TrapError,
    UninitialisedError,
    WgmmaError,
)
from .launch import LaunchOptions, LaunchStats, Module, load_ptx
from .tensor_map import TensorMap, triton_descriptor

__all__ = [
    "AlignmentError",
    "AsyncCopyError",
    "BarrierError",
    "BoundsError",
    "DeadlockError",
    "DivergenceError",
    "EmulatorError",
    "EmulatorTimeoutError",
    "LaunchError",
    "LaunchOptions",
    "LaunchStats",
    "LivelockError",
    "Module",
    "ProxyError",
    "PtxError",
    "RaceError",
    "ReadOnlyError",
    "Struct",
    "TensorMap",
    "TrapError",
    "UninitialisedError",
    "WgmmaError",
    "load_ptx",
    "triton_descriptor",
]
