"""TMA descriptors, in the emulator's own encoding (engine/tensor_map.h)."""

import struct
from dataclasses import dataclass

import torch

from .errors import LaunchError

_MAGIC = 0x70616D726F736E74
_MAX_RANK = 5
_REDUCTION_TYPES = {
    "torch.float32": 1,
    "torch.float16": 2,
    "torch.bfloat16": 3,
    "torch.uint32": 4,
    "torch.int32": 5,
    "torch.float64": 6,
    "torch.uint64": 7,
}


@dataclass
class TensorMap:
    """A tiled TMA descriptor over a tensor of 1 to 5 dimensions; elements outside the tensor read as zero.

    Args:
        tensor: the base, in row-major order of its dimensions (the last one is TMA's innermost, with stride 1).
        box: rows, columns (and so on) of a tile, in the tensor's order.
        swizzle: bytes of the swizzle span: 0, 32, 64 or 128.
        shape, strides: other extents and strides (in elements) than the tensor's, same order.
        alignment: bytes; how a by-value kernel parameter of it is aligned.
    """

    tensor: object
    box: tuple
    swizzle: int = 0
    shape: tuple = None
    strides: tuple = None
    alignment = 64

    def pack(self, address):
        """The 128 bytes, for a base at this device address.

        Raises: LaunchError, where cuTensorMapEncodeTiled would fail.
        """
        element = self.tensor.element_size()
        shape = tuple(self.shape if self.shape is not None else self.tensor.shape)
        strides = tuple(self.strides if self.strides is not None else self.tensor.stride())
        rank = len(shape)
        problems = [
            (not 1 <= rank <= _MAX_RANK, f"rank {rank}"),
            (
                len(self.box) != rank or len(strides) != rank,
                f"box {self.box} and strides {strides} for {rank} dimensions",
            ),
            (self.swizzle not in (0, 32, 64, 128), f"swizzle {self.swizzle}"),
            (address % 16, "the base is not aligned to 16 bytes"),
            (strides[-1] != 1, f"inner stride {strides[-1]}"),
            (any(stride * element % 16 for stride in strides[:-1]), f"strides {strides} are not multiples of 16 bytes"),
            (any(not 1 <= extent <= 256 for extent in self.box), f"box {self.box} outside 1..256"),
            (self.box[-1] * element % 16, f"inner box of {self.box[-1] * element} bytes is not a multiple of 16"),
            (
                self.swizzle and self.box[-1] * element > self.swizzle,
                f"inner box of {self.box[-1] * element} bytes exceeds the {self.swizzle}-byte swizzle",
            ),
            (any(not 1 <= extent < 1 << 32 for extent in shape), f"shape {shape}"),
        ]
        for wrong, what in problems:
            if wrong:
                raise LaunchError(f"tensor map of a tensor of shape {tuple(self.tensor.shape)}: {what}")

        def padded(values, count):
            return [*values, *[0] * (count - len(values))]

        inner_first = [tuple(reversed(values)) for values in (shape, strides, self.box)]
        return struct.pack(
            "<QQII5Q4Q5IIII",
            _MAGIC, address, rank, element,
            *padded(inner_first[0], _MAX_RANK),
            *padded([stride * element for stride in inner_first[1][1:]], _MAX_RANK - 1),
            *padded(inner_first[2], _MAX_RANK),
            self.swizzle, _REDUCTION_TYPES.get(str(self.tensor.dtype), 0), 0,
        )  # fmt: skip


_FORM = struct.Struct("<QQII5Q4Q5IIII")
_DRIVER_TYPES = {
    0: (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2),  # bytes, whatever they stand for
    3: (torch.int32,),
    6: (torch.float16,),
    7: (torch.float32,),
    9: (torch.bfloat16,),
}


def unpack(data, offset, by_address):
    """The TensorMap at an offset of a kernel's parameters, as an emulated driver has encoded it, or None where there is
    none. Its last word is the driver's number of the element type.

    Args: by_address: tensors by the address of their first element.
    Raises: LaunchError: the map lies over none of them, or over one of another type.
    """
    if offset % TensorMap.alignment or len(data) - offset < _FORM.size:
        return None
    magic, address, rank, element_bytes, *rest = _FORM.unpack_from(data, offset)
    if magic != _MAGIC:
        return None
    sizes, strides, box, (swizzle, _, element_type) = rest[:5], rest[5:9], rest[9:14], rest[14:]
    tensor = by_address.get(address)
    if tensor is None or tensor.dtype not in _DRIVER_TYPES.get(element_type, ()):
        what = "no operand" if tensor is None else f"a tensor of {tensor.dtype}"
        raise LaunchError(f"a tensor map of the driver's element type {element_type} lies over {what}")
    return TensorMap(
        tensor,
        box=tuple(reversed(box[:rank])),
        swizzle=swizzle,
        shape=tuple(reversed(sizes[:rank])),
        strides=(*(stride // element_bytes for stride in reversed(strides[: rank - 1])), 1),
    )


def triton_descriptor(name, tensor, metadata):
    """The kernel arguments that Triton makes of a tensor descriptor: the map, then its shape and strides.

    Args: metadata: the descriptor's entry of `kernel.metadata.tensordesc_meta`.
    """
    tensor_map = TensorMap(tensor, tuple(metadata["block_size"]), swizzle=(0, 32, 64, 128)[metadata["swizzle"]])
    arguments = {name: tensor_map}
    arguments |= {f"{name}.shape{i}": extent for i, extent in enumerate(tensor.shape)}
    arguments |= {f"{name}.stride{i}": stride for i, stride in enumerate(tensor.stride())}
    return arguments
