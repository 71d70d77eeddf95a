"""Layers run by the compiled CUDA kernels' own PTX in the emulator, and checked: what their tests, the sweep and the
search for planted defects have in common."""

from dataclasses import replace

import pytest
import torch

from fastlora.backends import workspace
from fastlora.backends.cuda import extension
from fastlora.backends.cuda import launch as cuda
from fastlora.philox import keep_mask
from fastlora.problem import Needs, split_scaling
from tests.emulator import LaunchOptions
from tests.support import numerics
from tests.support.cuda_emulation import SCHEDULES, emulated, ptx_of, run_layer, unavailable

needs_kernels = pytest.mark.skipif(unavailable() is not None, reason=f"CUDA kernels: {unavailable()}")

ALL = Needs(True, True, True, True)
LARGE, MEDIUM, SMALL = cuda.CudaTile(128, 256, 2), cuda.CudaTile(128, 128, 1, 2), cuda.CudaTile(64, 128, 1, 3)


def variants() -> list[dict]:
    return [] if unavailable() else list(extension.variants())


def draw_dropped_integers(m: int, n: int, k: int, r: int, dtype: torch.dtype) -> numerics.Case:
    """Integers that stay exact under dropout of one half, which doubles what it keeps."""
    case = numerics.draw_integer_case(m, n, k, r, dtype)
    # A density that survives the doubling: S is rounded to 8 bits.
    thin = torch.rand(case.lora_b.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    case = replace(
        case, lora_b=case.lora_b * thin, dropout_p=0.5, seed=torch.tensor(0x0123_4567_89AB_CDEF), scaling=1.0
    )
    for name, value in numerics.compose(case.to(torch.float64)).items():
        assert torch.equal(value, value.to(dtype).double()), f"{name} is not exact: draw sparser numbers"
    return case


# Every compiled kernel: each tile, with dropout and without, at a rank of each class. Beyond rank 64 S is always made
# in separate tiles, and only the largest tile is compiled. Gradient tiles come between the others or last.
EVERY_KERNEL = tuple(
    (replace(tile, fused=fused, gradients_last=fused != dropout), dropout, rank)
    for tile in (LARGE, MEDIUM, SMALL)
    for fused in (False, True)
    for dropout in (False, True)
    for rank in (8, 24, 40, 104, 232)
    if rank <= 64 or (tile == LARGE and not fused)
)


def describe(value) -> str:
    if isinstance(value, cuda.CudaTile):
        order = "-last" if value.gradients_last else ""
        return f"{value.block_m}x{value.block_n}-{'fused' if value.fused else 'separate'}{order}"
    return {True: "dropout", False: "plain"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def check_integers(
    tile, dropout: bool, rank: int, options: LaunchOptions | None = None, ptx=ptx_of, dtype=torch.bfloat16
):
    """Row blocks, columns, steps and ranks all end in tails; several groups make partial sums of the gradients."""
    m = {256: 600, 128: 280}[tile.block_n] if tile.block_m == 128 else 136
    draw = draw_dropped_integers if dropout else numerics.draw_integer_case
    case = draw(m, 328, 392, rank, dtype)
    with emulated(options, ptx) as launch:
        results, s = run_layer(case, tile, ctas=4)
    numerics.assert_exact(results, case)
    dropped = case.x.double()
    if dropout:
        dropped = dropped * keep_mask(case.seed, case.dropout_p, *case.x.shape) * 2
    assert torch.equal(s.double(), split_scaling(case.scaling, dtype).in_s * dropped @ case.lora_a.double().t())
    assert len(launch.stats) == 2, "one launch each way"


def schedule_of(*layer) -> LaunchOptions:
    """One or another; test_cuda_protocol.py runs a layer of each tile under all of them."""
    return (LaunchOptions(), *SCHEDULES)[EVERY_KERNEL.index(layer) % (1 + len(SCHEDULES))]


# All gradients but one, and one alone.
SUBSETS = tuple(
    Needs(*((field == name) != others for field in ALL._fields)) for others in (True, False) for name in ALL._fields
)


def check_needs(needs: Needs, ptx=ptx_of):
    case = numerics.draw_integer_case(280, 136, 264, 16, torch.bfloat16)
    with emulated(ptx=ptx) as launch:
        results, _ = run_layer(case, LARGE, ctas=2, needs=needs)
    assert set(results) == {"y", *(n for n, wanted in needs._asdict().items() if wanted)}
    numerics.assert_exact(results, case)
    if not needs.dx:
        whole = 280 * 136 * 264
        assert launch.stats[1].macs < whole, "dX's products were computed all the same"


FUSED = cuda.CudaTile(128, 256, 2, fused=True, gradients_last=True)
ONE_GROUP = cuda.CudaTile(64, 128, 12)
LAYERS = (
    (LARGE, (520, 328, 264, 16)),
    (FUSED, (520, 328, 264, 64)),
    (LARGE, (392, 328, 264, 72)),
    (replace(MEDIUM, gradients_last=True), (264, 136, 264, 64)),
    (SMALL, (136, 136, 264, 16)),
    (ONE_GROUP, (136, 328, 264, 16)),
)


def is_clean() -> bool:
    return not any(buffer.any() for buffer in workspace._by_stream.values())


def check_schedules(tile, sizes, dropout_p, dtype=torch.bfloat16, schedules=SCHEDULES, ptx=ptx_of):
    """Twice over one workspace each. With one cluster at a time, a tile that waited for a later one would deadlock."""
    case = numerics.draw_case(*sizes, dtype, dropout_p=dropout_p)
    with emulated(ptx=ptx):
        first, _ = run_layer(case, tile, ctas=2)
    numerics.assert_accurate(first, case)
    for options in schedules:
        with emulated(options, ptx):
            for _ in range(2):
                results, _ = run_layer(case, tile, ctas=6)
                assert is_clean(), "the workspace was left dirty"
                for name, result in results.items():
                    assert torch.equal(result.view(torch.int16), first[name].view(torch.int16)), name
