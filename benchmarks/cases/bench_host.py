"""Host overhead under pytest-benchmark: forward + backward of a layer too small to compute anything."""

import pytest
import torch

from fastlora.bench.correctness import check_variant
from fastlora.bench.host import CALLS, host_case
from fastlora.bench.layer import make_stage, random_tensors


def bench_host(benchmark, peer, device):
    case = host_case(device)
    tensors = random_tensors(case, device, torch.Generator(device=device).manual_seed(0))
    try:
        layer = peer.build(case, tensors)
    except ImportError as error:
        pytest.skip(f"not installed: {error}")
    check_variant(peer, layer, case, tensors)
    stage = make_stage(layer, tensors)

    def step():
        stage.forward()
        stage.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=20, iterations=CALLS, warmup_rounds=1)
