"""The measurement of LoRA on experts: what it counts, at a tiny size, and what it refuses to time."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers.integrations.moe")

from benchmarks import experts
from fastlora.bench.correctness import WrongResult
from fastlora.bench.experts import OURS, STOCK, VARIANTS

TINY = replace(experts.CASE, experts=8, hidden=16, intermediate=12, tokens=20, top_k=2, r=3)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def test_every_variant_is_right_and_measured():
    rows = {row["variant"]: row for row in experts.measure(TINY, seconds=0.0)}
    assert len(rows) == 6 and all(row["median_us"] > 0 and row["rounds"] >= 5 for row in rows.values())
    weights = 8 * 3 * 12 * 16 * 4  # bytes of W, which ours neither copies nor saves
    assert rows[STOCK]["saved_bytes"] > weights > rows[OURS]["saved_bytes"]
    assert rows[experts.NOISE]["saved_bytes"] == rows[STOCK]["saved_bytes"]
    assert rows[STOCK]["peak_bytes"] > rows[OURS]["peak_bytes"] > 0


def test_a_variant_that_is_wrong_is_not_timed(monkeypatch):
    def wrong(*given):
        variant = right(*given)
        call = variant.call
        variant.call = lambda x: call(x) * 1.01
        return variant

    right = VARIANTS[OURS]
    monkeypatch.setitem(VARIANTS, OURS, wrong)
    with pytest.raises(WrongResult, match="fastlora is wrong by 0.01"):
        experts.measure(TINY, seconds=0.0)


def test_the_table_is_made_of_the_report():
    report = json.loads(experts.RESULT.read_text())
    assert experts.RESULT.with_suffix(".md").read_text() == experts.results_table(report).to_markdown()
    assert experts.ExpertsCase(**report["case"]) == experts.CASE
