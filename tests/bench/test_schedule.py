"""The schedule model: the queue, the memory it assumes, analytic cases, calibration and its command."""

import json
import math
from dataclasses import replace
from itertools import groupby, product

import pytest
from click.testing import CliRunner

from benchmarks.cuda_resources import __main__ as command
from benchmarks.cuda_resources import table
from benchmarks.schedule import machine, model
from benchmarks.schedule.__main__ import main
from benchmarks.schedule.fit import Measured, as_launched, fit, read_measured
from benchmarks.schedule.machine import Machine
from benchmarks.schedule.model import LABEL, Memory, Problem, frozen_baseline, simulate
from benchmarks.schedule.queue_order import Schedule, Tile, build_queue, cdiv
from benchmarks.schedule.sweep import KERNELS, WAYS, best_by_class, sweep, way_of, write_sweep
from fastlora.backends.configs import MASK_COLUMNS

SMALL = Schedule(block_m=16, block_n=16, block_k=16, group_m=2, grad_columns=16)
FEW_SMS = Machine(sm_count=3)


def short(schedule):
    return "-".join(str(getattr(schedule, name)) for name in ("fused", "group_m", "gradients_last"))


def schedules():
    return [
        replace(SMALL, fused=fused, group_m=group, gradients_last=last)
        for fused in (True, False)
        for group in (1, 2, 3, 5)
        for last in (False, True)
    ]


@pytest.mark.parametrize("schedule", schedules(), ids=short)
def test_every_tile_is_queued_once_and_waits_only_on_earlier_ones(schedule):
    rows, columns, shrink, grads = 5, 4, 1 if schedule.fused else 2, (3, 4)
    queue = build_queue(rows, columns, shrink, grads, schedule, wave=3)
    parts = cdiv(rows, schedule.group_m)
    wanted = {Tile("shrink", m, n) for m in range(rows) for n in range(shrink)}
    wanted |= {Tile("base", m, n) for m in range(rows) for n in range(shrink if schedule.fused else 0, columns)}
    wanted |= {Tile("dB", part, n) for part in range(parts) for n in range(grads[0])}
    wanted |= {Tile("dA", part, n) for part in range(parts) for n in range(grads[1])}
    assert len(queue) == len(wanted) and set(queue) == wanted
    position = {tile: index for index, tile in enumerate(queue)}
    for tile, index in position.items():
        if tile.kind == "base":
            assert all(position[Tile("shrink", tile.block, n)] < index for n in range(shrink)), tile
        if tile.kind == "dA":
            first = tile.block * schedule.group_m
            blocks = range(first, min(first + schedule.group_m, rows))
            assert all(position[Tile("shrink", m, n)] < index for m in blocks for n in range(shrink)), tile
        if tile.kind in ("dA", "dB") and tile.block:
            assert position[Tile(tile.kind, tile.block - 1, tile.column)] < index, tile


def test_the_next_groups_shrink_tiles_come_one_wave_before_the_end():
    queue = build_queue(4, 3, 1, (0, 0), SMALL, wave=2)
    shrink = [Tile("shrink", m, 0) for m in range(4)]
    base = {(m, n): Tile("base", m, n) for m in range(4) for n in (1, 2)}
    first = [base[0, 1], base[1, 1]]
    assert queue == [
        *shrink[:2], *first, *shrink[2:], base[0, 2], base[1, 2],
        base[2, 1], base[3, 1], base[2, 2], base[3, 2],
    ]  # fmt: skip


def test_gradient_tiles_follow_their_group_or_everything():
    """The first wait only on those of the group before, in either order."""
    tiles = {last: build_queue(4, 2, 1, (1, 1), replace(SMALL, gradients_last=last), wave=1) for last in (False, True)}
    gradients = [Tile(kind, part, 0) for part in (0, 1) for kind in ("dB", "dA")]
    assert tiles[True][-4:] == gradients and [t for t in tiles[False] if t in gradients] == gradients
    assert tiles[False].index(gradients[0]) < tiles[False].index(Tile("base", 2, 1))
    assert sorted(tiles[True]) == sorted(tiles[False])


def test_gradients_last_pay_where_a_tile_takes_long():
    """8192 rows: 2 waves of long tiles, or 8 of short ones, whose rows would have to come from DRAM once more."""
    for n, k, better in ((4096, 1024, True), (1024, 4096, False)):
        problem, schedule = Problem(8192, n, k, 16, backward=True), Schedule(fused=False)
        between, last = (simulate(problem, replace(schedule, gradients_last=x)).makespan for x in (False, True))
        assert (last < between) == better
        assert as_launched(problem, schedule, Machine()).gradients_last == better


@pytest.mark.parametrize("backward", (False, True))
def test_a_producer_kernel_draws_dropouts_mask_beneath_its_products(backward):
    """Not so a separate tile of S, nor a kernel that does one thing after the other."""
    problem = Problem(4096, 4096, 4096, 16, backward)

    def costs(**schedule):
        return [simulate(replace(problem, dropout=d), Schedule(**schedule)).makespan for d in (False, True)]

    plain, dropped = costs(fused=True)
    assert dropped == plain if not backward else dropped > plain  # dA masks X in front of its products
    if not backward:
        plain, dropped = costs(fused=False)
        assert dropped > 1.05 * plain
        plain, dropped = costs(fused=True, overlap=False, cluster=1)
        assert dropped > 1.05 * plain


@pytest.mark.parametrize("steps, exposed", ((16, 0), (8, 128)))
def test_a_step_hides_the_mask_of_sixteen_of_dxs_columns(steps, exposed):
    """One tile of dX and one of dA, whose mask is drawn for all 256 columns in front of its product."""
    machine = Machine(sm_count=1, flops=Machine().flops / 132, philox=4e-10)
    problem = Problem(128, 64 * steps, 256, 16, backward=True)
    plain, dropped = (simulate(replace(problem, dropout=d), Schedule(), machine).makespan for d in (False, True))
    assert dropped - plain == pytest.approx(128 * (256 + exposed) * machine.philox * 1e6)


@pytest.mark.parametrize("field, value", [("group_m", 0), ("grad_columns", -1), ("cluster", 0)])
def test_a_schedule_that_cannot_be_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        Schedule(**{field: value})


def test_l2_evicts_the_least_recently_used_and_writes_dirty_lines_back():
    memory = Memory(Machine(l2_bytes=300))
    memory.access(0.0, [("a", 100, False), ("b", 100, True), ("c", 100, False)], 0)
    assert (memory.read, memory.written) == (200, 0)
    memory.access(0.0, [("a", 100, False)], 0)  # a hit makes b the oldest
    memory.access(0.0, [("d", 100, False)], 0)
    assert (memory.read, memory.written) == (300, 100)
    memory.access(0.0, [("a", 100, False), ("b", 100, False)], 0)
    assert memory.read == 400
    memory.access(0.0, [("a", 100, True)], 0)
    memory.flush()
    assert memory.written == 200


def test_requests_queue_for_dram():
    machine = Machine(dram_bandwidth=100.0, l2_bandwidth=1e12, sm_bandwidth=1e12)
    memory = Memory(machine)
    assert memory.access(0.0, [("a", 100, False)], 0) == pytest.approx(1.0)
    assert memory.access(0.5, [("b", 100, False)], 0) == pytest.approx(2.0)
    assert memory.access(2.5, [("b", 100, False)], 0) == pytest.approx(2.5)


def test_one_tile_takes_what_its_parts_take():
    machine = Machine(sm_count=1, flops=1e12, tile_overhead=0.25e-6, load_latency=0.5e-6)
    problem, schedule = Problem(128, 256, 64, 0), Schedule(cluster=1)
    loaded = (128 + 256) * 64 * 2
    load = max(loaded / machine.sm_bandwidth, loaded / machine.dram_bandwidth)
    product = 2 * 128 * 256 * 64 / 1e12
    expected = load + 0.5e-6 + product + 0.25e-6
    assert simulate(problem, schedule, machine).makespan == pytest.approx(expected * 1e6)


@pytest.mark.parametrize("backward", [False, True])
def test_with_an_endless_l2_every_operand_is_moved_once(backward):
    problem = Problem(256, 512, 384, 16, backward)
    found = simulate(problem, Schedule(), Machine(l2_bytes=1e12))
    frozen = simulate(problem.frozen, Schedule(), Machine(l2_bytes=1e12))
    m, n, k, r = 256, 512, 384, 16
    contracted, columns = (n, k) if backward else (k, n)
    base = 2 * (m * contracted + n * k)
    assert frozen.dram_read == base and frozen.dram_written == 2 * m * columns
    reads = base + 2 * r * (contracted + columns) + (2 * (m * k + m * r) if backward else 0)
    sums = 4 * r * (n + k) if backward else 0
    assert found.dram_read == reads
    assert found.dram_written == 2 * (m * columns + m * r) + sums


def test_compute_bound_time_follows_the_flop_rate_and_memory_bound_time_the_bandwidth():
    compute, memory = Problem(4096, 2048, 2048, 0), Problem(16, 32768, 1024, 0)
    machine = Machine()
    half_rate = replace(machine, flops=machine.flops / 2)
    half_dram = replace(machine, dram_bandwidth=machine.dram_bandwidth / 2)

    def slowdown(problem, slower):
        schedule = Schedule(block_m=min(128, problem.m))
        return simulate(problem, schedule, slower).makespan / simulate(problem, schedule, machine).makespan

    assert slowdown(compute, half_rate) > 1.8
    assert slowdown(compute, half_dram) < 1.1
    assert slowdown(memory, half_dram) > slowdown(memory, half_rate)


@pytest.mark.parametrize("schedule", schedules(), ids=short)
@pytest.mark.parametrize("overlap", [True, False])
def test_every_schedule_finishes_and_costs_no_less_than_the_gemm(schedule, overlap):
    problem = Problem(75, 60, 50, 20, backward=True)
    schedule = replace(schedule, shrink_width=8, overlap=overlap)
    found = simulate(problem, schedule, FEW_SMS)
    assert found == simulate(problem, schedule, FEW_SMS)
    assert found.makespan > simulate(problem.frozen, schedule, FEW_SMS).makespan


def test_counted_costs_are_those_of_the_committed_kernels():
    kernels = table.from_json(command.TABLE.read_text())["kernels"]
    rows = {drops: kernels[f"lora_sm90_forward_bf16_128x256_r16{drops}"]["rows"] for drops in ("", "_dropout")}
    assert rows[""]["consumer base: epilogue"]["code"] == machine.EPILOGUE_INSTRUCTIONS
    plain, dropped = (rows[drops]["consumer shrink: loop"]["code"] for drops in ("", "_dropout"))
    assert (dropped - plain) / 8 == machine.PHILOX_INSTRUCTIONS
    gpu = Machine()
    assert math.ceil(gpu.philox * gpu.flops / gpu.sm_count / 2) == MASK_COLUMNS


def test_idle_multiprocessors_make_s_for_free():
    problem = Problem(512, 4096, 4096, 16)
    base = frozen_baseline(problem, Schedule()).makespan
    fused, separate = (simulate(problem, Schedule(fused=fused)).makespan / base for fused in (True, False))
    assert fused > 1.1 > 1.02 > separate


def test_a_queue_with_a_tile_before_what_it_waits_for_deadlocks(monkeypatch):
    reverse = lambda *args: build_queue(*args)[::-1]  # noqa: E731 (one expression, used once)
    monkeypatch.setattr(model, "build_queue", reverse)
    with pytest.raises(RuntimeError, match="deadlock"):
        simulate(Problem(64, 64, 64, 16), SMALL, Machine(sm_count=1))


def test_calibration_recovers_the_machine_that_was_measured():
    truth = replace(Machine(), flops=600e12)
    problems = [Problem(m, 1024, 1024, r) for m in (1024, 2048, 4096) for r in (0, 16)]

    def measure(p):
        if p.r:
            return simulate(p, as_launched(p, Schedule(), truth), truth)
        return frozen_baseline(p, Schedule(), truth)

    measured = [Measured(p, measure(p).makespan) for p in problems]
    found = fit(measured, Schedule())
    assert found.machine.flops == pytest.approx(600e12, rel=0.1)
    assert found.frozen_error < 3 and found.fused_error < 6
    assert len(found.frozen) == len(found.fused) == 3
    wrong = [replace(row, microseconds=row.microseconds * (2 if row.problem.r else 1)) for row in measured]
    assert fit(wrong, Schedule(), rounds=1).fused_error > 50


def test_calibration_needs_measurements():
    with pytest.raises(ValueError, match="at least 3 measured frozen rows, got 1"):
        fit([Measured(Problem(128, 128, 128, 0), 10.0)], Schedule())


def bench_row(**changes):
    row = {"variant": "frozen", "device": "cuda", "dtype": "bfloat16", "dropout": 0.0, "pass": "forward"}
    return {**row, "m": 512, "n": 256, "k": 128, "r": 16, "median_us": 7.0, **changes}


def test_only_gpu_rows_of_the_frozen_layer_and_fastlora_calibrate(tmp_path):
    rows = [
        bench_row(),
        bench_row(variant="fastlora", **{"pass": "backward"}),
        bench_row(device="cpu"),
        bench_row(dtype="float32"),
        bench_row(dropout=0.1),
        bench_row(variant="peft"),
        bench_row(**{"pass": "step"}),
    ]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"layer": rows}))
    assert read_measured(path) == [
        Measured(Problem(512, 256, 128, 0), 7.0),
        Measured(Problem(512, 256, 128, 16, backward=True), 7.0),
    ]
    path.write_text(json.dumps({"layer": rows[2:]}))
    with pytest.raises(ValueError, match="no forward or backward row measured on a GPU"):
        read_measured(path)


def test_the_sweep_writes_labelled_tables_and_says_that_nothing_calibrated_it(tmp_path):
    rows = sweep(Machine(), layers=((256, 256),), tokens=(256, 512), ranks=(16,), progress=False)
    assert all(row["ratio"] >= 1 and math.isfinite(row["makespan_us"]) for row in rows)
    best = best_by_class(rows)
    ways = {"forward": {}, "forward with dropout": {"dropout": True}}
    ways |= {"backward": {"backward": True}, "backward with dropout": {"backward": True, "dropout": True}}
    assert list(WAYS) == list(ways)
    assert [key for key, _ in groupby((row["kernel"], way_of(row)) for row in rows)] == list(product(KERNELS, ways))
    for row in rows[:: len(rows) // 16]:
        problem = Problem(row["m"], 256, 256, 16, **ways[way_of(row)])
        kernel, schedule = KERNELS[row["kernel"]], Schedule(**row["schedule"])
        found, base = simulate(problem, schedule), frozen_baseline(problem, kernel)
        assert (row["makespan_us"], row["ratio_at_m"]) == (found.makespan, found.makespan / base.makespan), row
    for ranked in best.values():
        assert [ratio for ratio, _ in ranked] == sorted(ratio for ratio, _ in ranked)
    written, text = write_sweep(tmp_path, rows, Machine(), None, "the command")
    stored = json.loads(written.read_text())
    assert stored["label"] == LABEL and len(stored["rows"]) == len(rows) and stored["command"] == "the command"
    for heading in (line for line in text.read_text().splitlines() if line.startswith("#")):
        assert LABEL in heading
    assert "Calibration: none" in text.read_text()


def test_the_command_labels_its_answer(tmp_path):
    result = CliRunner().invoke(main, ["--m", "256", "--n", "256", "--k", "256", "--r", "8"])
    assert result.exit_code == 0, result.output
    assert LABEL in result.output and "forward," in result.output and "backward," in result.output
    empty = tmp_path / "bench.json"
    empty.write_text("{}")
    refused = CliRunner().invoke(main, ["--measured", str(empty)])
    assert refused.exit_code == 2 and "cannot calibrate" in refused.output
    empty.write_text("[]")
    refused = CliRunner().invoke(main, ["--measured", str(empty)])
    assert refused.exit_code == 2 and "not a report" in refused.output


def test_the_command_refuses_what_it_cannot_do_at_once(tmp_path):
    too_large = CliRunner().invoke(main, ["--m", "100000000"])
    assert too_large.exit_code == 2 and "more than the 1000000 that can be modelled" in too_large.output
    (tmp_path / "file").write_text("")
    nowhere = CliRunner().invoke(main, ["--sweep", "--output", str(tmp_path / "file" / "folder")])
    assert nowhere.exit_code == 1 and "cannot write" in nowhere.output


def test_a_problem_without_size_is_refused():
    with pytest.raises(ValueError, match="sizes must be positive"):
        Problem(0, 16, 16, 1)


def test_a_chain_of_parts_is_as_slow_as_its_flags():
    problem = Problem(16 * 16, 16, 16, 16, backward=True)
    slow_flags = Machine(sm_count=64, flag_latency=50e-6)
    chained = simulate(problem, replace(SMALL, group_m=1), slow_flags)
    single = simulate(problem, replace(SMALL, group_m=16), slow_flags)
    assert chained.makespan > 15 * 50 > single.makespan
    assert chained.stall > single.stall
