"""What the benchmark counts and times: costs, order of the runs, saved bytes, peaks of memory, launches."""

import pytest
import torch
from torch.nn import functional as F

from fastlora.bench import host, timing
from fastlora.bench.cases import CPU_HEADLINE, RANKS, TOKENS, LayerCase, preset_cases
from fastlora.bench.cost import Cost, pass_cost
from fastlora.bench.layer import input_sets, random_tensors
from fastlora.bench.memory import allocation_peak, launches, saved_bytes
from fastlora.bench.peaks import larger_peaks
from fastlora.bench.peers import FASTLORA, preset_peers
from fastlora.bench.timing import HostClock, Stage, summarise, time_calls, time_interleaved

MIB = 2**20


def test_costs_of_the_headline_layer():
    case = LayerCase(8192, 4096, 4096, 16)
    frozen = pass_cost(case, "forward", lora=False)
    assert frozen == pass_cost(case, "backward", lora=False)
    assert frozen.flops == 2 * 8192 * 4096 * 4096
    assert frozen.bytes == 160 * MIB
    step = pass_cost(case, "step", lora=True)
    assert step.flops == 2 * frozen.flops + 3 * 2 * 8192 * 16 * 8192
    assert 384 * MIB < step.bytes < 387 * MIB
    with pytest.raises(ValueError, match="unknown pass"):
        pass_cost(case, "sideways", lora=True)


def test_the_floor_is_the_longer_of_arithmetic_and_traffic():
    cost = Cost(flops=10**12, bytes=10**9)
    assert cost.floor_us(peak_tflops=1.0, peak_gbs=1e9) == pytest.approx(1e6)
    assert cost.floor_us(peak_tflops=1e9, peak_gbs=1.0) == pytest.approx(1e6)


def test_lorafusions_grid_is_exactly_theirs():
    cases = preset_cases("lorafusion", "cuda")
    assert len(cases) == 3 * 25
    assert {(case.r, case.dropout, case.dtype) for case in cases} == {(16, 0.1, "bfloat16")}
    assert {case.m for case in cases} == {256 * i for i in range(8, 33)}
    assert {(case.n, case.k) for case in cases} == {(s, s) for s in (4096, 5120, 8192)}


@pytest.mark.parametrize("preset, layers, dtypes", [("llama8b", 4, 1), ("llama70b", 4, 1), ("full", 10, 2)])
def test_grids_are_complete(preset, layers, dtypes):
    cases = preset_cases(preset, "cuda")
    assert len(set(cases)) == len(cases) == layers * dtypes * len(TOKENS) * len(RANKS) * 2


def test_the_qlora_preset_has_the_layers_and_the_peers_of_quantised_bases():
    assert {peer.name for peer in preset_peers("qlora")} == {"fastlora nf4", "peft nf4", "dequantise order nf4"}
    assert {(case.m, case.dropout) for case in preset_cases("qlora", "cpu")} >= {(2048, 0.0), (16, 0.1)}
    assert LayerCase(8192, 4096, 4096, 64, 0.1) in preset_cases("qlora", "cuda")
    assert "peft" in {peer.name for peer in preset_peers("quick")}


def test_the_quick_preset_depends_on_the_device():
    assert preset_cases("quick", "cpu")[0] == CPU_HEADLINE[0] == LayerCase(2048, 1024, 1024, 16, 0.0, "float32")
    assert LayerCase(8192, 4096, 4096, 16) in preset_cases("quick", "cuda")
    with pytest.raises(ValueError, match="unknown preset 'slow'"):
        preset_cases("slow", "cpu")


@pytest.mark.parametrize("sizes", [(0, 8, 8, 1), (8, 8, 8, 0)])
def test_a_case_without_size_is_refused(sizes):
    with pytest.raises(ValueError, match="sizes must be at least 1"):
        LayerCase(*sizes)


def test_inputs_rotate_past_the_cache():
    case = LayerCase(256, 256, 256, 4, 0.0, "float32")
    sets = input_sets(case, "cpu")
    assert 2 <= len(sets) <= 8
    assert not torch.equal(sets[0].x, sets[1].x)
    pointers = {tensors.weight.data_ptr() for tensors in sets}
    assert len(pointers) == len(sets)


def test_the_branch_is_about_as_large_as_the_base_product():
    case = LayerCase(256, 128, 64, 8, 0.0, "float32")
    tensors = random_tensors(case, "cpu", torch.Generator().manual_seed(0))
    base = tensors.x @ tensors.weight.t()
    branch = tensors.x @ tensors.lora_a.t() @ tensors.lora_b.t()
    assert 0.5 < branch.norm() / base.norm() < 2


def recorded_stages(log, name, sets):
    return [
        Stage(
            lambda s=s: log.append((name, s, "prepare")),
            lambda s=s: log.append((name, s, "forward")),
            lambda s=s: log.append((name, s, "backward")),
        )
        for s in range(sets)
    ]


def test_variants_take_turns_and_inputs_rotate(monkeypatch):
    monkeypatch.setattr(timing, "MIN_ROUNDS", 4)
    log: list = []
    result = time_interleaved(
        {"a": recorded_stages(log, "a", 2), "b": recorded_stages(log, "b", 2)}, "cpu", seconds=0.0, warm_up=2
    )
    timed = log[2 * 2 * 3 :]
    assert [(name, s) for name, s, what in timed if what == "forward"] == [
        ("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 0), ("b", 0), ("b", 1), ("a", 1),
    ]  # fmt: skip
    assert [what for _, _, what in timed[:3]] == ["prepare", "forward", "backward"]
    assert set(result) == {"a", "b"} and set(result["a"]) == {"forward", "backward", "step"}
    assert result["a"]["step"].rounds == 4 and result["a"]["step"].method == "host"


def test_a_pass_is_charged_for_its_own_time_and_not_for_preparation(monkeypatch):
    now = [0.0]

    class FakeClock(HostClock):
        def mark(self):
            return now[0]

    def advance(seconds):
        return lambda: now.__setitem__(0, now[0] + seconds)

    monkeypatch.setattr(timing, "HostClock", FakeClock)
    found = time_interleaved({"a": [Stage(advance(5.0), advance(1.0), advance(2.0))]}, "cpu", seconds=0.0)["a"]
    assert [found[which].median_us for which in ("forward", "backward", "step")] == pytest.approx([1e6, 2e6, 3e6])


def test_the_summary_holds_median_and_quartiles():
    found = summarise([5.0, 1.0, 3.0, 2.0, 4.0], "host")
    assert (found.median_us, found.min_us, found.rounds) == (3.0, 1.0, 5)
    assert found.q25_us < 3.0 < found.q75_us
    assert summarise([7.0], "host").q75_us == 7.0


def test_calls_are_timed_in_blocks():
    counts = {"a": 0, "b": 0}

    def call(name):
        return lambda: counts.__setitem__(name, counts[name] + 1)

    found = time_calls({name: call(name) for name in counts}, "cpu", seconds=0.0, calls=10)
    assert counts["a"] == counts["b"] == 10 * (timing.MIN_ROUNDS + 1)
    assert found["a"].rounds == timing.MIN_ROUNDS


def test_host_overhead_waits_for_no_other_thread(monkeypatch):
    threads = []
    timed = host.time_calls

    def recorded(*arguments):
        threads.append(torch.get_num_threads())
        return timed(*arguments)

    monkeypatch.setattr(host, "time_calls", recorded)
    monkeypatch.setattr(host, "CALLS", 2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows, _ = host.measure_host([FASTLORA], "cpu", 0.0)
        assert threads == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert {row["variant"] for row in rows if row["kind"] != "floor"} == {"frozen", "fastlora"}


def test_saved_bytes_count_storages_once_and_parameters_never():
    x = torch.randn(32, 16, requires_grad=True)
    frozen = torch.randn(8, 16)
    trained = torch.randn(8, 16, requires_grad=True)
    assert saved_bytes(lambda: F.linear(x, frozen), [frozen]) == 0
    assert saved_bytes(lambda: F.linear(x, frozen), []) == frozen.nbytes
    assert saved_bytes(lambda: F.linear(x, trained), [trained]) == x.nbytes
    assert saved_bytes(lambda: F.linear(x, trained) + F.linear(x, trained), [trained]) == x.nbytes
    assert saved_bytes(lambda: F.linear(x[:16], trained), [trained]) == x.nbytes  # a view keeps the whole storage


def test_the_peak_is_that_of_the_worst_moment():
    def two_buffers():
        first = torch.empty(MIB, dtype=torch.uint8)
        del first
        torch.empty(MIB, dtype=torch.uint8)

    def both_at_once():
        first = torch.empty(MIB, dtype=torch.uint8)
        second = torch.empty(MIB, dtype=torch.uint8)
        return first, second

    assert allocation_peak(two_buffers, "cpu") == MIB
    assert allocation_peak(both_at_once, "cpu") == 2 * MIB


def test_launches_count_calls_that_make_no_further_call():
    left, right = torch.randn(4, 4), torch.randn(4, 4)
    once = launches(lambda: torch.mm(left, right), "cpu")
    assert once >= 1
    assert launches(lambda: (torch.mm(left, right), torch.mm(left, right)), "cpu") == 2 * once


def test_the_better_of_two_peak_measurements_counts():
    first = {"copy_gbs": 1.0, "matmul_tflops": {"float32": 4.0}}
    second = {"copy_gbs": 2.0, "matmul_tflops": {"float32": 3.0}}
    assert larger_peaks(first, second) == {"copy_gbs": 2.0, "matmul_tflops": {"float32": 4.0}}
