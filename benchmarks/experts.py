"""LoRA on MoE experts on the CPU: bytes saved, peak and time of a step, beside stock PEFT and a loop over experts.

The experts module is transformers' own for Qwen3-MoE, in float32: a quarter of the experts, of the widths and of the
tokens of 128 experts x 2048 x 768 with 4096 tokens, so that an expert has as many rows. Stock PEFT runs over
transformers' default, torch's grouped product; over its eager loop, PEFT's backward would fill a gradient of all
experts' weights once an expert. All ways are checked against float64 before they are timed, and take turns in one run,
by the CPU time of one thread; the first of them runs twice, so that the noise stands beside the ratios. Writes
results/experts.*.
"""

import copy
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial

import click
import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks import RESULTS
from fastlora.bench.memory import allocation_peak, saved_bytes
from fastlora.bench.timing import time_calls
from fastlora.environment import describe
from fastlora.integrations.peft import patch
from fastlora.tables import MIB, Table

RESULT = RESULTS / "experts.json"
STOCK, LOOP, OURS, FROZEN = "PEFT", "loop", "fastlora", "frozen"
NOISE = f"{STOCK}, again"
PARAMETERS = ("gate_up_proj", "down_proj")
ALLOWED = 1e-4  # relative to the norm of each gradient in float64: what is wrong differs by about 1


@dataclass(frozen=True)
class Shape:
    experts: int = 32
    hidden: int = 512
    intermediate: int = 192
    tokens: int = 1024
    top_k: int = 8
    rank: int = 16


class Block(nn.Module):
    """An experts module where target_parameters finds it."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


@dataclass
class Way:
    """One way to compute a step: what it computes, the module that holds its parameters."""

    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    module: nn.Module

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]


def make_stock(shape: Shape) -> nn.Module:
    """Stock PEFT on an experts module; branches about as large as the frozen products."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        num_experts=shape.experts, hidden_size=shape.hidden, moe_intermediate_size=shape.intermediate
    )
    config._experts_implementation = "grouped_mm"
    block = Block(Qwen3MoeExperts(config))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter.shape[2] ** -0.5)
    targets = [f"experts.{name}" for name in PARAMETERS]
    options = {"r": shape.rank, "lora_alpha": 2 * shape.rank, "target_modules": [], "target_parameters": targets}
    model = peft.get_peft_model(block, peft.LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=shape.rank**-0.5 / 2)
    return model


def _wrapper(model: nn.Module) -> nn.Module:
    return model.base_model.model.experts


def _experts(model: nn.Module) -> nn.Module:
    return _wrapper(model).get_base_layer()


def loop_forward(model: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """transformers' eager loop, with a branch of two products beside each of an expert's."""
    outer, experts = _wrapper(model), _experts(model)
    wrappers = {wrapper.parameter_name: wrapper for wrapper in (outer, outer.base_layer)}
    scaling = outer.scaling["default"]

    def factors(name: str) -> list[tuple[Tensor, ...]]:
        a, b = wrappers[name].lora_A["default"].weight, wrappers[name].lora_B["default"].weight
        a, b = a.view(experts.num_experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts.num_experts)
        return list(zip(getattr(experts, name).unbind(0), a.unbind(0), b.unbind(-1), strict=True))

    def linear(rows: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(rows, weight) + F.linear(F.linear(rows, a), b) * scaling

    def forward(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        first, second = map(factors, PARAMETERS)
        y = torch.zeros_like(x)
        for expert in range(experts.num_experts):
            token, place = torch.where(index == expert)
            rows = experts._apply_gate(linear(x[token], *first[expert]))
            y.index_add_(0, token, linear(rows, *second[expert]) * weights[token, place, None])
        return y

    return forward


def make_ways(shape: Shape) -> dict[str, Way]:
    stock = make_stock(shape)
    ours = copy.deepcopy(stock)
    if patch(ours).unserved:
        raise RuntimeError(f"not all is served: {patch(ours)}")
    return {
        STOCK: Way(stock, stock),
        LOOP: Way(loop_forward(stock), stock),
        OURS: Way(ours, ours),
        FROZEN: Way(_experts(stock), stock),
    }


def make_inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, the experts of each token and their weights, dY."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(shape.tokens, shape.experts, generator=generator)
    weights, index = logits.softmax(-1).topk(shape.top_k)
    x = torch.randn(shape.tokens, shape.hidden, generator=generator).requires_grad_()
    return x, index, weights / weights.sum(-1, keepdim=True), torch.randn(x.shape, generator=generator)


def gradients(way: Way, x: Tensor, index: Tensor, weights: Tensor, dy: Tensor) -> list[Tensor]:
    """Y and the gradients of x, A and B."""
    y = way.forward(x, index, weights)
    return [y.detach(), *torch.autograd.grad(y, [x, *way.trained()], dy)]


def check(ways: dict[str, Way], inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Raises RuntimeError unless every way's results are those of the loop in float64."""
    x, index, weights, dy = inputs
    exact = copy.deepcopy(ways[STOCK].module).double()
    wanted = gradients(
        Way(loop_forward(exact), exact), x.detach().double().requires_grad_(), index, weights.double(), dy.double()
    )
    for name in (STOCK, LOOP, OURS):
        for got, value in zip(gradients(ways[name], *inputs), wanted, strict=True):
            error = ((got.double() - value).norm() / value.norm()).item()
            if not error <= ALLOWED:
                raise RuntimeError(f"{name} is wrong by {error:.3g} of a result's norm, and was not timed")


def measure(shape: Shape, seconds: float) -> list[dict]:
    """Bytes and times of every way."""
    ways, inputs = make_ways(shape), make_inputs(shape)
    check(ways, inputs)
    ways = {NOISE: ways[STOCK], **ways}
    x, index, weights, dy = inputs

    def step(way: Way) -> None:
        y = way.forward(x, index, weights)
        torch.autograd.grad(y, [x, *([] if way is ways[FROZEN] else way.trained())], dy)

    steps = {name: partial(step, way) for name, way in ways.items()}
    timings = time_calls(steps, "cpu", seconds, calls=1, clock=time.thread_time)
    rows = []
    for name, way in ways.items():
        held: Iterable[Tensor] = [*way.module.parameters(), index, weights]
        saved = saved_bytes(partial(way.forward, x, index, weights), held)
        rows.append(
            {
                "way": name,
                **asdict(timings[name]),
                "saved_bytes": saved,
                "peak_bytes": allocation_peak(steps[name], "cpu"),
            }
        )
    return rows


def results_table(report: dict) -> Table:
    shape, rows = Shape(**report["shape"]), report["rows"]
    median = {row["way"]: row["median_us"] for row in rows}
    note = (
        f"{shape.experts} experts, {shape.hidden} -> 2 x {shape.intermediate} -> {shape.hidden}, {shape.tokens} tokens "
        f"x {shape.top_k}, r {shape.rank}, float32, forward and backward; CPU time of one thread, {rows[0]['rounds']} "
        f"rounds in turn; saved: without parameters; `{report['command']}`."
    )
    lines = [
        [
            row["way"],
            f"{row['saved_bytes'] / MIB:.1f}",
            f"{row['peak_bytes'] / MIB:.1f}",
            f"{row['median_us'] / 1e3:.0f} ({row['q25_us'] / 1e3:.0f} – {row['q75_us'] / 1e3:.0f})",
            f"{row['median_us'] / median[STOCK]:.2f}",
        ]
        for row in rows
    ]
    columns = ["way", "saved for backward, MiB", "peak of a step, MiB", "ms (quartiles)", f"/ {STOCK}"]
    return Table("LoRA on experts", note, columns, lines)


@click.command(help=__doc__)
@click.option("--seconds", type=float, default=40.0, show_default=True, help="For the times.")
def main(seconds: float) -> None:
    torch.set_num_threads(1)
    shape = Shape()
    rows = measure(shape, seconds)
    report = {
        "command": "python -m benchmarks.experts",
        "shape": asdict(shape),
        "environment": describe("cpu"),
        "rows": rows,
    }
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(results_table(report).to_markdown())


if __name__ == "__main__":
    main()
