"""Dropout in the compiled CUDA kernels, in the emulator, where a threshold decides: its least and greatest values, and
random bits that equal it. A forward masks X in registers, a backward dX's branch by its keep bits and dA's X in place.
"""

from dataclasses import replace

import pytest
import torch

from fastlora.philox import inverse_keep, keep_mask, threshold
from tests.support import cuda_checks, numerics
from tests.support.cuda_checks import ENDS, MASKED_LAYERS, SMALL, describe, needs_kernels
from tests.support.cuda_emulation import emulated, run_layer

pytestmark = [needs_kernels, pytest.mark.usefixtures("own_workspace")]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("tile, rank", MASKED_LAYERS, ids=describe)
def test_every_bit_of_the_mask_is_right(poisoned, tile, rank, end):
    assert threshold(ENDS[end]) == int(end)
    cuda_checks.check_mask(tile, rank, end)


@pytest.mark.parametrize("tile, rank", MASKED_LAYERS, ids=describe)
def test_bits_that_equal_the_threshold_are_dropped(poisoned, tile, rank):
    cuda_checks.check_mask(tile, rank, None)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("fused", (False, True), ids=("separate", "fused"))
def test_what_is_kept_is_scaled(poisoned, fused, end):
    """By 65536 where one element in so many is kept, and by nothing where none is."""
    dropout_p, (seed, _) = ENDS[end], cuda_checks.masked_seed()
    case = numerics.draw_case(136, 136, 264, 16, torch.bfloat16, dropout_p=dropout_p)
    case = replace(case, seed=torch.tensor(seed))
    kept = keep_mask(seed, dropout_p, 136, 264)
    assert kept.any() == (end != "65536") and not kept.all()
    with emulated():
        results, s = run_layer(case, replace(SMALL, fused=fused), ctas=4)
    numerics.assert_accurate(results, case)
    if inverse_keep(dropout_p) == 0.0:
        assert not s.any() and not results["da"].any() and not results["db"].any()
