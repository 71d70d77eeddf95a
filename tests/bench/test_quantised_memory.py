"""The recorded memory of steps over quantised weights: a layer keeps X and S, counted again at a small size."""

import json

import pytest

pytest.importorskip("peft")

from benchmarks import quantised_memory
from tests.support.quantised_models import bitsandbytes, torchao


def x_and_s(layers, m, n, k, r):
    return 2 * layers * m * (k + r)  # all layers are square here: each one's input is k wide


@pytest.mark.parametrize("base", ["nf4", "float8"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_keeps_x_and_s_and_less_than_pefts(base, dropout):
    bitsandbytes() if base == "nf4" else torchao()
    shape = {"layers": 2, "m": 8, "n": 64, "k": 64, "r": 4}
    found = quantised_memory.count(base, dropout, shape)
    seeds = 8 * shape["layers"] if dropout else 0
    assert found["fastlora_saved"] == x_and_s(**shape) + seeds < found["peft_saved"]
    assert found["weights"] < found["dense"] and min(found["fastlora_peak"], found["peft_peak"]) > found["dense"] / 2


def test_the_record_says_the_same():
    report = json.loads(quantised_memory.RESULT.read_text())
    assert [(row["base"], row["dropout"]) for row in report["rows"]] == list(quantised_memory.KINDS)
    for row in report["rows"]:
        assert 0 <= row["fastlora_saved"] - x_and_s(**report["shape"]) <= 8 * report["shape"]["layers"]
        assert row["fastlora_saved"] < row["peft_saved"] and row["fastlora_peak"] < row["peft_peak"]
