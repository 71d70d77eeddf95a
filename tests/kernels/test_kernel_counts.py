"""How many kernels a run compiles: few, whatever its sequence lengths, and none that a warm-up has not foreseen."""

import random

import pytest
import torch

from fastlora.backends.configs import FEW_ROWS
from fastlora.backends.triton import launch as triton_lora
from tests.support.specialisations import DROPOUT, N_SMS, Step, asked_for, walk

pytestmark = pytest.mark.skipif(triton_lora.triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")

MOST_OF_TRAINING, MOST_OF_DECODING = 12, 3
SHOWN = 10  # of the lengths that a thousand steps draw


def _lengths(batch: int, shortest: int, longest: int, multiple: int = 1) -> list[int]:
    """The extremes, and some in between: odd ones, multiples of 16 and others."""
    draw = random.Random(0)
    drawn = {multiple * draw.randint(shortest // multiple, longest // multiple) for _ in range(SHOWN)}
    return sorted({batch * each for each in (*drawn, shortest, longest)})


def training(tokens: list[int]) -> list[Step]:
    """Steps of every length, evaluated as well; seeds are drawn on the CPU and, for two lengths, in captured graphs."""
    steps = [Step(m, trains) for m in tokens for trains in (True, False)]
    return steps + [Step(m, captured=True) for m in (tokens[0], tokens[-1])]


RUNS = {
    "one length": training([4096]),
    "packed, with a last batch": training([8192, 6144]),
    "one sample, any length": training(_lengths(1, 50, 2048)),
    "four samples, any length": training(_lengths(4, 50, 1024)),
    "any number of tokens": training(_lengths(1, FEW_ROWS + 1, 16384)),
    "four samples, padded to a multiple of 8": training(_lengths(4, 48, 1024, 8)),
}


@pytest.mark.parametrize("arch", N_SMS)
@pytest.mark.parametrize("run", RUNS)
def test_a_fine_tuning_run_compiles_few_kernels(arch, run):
    for dropout_p in (DROPOUT, 0.0):
        with asked_for(arch) as found:
            walk(RUNS[run], dropout_p)
        assert 2 <= len(found) <= MOST_OF_TRAINING, sorted(found)


@pytest.mark.parametrize("arch", N_SMS)
def test_decoding_compiles_few_kernels(arch):
    with asked_for(arch) as found:
        walk(Step(batch, trains=False) for batch in range(1, 33))
    assert 1 <= len(found) <= MOST_OF_DECODING, sorted(found)


def test_no_kernel_of_its_own_for_a_number():
    """Rows, the seed and its place, the probability of dropout: one kernel each way, whatever they are."""
    with asked_for(90) as found:
        walk([Step(4096), Step(4097), Step(4100, captured=True)], 0.1, torch.float32)
        known = set(found)
        walk([Step(4112)], 0.5, torch.float32)
    assert found == known and {name for name, _ in found} == {"lora_forward_kernel", "lora_backward_kernel"}
