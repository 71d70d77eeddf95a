"""Layers and models over quantised base weights, made by the real libraries; tests skip where these are missing."""

import warnings

import pytest
import torch
from torch import Tensor, nn

FOUR_BIT = ("nf4", "nf4 nested", "fp4", "fp4 nested")
EIGHT_BIT = ("int8", "int8 v1", "int8 tensor", "int8 group", "float8")
FORMATS = FOUR_BIT + EIGHT_BIT
MISSING = "pip install 'fastlora[quantised]'"


def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason=MISSING)


def torchao():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchao.quantization", reason=MISSING)


def quantise(linear: nn.Linear, name: str, block: int = 64, compute_dtype: torch.dtype | None = None) -> nn.Linear:
    """The layer in one of FORMATS: a new ``bitsandbytes.nn.Linear4bit``, or the same layer with torchao's weight.

    Args:
        block: of 4-bit formats: elements that share a scale.
        compute_dtype: of 4-bit layers; by default the dtype of the weight.
    """
    if name in FOUR_BIT:
        return _four_bit(linear, name, block, compute_dtype or linear.weight.dtype)
    ao = torchao()
    configs = {
        "int8": lambda: ao.Int8WeightOnlyConfig(version=2),
        "int8 v1": lambda: ao.Int8WeightOnlyConfig(version=1),
        "int8 tensor": lambda: ao.Int8WeightOnlyConfig(version=2, granularity=ao.PerTensor()),
        "int8 group": lambda: ao.Int8WeightOnlyConfig(version=2, granularity=ao.PerGroup(linear.in_features // 2)),
        "float8": lambda: ao.Float8WeightOnlyConfig(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao says what it will deprecate
        ao.quantize_(linear, configs[name]())
    return linear


def _four_bit(linear: nn.Linear, name: str, block: int, compute_dtype: torch.dtype) -> nn.Linear:
    bnb = bitsandbytes()
    n, k = linear.weight.shape
    layer = bnb.nn.Linear4bit(k, n, linear.bias is not None, compute_dtype, quant_type=name[:3])
    layer.weight = bnb.nn.Params4bit(
        linear.weight.detach(), False, blocksize=block, compress_statistics="nested" in name, quant_type=name[:3],
        module=layer,
    )  # fmt: skip
    layer.bias = linear.bias
    return as_stored(layer.to("cpu"))  # which quantises


def as_stored(model: nn.Module) -> nn.Module:
    """Where a CPU has AVX512-BF16, bitsandbytes' layers repack their weight in place at their first inference, if N is
    a multiple of 32, and fail if it is not: these do not."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def decoded(layer: nn.Module) -> Tensor:
    """The library's own dense weight [N, K], in the dtype that it was quantised from."""
    weight = layer.weight
    if type(weight).__name__ != "Params4bit":
        return weight.dequantize()
    return bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state)


def by_the_book(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The values that the format defines, decoded here: code·scale in float32, and one rounding."""
    weight = layer.weight
    if type(weight).__name__ == "Params4bit":
        state = weight.quant_state
        bytes_ = weight.data.reshape(-1).int()
        codes = torch.stack((bytes_ >> 4, bytes_ & 15), dim=1).reshape(-1)[: state.shape.numel()]
        scales = state.absmax
        if state.nested:
            inner = state.state2.code[state.absmax.int()]
            scales = inner * state.state2.absmax.repeat_interleave(state.state2.blocksize)[: inner.numel()]
            scales = scales + state.offset
        values = state.code[codes] * scales.repeat_interleave(state.blocksize)[: codes.numel()]
        return values.reshape(state.shape).to(dtype)
    codes, scale = (
        weight.tensor_impl.get_plain()[:2] if hasattr(weight, "tensor_impl") else (weight.qdata, weight.scale)
    )
    scale = scale.float().reshape(scale.shape[0], -1)
    columns = codes.shape[1] // scale.shape[1]
    return (codes.float() * scale.repeat_interleave(columns, dim=1)).to(dtype)


def quantise_model(model: nn.Module, name: str, compute_dtype: torch.dtype | None = None, skip=("lm_head",)):
    """Every linear layer of a model but those named, as transformers leaves a model that it quantises."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path.rpartition(".")[2] not in skip:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, quantise(module, name, compute_dtype=compute_dtype))
    model.is_loaded_in_4bit = name in FOUR_BIT  # what PEFT reads
    return model
