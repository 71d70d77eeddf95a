"""What one layer saves for backward, by us and by PEFT, counted and not timed: ``results/saved_bytes.json``."""

import copy
import json

import click
import peft
import torch
from torch import nn

from benchmarks import RESULTS
from fastlora.bench.memory import saved_bytes
from fastlora.environment import package_versions
from fastlora.integrations.peft import patch
from fastlora.tables import MIB, Table

RESULT = RESULTS / "saved_bytes.json"
SHAPE = {"m": 2048, "n": 1024, "k": 1024, "r": 16}
KINDS = (  # of the base, of the adapters, and dropout
    ("bfloat16", "bfloat16", 0.0),
    ("bfloat16", "bfloat16", 0.1),
    ("bfloat16", "float32", 0.0),
    ("bfloat16", "float32", 0.1),
    ("float32", "float32", 0.1),
)


def count(base: str, adapters: str, dropout: float, shape: dict = SHAPE) -> dict:
    """Bytes saved by the same PEFT model as it is and patched, and the bytes of X and S."""
    m, n, k, r = (shape[name] for name in "mnkr")
    dtype = getattr(torch, base)
    stock = peft.get_peft_model(
        nn.Sequential(nn.Linear(k, n, dtype=dtype)),
        peft.LoraConfig(r=r, target_modules=["0"], lora_dropout=dropout),
        autocast_adapter_dtype=adapters == "float32",
    )
    fused = copy.deepcopy(stock)
    patch(fused, strict=True)
    x = torch.randn(m, k, dtype=dtype, requires_grad=True)
    return {
        "base": base,
        "adapters": adapters,
        "dropout": dropout,
        "peft": saved_bytes(lambda: stock(x), stock.parameters()),
        "fastlora": saved_bytes(lambda: fused(x), fused.parameters()),
        "x_and_s": (m * k + m * r) * dtype.itemsize,
    }


def make_report() -> dict:
    versions = package_versions(("torch", "peft"))
    rows = [count(*kind) for kind in KINDS]
    return {"command": "python -m benchmarks.saved_bytes", "versions": versions, "shape": SHAPE, "rows": rows}


def readme_table(report: dict) -> Table:
    """The counts in MiB."""
    sizes = ", ".join(f"{name.upper()} = {size}" for name, size in report["shape"].items())
    lines = [
        [row["base"], row["adapters"], f"{row['dropout']:g}"]
        + [f"{row[name] / MIB:.1f}" for name in ("peft", "fastlora", "x_and_s")]
        for row in report["rows"]
    ]
    note = f"MiB for one layer, {sizes}, each storage once, parameters apart."
    return Table("Saved for backward", note, ["base", "adapters", "dropout", "PEFT", "fastlora", "X + S"], lines)


@click.command(help=__doc__)
def main() -> None:
    RESULT.write_text(json.dumps(make_report(), indent=1) + "\n")


if __name__ == "__main__":
    main()
