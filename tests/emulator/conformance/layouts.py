"""Where elements lie: in the registers of a warp, and in shared memory under a swizzle; from the PTX manual."""

import torch

LANE = torch.arange(32)


def swizzled(address, span):
    """Byte addresses after the XOR of the 16-byte chunk number with the row number within the pattern."""
    rows = span // 16 - 1
    return address ^ ((address >> 7 & rows) << 4) if span else address


def fragment_a(k_size, per):
    """(row, column) of every element of the A fragment: [32, registers, per]. per: elements in a register."""
    step = 4 * per
    registers = 2 * k_size // step
    i, e = torch.arange(registers), torch.arange(per)
    rows = (LANE // 4)[:, None, None] + (i % 2 * 8)[None, :, None] + torch.zeros_like(e)
    columns = (LANE % 4 * per)[:, None, None] + (i // 2 * step)[None, :, None] + e
    return rows, columns


def fragment_b(k_size, per):
    """(k, n) of every element of the B fragment."""
    step = 4 * per
    i, e = torch.arange(k_size // step), torch.arange(per)
    k = (LANE % 4 * per)[:, None, None] + (i * step)[None, :, None] + e
    return k, (LANE // 4)[:, None, None].expand_as(k)


def fragment_c(n_size=8):
    """(row, column) of every accumulator of a warp: [32, n_size / 2]."""
    i = torch.arange(n_size // 2)
    rows = (LANE // 4)[:, None] + (i // 2 % 2 * 8)[None, :]
    return rows, (LANE % 4 * 2)[:, None] + (i // 4 * 8 + i % 2)[None, :]


def pack(elements):
    """[..., per] elements -> int32 registers."""
    return elements.contiguous().view(torch.int32).squeeze(-1)


def place_matrix(matrix, mn_major, span, bytes_total):
    """The shared-memory image (uint8) of a [mn, k] matrix, and the descriptor's leading and stride offsets in bytes."""
    element = matrix.element_size()
    mn, k = torch.meshgrid(*(torch.arange(extent) for extent in matrix.shape), indexing="ij")
    per = 16 // element
    if not mn_major and span:
        leading, stride = 16, 8 * span
        address = mn // 8 * stride + mn % 8 * span + k * element
    elif not mn_major:
        leading, stride = 128, 128 * (matrix.shape[1] // per)  # core matrices of 8 rows x 16 bytes, along k first
        address = mn // 8 * stride + k // per * leading + mn % 8 * 16 + k % per * element
    elif span:
        wide = span // element
        stride = 8 * span
        leading = stride * (matrix.shape[1] // 8)
        address = mn // wide * leading + k // 8 * stride + k % 8 * span + mn % wide * element
    else:
        stride = 128
        leading = stride * (matrix.shape[0] // per)
        address = mn // per * stride + k // 8 * leading + k % 8 * 16 + mn % per * element
    image = torch.zeros(bytes_total, dtype=torch.uint8)
    flat = matrix.contiguous().view(torch.uint8).view(*matrix.shape, element)
    for byte in range(element):
        image[swizzled(address, span) + byte] = flat[..., byte]
    return image, leading, stride


def tile_image(tensor, corner, box, span):
    """What a TMA load of the box at `corner` (outermost first) leaves in shared memory: zero outside the tensor."""
    tile = torch.zeros(box, dtype=tensor.dtype)
    source, target = [], []
    for start, extent, size in zip(corner, box, tensor.shape, strict=True):
        low, high = min(max(start, 0), size), min(max(start + extent, 0), size)
        source.append(slice(low, high))
        target.append(slice(low - start, high - start))
    tile[tuple(target)] = tensor[tuple(source)]
    flat = tile.view(torch.uint8).reshape(-1)
    image = torch.zeros_like(flat)
    image[swizzled(torch.arange(flat.numel()), span)] = flat
    return image
