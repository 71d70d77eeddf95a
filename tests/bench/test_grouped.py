"""The benchmark's experts and batches of several adapters: what is timed is right, and what it costs is counted."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastlora.bench import batches, experts, run
from fastlora.bench.correctness import WrongResult
from fastlora.bench.grouped import FROZEN, check
from fastlora.bench.report import load_report, write_report
from fastlora.bench.run import BenchOptions, run_bench, steps_of
from fastlora.bench.tables import report_tables
from fastlora.bench.verdict import verdict

pytest.importorskip("peft")
pytest.importorskip("transformers.integrations.moe")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

EXPERTS = experts.ExpertsCase(8, 16, 12, 20, 2, 3, "float32")
BATCH = batches.BatchCase(6, 5, 2, 14, 10, 3, "float32")


def built(case):
    """Variants, the exact one, x and dY."""
    if case is EXPERTS:
        variants, exact, missing = experts.build_variants(case, "cpu")
        inputs = experts.make_inputs(case, "cpu")
    else:
        variants, exact, missing, inputs = batches.build_variants(case, "cpu")
    assert not missing and len(variants) == 5
    return variants, exact, inputs


@pytest.mark.parametrize("case", (EXPERTS, BATCH), ids=("experts", "batch"))
def test_variants_share_their_weights_and_what_is_wrong_is_not_timed(case):
    variants, exact, inputs = built(case)
    check(variants, exact, *inputs)
    pointers = {min(p.data_ptr() for p in v.held.parameters() if not p.requires_grad) for v in variants.values()}
    assert len(pointers) == 1, "weights are copied"
    right = variants["fastlora"].call
    variants["fastlora"].call = lambda x: right(x) * 1.01
    with pytest.raises(WrongResult, match="fastlora is wrong by 0.01"):
        check(variants, exact, *inputs)


@pytest.mark.parametrize("case", (EXPERTS, BATCH), ids=("experts", "batch"))
def test_the_cost_is_what_torch_counts(case):
    """Of ours each row of a batch counts as if it had an adapter; of torch's grouped products it counts nothing."""
    variants, _, inputs = built(case)
    x, dy = inputs
    for name in ("fastlora", experts.LOOP) if case is EXPERTS else ("fastlora", FROZEN):
        with FlopCounterMode(display=False) as counter:
            variants[name].call(x.requires_grad_()).backward(dy)
        assert counter.get_total_flops() == case.cost("step", name != FROZEN).flops > 0


def test_every_weight_is_read_once_and_every_adapter():
    case = replace(BATCH, adapters=3)
    rows, n, k, r = 30, 14, 10, 3
    assert case.cost("forward", False).bytes == 4 * (rows * k + rows * n + n * k)
    assert case.cost("forward", True).bytes == 4 * (rows * k + rows * n + n * k + r * (3 * (n + k) + rows))
    m, e, h, i = 40, 8, 16, 12
    frozen = 4 * (m * h + m * 2 * i + e * 2 * i * h) + 4 * (m * i + m * h + e * i * h)
    assert EXPERTS.cost("forward", False).bytes == frozen
    factors = r * (e * (2 * i + h) + m) + r * (e * (i + h) + m)
    assert EXPERTS.cost("forward", True).bytes == frozen + 4 * factors


def test_samples_have_their_turns():
    assert BATCH.owners == [0, 1, -1, 0, 1, -1]
    assert BATCH.names == ["adapter0", "adapter1", "__base__"] * 2


def test_sections_of_a_report(monkeypatch, tmp_path):
    monkeypatch.setattr("fastlora.bench.peaks.MATMUL_SIZE", {"cpu": 64})
    monkeypatch.setattr("fastlora.bench.peaks.COPY_BYTES", {"cpu": 1 << 20})
    cases = {"experts": (EXPERTS,), "batches": (BATCH, replace(BATCH, samples=3))}
    grouped = {name: (lambda device, name=name: cases[name], run._GROUPED[name][1]) for name in cases}
    monkeypatch.setattr(run, "_GROUPED", grouped)
    begun = []
    options = BenchOptions("quick", "cpu", ("experts", "batches"), 0.0, on_progress=begun.append)
    report = run_bench(options)
    assert len(begun) == steps_of(options) == 4 and not report["missing"]
    steps = {
        (row["name"], row["variant"]): row for row in report["experts"] + report["batches"] if row["pass"] == "step"
    }
    assert len(steps) == 3 * 5 and all(row["share_of_peak"] > 0 and row["launches"] for row in steps.values())
    peft, ours = (steps["8 experts", name]["saved_bytes"] for name in ("peft", "fastlora"))
    assert peft > 8 * 3 * 12 * 16 * 4 > ours, "PEFT saves as much as all weights"
    assert "A step of 8 experts takes fastlora" in verdict(report)
    tables = [table for table in report_tables(report) if "adapters or none" in table.title]
    assert [table.title.split()[0] for table in tables] == ["6", "3"] and all(len(t.rows) == 15 for t in tables)
    write_report(report, tmp_path)
    assert "8 experts" in (tmp_path / "bench.md").read_text()
    older = {name: value for name, value in report.items() if name not in cases}
    assert load_report(write_report(older, tmp_path / "older")[0]) == older, "a report of before is read as it is"


def test_sizes_of_a_gpu():
    assert {case.experts for case in experts.experts_cases("cuda")} == {128, 8}
    assert all(case.dtype == "bfloat16" for case in (*experts.experts_cases("cuda"), *batches.batch_cases("cuda")))
    assert torch.bfloat16 in {experts.DTYPES[case.dtype] for case in batches.batch_cases("cuda")}
