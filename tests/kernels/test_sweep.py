"""The larger sweep of emulated kernels: ``make test-sweep``.

Every compiled CUDA kernel and every shipped Triton tile under every schedule, with dropout and without, in both 16-bit
types; and random sizes under random schedules.
"""

import random
from dataclasses import replace

import pytest
import torch

from fastlora.backends.configs import FUSED_RANK
from fastlora.problem import Needs
from tests.emulator import LaunchOptions
from tests.support import cuda_checks, numerics
from tests.support import triton_checks as triton

pytestmark = [pytest.mark.sweep, triton.needs_compiler, pytest.mark.usefixtures("own_workspace", "poisoned")]
DTYPES = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))


def random_options(generator: random.Random) -> LaunchOptions:
    return LaunchOptions(
        seed=generator.randrange(1, 1 << 30),
        resident=generator.choice((0, 1, 2, 3)),
        async_policy=generator.choice(("late", "early", "random")),
        shuffle_ctas=generator.random() < 0.5,
    )


@cuda_checks.needs_kernels
@DTYPES
@pytest.mark.parametrize("tile, dropout, rank", cuda_checks.EVERY_KERNEL, ids=cuda_checks.describe)
def test_every_cuda_kernel_under_every_schedule(tile, dropout, rank, dtype):
    m = 3 * tile.block_m * (2 if tile.block_n == 256 else 1) + 8
    cuda_checks.check_schedules(tile, (m, 328, 264, rank), 0.3 * dropout, dtype)


@cuda_checks.needs_kernels
@pytest.mark.parametrize("seed", range(40))
def test_cuda_kernels_at_random_sizes(seed):
    generator = random.Random(seed)
    tile, dropout, rank = generator.choice(cuda_checks.EVERY_KERNEL)
    # At least a step of 64 for each of a contraction's parts.
    sizes = generator.randrange(1, 700), 8 * generator.randrange(24, 60), 8 * generator.randrange(24, 60), rank
    schedules = [random_options(generator) for _ in range(3)]
    cuda_checks.check_schedules(
        tile, sizes, 0.3 * dropout, generator.choice((torch.bfloat16, torch.float16)), schedules
    )


@pytest.mark.parametrize("tile", list(triton.shipped()))
def test_every_triton_tile_under_every_schedule(tile):
    config, tail = tile.config, tile.multiple
    m, n, k = 2 * config.block_m + 13, config.block_n + tail, 2 * max(config.block_n, config.block_k) + 3 * tail
    case = numerics.draw_case(m, n, k, tile.rank - 8, tile.dtype, dropout_p=tile.dropout_p)
    first = None
    for options in triton.SCHEDULES:
        results, _ = triton.run(case, config, tile.arch, options, None if tile.forward_only else triton.ALL)
        numerics.assert_accurate(results, case, against_eager=tile.dtype != torch.float32)
        first = first or results
        assert all(torch.equal(results[name], first[name]) for name in first), "the bits depend on the schedule"


@pytest.mark.parametrize("seed", range(120))
def test_triton_kernels_at_random_sizes(seed):
    """A shipped tile or a small one, in row groups of any length, at sizes of more steps than pipelines have stages."""
    generator = random.Random(seed)
    (tile,) = generator.choice([each for each in triton.shipped() if not each.values[0].forward_only]).values
    arch, config, top_rank, dtype = tile.arch, tile.config, tile.rank, tile.dtype
    if top_rank == FUSED_RANK and dtype.itemsize == 2:
        config = generator.choice((config, triton.SMALL[arch]))
    config = replace(config, group_m=generator.choice((1, 2, 8)), fused=generator.random() < 0.5 or dtype.itemsize == 4)
    sizes = generator.randrange(1, 400), *(tile.multiple * generator.randrange(1, 500 // tile.multiple) for _ in "NK")
    rank = generator.choice([r for r in (1, 3, 8, 16, 40, FUSED_RANK, 72, 128, 256) if r <= top_rank])
    adapter_dtype = generator.choice((dtype, torch.float32))
    dropout_p = generator.choice((0.0, 0.3))
    case = numerics.draw_case(*sizes, rank, dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p, seed=seed)
    needs = Needs(*(generator.random() < 0.8 for _ in Needs._fields))
    for _ in range(2):
        results, _ = triton.run(case, config, arch, random_options(generator), needs if any(needs) else triton.ALL)
        numerics.assert_accurate(results, case, against_eager=dtype != torch.float32)
