"""What no LoRALinear can be made of."""

import math

import pytest
import torch
from torch import nn

from fastlora.module import LoRALinear


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"r": -2}, ValueError, "r must be at least 1"),
        ({"r": 2.0}, TypeError, "r must be an integer"),
        ({"r": True}, TypeError, "r must be an integer"),
        ({"alpha": math.inf}, ValueError, "alpha must be finite"),
        ({"alpha": "8"}, TypeError, "alpha must be a number"),
        ({"dropout": 1.5}, ValueError, "dropout must be between 0 and 1"),
        ({"dropout": math.nan}, ValueError, "dropout must be between 0 and 1"),
        ({"init": "zeros"}, ValueError, "init must be one of 'kaiming', 'gaussian', got 'zeros'"),
        ({"dtype": torch.complex64}, TypeError, "floating-point"),
        ({"dtype": torch.int32}, TypeError, "floating-point"),
    ],
)
def test_what_no_layer_can_have(kwargs, error, message):
    with pytest.raises(error, match=message):
        LoRALinear(4, 4, **kwargs)


def test_from_linear_refuses_what_it_cannot_share():
    with pytest.raises(TypeError, match="nn.Linear, got Conv1d"):
        LoRALinear.from_linear(nn.Conv1d(2, 2, 1))
    quantized = nn.Linear(4, 4)
    quantized.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match="dense floating-point"):
        LoRALinear.from_linear(quantized)
    quantized.weight = nn.Parameter(torch.zeros(4, 4).to(torch.float8_e5m2), requires_grad=False)
    with pytest.raises(TypeError, match="dense floating-point"):
        LoRALinear.from_linear(quantized)
    with pytest.raises(TypeError, match="nn.Linear, got LoRALinear"):  # its branch would be lost
        LoRALinear.from_linear(LoRALinear(4, 4))


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.int8),
    ],
    ids=str,
)
def test_adapter_dtypes_that_no_forward_would_take(dtype, adapter_dtype):
    with pytest.raises(TypeError, match=f"adapter_dtype {adapter_dtype} does not go with a {dtype} weight"):
        LoRALinear.from_linear(nn.Linear(4, 4, dtype=dtype), adapter_dtype=adapter_dtype)
