"""The ends of the range, on the emulated CUDA kernels."""

import pytest
import torch

from fastlora.backends.cuda import launch as cuda
from fastlora.problem import Needs
from tests.support.cuda_checks import needs_kernels
from tests.support.cuda_emulation import emulated, run_layer
from tests.support.cuda_range import (
    FUSED,
    INFINITE,
    LARGE,
    OVERFLOWING,
    SPLIT,
    assert_same,
    check_infinities,
    check_overflow,
    draw_large,
    draw_with_infinities,
    expected,
    run,
)

pytestmark = [needs_kernels, pytest.mark.usefixtures("own_workspace")]


def label(value) -> str:
    if isinstance(value, cuda.CudaTile):
        return f"{value.block_m}x{value.block_n}-{'fused' if value.fused else 'separate'}"
    return str(value)


@pytest.mark.parametrize("tile, rank, scaling, dropout_p", OVERFLOWING, ids=label)
def test_fp16_overflows_where_the_composed_layer_does(poisoned, tile, rank, scaling, dropout_p):
    check_overflow(tile, rank, scaling, dropout_p)


def test_bf16_needs_no_split(poisoned):
    """It has fp32's range; S holds all of the scaling."""
    case = draw_large(24, 32.0, 0.0, torch.bfloat16)
    results = run(case, FUSED)
    assert results["s"].isfinite().all() and results["y"].isfinite().all()
    torch.testing.assert_close(results["s"].double(), 32 * case.x.double() @ case.lora_a.double().T, rtol=2**-8, atol=0)


@pytest.mark.parametrize("tile, rank, dtype, dropout_p", INFINITE, ids=label)
def test_infinities_and_nans_stay_where_they_belong(poisoned, tile, rank, dtype, dropout_p):
    check_infinities(tile, rank, dtype, dropout_p)


@pytest.mark.parametrize("tile", (LARGE, SPLIT), ids=label)
def test_an_infinite_gradient_of_the_bias_alone(poisoned, tile):
    case = draw_with_infinities(8, torch.bfloat16)
    with emulated():
        results, _ = run_layer(case, tile, ctas=2, needs=Needs(False, False, False, True))
    assert_same({"dbias": results["dbias"]}, expected(case))
