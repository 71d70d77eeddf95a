"""The two ways to decode a packed base weight against each other: which are possible, which is chosen, and that a wrong
one is not."""

import pytest
import torch

from fastlora import selection
from fastlora.backends import reference
from fastlora.backends.configs import TILE_TABLES
from fastlora.backends.target import Target
from fastlora.bench import tuner, ways
from fastlora.bench.cases import PackedCase
from fastlora.bench.packed import packed_weight
from fastlora.bench.timing import HostClock
from fastlora.bench.ways import Way
from fastlora.problem import BackwardOperands, ForwardOperands
from fastlora.quantised_weight import QuantisedWeight
from tests.support.quantised_models import bitsandbytes

CASE = PackedCase(16, 64, 96, 4)
CPU = torch.device("cpu")


class Now:
    """A clock that the launches move on."""

    seconds = 0.0

    def clock(self):
        class Clock(HostClock):
            def mark(clock):
                return self.seconds

        return Clock()


class FakeLaunches:
    """A backend over packed weights, whose launches take a time by way; ``wrong`` ones halve the scaling."""

    def __init__(self, now, once, in_loop=None, default=True, wrong=()):
        self.now, self.seconds, self.default, self.wrong = now, {False: once, True: in_loop}, default, wrong
        self.launched = []

    def why_not_in_loop(self, spec):
        backward = spec.direction == "backward"
        return None if self.seconds[True] is not None and not backward else "it has no such kernel"

    def decodes_in_loop(self, spec, tuned=True):
        assert not tuned
        return self.default and self.why_not_in_loop(spec) is None

    def prepare(self, spec, config=None, in_loop=False):
        assert spec.packed is not None and spec.base_format == CASE.base

        def launch(operands):
            operands = (ForwardOperands if spec.direction == "forward" else BackwardOperands)(*operands)
            assert isinstance(operands.weight, QuantisedWeight)
            self.launched.append((in_loop, config))
            self.now.seconds += self.seconds[in_loop]
            scaling = operands.scaling * (0.5 if in_loop in self.wrong else 1.0)
            dense = operands._replace(weight=operands.weight.dequantize(), scaling=scaling)
            return reference.prepare(spec._replace(packed=None, base_format="dense"))(dense)

        return launch


@pytest.fixture(autouse=True)
def served(monkeypatch):
    bitsandbytes()
    monkeypatch.setattr(selection, "why_unsupported", lambda name, spec: None)


def compare(now, direction="forward", configs=None, **modules):
    return ways.compare_ways(CASE, direction, CPU, configs, modules, now.clock())


def test_the_fastest_way_of_each_backend_and_of_all():
    now = Now()
    cuda, triton = FakeLaunches(now, 3.0, 2.0), FakeLaunches(now, 1.0, 4.0)
    found = compare(now, cuda=cuda, triton=triton)
    assert found.default == Way("cuda", True) and found.winner == Way("triton", False)
    assert found.in_loop == {"cuda": True, "triton": False} and found.untuned == {"cuda": True, "triton": True}
    assert {way.describe(): us for way, us in found.median_us.items()} == pytest.approx(
        {"cuda once": 3e6, "cuda in the loop": 2e6, "triton once": 1e6, "triton in the loop": 4e6}
    )


def test_a_gain_within_the_noise_changes_nothing():
    now = Now()
    found = compare(now, cuda=FakeLaunches(now, 0.99, 1.0), triton=FakeLaunches(now, 0.99, 1.0))
    assert found.winner == found.default == Way("cuda", True) and found.in_loop == {"cuda": True, "triton": True}


def test_a_way_that_is_wrong_is_not_chosen():
    now = Now()
    found = compare(now, cuda=FakeLaunches(now, 3.0, 1.0, wrong=(True,)), triton=FakeLaunches(now, 4.0))
    assert found.winner == Way("cuda", False) and found.in_loop["cuda"] is False
    assert found.median_us[Way("cuda", True)] is None and "is off by" in found.errors["cuda in the loop"]


def test_a_backward_has_one_way():
    now = Now()
    found = compare(now, "backward", cuda=FakeLaunches(now, 3.0, 1.0), triton=FakeLaunches(now, 4.0, 1.0))
    assert set(found.median_us) == {Way("cuda", False), Way("triton", False)} and found.winner == Way("cuda", False)


def test_each_way_is_timed_with_the_tile_that_was_tuned_for_it():
    now, tiles = Now(), TILE_TABLES["hopper few rows"]
    triton = FakeLaunches(now, 3.0, 1.0)
    compare(now, configs={False: tiles[0], True: tiles[1]}, cuda=FakeLaunches(now, 4.0), triton=triton)
    assert set(triton.launched) == {(False, tiles[0]), (True, tiles[1])}


def test_no_launch_that_decodes_is_an_error(monkeypatch):
    monkeypatch.setattr(selection, "why_unsupported", lambda name, spec: f"{name}: not here")
    with pytest.raises(RuntimeError, match="no launch decodes .* over nf4 forward: cuda: not here; triton: not here"):
        compare(Now())


@pytest.mark.parametrize("in_loop", (False, True))
def test_tiles_are_tuned_for_a_way(in_loop):
    """From the table's own choice for it on, and launched by it alone."""
    now = Now()
    triton = FakeLaunches(now, 1.0, 1.0)
    choice = tuner.tune_case(CASE, "forward", Target(90, 132), triton, 0.0, now.clock(), in_loop=in_loop)
    assert choice.tried == 1 and not choice.table.config.fused and choice.table.config.block_m == 16
    assert set(triton.launched) == {(in_loop, choice.table.config)}


@pytest.mark.parametrize("base", ("nf4", "fp4"))
def test_inputs_are_packed_by_their_library(base):
    weight = torch.randn(64, 96).to(torch.bfloat16)
    packed = packed_weight(weight, base)
    assert (packed.format, packed.shape, packed.dtype, packed.nested) == (base, (64, 96), torch.bfloat16, True)
    assert 0 < (packed.dequantize() - weight).float().norm() < 0.3 * weight.float().norm()
