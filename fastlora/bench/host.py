"""Host overhead: what one forward and backward costs where the arithmetic is next to nothing."""

import time
from dataclasses import asdict

import torch

from fastlora.bench.cases import LayerCase
from fastlora.bench.layer import build_variants, make_stage, random_tensors
from fastlora.bench.peers import FROZEN, Peer
from fastlora.bench.timing import time_calls

CALLS = 100


def host_case(device: str) -> LayerCase:
    """16 tokens through 64 -> 64 features, rank 8."""
    return LayerCase(16, 64, 64, 8, 0.0, "float32" if device == "cpu" else "bfloat16")


def measure_host(peers: list[Peer], device: str, seconds: float) -> tuple[list[dict], dict[str, str]]:
    """µs per call of forward + backward of every variant, and name -> why a variant is missing."""
    case = host_case(device)
    tensors = random_tensors(case, device, torch.Generator(device=device).manual_seed(0))
    built, missing = build_variants(case, [FROZEN, *(peer for peer in peers if peer is not FROZEN)], tensors)
    calls = {}
    for name, (_, layer) in built.items():
        stage = make_stage(layer, tensors)
        stage.prepare()

        def step(stage=stage) -> None:
            stage.forward()
            stage.backward()

        calls[name] = step
    # On a CPU all of it runs in this thread, backward included; on a GPU the last kernel is waited for.
    clock = time.thread_time if device == "cpu" else time.perf_counter
    timings = time_calls(calls, device, seconds, CALLS, clock)
    frozen, peft = timings[FROZEN.name].median_us, timings.get("peft")
    rows = [
        {
            "device": device,
            "variant": name,
            "kind": built[name][0].kind,
            **asdict(case),
            **asdict(timing),
            "ratio_to_frozen": timing.median_us / frozen,
            "ratio_to_peft": timing.median_us / peft.median_us if peft else None,
        }
        for name, timing in timings.items()
    ]
    return rows, missing
