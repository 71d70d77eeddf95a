"""Which of PEFT's common recipes a patched model serves, and why not the others: ``results/recipes.*``.

Each recipe is built twice on a tiny model, stock and patched, and takes a training step (or, where PEFT trains none, a
forward). The page says what the counts of that step said: it changes when the code does. Without a GPU all of it is the
reference's; what a GPU's backends say of the shape of a base weight is not asked here.
"""

import copy
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import peft
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

import fastlora
from benchmarks import RESULTS
from fastlora.environment import package_versions
from fastlora.integrations.peft import patch
from fastlora.tables import Table
from tests.support.quantised_models import as_stored
from tests.support.tiny_gpt2 import make_gpt2
from tests.support.tiny_llama import make_llama

RESULT = RESULTS / "recipes.json"
IDS = torch.arange(20).view(2, 10) % 19
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
FLOAT32 = 1e-5  # the largest error of a result relative to its largest value
NOISE = 1.25  # in 16 bit: times that of PEFT's layers in that dtype


def nothing(model: nn.Module) -> None:
    pass


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


@dataclass(frozen=True)
class Recipe:
    """A name; the base model; LoraConfig's fields; what is done to the stock model before it is patched, and to both
    models after; the call; whether the call is trained; the dtype."""

    name: str
    config: dict[str, Any]
    base: Callable[[], nn.Module] = make_llama
    add: Callable[[Any], None] = nothing
    after: Callable[[Any], None] = nothing
    call: Callable[[nn.Module], Tensor] = logits
    trains: bool = True
    dtype: torch.dtype = torch.float32


def quantised(**options: Any) -> Callable[[], nn.Module]:
    """A tiny Llama that transformers has loaded with a quantisation: of bitsandbytes, or of torchao."""

    def build() -> nn.Module:
        import transformers

        if "load_in_4bit" in options:
            quantisation: Any = transformers.BitsAndBytesConfig(**options)
        else:
            from torchao.quantization import Int8WeightOnlyConfig

            quantisation = transformers.TorchAoConfig(Int8WeightOnlyConfig(version=2))
        with tempfile.TemporaryDirectory() as directory:
            # Rows of whole blocks: of others bitsandbytes decodes some wrongly on CPUs with AVX-512.
            make_llama(hidden_size=64, intermediate_size=64).save_pretrained(directory)
            model = transformers.LlamaForCausalLM.from_pretrained(
                directory, quantization_config=quantisation, dtype=torch.float32, device_map="cpu"
            )
        return as_stored(model)

    return build


def mixtral() -> nn.Module:
    import transformers

    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.MixtralConfig(
        **sizes, vocab_size=19, num_hidden_layers=1, num_local_experts=3, num_experts_per_tok=2
    )
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config)


def second_adapter(model: Any) -> None:
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"]))


def both_adapters(model: Any) -> None:
    second_adapter(model)
    model.base_model.set_adapter(["default", "second"])


def an_optimiser_step(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[Any], None]:
    def step(model: Any) -> None:
        optimizer = make(model)
        logits(model).pow(2).mean().backward()
        optimizer.step()

    return step


def lora_plus(model: Any) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-2, loraplus_lr_ratio=16)


def lora_fa(model: Any) -> torch.optim.Optimizer:
    return create_lorafa_optimizer(model, r=3, lora_alpha=7, lr=1e-3)


def of_two_adapters(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, adapter_names=["default", "second"]).logits


RECIPES = (
    Recipe("LoRA on linear layers", {}),
    Recipe("LoRA on a bfloat16 base", {}, dtype=torch.bfloat16),
    Recipe("LoRA with dropout, in eval", {"lora_dropout": 0.1}, after=lambda model: model.eval()),
    Recipe("rsLoRA", {"use_rslora": True}),
    Recipe("rank_pattern and alpha_pattern", {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {"q_proj": 2}}),
    Recipe(
        "exclude_modules and layers_to_transform",
        {"exclude_modules": ["v_proj"], "layers_to_transform": [1]},
    ),
    Recipe("PiSSA", {"init_lora_weights": "pissa"}),
    Recipe("OLoRA", {"init_lora_weights": "olora"}),
    Recipe("LoRA+", {}, after=an_optimiser_step(lora_plus)),
    Recipe("LoRA-FA", {}, after=an_optimiser_step(lora_fa)),
    Recipe("DoRA", {"use_dora": True}),
    Recipe("DoRA with dropout, in training", {"use_dora": True, "lora_dropout": 0.1}),
    Recipe("GPT-2's Conv1D", {"target_modules": ["c_attn", "c_proj", "c_fc"]}, base=make_gpt2),
    Recipe("several active adapters", {}, add=both_adapters),
    Recipe(
        "a mixed batch (adapter_names)",
        {"target_modules": ["q_proj", "v_proj"]},
        add=second_adapter,
        after=lambda model: model.eval(),
        call=of_two_adapters,
        trains=False,
    ),
    Recipe("embeddings beside linear layers", {"target_modules": ["embed_tokens", "q_proj"]}),
    Recipe("trainable_token_indices", {"trainable_token_indices": [1, 5]}),
    Recipe("a head in modules_to_save", {"modules_to_save": ["lm_head"]}),
    Recipe("QLoRA, bitsandbytes nf4", {}, base=quantised(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    Recipe("torchao int8 weights", {}, base=quantised()),
    Recipe(
        "experts (target_parameters)",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        base=mixtral,
    ),
    Recipe("aLoRA", {"alora_invocation_tokens": [5, 6], "target_modules": ["q_proj", "v_proj"]}),
)


def build(recipe: Recipe) -> nn.Module:
    """The stock model, with branches about as large as the frozen products."""
    config = {"r": 3, "lora_alpha": 7, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM", **recipe.config}
    base = recipe.base()
    base = base if recipe.dtype == torch.float32 else base.to(recipe.dtype)
    torch.manual_seed(2)
    model = peft.get_peft_model(base, peft.LoraConfig(**config))
    recipe.add(model)
    for name, parameter in model.named_parameters():
        if "lora_B." in name or "lora_embedding_A" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def results(recipe: Recipe, model: nn.Module) -> dict[str, Tensor]:
    """The output, and where it trains every gradient."""
    model.zero_grad()
    torch.manual_seed(7)
    output = recipe.call(model)
    found = {"output": output.detach()}
    if recipe.trains:
        output.float().pow(2).mean().backward()
        found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found


def errors_of(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, float]:
    """Relative to the largest value of its tensor: the largest error, and the root of the tensors' mean square."""
    assert got.keys() == wanted.keys(), sorted(got.keys() ^ wanted.keys())
    errors = [
        (got[name].double() - value.double()) / value.double().abs().max().clamp_min(1e-30)
        for name, value in wanted.items()
    ]
    squares = torch.stack([error.square().mean() for error in errors])
    return max(error.abs().max().item() for error in errors), squares.mean().sqrt().item()


def run(recipe: Recipe) -> dict[str, Any]:
    """One row: layers, how many calls of a step were fused and how many PEFT's by reason, and the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of settings that it puts right itself
        stock = build(recipe)
        fused = copy.deepcopy(stock)
        patch(fused)
        for model in (stock, fused):
            recipe.after(model)
        fastlora.reset_dispatch_counts()
        got = results(recipe, fused)
        counted = fastlora.dispatch_counts()["fallbacks"]
        wanted = results(recipe, stock)
        if recipe.dtype == torch.float32:
            agrees = errors_of(got, wanted)[0] <= FLOAT32
        else:
            # As noisy as PEFT's own layers in that dtype throughout, and one rounding of the largest value. PEFT keeps
            # float32 adapters in float32 within its forward, where fastlora rounds S to the base's dtype. (The largest
            # of so few errors is another on every processor.)
            wanted = results(recipe, copy.deepcopy(stock).double())
            eager = results(recipe, copy.deepcopy(stock).to(recipe.dtype))
            (_, error), (_, allowed) = errors_of(got, wanted), errors_of(eager, wanted)
            agrees = error <= NOISE * allowed + torch.finfo(recipe.dtype).eps / 2
        layers = [module for module in fused.modules() if isinstance(module, LoraLayer)]
    reasons = {name.removeprefix("peft: "): n for name, n in counted.items() if name.startswith("peft: ")}
    return {"recipe": recipe.name, "layers": len(layers), "by_peft": reasons, "agrees": agrees}


def results_table(report: dict) -> Table:
    lines = []
    for row in report["rows"]:
        stocks = sum(row["by_peft"].values())
        ours = row["layers"] - stocks
        by = "fastlora" if not stocks else "PEFT's forward" if not ours else f"fastlora {ours}, PEFT's forward {stocks}"
        why = "; ".join(row["by_peft"]) or "-"
        lines.append([row["recipe"], str(row["layers"]), by, why, "yes" if row["agrees"] else "NO"])
    whole = sum(not row["by_peft"] for row in report["rows"])
    note = f"{whole} of {len(report['rows'])} recipes are served whole. By the counts of one step of a tiny model."
    return Table("PEFT's recipes", note, ["recipe", "layers", "served by", "why not", "agrees with stock"], lines)


def make_report() -> dict:
    versions = package_versions(("torch", "peft", "transformers", "bitsandbytes", "torchao"))
    return {"command": "python -m benchmarks.recipes", "versions": versions, "rows": [run(each) for each in RECIPES]}


@click.command(help=__doc__)
def main() -> None:
    report = make_report()
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(results_table(report).to_markdown())


if __name__ == "__main__":
    main()
