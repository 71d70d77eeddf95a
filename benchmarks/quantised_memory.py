"""What a training step over quantised base weights keeps and needs, by us and by PEFT, counted and not timed:
``results/quantised_memory.json``."""

import copy
import json
import warnings

import click
import peft
import torch
from torch import nn

from benchmarks import RESULTS
from fastlora.bench.memory import allocation_peak, saved_bytes
from fastlora.environment import package_versions
from fastlora.finetune.memory import distinct_bytes
from fastlora.finetune.quantise import quantise_linears
from fastlora.integrations.peft import patch
from fastlora.tables import MIB, Table

RESULT = RESULTS / "quantised_memory.json"
SHAPE = {"layers": 4, "m": 256, "n": 1024, "k": 1024, "r": 16}
KINDS = tuple((base, dropout) for base in ("nf4", "fp4", "int8", "float8") for dropout in (0.0, 0.1))


def count(base: str, dropout: float, shape: dict = SHAPE) -> dict:
    """Bytes of the same PEFT model as it is and patched: of its base weights, kept for backward, and the peak of what a
    step allocates (forward, backward), in bfloat16 with float32 adapters."""
    layers, m, n, k, r = shape.values()
    torch.manual_seed(0)
    stack = [nn.Linear(k if i == 0 else n, n, bias=False, dtype=torch.bfloat16) for i in range(layers)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao and PEFT announce what will change
        model = quantise_linears(nn.Sequential(*stack), base, torch.bfloat16)
        names = [str(i) for i in range(layers)]
        stock = peft.get_peft_model(model, peft.LoraConfig(r=r, target_modules=names, lora_dropout=dropout))
    fused = copy.deepcopy(stock)
    patch(fused, strict=True)
    x = torch.randn(m, k, dtype=torch.bfloat16, requires_grad=True)
    found = {"base": base, "dropout": dropout, "dense": layers * n * k * 2}
    for name, each in (("peft", stock), ("fastlora", fused)):
        found["weights"] = distinct_bytes(p for p in each.parameters() if not p.requires_grad)
        found[f"{name}_saved"] = saved_bytes(lambda each=each: each(x), each.parameters())
        found[f"{name}_peak"] = allocation_peak(lambda each=each: each(x).sum().backward(), "cpu")
    return found


def make_report() -> dict:
    versions = package_versions(("torch", "peft", "bitsandbytes", "torchao"))
    rows = [count(*kind) for kind in KINDS]
    return {"command": "python -m benchmarks.quantised_memory", "versions": versions, "shape": SHAPE, "rows": rows}


def readme_table(report: dict) -> Table:
    """The counts in MiB."""
    sizes = ", ".join(f"{name.upper() if len(name) == 1 else name} = {n}" for name, n in report["shape"].items())
    columns = ("weights", "peft_saved", "fastlora_saved", "peft_peak", "fastlora_peak")
    lines = [
        [row["base"], f"{row['dropout']:g}", *(f"{row[name] / MIB:.1f}" for name in columns)] for row in report["rows"]
    ]
    dense = report["rows"][0]["dense"] / MIB
    note = (
        f"MiB for a stack of layers, {sizes}, bfloat16 with float32 adapters, on the CPU; dense weights: "
        f"{dense:.0f}. Saved: kept for backward, packed weights apart. Peak: what a step allocates."
    )
    header = ["base", "dropout", "weights", "saved: PEFT", "saved: fastlora", "peak: PEFT", "peak: fastlora"]
    return Table("A step over quantised weights", note, header, lines)


@click.command(help=__doc__)
def main() -> None:
    RESULT.write_text(json.dumps(make_report(), indent=1) + "\n")


if __name__ == "__main__":
    main()
