"""Which layers a patched model serves where rows lie in segments, experts and batches of several adapters, and whether
they agree with stock PEFT: ``results/segments.*``.

By the counts and results of one step of a tiny model, as ``benchmarks.recipes`` has it. Stock PEFT takes
``adapter_names`` neither in training nor over experts: there it computes every sample alone, with its adapter active.
"""

import json
from collections.abc import Callable
from typing import Any

import click
import peft
import torch
from torch import Tensor, nn

from benchmarks import RESULTS
from benchmarks.recipes import IDS, Recipe, results_table, run
from fastlora.environment import package_versions
from fastlora.integrations.peft_mixed import MixedLoraModel
from fastlora.tables import Table
from tests.support.tiny_llama import make_llama
from tests.support.tiny_moe import MODELS, PARAMETERS, make_moe

RESULT = RESULTS / "segments.json"
ATTENTION = ["q_proj", "o_proj"]
OTHERS = {"second": (2, 5), "third": (4, 3)}  # rank and alpha
NAMES = ["second", "__base__", "default", "third", "second", "__base__"]
EXPERTS = {"target_modules": ATTENTION, "target_parameters": PARAMETERS}
LINEAR = {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]}


def add_adapters(config: dict[str, Any]) -> Callable[[Any], None]:
    def add(model: Any) -> None:
        for name, (rank, alpha) in OTHERS.items():
            model.add_adapter(name, peft.LoraConfig(r=rank, lora_alpha=alpha, **config))

    return add


def train_all(model: Any) -> None:
    model.base_model.set_requires_grad(["default", *OTHERS])


def mixed_logits(model: Any) -> Tensor:
    """Of six samples with three adapters or none."""
    ids = torch.cat([IDS, IDS + 3, IDS + 5]) % 19
    if type(model.base_model) is MixedLoraModel:
        return model(input_ids=ids, adapter_names=NAMES).logits
    found = []
    for sample, name in zip(ids.split(1), NAMES, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                found.append(model(input_ids=sample).logits)
        else:
            model.set_adapter(name)
            found.append(model(input_ids=sample).logits)
    train_all(model)
    return torch.cat(found)


def without_gradients(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return mixed_logits(model)


def mixed(name: str, config: dict[str, Any], base: Callable[[], nn.Module], trains: bool) -> Recipe:
    after = train_all if trains else nn.Module.eval
    call = mixed_logits if trains else without_gradients
    return Recipe(name, config, base, add=add_adapters(config), after=after, call=call, trains=trains)


CASES = (
    *(Recipe(f"{kind}: attention and experts", EXPERTS, lambda kind=kind: make_moe(kind)) for kind in MODELS),
    *(
        mixed(f"three adapters and rows without: {what}, {'training' if trains else 'inference'}", config, base, trains)
        for what, config, base in (
            ("a Llama", LINEAR, make_llama),
            ("Mixtral's attention and experts", EXPERTS, make_moe),
        )
        for trains in (False, True)
    ),
)


def make_report() -> dict:
    versions = package_versions(("torch", "peft", "transformers"))
    return {"command": "python -m benchmarks.segments", "versions": versions, "rows": [run(case) for case in CASES]}


def segments_table(report: dict) -> Table:
    table = results_table(report)
    layers = sum(row["layers"] for row in report["rows"])
    stocks = sum(sum(row["by_peft"].values()) for row in report["rows"])
    note = f"{layers - stocks} of {layers} LoRA layers are served. By the counts of one step of a tiny model."
    return Table("Experts and batches of several adapters", note, ["case", *table.columns[1:]], table.rows)


@click.command(help=__doc__)
def main() -> None:
    report = make_report()
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(segments_table(report).to_markdown())


if __name__ == "__main__":
    main()
