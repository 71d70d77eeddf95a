"""The mark: what is wrong is never timed, however little of it, and what stops the process costs itself."""

import json
import os
import re
import time
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from click.testing import CliRunner

from benchmarks import clocks, mark, readme_tables
from benchmarks.gpu import sweep
from benchmarks.judge import Judge, NanFilled
from fastlora.backends import reference
from fastlora.bench.cases import LayerCase
from fastlora.bench.layer import input_sets

CASE = LayerCase(64, 48, 32, 16, dtype="float32")
LARGE = LayerCase(1024, 1024, 64, 16)


@pytest.fixture(scope="module")
def sets():
    return input_sets(CASE, "cpu")[:2]


@pytest.mark.parametrize("direction", mark.DIRECTIONS)
def test_what_is_right_is_timed_in_one_rotation(sets, direction):
    kept = []
    rotation = mark.Rotation(direction, CASE, sets, lambda rows: kept.append(json.dumps(rows)))
    launch, calls = mark.launch_of(direction, reference, {}), []

    def counted(name, tensors):
        calls.append(name)
        return launch(tensors)

    rotation.time(rotation.check({name: partial(counted, name) for name in ("one", "other")}), rounds=5)
    timed = mark.WARM_UP_ROUNDS + 5
    assert (calls.count("one"), calls.count("other")) == (1 + 2 * timed, 1 + timed), "the first against itself as well"
    assert [row["variant"] for row in rotation.rows] == ["one", "other"]
    for row in rotation.rows:
        assert "failure" not in row and row["ratio"] == row["median_us"] / row["frozen_us"] > 0
        assert row["frozen_us"] == rotation.rows[0]["frozen_us"] and row["noise"] >= 0 and row["rounds"] == 5
        assert 0 < row["error"] < 1e-5 and 0 < row["largest"] <= 1
        assert f"mark {row['mark']:.2f}x" in mark.as_line(row)
    assert json.loads(kept[0])[0]["failure"] == mark.STOPPED, "on record before it can stop the process"
    assert json.loads(kept[-1]) == rotation.rows


def wrong_block(scale, t):
    """Right but for one block, in which the result is ``scale`` times the right one."""
    y = t.x @ t.weight.t() + 1.5 * (t.x @ t.lora_a.t()) @ t.lora_b.t()
    y[-64:, -64:] *= scale
    return {"y": y}


def forgetful(t):
    y = t.x.new_empty(t.x.shape[0], t.weight.shape[0])
    y[:, 1:] = 1.0
    return {"y": y}


@pytest.mark.parametrize(
    "launch, failure",
    (
        (lambda t: {"y": t.x @ t.weight.t()}, "of its norm"),
        (lambda t: torch.ones(2) @ torch.ones(3), "RuntimeError: .*size"),
        (lambda t: {}["y"], "KeyError"),
        (forgetful, "y has 64 NaN of"),
    ),
)
def test_what_is_wrong_is_not_timed_and_says_why(sets, launch, failure):
    rotation = mark.Rotation("forward", CASE, sets, lambda rows: None)
    rotation.time(rotation.check({"broken": launch, "right": mark.launch_of("forward", reference, {})}), rounds=5)
    broken, right = rotation.rows
    assert re.search(failure, broken["failure"]) and "ratio" not in broken
    assert broken["failure"] in mark.as_line(broken) and "ratio" in right


def test_one_wrong_block_passes_the_norm_and_not_the_largest_element():
    tensors = input_sets(LARGE, "cpu")[0]
    judge = Judge(LARGE, tensors)
    assert judge.verdict(partial(wrong_block, 1.0))["failure"] is None
    wrong = judge.verdict(partial(wrong_block, 0.95))
    assert wrong["error"] < 5e-3 and wrong["largest"] > 1
    row, column = (int(word) for word in wrong["failure"].split("[")[1].split("]")[0].split(","))
    assert row >= 960 and column >= 960


def test_the_saved_s_is_of_its_own_inputs(sets):
    """Though others have lain at the same address."""
    mark._saved[id(sets[0])] = weakref.ref(sets[1]), torch.zeros(CASE.m, CASE.r)
    assert torch.equal(mark.saved_s(sets[0]), (sets[0].x @ sets[0].lora_a.t()) * 1.5)
    assert mark.saved_s(sets[0]) is mark.saved_s(sets[0])


def test_what_a_launch_allocates_is_full_of_nan():
    like = torch.ones(2, 3)
    with NanFilled():
        made = like.new_empty(2), torch.empty(3), torch.empty_like(like), like.new_empty(2, dtype=torch.int32)
    assert all(tensor.isnan().all() for tensor in made[:3]) and torch.equal(like, torch.ones(2, 3))


def stopping(how):
    """Variants of which the second ends the process."""

    def stop(spec, **choice):
        how()

    broken = type("Broken", (), {"prepare": staticmethod(stop)})
    return {"first": (reference, {}), "second": (broken, {}), "third": (reference, {})}


@pytest.mark.parametrize(
    "how, said",
    (
        (partial(time.sleep, 60), "did not return within 1 s"),
        (partial(os._exit, 9), "did not return and ended the process (exit code 9)"),
        (lambda: None, None),
    ),
    ids=("hangs", "dies", "returns nothing"),
)
def test_a_variant_that_stops_the_process_costs_itself(tmp_path, monkeypatch, how, said):
    monkeypatch.setattr(mark, "variants", lambda backend: stopping(how))
    monkeypatch.setattr(mark, "CHECK_LIMIT_S", 1.0)
    small = [replace(case, dtype="float32") for case in mark.GPU_HEADLINE[:1]]
    monkeypatch.setattr(mark, "GPU_HEADLINE", small)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the process forks
    try:
        output = tmp_path / "mark.json"
        options = ["--output", str(output), "--device", "cpu", "--rounds", "5", "--case", "64", "48", "32"]
        assert CliRunner().invoke(mark.main, options).exit_code == 1
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(output.read_text())["rows"]
    assert sorted((row["pass"], row["variant"]) for row in rows) == sorted(
        (direction, name) for direction in mark.DIRECTIONS for name in ("first", "second", "third")
    )
    for row in rows:
        assert ("ratio" in row) == (row["variant"] != "second")
        if row["variant"] == "second":
            assert row["failure"] == said if said else "TypeError" in row["failure"]


def test_clocks_are_the_samples_of_nvidia_smi(tmp_path, monkeypatch):
    assert clocks.summary("1980, 3201, 650.5, 55\n1755, 3201, [N/A], 56\n\n1900, 3201, 700.5, 57\n garbage") == {
        "sm_mhz": [1755, 1900, 1980],
        "memory_mhz": [3201] * 3,
        "power_w": [650.5, 675.5, 700.5],
        "celsius": [55, 56, 57],
    }
    assert clocks.summary("") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    with clocks.Clocks() as sampled:
        pass
    assert sampled.summary() is None


def test_the_table_of_the_mark_shows_what_is_wrong_as_such():
    base = {"pass": "forward", "r": 16, "m": 8192, "n": 4096, "k": 4096, "dtype": "bfloat16", "mark": 1.0}
    timed = {"median_us": 361.24, "frozen_us": 350.0, "ratio": 361.24 / 350, "noise": 0.004}
    rows = [
        {**base, **timed, "variant": "cuda", "clocks": {"sm_mhz": [1700, 1900, 1980]}},
        {**base, "variant": "cuda group 8", "failure": "wrong: y is off"},
        {**base, "variant": "cuda group 32"},
    ]
    text = readme_tables.TABLES["mark"]({"rows": rows}).to_markdown()
    assert "M=8192 N=4096 K=4096 bfloat16, SM clock 1700 to 1980 MHz" in text
    assert "| forward | 16 | cuda | 361.2 | 350.0 | 1.032 | 0.4% | 1.00 |" in text
    assert "wrong: y is off" in text and "not timed" in text


def test_the_sweep_has_every_tile_with_its_splits():
    pytest.importorskip("fastlora._C")
    names = list(sweep.forward_launches(LayerCase(16, 4096, 4096, 16)))
    assert names[0] == "cuda" and {"128x256 splits 1", "128x128 splits 8", "64x128 splits 1"} <= set(names)
    assert list(sweep.backward_launches(CASE)) == ["backward", "dX alone", "gradients alone"]
