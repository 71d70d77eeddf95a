"""Where decoding in the loop pays: the model by hand, and the limit of the kernels by the model."""

import math

import pytest

from benchmarks import RESULTS
from benchmarks.cuda_resources import table
from benchmarks.schedule.decoding import DECODE_INSTRUCTIONS, LAYERS, PACKED_BYTES, ROWS, as_text, model
from benchmarks.schedule.machine import CLOCK, Machine
from fastlora.backends.configs import FEW_ROWS
from fastlora.backends.cuda.quantised_launch import ROWS_IN_LOOP
from fastlora.backends.cuda.tiles import IN_LOOP_INSTRUCTIONS


def test_what_is_modelled_was_counted():
    """Eight groups of eight elements; 32 elements of a step."""
    kernels = table.from_json((RESULTS / "cuda_resources.json").read_text())["kernels"]
    rows = kernels["lora_sm90_forward_bf16_128x256_r64_decoded"]["rows"]
    assert rows["consumer decode 4 bits, nested: rest"]["code"] == 64 * DECODE_INSTRUCTIONS
    rows = kernels["lora_sm90_forward_bf16_64x128_r64_in_loop"]["rows"]
    assert rows["consumer base: loop, nf4"]["step"] == 32 * IN_LOOP_INSTRUCTIONS


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


def test_splits_by_hand():
    """16 rows of 4096 x 4096: 32 columns of tiles and one of S in four splits, each on a multiprocessor of its own."""
    machine = Machine()
    steps = 1024 * 128 * IN_LOOP_INSTRUCTIONS / 128 / CLOCK
    reduced = 3 * 16 * 128 * 4 / machine.sm_bandwidth
    expected = steps + machine.tile_overhead + reduced + machine.flag_latency
    assert model(16, 4096, 4096).in_stage == pytest.approx(1e6 * expected)


def test_the_loop_of_the_cuda_kernels_pays_up_to_two_row_blocks():
    """On average over the layers; of one row block in each of them. It is nowhere slower than Triton's loop."""
    by_rows = {m: [model(m, n, k) for n, k in LAYERS] for m in ROWS}
    assert all(each.in_stage < each.in_loop for found in by_rows.values() for each in found)
    assert all(each.in_stage < each.once for m in ROWS if m <= FEW_ROWS for each in by_rows[m])
    pays = {m: math.prod(each.in_stage / each.once for each in found) < 1 for m, found in by_rows.items()}
    assert pays == {m: m <= ROWS_IN_LOOP for m in ROWS}


def test_the_loop_pays_up_to_few_rows_and_not_beyond():
    """At the limit both take as long, on average over the layers."""
    assert all(math.prod(ratios(m)) < 1 for m in (1, 16, 32))
    assert math.prod(ratios(FEW_ROWS)) ** (1 / len(LAYERS)) == pytest.approx(1, abs=0.05)
    assert all(min(ratios(m)) > 1 for m in (FEW_ROWS + 32, 128, 200, 256))


def test_the_table_says_so():
    found = [line.split()[3:] for line in as_text().splitlines() if line.startswith("8192 x 8192")]
    each = [model(m, 8192, 8192) for m in ROWS]
    ratios = ("in_loop", "once"), ("in_stage", "once"), ("in_stage", "in_loop")
    assert found == [[f"{getattr(one, a) / getattr(one, b):.2f}" for one in each] for a, b in ratios]
