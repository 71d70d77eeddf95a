"""--base-quant: the base model's linear layers in 4 or 8 bits, by bitsandbytes or torchao."""

import warnings
from importlib.util import find_spec

import torch
from torch import nn

from fastlora.errors import CommandError
from fastlora.heads import is_head

_LIBRARIES = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "int8": "torchao", "float8": "torchao"}


def require_library(name: str) -> None:
    """Raises CommandError where the package that quantises in this format is not installed."""
    library = _LIBRARIES[name]
    if find_spec(library) is None:
        raise CommandError(f"--base-quant {name} needs the {library} package: pip install 'fastlora[quantised]'")


def quantise_linears(model: nn.Module, name: str, compute_dtype: torch.dtype) -> nn.Module:
    """Replaces every plain ``nn.Linear`` but the output head by its quantised form, in place, layer by layer: never are
    two dense copies of a weight held.

    Args:
        name: one of settings.BASE_QUANTS; the 4-bit ones with nested statistics in blocks of 64, as QLoRA has them.
        compute_dtype: what products over 4-bit weights are made in.

    Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv:2305.14314), sections 3 and 4.
    """
    for path, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and not is_head(model, path):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, quantised_linear(linear, name, compute_dtype))
    model.is_loaded_in_4bit = _LIBRARIES[name] == "bitsandbytes"  # what PEFT chooses its class of layer by
    return model


def quantised_linear(linear: nn.Linear, name: str, compute_dtype: torch.dtype) -> nn.Module:
    """One such layer: a new one of bitsandbytes', or the same one with torchao's weight; arguments as above."""
    device = linear.weight.device
    if _LIBRARIES[name] == "torchao":
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        config = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it will deprecate
            # Not for a model to be compiled by Inductor's settings, which are the whole process's.
            quantize_(linear, config(version=2, set_inductor_config=False))
        return linear
    from bitsandbytes import nn as bnb

    n, k = linear.weight.shape
    with torch.device("meta"):
        layer = bnb.Linear4bit(k, n, linear.bias is not None, compute_dtype, quant_type=name)
    layer.weight = bnb.Params4bit(linear.weight.detach(), False, quant_type=name, module=layer)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=linear.bias.requires_grad)
    layer = layer.to(device).train(linear.training)  # moving it quantises it
    # Some CPUs' inference would repack the weight, which all copies of the model share, with its scales rounded.
    layer.support_avx512bf16_for_cpu = False
    return layer
