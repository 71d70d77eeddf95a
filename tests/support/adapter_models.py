"""A small model with adapters, and the names of the files that they are saved in."""

import json

import torch
from torch import nn

from fastlora.model import inject, lora_layers

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.arange(24).view(2, 12) % 19


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 6)) for _ in range(12))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def make_model(targets=("1.0", "11.0", "1.1"), dtype=torch.float32, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = Model().to(dtype)
    if targets:
        inject(model, list(targets), **kwargs)
        start_branches(model)
    return model


def start_branches(model, seed=1):
    torch.manual_seed(seed)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B)
    return model


def edit_config(directory, **fields):
    """Other values for some of a saved adapter's fields."""
    path = directory / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
