"""The measurement of LoRA on experts: what it counts, at a tiny size, and what it refuses to time."""

import json

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers.integrations.moe")

from benchmarks import experts

TINY = experts.Shape(experts=8, hidden=16, intermediate=12, tokens=20, top_k=2, rank=3)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def test_every_way_is_right_and_measured():
    rows = {row["way"]: row for row in experts.measure(TINY, seconds=0.0)}
    assert len(rows) == 5 and all(row["median_us"] > 0 and row["rounds"] >= 5 for row in rows.values())
    weights = 8 * 3 * 12 * 16 * 4  # bytes of W, which ours neither copies nor saves
    assert rows[experts.STOCK]["saved_bytes"] > weights > rows[experts.OURS]["saved_bytes"]
    assert rows[experts.NOISE]["saved_bytes"] == rows[experts.STOCK]["saved_bytes"]
    assert rows[experts.STOCK]["peak_bytes"] > rows[experts.OURS]["peak_bytes"] > 0


def test_a_way_that_is_wrong_is_not_timed(monkeypatch):
    ways = experts.make_ways(TINY)
    right = ways[experts.OURS].forward
    ways[experts.OURS].forward = lambda *inputs: right(*inputs) * 1.01
    with pytest.raises(RuntimeError, match="fastlora is wrong by 0.01 of a result's norm, and was not timed"):
        experts.check(ways, experts.make_inputs(TINY))


def test_the_table_is_made_of_the_report():
    report = json.loads(experts.RESULT.read_text())
    assert experts.RESULT.with_suffix(".md").read_text() == experts.results_table(report).to_markdown()
    assert experts.Shape(**report["shape"]) == experts.Shape()
