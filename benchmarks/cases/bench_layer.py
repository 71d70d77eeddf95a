"""One LoRA layer under pytest-benchmark: forward, backward and step of every variant, checked before it is timed."""

import itertools

import pytest
import torch

from fastlora.bench.correctness import check_variant
from fastlora.bench.cost import PASSES
from fastlora.bench.layer import input_sets, make_stage


@pytest.fixture
def stages(case, peer, device):
    refusal = peer.refuses(case)
    if refusal:
        pytest.skip(refusal)
    sets = input_sets(case, device)
    try:
        layer = peer.build(case, sets[0])
    except ImportError as error:
        pytest.skip(f"not installed: {error}")
    check_variant(peer, layer, case, sets[0])
    return itertools.cycle([make_stage(layer, tensors) for tensors in sets])


@pytest.mark.parametrize("which", PASSES)
def bench_layer(benchmark, stages, case, which, device):
    benchmark.group = f"{case.label} {which}"

    def setup():
        stage = next(stages)
        stage.prepare()
        if which == "backward":
            stage.forward()
        if device == "cuda":
            torch.cuda.synchronize()
        return (stage,), {}

    def run(stage):
        if which != "backward":
            stage.forward()
        if which != "forward":
            stage.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, setup=setup, rounds=20, warmup_rounds=3)
