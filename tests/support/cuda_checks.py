"""Layers run by the compiled CUDA kernels' own PTX in the emulator, and checked: what their tests, the sweep and the
search for planted defects have in common."""

import functools
from dataclasses import replace
from unittest import mock

import pytest
import torch

from fastlora import philox
from fastlora.backends import workspace
from fastlora.backends.cuda import extension
from fastlora.backends.cuda import launch as cuda
from fastlora.philox import keep_mask, random_words
from fastlora.problem import Needs, split_scaling
from tests.emulator import LaunchOptions
from tests.support import cuda_runtime, numerics
from tests.support.cuda_emulation import SCHEDULES, emulated, ptx_of, run_layer, unavailable, variants_for
from tests.support.triton_checks import GENERATOR

needs_kernels = pytest.mark.skipif(unavailable() is not None, reason=f"CUDA kernels: {unavailable()}")

ALL = Needs(True, True, True, True)
LARGE, MEDIUM, SMALL = cuda.CudaTile(128, 256, 2), cuda.CudaTile(128, 128, 1, 2), cuda.CudaTile(64, 128, 1, 3)


def variants() -> list[dict]:
    return [] if unavailable() else list(extension.variants())


def lying_transposed(case: numerics.Case) -> numerics.Case:
    """The case over a base weight that lies as [in_features, out_features]."""
    return replace(case, weight=case.weight.t().contiguous().t())


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


def draw_masked_integers(m: int, n: int, k: int, r: int, seed: int, dropout_p: float) -> numerics.Case:
    """Integers for which every single bit of the mask changes S, dX and dA. No element of X is zero, a column of A has
    one that is not, and a row of dY picks a row of B. All is exact where kept elements are not scaled."""
    generator = torch.Generator().manual_seed(1)

    def signs(*shape: int) -> torch.Tensor:
        return torch.randint(0, 2, shape, generator=generator) * 2 - 1

    def one_of(rows: int, columns: int) -> torch.Tensor:
        return torch.eye(columns)[torch.arange(rows) % columns]

    case = numerics.draw_integer_case(m, n, k, r, torch.bfloat16)
    lora_a, dy = one_of(k, r).T * signs(r, k), one_of(m, n) * signs(m, n)
    return replace(
        case, x=signs(m, k), lora_a=lora_a, lora_b=signs(n, r), dy=dy, scaling=1.0, dropout_p=dropout_p,
        seed=torch.tensor(seed),
    ).to(torch.bfloat16)  # fmt: skip


MASKED_ROWS, MASKED_COLUMNS = 136, 264  # of X
ENDS = {"1": 1e-9, "65535": 1 - 1e-9, "65536": 1.0}  # the least and the greatest thresholds, and their p


@functools.cache
def masked_seed() -> tuple[int, float]:
    """A seed by which elements lie at both sides of the thresholds 1 and 65535, and a p by which a whole word of
    random bits equals what the kernels compare it with: the last of the dropped ones, followed by ones."""
    counter = torch.arange(MASKED_ROWS * MASKED_COLUMNS // philox.ELEMENTS_PER_CALL)
    for seed in range(1000):
        words = random_words(seed, counter)
        low, high = words & 0xFFFF, words >> 16
        equal = high[low == 0xFFFF]
        if equal.numel() and all(((low == bits) | (high == bits)).any() for bits in (0, 1, 65534, 65535)):
            return seed, (int(equal[0]) + 1) / 65536
    raise AssertionError("no seed has such bits")


def check_mask(tile, rank: int, end: str | None, ptx=ptx_of):
    """Each bit of the mask, by results that do not hide one: kept elements are not scaled, not even where p is 1.

    end: of ENDS; None: the threshold that bits equal.
    """
    seed, equal = masked_seed()
    dropout_p = ENDS[end] if end else equal
    case = draw_masked_integers(MASKED_ROWS, 136, MASKED_COLUMNS, rank, seed, dropout_p)
    keeps_scale = mock.Mock(return_value=1.0)
    with (
        mock.patch.object(philox, "inverse_keep", keeps_scale),
        mock.patch.object(numerics, "inverse_keep", keeps_scale),
        emulated(ptx=ptx),
    ):
        results, s = run_layer(case, tile, ctas=4)
        numerics.assert_exact(results, case)
    dropped = case.x.double() * keep_mask(seed, dropout_p, *case.x.shape)
    assert torch.equal(s.double(), dropped @ case.lora_a.double().t())


def check_masks(tile, rank: int, ptx=ptx_of):
    for end in (None, *ENDS):
        check_mask(tile, rank, end, ptx)


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


# Every kernel over a base weight that lies as [in_features, out_features].
TRANSPOSED = tuple(
    (replace(tile, fused=fused, gradients_last=fused != dropout), dropout, rank)
    for tile, rank, fuses in ((LARGE, 8, False), (LARGE, 40, True), (MEDIUM, 24, False), (SMALL, 40, True))
    for dropout in (False, True)
    for fused in (fuses != dropout,)
)


def check_transposed(tile, dropout: bool, rank: int, options: LaunchOptions | None = None, ptx=ptx_of):
    check_integers(tile, dropout, rank, options, ptx, transposed=True)


def check_integers(
    tile, dropout: bool, rank: int, options: LaunchOptions | None = None, ptx=ptx_of, dtype=torch.bfloat16, m=None,
    transposed: bool = False,
):  # fmt: skip
    """Row blocks, columns, steps and ranks all end in tails; several groups make partial sums of the gradients."""
    m = m or ({256: 600, 128: 280}[tile.block_n] if tile.block_m == 128 else 136)
    draw = draw_dropped_integers if dropout else numerics.draw_integer_case
    case = draw(m, 328, 392, rank, dtype)
    with emulated(options, ptx) as launch:
        results, s = run_layer(lying_transposed(case) if transposed else case, tile, ctas=4)
    numerics.assert_exact(results, case)
    dropped = case.x.double()
    if dropout:
        dropped = dropped * keep_mask(case.seed, case.dropout_p, *case.x.shape) * 2
    assert torch.equal(s.double(), split_scaling(case.scaling, dtype).in_s * dropped @ case.lora_a.double().t())
    assert len(launch.stats) == 2, "one launch each way"
    kernels = {variant["name"] for variant in variants_for(tile, dropout, rank, dtype, transposed=transposed)}
    known = [variant for variant in cuda_runtime.runtime().module.variants() if variant["name"] in kernels]
    assert [variant["arch"] for variant in known] == [90, 90], "the host takes the kernels for another GPU's"
    if not dropout:
        assert not any(GENERATOR.search(ptx(kernel)) for kernel in kernels), "numbers are drawn that nobody reads"


# Every tile in groups as long as those that are shipped (fastlora.backends.cuda.tiles.group_size).
GROUPED = (
    (replace(LARGE, group_m=16, gradients_last=True), False, 16),
    (replace(LARGE, group_m=8, fused=True), True, 64),
    (replace(MEDIUM, group_m=8, fused=True), False, 40),
    (replace(SMALL, group_m=8), True, 16),
)


def check_group(tile, dropout: bool, rank: int, options: LaunchOptions | None = None, ptx=ptx_of):
    """A whole group, and a ragged one behind it whose last row block has a tail."""
    check_integers(tile, dropout, rank, options, ptx, m=(tile.group_m + 2) * tile.block_m + 13)


def schedule_of_group(number: int) -> LaunchOptions:
    return SCHEDULES[number % len(SCHEDULES)]


def schedule_of(*layer, layers=EVERY_KERNEL) -> LaunchOptions:
    """One or another; test_cuda_protocol.py runs a layer of each tile under all of them."""
    return (LaunchOptions(), *SCHEDULES)[layers.index(layer) % (1 + len(SCHEDULES))]


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
TRANSPOSED_LAYERS = ((LARGE, (264, 264, 136, 16), 0.3), (MEDIUM, (136, 136, 264, 64), 0.0))
FLOAT16_LAYERS = ((LARGE, 16), (FUSED, 64))
MASKED_LAYERS = ((SMALL, 16), (replace(SMALL, fused=True), 16), (FUSED, 64))


def is_clean() -> bool:
    return not any(buffer.any() for buffer in workspace._by_stream.values())


def check_schedules(
    tile, sizes, dropout_p, dtype=torch.bfloat16, schedules=SCHEDULES, ptx=ptx_of, transposed: bool = False
):
    """Twice over one workspace each. With one cluster at a time, a tile that waited for a later one would deadlock."""
    case = numerics.draw_case(*sizes, dtype, dropout_p=dropout_p)
    case = lying_transposed(case) if transposed else case
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


def check_float16_schedules(tile, rank: int, schedules=SCHEDULES[1:], ptx=ptx_of):
    """A scaling above 1, which the forward splits: its tiles wait for their products before the expand step."""
    check_schedules(tile, (264, 328, 264, rank), 0.0, torch.float16, schedules, ptx)
