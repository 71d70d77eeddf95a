"""DoRA by us and by PEFT on the CPU, interleaved, with the same layer's plain LoRA and frozen base: ``results/dora.*``.

Times are CPU time of one thread, which other processes do not lengthen. A step is a forward and a backward for the
input, A, B and the magnitude; after each, the norm is made anew, as in training. "twice" is our own step once more: its
ratio to itself is the noise. Nothing is timed before output and gradients agree with PEFT's.
"""

import copy
import json
import time
from collections.abc import Callable
from typing import Any

import click
import peft
import torch
from torch import Tensor, nn

from benchmarks import RESULTS
from fastlora.bench.host import one_thread
from fastlora.bench.timing import time_calls
from fastlora.environment import describe
from fastlora.integrations.peft import patch
from fastlora.tables import Table

RESULT = RESULTS / "dora.json"
CASES = (  # tokens, out_features, in_features, rank, dtype of the base; adapters are float32, as PEFT makes them
    (512, 1024, 1024, 16, "float32"),
    (2048, 1024, 1024, 16, "float32"),
    (16, 1024, 1024, 16, "float32"),
    (64, 1024, 1024, 16, "bfloat16"),
)
PASSES = ("step", "forward in eval")
OURS, AGAIN, PEFT, LORA, FROZEN = "fastlora", "fastlora, twice", "PEFT", "fastlora, plain LoRA", "frozen layer"


def make_layers(n: int, k: int, r: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """One layer in all variants, with factors as large as its weight."""
    torch.manual_seed(0)
    base = nn.Linear(k, n, dtype=dtype)
    models = {}
    for name, dora in ((PEFT, True), (LORA, False)):
        config = peft.LoraConfig(r=r, target_modules=["0"], use_dora=dora)
        torch.manual_seed(1)
        models[name] = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config)
        nn.init.normal_(models[name].base_model.model[0].lora_B["default"].weight, std=0.05)
    models[OURS] = copy.deepcopy(models[PEFT])
    for name in (OURS, LORA):
        patch(models[name], strict=True)
    layers = {name: model.base_model.model[0] for name, model in models.items()}
    layers[AGAIN], layers[FROZEN] = layers[OURS], base.requires_grad_(False)
    return layers


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output and gradients of a forward and a backward."""
    x.grad = None
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    gradients: dict[str, Any] = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


def check(ours: dict[str, Tensor], theirs: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Raises where a result differs by more than 64 roundings of the largest value."""
    assert ours.keys() == theirs.keys(), (ours.keys(), theirs.keys())
    for name, value in ours.items():
        error = (value - theirs[name]).abs().max() / theirs[name].abs().max()
        assert error <= 64 * torch.finfo(dtype).eps, f"{name} differs by {error:.2g}"


def measure(case: tuple, seconds: float) -> list[dict]:
    m, n, k, r, name = case
    dtype = getattr(torch, name)
    layers = make_layers(n, k, r, dtype)
    x, dy = torch.randn(m, k, dtype=dtype, requires_grad=True), torch.randn(m, n, dtype=dtype)
    check(step(layers[OURS], x, dy), step(layers[PEFT], x, dy), dtype)

    def evaluate(layer: nn.Module) -> None:
        with torch.no_grad():
            layer(x)

    calls: dict[str, dict[str, Callable[[], object]]] = {
        "step": {variant: lambda layer=layer: step(layer, x, dy) for variant, layer in layers.items()},
        "forward in eval": {variant: lambda layer=layer: evaluate(layer) for variant, layer in layers.items()},
    }
    rows = []
    for kind, variants in calls.items():
        for layer in layers.values():
            layer.train(kind == "step")
        times = time_calls(variants, "cpu", seconds, 1, time.thread_time)  # type: ignore[arg-type]
        for variant, timing in times.items():
            rows.append(
                {
                    "m": m, "n": n, "k": k, "r": r, "dtype": name, "pass": kind, "variant": variant,
                    "median_us": timing.median_us, "q25_us": timing.q25_us, "q75_us": timing.q75_us,
                    "rounds": timing.rounds, "ratio_to_frozen": timing.median_us / times[FROZEN].median_us,
                    "ratio_to_peft": timing.median_us / times[PEFT].median_us,
                }
            )  # fmt: skip
    return rows


def results_table(report: dict) -> Table:
    lines = [
        [
            f"{row['m']} x {row['n']} x {row['k']}, R = {row['r']}, {row['dtype']}", row["pass"], row["variant"],
            f"{row['median_us']:.0f}", f"{row['q25_us']:.0f} to {row['q75_us']:.0f}",
            f"{row['ratio_to_frozen']:.2f}", f"{row['ratio_to_peft']:.2f}",
        ]
        for row in report["rows"]
    ]  # fmt: skip
    columns = ["M x N x K", "pass", "variant", "median, µs", "quartiles", "of the frozen layer", "of PEFT's DoRA"]
    return Table("DoRA on a CPU", "CPU time of one thread, variants in turns; adapters in float32.", columns, lines)


@click.command(help=__doc__)
@click.option("--seconds", type=float, default=6.0, show_default=True, help="For each case and pass.")
def main(seconds: float) -> None:
    with one_thread():
        rows = [row for case in CASES for row in measure(case, seconds)]
    report = {"command": "python -m benchmarks.dora", "environment": describe("cpu"), "rows": rows}
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(results_table(report).to_markdown())


if __name__ == "__main__":
    main()
