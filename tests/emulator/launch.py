"""Translated modules and their launches."""

import ctypes
import math
import re
from dataclasses import dataclass, field

import torch

from .arguments import BUFFER_SHIFT, Buffers, pack_arguments
from .engine_library import library
from .errors import BY_KIND, EmulatorError, LaunchError
from .ptx import parse
from .translate import translate_module

_POLICIES = {"late": 0, "early": 1, "random": 2}
_FENCES = {"path": (0, 0), "writer": (1, 0), "both": (1, 1)}
_SHARED_REGION = 0xFFFF  # kSharedRegion of engine/memory.h
_SHARED_BASE = 1024
_MESSAGE_BYTES = 8192
_MAX_THREADS = 1024
_MAX_SHARED_BYTES = 232448


@dataclass(frozen=True)
class LaunchOptions:
    """How to run a launch; README.md says what each field means."""

    seed: int = 0
    resident: int = 0
    race: bool = True
    async_policy: str = "late"
    proxy_fence: str = "path"
    shuffle_ctas: bool = False
    timeout_s: float = 120.0  # of a processor


@dataclass
class BufferStats:
    """Bytes moved between the grid and a buffer: every access, and distinct bytes only."""

    bytes_read: int
    bytes_written: int
    first_touch_read: int
    first_touch_written: int


@dataclass
class LaunchStats:
    """Counters of a launch. `instructions` counts warps, `macs` the multiply-adds of the tensor cores."""

    instructions: int
    switches: int
    barriers: int
    mbarrier_phases: int
    atomics: int
    mma: int
    wgmma: int
    macs: int
    ldmatrix: int
    stmatrix: int
    cp_async: int
    tma_loads: int
    tma_stores: int
    tma_bytes: int
    threads: int
    seconds: float  # of a processor
    buffers: dict = field(default_factory=dict)
    printed: str = ""  # by printf

    @property
    def tma(self):
        return self.tma_loads + self.tma_stores


class _Stats(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in list(LaunchStats.__dataclass_fields__)[:-3]] + [
        ("seconds", ctypes.c_double)
    ]


class _Options(ctypes.Structure):
    _fields_ = [("seed", ctypes.c_uint64)]
    _fields_ += [
        (name, ctypes.c_int32)
        for name in ("resident", "race", "async_policy", "fence_by_writer", "fence_by_reader", "shuffle_ctas")
    ]
    _fields_ += [("timeout_s", ctypes.c_double)]


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32 * 3) for name in ("grid", "block", "cluster")]
    _fields_ += [("shared_bytes", ctypes.c_uint32), ("dynamic_shared_bytes", ctypes.c_uint32)]


class _BufferSpec(ctypes.Structure):
    _fields_ = [("host", ctypes.c_void_p)] + [
        (name, ctypes.c_uint64) for name in ("size", "address", "row_bytes", "row_stride")
    ]
    _fields_ += [(name, ctypes.c_uint32) for name in ("writable", "initialised")]
    _fields_ += [(name, ctypes.c_uint64) for name in BufferStats.__dataclass_fields__]


def load_ptx(text):
    """Translates PTX, all of it, before anything runs.

    Returns: a Module. Raises: PtxError, naming the PTX line, for whatever is not modelled.
    """
    return Module(parse(text))


class Module:
    """The entries of a PTX text, ready to launch."""

    def __init__(self, parsed):
        self._variables = {
            variable.name: variable for variable in parsed.variables if variable.space in ("global", "const")
        }
        # Variables of the module come first among the buffers of every launch, so their addresses are known now.
        addresses = {name: (i + 1) << BUFFER_SHIFT for i, name in enumerate(self._variables)}
        self._programs = translate_module(parsed, addresses)

    @property
    def entries(self):
        return list(self._programs)

    def program(self, entry):
        """What an entry was translated to."""
        return self._programs[entry][1]

    def param_bytes(self, entry):
        """The size of an entry's parameters."""
        return self._programs[entry][0].param_bytes

    def launch(
        self,
        entry,
        grid,
        block,
        args,
        shared_bytes=0,
        buffers=None,
        cluster=(1, 1, 1),
        read_only=(),
        uninitialised=(),
        options=LaunchOptions(),
    ):
        """Runs an entry to its end.

        Args: see README.md.
        Returns: LaunchStats. Raises: the EmulatorError that says what the kernel did wrong.
        """
        if entry is None and len(self._programs) == 1:
            entry = self.entries[0]
        if entry not in self._programs:
            raise LaunchError(f"no entry {entry!r}; there are {self.entries}")
        header, program, static_bytes = self._programs[entry]
        known = Buffers(read_only, uninitialised)
        for name, variable in self._variables.items():
            data = torch.frombuffer(bytearray(variable.initial.ljust(max(variable.size, 1), b"\0")), dtype=torch.uint8)
            known.add(name, data)
        for name, tensor in (buffers or {}).items():
            known.add(name, tensor)
        params = pack_arguments(header, args, known)
        known.check_names()
        shape = _shape(grid, block, cluster, static_bytes, shared_bytes, header.directives)
        return _run(program, known.list, params, shape, options)


def _extent(value, what):
    extent = (value,) if isinstance(value, int) else tuple(value)
    extent += (1,) * (3 - len(extent))
    if len(extent) != 3 or any(int(each) < 1 for each in extent):
        raise LaunchError(f"{what} {value}")
    return extent


def _shape(grid, block, cluster, static_bytes, shared_bytes, directives):
    if cluster is None:
        cluster = directives.get("reqnctapercluster", (1, 1, 1))
    grid, block, cluster = _extent(grid, "grid"), _extent(block, "block"), _extent(cluster, "cluster")
    for what, given, name in (("block", block, "reqntid"), ("cluster", cluster, "reqnctapercluster")):
        if name in directives and _extent(directives[name], what) != given:
            raise LaunchError(f"the entry is compiled for a {what} of {directives[name]}, not {given}")
    if math.prod(block) > math.prod(directives.get("maxntid", (_MAX_THREADS,))):
        raise LaunchError(f"a block of {block} has more threads than {directives.get('maxntid', _MAX_THREADS)}")
    if static_bytes + shared_bytes > _MAX_SHARED_BYTES:
        raise LaunchError(
            f"{static_bytes} static and {shared_bytes} dynamic bytes exceed the {_MAX_SHARED_BYTES} of shared memory"
        )
    if any(n % c for n, c in zip(grid, cluster, strict=True)):
        raise LaunchError(f"a grid of {grid} is not a multiple of clusters of {cluster}")
    triple = ctypes.c_uint32 * 3
    return _Shape(triple(*grid), triple(*block), triple(*cluster), static_bytes + shared_bytes, shared_bytes)


def _run(program, buffers, params, shape, options):
    if options.async_policy not in _POLICIES or options.proxy_fence not in _FENCES:
        raise LaunchError(f"unknown async_policy {options.async_policy!r} or proxy_fence {options.proxy_fence!r}")
    fences = _FENCES[options.proxy_fence]
    native = _Options(
        options.seed,
        options.resident,
        options.race,
        _POLICIES[options.async_policy],
        *fences,
        options.shuffle_ctas,
        options.timeout_s,
    )
    specs = (_BufferSpec * max(len(buffers), 1))(
        *[_BufferSpec(b.host, b.size, b.address, b.row_bytes, b.row_stride, b.writable, b.initialised) for b in buffers]
    )
    stats, agent_shift, message = _Stats(), ctypes.c_uint32(), ctypes.create_string_buffer(_MESSAGE_BYTES)
    kind = library().emu_launch(
        program.handle,
        ctypes.byref(shape),
        ctypes.byref(native),
        specs,
        ctypes.c_uint64(len(buffers)),
        params,
        ctypes.c_uint64(len(params)),
        ctypes.byref(stats),
        ctypes.byref(agent_shift),
        message,
        ctypes.c_uint64(_MESSAGE_BYTES),
    )
    if kind:
        raise _error(kind, message.value.decode(), program.sites, buffers, shape)
    counters = {name: getattr(stats, name) for name, _ in _Stats._fields_}
    traffic = {
        b.name: BufferStats(*(getattr(spec, name) for name in BufferStats.__dataclass_fields__))
        for b, spec in zip(buffers, specs, strict=False)
    }
    return LaunchStats(**counters, buffers=traffic, printed=message.value.decode())


def _error(kind, text, sites, buffers, shape) -> EmulatorError:
    """Spells out the numbers of instructions, buffers and agents in an engine message."""
    found = []

    def site(match):
        found.append(sites[int(match.group(1))])
        return str(found[-1])

    def place(match):
        buffer, offset = int(match.group(1)), int(match.group(2))
        return (
            f"shared memory +{offset - _SHARED_BASE}" if buffer == _SHARED_REGION else buffers[buffer].describe(offset)
        )

    def agent(match):
        cta, index = int(match.group(1)), int(match.group(2))
        threads = -(-shape.block[0] * shape.block[1] * shape.block[2] // 32) * 32
        return (
            f"thread {index} of CTA number {cta}" if index < threads else f"the asynchronous proxy for CTA number {cta}"
        )

    text = re.sub(r"<at:(\d+):(-?\d+)>", place, text)
    text = re.sub(r"<agent:(\d+):(\d+)>", agent, text)
    text = re.sub(r"<pc:(\d+)>", site, text)
    return BY_KIND[kind](text, found)
