"""The schedule model of rows in segments: row blocks, chunks and queue counted by hand, and what loads must cost."""

from dataclasses import replace

import pytest
from click.testing import CliRunner

from benchmarks.cuda_resources import __main__ as command
from benchmarks.cuda_resources import table
from benchmarks.schedule import __main__ as schedule_command
from benchmarks.schedule import segments as experts
from benchmarks.schedule.machine import Machine
from benchmarks.schedule.model import Problem, Simulation, simulate
from benchmarks.schedule.queue_order import Schedule, Tile, build_queue
from benchmarks.schedule.row_map import Chunk, RowBlock, RowMap, segments

SMALL = Schedule(
    block_m=64, block_n=16, block_k=16, group_m=2, grad_columns=16, fused=False, cluster=1, gradients_last=True
)
LENGTHS = [65, 0, 300]  # 2 + 0 + 5 row blocks; 1 + 0 + 3 chunks


def test_row_blocks_and_chunks_begin_with_their_segment():
    found = segments(LENGTHS, replace(SMALL, block_m=128))
    assert found.blocks == (
        RowBlock(65, 128, 128, 0),
        RowBlock(128, 128, 128, 2),
        RowBlock(128, 128, 128, 2),
        RowBlock(44, 44, 64, 2),  # behind its rows is no segment to be loaded from; one step is summed
    )
    zeroes = Chunk(range(0), 0, 0, zeroed=1)
    assert found.chunks == (Chunk(range(1), 0, 0), Chunk(range(1, 3), 2, 0), Chunk(range(3, 4), 2, 1), zeroes)


@pytest.mark.parametrize("count, zeroed", ((16, [15]), (17, [15, 1]), (40, [15, 16, 8])))
def test_a_zero_tile_has_sixteen_adapters(count, zeroed):
    chunks = segments([3] + [0] * (count - 1), SMALL).chunks
    assert [chunk.zeroed for chunk in chunks[1:]] == zeroed and not any(chunk.blocks for chunk in chunks[1:])


def test_the_queue_is_that_of_the_row_blocks_and_gradients_by_chunks_follow():
    problem = Problem(365, 32, 16, 16, backward=True)
    queue = Simulation(problem, SMALL, Machine(sm_count=1), segments(LENGTHS, SMALL)).queue
    shrinks = [Tile("shrink", block, 0) for block in range(7)]
    base = [Tile("base", block, 0) for block in range(7)]  # dX has one column of 16
    products = [*shrinks[:2], base[0], *shrinks[2:4], base[1]]  # the next group's S, one CTA's tile before the end
    products += [base[2], *shrinks[4:6], base[3], base[4], shrinks[6], base[5], base[6]]
    gradients = [
        Tile(kind, chunk, column) for chunk in range(5) for kind, column in (("dB", 0), ("dB", 1), ("dA", 0))
    ]  # four chunks, and what zeroes the adapter without rows
    assert queue == products + gradients


def test_a_sum_waits_for_the_chunk_before_it_of_the_same_adapter_alone():
    """Of seven row blocks in chunks of one: one expert's sums wait for six flags in turn, seven experts' for none."""
    schedule, machine = replace(SMALL, group_m=1), Machine(sm_count=64, flag_latency=50e-6)
    problem = Problem(7 * 64, 16, 16, 16, backward=True)
    chained, apart = (
        simulate(problem, schedule, machine, segments(lengths, schedule)) for lengths in ([7 * 64], [64] * 7)
    )
    assert chained.makespan - apart.makespan == pytest.approx(6 * 50, rel=0.02)
    assert chained.dram_written == apart.dram_written - 6 * 4 * 16 * (16 + 16)  # six sums fewer of dA and of dB
    found = segments([7 * 64], schedule)
    reverse = RowMap(found.blocks, (*(chunk._replace(place=6 - chunk.place) for chunk in found.chunks[:-1]),))
    with pytest.raises(RuntimeError, match="deadlock"):
        simulate(problem, schedule, Machine(sm_count=1), reverse)


def test_a_gradient_tile_loads_and_multiplies_whole_steps():
    """One row more in the first segment, of three of 64 rows, is a step more of its gradient tiles."""
    problem, schedule = Problem(192, 16, 16, 16, backward=True), replace(SMALL, block_m=128)

    def longer(machine):
        even, uneven = (
            simulate(problem, schedule, machine, segments(lengths, schedule)).makespan
            for lengths in ([64, 64, 64], [65, 63, 64])
        )
        return uneven - even

    free = Machine(
        sm_count=1, flops=1e30, dram_bandwidth=1e30, l2_bandwidth=1e30, sm_bandwidth=1e30, load_latency=0,
        flag_latency=0, tile_overhead=0,
    )  # fmt: skip
    step = 2 * 64 * 16 * 32  # FLOP, of dA and of dB
    assert longer(replace(free, flops=1e9)) == pytest.approx(2 * step / 1e9 * 1e6)
    # In bytes: 64 rows more of X and dS, and of dY and S; a row of S more or less does not matter.
    assert longer(replace(free, sm_bandwidth=1e9)) == pytest.approx(2 * 64 * (16 + 16) * 2 / 1e9 * 1e6, rel=0.02)


@pytest.mark.parametrize("backward", (False, True))
@pytest.mark.parametrize("block_m", experts.EPILOGUES)
def test_one_expert_with_all_rows_is_the_product_of_one_segment(block_m, backward):
    m, n, k, r = 2048, 768, 2048, 16
    lengths = experts.all_in_one(m, 8)
    dense = simulate(Problem(m, n, k, r, backward), experts.schedule_of(block_m), Machine())
    found = experts.simulate_segments(lengths, n, k, r, block_m, backward, Machine())
    zero_tiles = (n + k) // 128 if backward else 0  # the other seven's
    assert found.tiles == dense.tiles + zero_tiles
    assert found.makespan == pytest.approx(dense.makespan, rel=0.05 if backward else 0)
    assert found.dram_written - dense.dram_written == (7 * (n + k) * r * 4 if backward else 0)
    assert experts.tail_share(lengths, block_m) == 0


@pytest.mark.parametrize("backward", (False, True))
@pytest.mark.parametrize("block_m", experts.EPILOGUES)
def test_skewed_loads_are_never_faster_than_balanced_ones(block_m, backward):
    """Of as many rows, where every expert has some and the grid is full: the balanced load has no tail."""
    m, count = 4096, 16
    loads = {load: experts.LOADS[load](m, count) for load in ("balanced", "drawn", "Zipf")}
    times = {
        load: experts.simulate_segments(lengths, 1024, 1024, 16, block_m, backward).makespan
        for load, lengths in loads.items()
    }
    assert experts.tail_share(loads["balanced"], block_m) == 0 < experts.tail_share(loads["Zipf"], block_m)
    assert times["balanced"] < min(times["drawn"], times["Zipf"])


def test_every_weight_that_is_used_is_read_and_no_other():
    n, k, m = 256, 512, 1024
    machine = Machine(l2_bytes=1e12)
    read = [
        experts.simulate_segments(lengths, n, k, 16, 64, machine=machine).dram_read
        for lengths in (experts.half_empty(m, 8), experts.balanced(m, 8))
    ]
    assert read[1] - read[0] == 4 * 2 * (n * k + 16 * (n + k))


def test_the_least_time_is_that_of_products_or_of_used_operands():
    lengths, n, k = [100, 0, 0], 64, 32
    moved = 2 * (100 * (n + k) + n * k)
    assert experts.least_time(lengths, n, k, Machine(flops=1e30, dram_bandwidth=1e9)) == pytest.approx(moved / 1e3)
    products = 2 * 100 * n * k
    assert experts.least_time(lengths, n, k, Machine(flops=1e9, dram_bandwidth=1e30)) == pytest.approx(products / 1e3)


@pytest.mark.parametrize("load", experts.LOADS)
@pytest.mark.parametrize("count", experts.EXPERTS)
def test_a_load_shares_out_all_rows_and_is_the_same_each_time(load, count):
    lengths = experts.LOADS[load](4096, count)
    assert len(lengths) == count and sum(lengths) == 4096 and min(lengths) >= 0
    assert lengths == experts.LOADS[load](4096, count)
    empty = {"half empty": count // 2, "all in one": count - 1}.get(load, 0)
    assert sum(length == 0 for length in lengths) == empty
    assert load != "Zipf" or sorted(lengths)[-1] == pytest.approx(2 * sorted(lengths)[-2], abs=2)


def test_counted_epilogues_are_those_of_the_committed_kernels():
    kernels = table.from_json(command.TABLE.read_text())["kernels"]
    for block_m, count in experts.EPILOGUES.items():
        rows = kernels[f"lora_sm90_forward_bf16_{block_m}x128_r16_segments"]["rows"]
        assert rows["consumer base: epilogue"]["code"] == count


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="cannot have -1 rows"):
        segments([3, -1], SMALL)
    with pytest.raises(ValueError, match="must hold the 4 rows"):
        simulate(Problem(4, 16, 16, 16), SMALL, row_map=segments([3], SMALL))
    with pytest.raises(ValueError, match="5 parts of M can follow 2 row groups only with gradients_last=True"):
        build_queue(4, 1, 1, (1, 1), replace(SMALL, gradients_last=False), 1, 5)


def test_the_command_prints_both_tiles_and_what_is_taken(monkeypatch):
    rows = [experts._point(("Qwen3-MoE", False, 512, 8, load)) for load in ("balanced", "Zipf")]
    monkeypatch.setattr(experts, "sweep", lambda: rows)
    result = CliRunner().invoke(schedule_command.main, ["--experts"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "model, not a measurement" in lines[0] and lines[1].split() == ["64x128", "128x128"]
    balanced = lines[3].split()
    assert balanced[:5] == ["Qwen3-MoE", "forward", "512", "8", "balanced"]
    assert balanced[5:7] == ["0.0%", f"{rows[0].outcomes[64].makespan:.1f}"] and balanced[9] == "50.0%"
    assert balanced[13:15] == [str(rows[0].faster), "64"]
    slower = sum(row.faster != 64 for row in rows)
    assert f"taken by {slower} of 2" in lines[-1]
