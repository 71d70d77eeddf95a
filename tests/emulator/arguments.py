"""Kernel arguments: tensors become device buffers, everything becomes the bytes of the parameter space."""

import ctypes
import numbers
import struct
from dataclasses import dataclass, field

import numpy as np
import torch

from .errors import LaunchError
from .tensor_map import TensorMap

BUFFER_SHIFT = 36  # kBufferShift of engine/memory.h
_ALLOCATION_ALIGNMENT = 256
_PACK = {
    "b8": "B",
    "u8": "B",
    "s8": "b",
    "b16": "H",
    "u16": "H",
    "s16": "h",
    "b32": "I",
    "u32": "I",
    "s32": "i",
    "b64": "Q",
    "u64": "Q",
    "s64": "q",
    "f32": "f",
    "f64": "d",
}


@dataclass
class Struct:
    """A C structure passed by value: tensors, TensorMaps, scalars, bytes, each at its natural alignment.

    Python ints are int32 and floats float32: wrap others in a ctypes or numpy scalar.
    """

    fields: list
    alignment: int = field(init=False, default=8)

    def __post_init__(self):
        self.alignment = max([8] + [item.alignment for item in self.fields if isinstance(item, (Struct, TensorMap))])


@dataclass
class Buffer:
    """A tensor as the device sees it: the bytes from its first to its last element."""

    name: str
    tensor: torch.Tensor
    host: int
    size: int
    address: int
    row_bytes: int
    row_stride: int
    writable: bool
    initialised: bool

    def describe(self, offset):
        """Which element a byte offset is."""
        element = self.tensor.element_size()
        index, rest = [], offset // element
        if offset < 0 or offset >= self.size:
            return f"{self.name} {offset:+d} bytes"
        for stride, extent in sorted(
            zip(self.tensor.stride(), self.tensor.shape, strict=True), key=lambda pair: -pair[0]
        ):
            index.append(rest // stride if stride and extent > 1 else 0)
            rest -= index[-1] * stride
        return f"{self.name}[{', '.join(map(str, index))}]"


class Buffers:
    """Hands out device addresses, one range for each tensor; a view into a tensor shares its range."""

    def __init__(self, read_only=(), uninitialised=()):
        self.list, self._read_only, self._uninitialised = [], set(read_only), set(uninitialised)
        self._aliases = set()

    def add(self, name, tensor):
        """The device address of a CPU tensor, which is registered unless it lies in one that has been."""
        if tensor.device.type != "cpu":
            raise LaunchError(f"{name} is on {tensor.device}: the emulator works on CPU tensors")
        start, size = tensor.data_ptr(), _extent(tensor)
        for other in self.list:
            if other.host <= start and start + size <= other.host + other.size and size:
                if other.size != size and other.row_stride:
                    continue  # other columns of one matrix, perhaps: the rows of the two interleave
                self._check_alias(name, other)
                return other.address + start - other.host
            if max(start, other.host) < min(start + size, other.host + other.size) and not other.row_stride:
                raise LaunchError(f"{name} overlaps {other.name} in part: pass the larger one first")
        offset = tensor.storage_offset() * tensor.element_size() % _ALLOCATION_ALIGNMENT
        row_bytes, row_stride = _rows(name, tensor)
        self.list.append(
            Buffer(
                name,
                tensor,
                host=start,
                size=size,
                address=((len(self.list) + 1) << BUFFER_SHIFT) + offset,
                row_bytes=row_bytes,
                row_stride=row_stride,
                writable=name not in self._read_only,
                initialised=name not in self._uninitialised,
            )
        )
        return self.list[-1].address

    def _check_alias(self, name, other):
        self._aliases.add(name)
        for names in (self._read_only, self._uninitialised):
            if name in names and other.name not in names:
                raise LaunchError(f"{name} lies in {other.name}, which is not read_only or uninitialised as {name} is")

    def check_names(self):
        known = {buffer.name for buffer in self.list}
        for name in sorted((self._read_only | self._uninitialised) - known):
            if name not in self._aliases:
                raise LaunchError(f"{name!r} is read_only or uninitialised, but the buffers are {sorted(known)}")


def _extent(tensor):
    """Bytes from the first to the last element."""
    if not tensor.numel():
        return 0
    last = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _rows(name, tensor):
    """Bytes of a row and from row to row, where rows have gaps between them; else zeros. Of a vector whose elements
    have gaps between them each element is a row."""
    strides = zip(tensor.stride(), tensor.shape, strict=True)
    run, distance, rows = 1, 0, 1  # elements of a row, from row to row where there are gaps, and number of rows
    for stride, extent in sorted((s, e) for s, e in strides if s and e > 1) if tensor.numel() else ():
        if not distance and stride <= run:
            run += (extent - 1) * stride
        elif not distance:
            distance, rows = stride, extent
        elif stride % distance == 0 and stride <= rows * distance:
            rows += (extent - 1) * stride // distance
        else:
            raise LaunchError(f"{name} has gaps of two sizes, which cannot be checked: strides {tensor.stride()}")
    return run * tensor.element_size() * bool(distance), distance * tensor.element_size()


def pack_arguments(entry, args, buffers):
    """The parameter bytes of an entry. `args` is a dict or a list with one item for each parameter."""
    named = list(args.items()) if isinstance(args, dict) else [(f"arg{i}", value) for i, value in enumerate(args)]
    if len(named) != len(entry.params):
        raise LaunchError(f"{entry.name} takes {len(entry.params)} parameters, {len(named)} were given")
    for (
        name,
        value,
    ) in named:  # plain tensors first: a buffer that a TensorMap or Struct shares with one goes by its name
        if isinstance(value, torch.Tensor):
            buffers.add(name, value)
    packed = bytearray(entry.param_bytes)
    for (name, value), param in zip(named, entry.params, strict=True):
        data = _pack_param(name, value, param, buffers)
        if len(data) > param.size:
            raise LaunchError(f"{name} has {len(data)} bytes, the parameter {param.name} {param.size}")
        packed[param.offset : param.offset + len(data)] = data
    return bytes(packed)


def _pack_param(name, value, param, buffers):
    if isinstance(value, TensorMap) and param.size == 8:  # by pointer
        holder = torch.frombuffer(bytearray(_pack_map(name, value, buffers)), dtype=torch.uint8)
        return struct.pack("<Q", buffers.add(f"{name} (descriptor)", holder))
    if isinstance(value, (Struct, TensorMap, bytes)):
        return _pack_value(name, value, buffers)
    if isinstance(value, torch.Tensor):
        return struct.pack("<Q", buffers.add(name, value))
    if value is None:
        return bytes(param.size)
    if isinstance(value, ctypes._SimpleCData):
        value = value.value
    if isinstance(value, (numbers.Number, np.generic)) and param.type in _PACK and param.size <= 8:
        return _pack_number(name, value, param.type)
    raise LaunchError(
        f"{name}: cannot pass {type(value).__name__} as .{param.type} parameter {param.name} of {param.size} bytes"
    )


def _pack_number(name, value, type_name):
    """A float for a parameter declared .b32 or .b64 is passed as the bits of a float of that size."""
    code = _PACK[type_name]
    if code in "fd":
        return struct.pack("<" + code, float(value))
    if isinstance(value, (float, np.floating)):
        if type_name not in ("b32", "b64"):
            raise LaunchError(f"{name}: the float {value} for an integer parameter .{type_name}")
        return struct.pack("<f" if type_name == "b32" else "<d", value)
    bits = 8 * struct.calcsize(code)
    if not -(1 << (bits - 1)) <= int(value) < 1 << bits:
        raise LaunchError(f"{name}: {value} does not fit .{type_name}")
    return (int(value) % (1 << bits)).to_bytes(bits // 8, "little")


def _pack_map(name, value, buffers):
    return value.pack(buffers.add(name, value.tensor))


def _pack_value(name, value, buffers):
    if isinstance(value, TensorMap):
        return _pack_map(name, value, buffers)
    if isinstance(value, Struct):
        data = bytearray()
        for i, item in enumerate(value.fields):
            each = _pack_value(f"{name}.{i}", item, buffers)
            align = (
                item.alignment if isinstance(item, (Struct, TensorMap)) else 1 if isinstance(item, bytes) else len(each)
            )
            data += bytes(-len(data) % align) + each
        return bytes(data) + bytes(-len(data) % value.alignment)
    if isinstance(value, torch.Tensor):
        return struct.pack("<Q", buffers.add(name, value))
    if value is None:
        return bytes(8)
    if isinstance(value, bytes):
        return value
    if isinstance(value, (ctypes._SimpleCData, np.generic)):
        return bytes(value) if isinstance(value, ctypes._SimpleCData) else value.tobytes()
    if isinstance(value, bool):
        return struct.pack("<?", value)
    if isinstance(value, int):
        return struct.pack("<i" if value < 1 << 31 else "<I", value)
    if isinstance(value, float):
        return struct.pack("<f", value)
    raise LaunchError(f"{name}: cannot pass {type(value).__name__} in a structure")
