"""Which kernels a run of a model compiles, by Triton's own keys, without compiling any."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from fastlora.backends.target import Target
from fastlora.backends.triton import launch, projection_launch, segment_launch
from fastlora.bench.cases import LLAMA_8B
from fastlora.operands import describe_backward, describe_forward
from fastlora.problem import BackwardOperands, ForwardOperands, Needs
from tests.support.compile_target import compile_for

N_SMS = {80: 108, 90: 132, 100: 148}
RANK = 16
DROPOUT = 0.1


class Step(NamedTuple):
    """Tokens of a forward pass, whether it is of training (dropout, a backward), and where its seeds are drawn."""

    tokens: int
    trains: bool = True
    captured: bool = False


@contextmanager
def asked_for(arch: int) -> Iterator[set]:
    """Within it kernels are prepared for a GPU of compute capability ``arch``; the set holds (name, key) of each that
    would be compiled."""
    found = set()

    def do_compile(kernel, key, *rest, **options):
        found.add((kernel.__name__, key))  # and returns None: nothing is kept

    def target(device):
        return Target(arch, N_SMS[arch])

    single, segments, projections = (
        mock.patch.object(module, "target_of", target) for module in (launch, segment_launch, projection_launch)
    )
    with compile_for(arch), single, segments, projections, mock.patch.object(JITFunction, "_do_compile", do_compile):
        yield found


def off_by_one(t: torch.Tensor) -> torch.Tensor:
    """The same, one element behind 16 bytes."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def walk(steps: Iterable[Step], dropout_p: float = DROPOUT, adapters: torch.dtype = torch.bfloat16) -> None:
    """Prepares what the layers of Llama-3.1-8B launch in these steps. The projections of the first decoder layer that
    read its input need no gradient of it."""
    for tokens, trains, captured in steps:
        for i, (n, k) in enumerate(LLAMA_8B):
            p = dropout_p if trains else 0.0
            seed = torch.empty((), dtype=torch.int64, device="meta" if captured else "cpu") if p else None
            x, weight, dy, s = _meta(tokens, k), _meta(n, k), _meta(tokens, n), _meta(tokens, RANK)
            lora_a, lora_b = _meta(RANK, k, dtype=adapters), _meta(n, RANK, dtype=adapters)
            operands, spec = describe_forward(ForwardOperands(x, weight, lora_a, lora_b, None, 2.0, p, seed))
            launch.prepare(spec).compile(operands)
            for dx in (True, False) if i < 2 else (True,):
                if trains:
                    given = BackwardOperands(dy, x, weight, lora_a, lora_b, s, 2.0, p, seed)
                    saved, spec = describe_backward(given, Needs(dx, True, True, False))
                    launch.prepare(spec).compile(saved)
