"""Bad arguments: each is refused with the names and shapes, before anything is computed."""

import pytest
import torch

import fastlora
from fastlora.checks import check_arguments


def arguments(**changes):
    defaults = {
        "x": torch.zeros(2, 3, 8),
        "weight": torch.zeros(6, 8),
        "lora_a": torch.zeros(4, 8),
        "lora_b": torch.zeros(6, 4),
        "bias": torch.zeros(6),
    }
    return defaults | changes


def test_what_fits_is_accepted():
    check_arguments(**arguments())
    check_arguments(**arguments(x=torch.zeros(8), bias=None))
    check_arguments(**arguments(x=torch.zeros(2, 0, 8)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.zeros(2, 7)}, r"x \[2, 7\]"),
        ({"x": torch.tensor(1.0)}, r"x \[\]"),
        ({"weight": torch.zeros(8)}, r"weight \[8\]"),
        ({"lora_a": torch.zeros(4, 9)}, r"lora_a \[4, 9\]"),
        ({"lora_a": torch.zeros(3, 8)}, r"lora_a \[3, 8\], lora_b \[6, 4\]"),
        ({"lora_b": torch.zeros(5, 4)}, r"lora_b \[5, 4\]"),
        ({"bias": torch.zeros(5)}, r"bias \[5\]"),
        ({"lora_a": torch.zeros(0, 8), "lora_b": torch.zeros(6, 0)}, "rank must be at least 1"),
        ({"lora_b": torch.zeros(6, 4, device="meta")}, "lora_b is on meta"),
    ],
)
def test_shapes_and_devices(changes, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(**arguments(**changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.zeros(2, 8, dtype=torch.int32)}, "torch.int32"),
        ({"weight": torch.zeros(6, 8, dtype=torch.float16)}, "weight torch.float16"),
        ({"bias": torch.zeros(6, dtype=torch.float64)}, "bias torch.float64"),
        ({"lora_a": torch.zeros(4, 8, dtype=torch.bfloat16)}, "lora_a is torch.bfloat16"),
        ({"lora_b": torch.zeros(6, 4, dtype=torch.float64)}, "lora_b is torch.float64"),
    ],
)
def test_dtypes(changes, message):
    with pytest.raises(TypeError, match=message):
        check_arguments(**arguments(**changes))


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_dropout(p):
    a = arguments()
    with pytest.raises(ValueError, match="dropout_p must be between 0 and 1"):
        fastlora.lora_linear(a["x"], a["weight"], a["lora_a"], a["lora_b"], 1.0, dropout_p=p)


def test_a_trainable_base_weight_is_refused():
    a = arguments(weight=torch.zeros(6, 8, requires_grad=True))
    with pytest.raises(ValueError, match=r"weight\.requires_grad_\(False\)"):
        fastlora.lora_linear(a["x"], a["weight"], a["lora_a"], a["lora_b"], 1.0)
