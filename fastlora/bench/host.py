"""Host overhead: what one forward and backward costs where the arithmetic is next to nothing."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch

from fastlora.backends import reference
from fastlora.bench.cases import LayerCase
from fastlora.bench.layer import build_variants, make_stage, random_tensors
from fastlora.bench.peers import FROZEN, SCALING, LayerTensors, Peer
from fastlora.bench.timing import time_calls
from fastlora.problem import Needs

CALLS = 100


def host_case(device: str) -> LayerCase:
    """16 tokens through 64 -> 64 features, rank 8."""
    return LayerCase(16, 64, 64, 8, 0.0, "float32" if device == "cpu" else "bfloat16")


class _EmptyNode(torch.autograd.Function):
    """What LoRALinearFunction keeps and returns, without a product."""

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b):
        ctx.save_for_backward(x, weight, lora_a, lora_b)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        _, _, lora_a, lora_b = ctx.saved_tensors
        return dy, None, lora_a, lora_b


def floor_calls(tensors: LayerTensors) -> dict[str, Callable[[], None]]:
    """The two parts that no layer of this kind can do without: its eight products, and its autograd node."""
    t, needs = tensors, Needs(True, True, True, False)
    x, a, b = (tensor.detach().requires_grad_(True) for tensor in (t.x, t.lora_a, t.lora_b))

    @torch.no_grad()
    def products() -> None:
        _, s = reference.lora_forward(t.x, t.weight, t.lora_a, t.lora_b, None, SCALING, 0.0, None)
        reference.lora_backward(t.dy, t.x, t.weight, t.lora_a, t.lora_b, s, SCALING, 0.0, None, needs)

    def node() -> None:
        torch.autograd.grad(_EmptyNode.apply(x, t.weight, a, b), [x, a, b], t.dy)

    return {"floor: products, no autograd": products, "floor: autograd node, no products": node}


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes in the calling thread alone. Threads of its pool have nothing to gain at this size, but a caller
    that waits for one spins, which is time of its own: a busy machine then multiplied the figures by hundreds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure_host(peers: list[Peer], device: str, seconds: float) -> tuple[list[dict], dict[str, str]]:
    """µs per call of forward + backward of every variant, and name -> why a variant is missing. On a CPU the rows of
    kind "floor" say of what the time is made."""
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
    if device == "cpu":
        calls |= floor_calls(tensors)
    # On a CPU all of it runs in this thread, backward included; on a GPU the last kernel is waited for.
    clock = time.thread_time if device == "cpu" else time.perf_counter
    with one_thread():
        timings = time_calls(calls, device, seconds, CALLS, clock)
    frozen, peft = timings[FROZEN.name].median_us, timings.get("peft")
    rows = [
        {
            "device": device,
            "variant": name,
            "kind": built[name][0].kind if name in built else "floor",
            **asdict(case),
            **asdict(timing),
            "ratio_to_frozen": timing.median_us / frozen,
            "ratio_to_peft": timing.median_us / peft.median_us if peft else None,
        }
        for name, timing in timings.items()
    ]
    return rows, missing
