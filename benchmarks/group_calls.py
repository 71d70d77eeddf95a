"""What layers that share an input cost the CPU, without a GPU: a parent's forward, with and without gradients, and its
training step, of single layers and of a group, over drivers that do nothing (benchmarks.host_calls).

Counts calls and times them, in CPU time of the thread, by turns. Without --json both backends are measured, each in a
process of its own, and results/group_calls.* written.
"""

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor, nn

import fastlora
from benchmarks import RESULTS, host_calls
from fastlora import ops, selection
from fastlora.environment import describe
from fastlora.shared_input import ops as shared_ops
from fastlora.shared_input import scope
from fastlora.tables import Table

GROUPS = {"q, k, v": 3, "gate, up": 2}
WHAT = ("forward", "inference", "step")
ROWS, FEATURES, RANK = 64, 64, 16
RESULT = RESULTS / "group_calls.json"


class Parent(nn.Module):
    """A module whose children are called with its input, one after the other."""

    def __init__(self, count: int, features: int, dtype: torch.dtype):
        super().__init__()
        self.layers = [f"layer{i}" for i in range(count)]
        for name in self.layers:
            setattr(self, name, nn.Linear(features, features, bias=False, dtype=dtype))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self._modules[name](x) for name in self.layers]  # type: ignore[misc]


def make_calls(
    count: int, dropout: float, features: int = FEATURES, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Callable[[], object]]:
    """A forward, one without gradients, and a whole training step, of single layers and of a group, each called
    before."""
    x = torch.randn(ROWS, features, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    dys = [torch.ones(ROWS, features, dtype=dtype)] * count
    calls: dict[str, Callable[[], object]] = {}
    for name, group in (("single", False), ("group", x)):
        model = Parent(count, features, dtype)
        fastlora.inject(model, model.layers, r=RANK, dropout=dropout, group=group)

        def forward(model=model):
            return model(x)

        def step(model=model):
            x.grad = None
            torch.autograd.backward(model(x), dys)

        calls |= {f"{name} forward": forward, f"{name} inference": torch.no_grad()(forward), f"{name} step": step}
    for call in [*calls.values()] * 3:
        call()
    return calls


def measure(backend: str, rounds: int) -> list[dict]:
    """Calls and µs of one backend in this process, whose drivers it replaces."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        host_calls.stand_in_for(backend, Path(directory))
        selection.why_unsupported = lambda name, spec: None if name == backend else "not here"  # type: ignore[assignment]
        # A call that insists on a backend goes to its launches from CPU memory, too. Asked in this way, it takes as
        # many calls as to find that the environment insists on none.
        for module in (ops, shared_ops, scope):
            module.environment_backend = lambda: backend  # type: ignore[attr-defined]
        ops._skips_ops = lambda tensor: False  # as on a GPU, where a single layer calls its op
        for (name, count), dropout in itertools.product(GROUPS.items(), (0.0, 0.1)):
            calls = make_calls(count, dropout)
            fastlora.reset_dispatch_counts()
            calls["group step"]()
            row = {"backend": backend, "layers": name, "dropout": dropout, "counts": fastlora.dispatch_counts()}
            row |= {f"{name} calls": host_calls.count_calls(call) for name, call in calls.items()}
            row |= {f"{name} us": round(us, 1) for name, us in host_calls.time_calls(calls, rounds).items()}
            rows.append(row)
    return rows


def results_table(rows: list[dict]) -> Table:
    of_each = [f"{what} {of}" for what in WHAT for of in ("calls", "us")]
    lines = [
        [row["backend"], row["layers"], f"{row['dropout']:g}"]
        + [f"{row[f'group {of}']:g} / {row[f'single {of}']:g}" for of in of_each]
        for row in rows
    ]
    columns = ["backend", "layers", "dropout", *(of.replace("us", "µs") for of in of_each)]
    note = (
        f"A group / its single layers, of {FEATURES} features, rank {RANK} and {ROWS} rows, bfloat16; least µs of CPU "
        "time; `python -m benchmarks.group_calls`."
    )
    return Table("Host cost of layers that share an input", note, columns, lines)


@click.command(help=__doc__)
@click.option("--json", "as_json", is_flag=True, help="Print one backend's figures, and write nothing.")
@click.option(
    "--backend", type=click.Choice(host_calls.BACKENDS), default="triton", show_default=True, help="With --json."
)
@click.option("--rounds", type=click.IntRange(1), default=1000, show_default=True)
def main(as_json: bool, backend: str, rounds: int) -> None:
    if as_json:
        print(json.dumps(measure(backend, rounds)))
        return
    command = [sys.executable, "-m", "benchmarks.group_calls", "--json", f"--rounds={rounds}"]
    rows: list[dict] = []
    for name in host_calls.BACKENDS:
        done = subprocess.run([*command, f"--backend={name}"], check=True, capture_output=True, text=True)
        rows += json.loads(done.stdout)
    report = {"command": "python -m benchmarks.group_calls", "environment": describe("cpu"), "rows": rows}
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(results_table(rows).to_markdown())


if __name__ == "__main__":
    main()
