"""What a compiled Triton kernel must be to be shipped: without a spill, within the limits of its devices, and by the
matrix instruction that its tile is for."""

import torch

from fastlora.backends.configs import TileConfig
from fastlora.backends.target import multiplies_by_warpgroup
from tests.support.compile_target import (
    REGISTER_FILE,
    SHARED_MEMORY,
    TENSOR_MEMORY_COLUMNS,
    remarks,
    resources,
    spilled_bytes,
)

MORE_ARCHITECTURES = (86, 89, 120)  # which take the tables of sm_80
_PLAIN_FMA = "fma.rn.f32"


def expected_instruction(arch: int, config: TileConfig, dtype: torch.dtype) -> str:
    """The matrix instruction in PTX that a tile must come to; fp32 products are plain FMA unless TF32 is allowed."""
    if dtype == torch.float32:
        return _PLAIN_FMA
    if not multiplies_by_warpgroup(arch) or config.block_m < 64:
        return "mma.sync"
    return "wgmma.mma_async" if arch == 90 else "tcgen05.mma"


def assert_fits(kernel, arch: int, instruction: str) -> None:
    used = resources(kernel)
    spills = spilled_bytes(kernel, arch) if used.stack else 0
    assert spills == 0 and used.local == 0, f"spills: {used}"
    assert used.registers > 16, f"nothing left of the kernel: {used}"
    assert used.registers * used.threads <= REGISTER_FILE, f"too many registers: {used}"
    limits = [SHARED_MEMORY[arch]]
    if arch == 80:  # its tables serve these as well
        limits += [SHARED_MEMORY[other] for other in MORE_ARCHITECTURES]
    assert used.shared <= min(limits), f"too much shared memory: {used}"
    assert used.tensor_memory <= TENSOR_MEMORY_COLUMNS, f"too much tensor memory: {used}"
    assert instruction in kernel.asm["ptx"], f"no {instruction}"
    if "wgmma" in instruction:
        assert not remarks(kernel, arch)
    if instruction == _PLAIN_FMA:
        assert "tf32" not in kernel.asm["ptx"]
