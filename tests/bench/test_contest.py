"""All backends against each other: who wins a class of shapes, and who cannot."""

from dataclasses import replace

import pytest
import torch

from fastlora.backends import reference
from fastlora.backends.configs import TILE_TABLES
from fastlora.backends.tuning import DIRECTIONS
from fastlora.bench import contest
from fastlora.bench.cases import LayerCase
from fastlora.bench.timing import HostClock

CASE = LayerCase(64, 48, 32, 4, 0.0, "float32")


class Timed:
    """A backend whose launches take so many seconds of a clock that all share; None where its results are wrong."""

    now = 0.0

    def __init__(self, seconds, takes_config=False):
        self.seconds, self.takes_config, self.configs = seconds, takes_config, []

    def prepare(self, spec, **choice):
        right = reference.prepare(spec)
        assert self.takes_config or not choice

        def launch(operands):
            self.configs.append(choice.get("config"))
            Timed.now += self.seconds or 0.0
            return right(operands if self.seconds else operands._replace(scaling=3.0))

        return launch


class SharedClock(HostClock):
    def mark(self):
        return Timed.now


def compare(monkeypatch, seconds, direction="forward", refuses=(), first=("cuda",), config=None):
    """The contest of backends that take so many seconds."""
    reasons = {name: f"{name}: no" for name in refuses}
    monkeypatch.setattr(contest.selection, "why_unsupported", lambda name, spec: reasons.get(name))
    monkeypatch.setattr(contest.selection, "preference", lambda spec, tuned: (*first, *contest.BACKENDS))
    modules = {name: Timed(each, name == "triton") for name, each in seconds.items()}
    return contest.compare_backends(CASE, direction, torch.device("cpu"), config, modules, SharedClock()), modules


TIMES = {"cuda": 4.0, "triton": 3.0, "composed": 2.0, "reference": 9.0}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_fastest_backend_wins(monkeypatch, direction):
    config = replace(TILE_TABLES["float32"][0], group_m=16)
    found, modules = compare(monkeypatch, TIMES, direction, config=config)
    assert (found.default, found.winner) == ("cuda", "composed")
    assert {each.backend: each.median_us for each in found.entrants} == {n: t * 1e6 for n, t in TIMES.items()}
    assert config in modules["triton"].configs


def test_a_backend_that_is_faster_by_the_noise_changes_nothing(monkeypatch):
    assert compare(monkeypatch, {**TIMES, "composed": 3.95, "triton": 4.5})[0].winner == "cuda"


def test_a_backend_that_refuses_or_is_wrong_has_no_time(monkeypatch):
    found, _ = compare(monkeypatch, {**TIMES, "composed": None}, refuses=("triton",))
    errors = {each.backend: each.error for each in found.entrants if each.median_us is None}
    assert found.winner == "cuda" and errors["triton"] == "triton: no" and "WrongResult" in errors["composed"]
    assert list(errors) == ["triton", "composed"]


def test_a_default_that_is_wrong_is_replaced(monkeypatch):
    found, _ = compare(monkeypatch, {**TIMES, "composed": None}, first=("composed",))
    assert (found.default, found.winner) == ("composed", "triton")


def test_where_nothing_is_right_nobody_wins(monkeypatch):
    with pytest.raises(RuntimeError, match="no backend serves"):
        compare(monkeypatch, dict.fromkeys(TIMES))
