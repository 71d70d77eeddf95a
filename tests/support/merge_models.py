"""Small float64 models with trained branches, to be merged and saved."""

import torch
from torch import nn

from fastlora.model import inject, lora_layers
from tests.support import tiny_llama
from tests.support.numerics import assert_reordered

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IDS = torch.arange(24).view(2, 12) % 19


def make_base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9, bias=False), nn.Linear(9, 3)).double()


def start_branches(model, seed=1):
    torch.manual_seed(seed)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B)
    return model


def make_model(seed=1, **kwargs):
    model = make_base()
    inject(model, ["0", "2"], **{"r": 2, "alpha": 6, "rslora": True, **kwargs})
    return start_branches(model, seed)


def make_llama(**kwargs):
    return tiny_llama.make_llama(torch.float64, **kwargs).eval()


def trained_llama(**kwargs):
    model = make_llama(**kwargs)
    inject(model, ["q_proj", "down_proj"], r=3, alpha=5)
    return start_branches(model)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


TERMS = 128  # of the longest sum of a tiny model


def close(actual, expected):
    assert_reordered([actual], [expected], TERMS)
