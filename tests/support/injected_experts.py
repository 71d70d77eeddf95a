"""transformers' models with LoRA on their experts, by ``inject`` and by PEFT alike; and what a refusal must leave."""

import torch
from torch import nn

import fastlora
from fastlora.adapters.experts import file_paths
from fastlora.adapters.files import PREFIX, entry_name
from fastlora.model import lora_layers
from tests.support.tiny_moe import IDS, PARAMETERS, make_moe, peft

EXPERTS = "model.layers.0.mlp.experts"
ATTENTION = ["q_proj", "o_proj"]
STEP = 1e-5  # of float32 losses and gradients, relative to the largest value of each tensor


def make_injected(kind="Mixtral", targets=ATTENTION, changes=None, seed=5, started=True, **options):
    """A model with branches that are about as large as its frozen products."""
    model = make_moe(kind, **(changes or {}))
    torch.manual_seed(seed)
    fastlora.inject(model, targets, **{"target_parameters": PARAMETERS, "r": 3, "alpha": 5, **options})
    return start(factors(model), model) if started else model


def make_stock(kind="Mixtral", targets=ATTENTION, changes=None, seed=5, started=True, **options):
    """The same by PEFT."""
    model = make_moe(kind, **(changes or {}))
    torch.manual_seed(seed)
    options = {"target_modules": targets, "target_parameters": PARAMETERS, "r": 3, "lora_alpha": 5, **options}
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    return start(stock_factors(model), model) if started else model


def factors(model):
    """A and B by the name that PEFT has for them in a file."""
    layers = dict(lora_layers(model))
    places = file_paths(layers)
    return {
        entry_name(places[path], name): p
        for path, layer in layers.items()
        for name, p in layer.adapter_parameters().items()
    }


def stock_factors(model):
    named = {name.replace(".default", "").removeprefix(PREFIX): p for name, p in model.named_parameters()}
    return {name: p for name, p in named.items() if ".lora_" in name}


@torch.no_grad()
def start(found, model):
    for name, parameter in sorted(found.items()):
        if "lora_B" in name:
            torch.manual_seed(sum(map(ord, name)))
            nn.init.normal_(parameter, std=0.3)
    return model


def run(model):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def assert_close(got, wanted, tolerance=STEP):
    error = (got.double() - wanted.double()).abs().max()
    assert got.dtype == wanted.dtype and error <= tolerance * wanted.abs().max(), error / wanted.abs().max()


def assert_same_step(model, stock, tolerance=STEP):
    assert_close(run(model), run(stock), tolerance)
    found, wanted = factors(model), stock_factors(stock)
    assert found.keys() == wanted.keys() and found
    for name, parameter in found.items():
        assert_close(parameter.grad, wanted[name].grad, tolerance)


OPTIONS = [
    ({"rslora": True}, {"use_rslora": True}),
    ({"rank_pattern": {"experts.down_proj": 2, "q_proj": 5}}, None),
    ({"alpha_pattern": {r"mlp\.experts\.gate_up_proj": 11}}, None),
    ({"target_parameters": ["down_proj"]}, None),
    ({"target_parameters": [f"{EXPERTS}.gate_up_proj"], "targets": []}, None),
]


class unchanged:
    """Within it a model keeps its modules, their classes and children, its parameters and what trains."""

    def __init__(self, model):
        self.model, self.before = model, self._look(model)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        assert self._look(self.model) == self.before

    @staticmethod
    def _look(model):
        modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
        parameters = [(name, id(p), p._version, p.requires_grad) for name, p in model.named_parameters()]
        return modules, parameters
