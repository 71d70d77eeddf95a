"""Where decoding in the loop pays: the model by hand, and the limit of the kernels by the model."""

import math

import pytest

from benchmarks import RESULTS
from benchmarks.cuda_resources import table
from benchmarks.schedule.decoding import DECODE_INSTRUCTIONS, LAYERS, PACKED_BYTES, as_text, model
from benchmarks.schedule.machine import CLOCK, Machine
from fastlora.backends.configs import FEW_ROWS


def test_what_is_modelled_was_counted():
    """Eight groups of eight elements."""
    kernels = table.from_json((RESULTS / "cuda_resources.json").read_text())["kernels"]
    rows = kernels["lora_sm90_forward_bf16_128x256_r64_decoded"]["rows"]
    assert rows["consumer decode 4 bits, nested: rest"]["code"] == 64 * DECODE_INSTRUCTIONS


def ratios(m: int) -> list[float]:
    return [each.in_loop / each.once for each in (model(m, n, k) for n, k in LAYERS)]


def test_one_wave_by_hand():
    """16 rows of 4096 x 4096: 128 tiles of 32 columns, each on a multiprocessor of its own; loads bound products."""
    machine = Machine()
    decoded = 32 * 4096 * DECODE_INSTRUCTIONS / 128 / CLOCK
    loads = 4096 * (2 * 16 + 32 * PACKED_BYTES) / machine.sm_bandwidth
    assert model(16, 4096, 4096).in_loop == pytest.approx(1e6 * (decoded + loads + machine.tile_overhead))
    ahead = machine.flag_latency + 4096 * 4096 * DECODE_INSTRUCTIONS / 128 / CLOCK / machine.sm_count
    dense = 4096 * (2 * 16 + 32 * 2) / machine.sm_bandwidth
    assert model(16, 4096, 4096).once == pytest.approx(1e6 * (ahead + dense + machine.tile_overhead))


def test_the_loop_pays_up_to_few_rows_and_not_beyond():
    """At the limit both take as long, on average over the layers."""
    assert all(math.prod(ratios(m)) < 1 for m in (1, 16, 32))
    assert math.prod(ratios(FEW_ROWS)) ** (1 / len(LAYERS)) == pytest.approx(1, abs=0.05)
    assert all(min(ratios(m)) > 1 for m in (FEW_ROWS + 32, 128, 200, 256))


def test_the_table_says_so():
    line = next(line for line in as_text().splitlines() if line.startswith("8192 x 8192"))
    assert line.split()[3:] == [f"{model(m, 8192, 8192).in_loop / model(m, 8192, 8192).once:.2f}" for m in
                                (1, 16, 32, 64, 96, 128, 200, 256)]  # fmt: skip
