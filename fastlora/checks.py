"""The one place that validates the arguments of a LoRA layer. Everything below it may take them for granted."""

from numbers import Real

import torch
from torch import Tensor

FROZEN_WEIGHT = "weight requires a gradient, which a LoRA layer never computes: weight.requires_grad_(False)"
_FROZEN_IN_FUNC = (
    "torch.func differentiates every parameter that it is given, here the frozen weight, too, and a LoRA layer never "
    "computes its gradient: give torch.func.grad the parameters that train. Opacus gives it all of a layer that it has "
    "no rule for: use PEFT's own layers with it, without fastlora"
)

_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def frozen_weight_reason(weight: Tensor) -> str:
    """What a caller whose weight requires a gradient has to do."""
    return _FROZEN_IN_FUNC if torch._C._functorch.is_functorch_wrapped_tensor(weight) else FROZEN_WEIGHT


def _describe(name: str, tensor: Tensor) -> str:
    return f"{name} {list(tensor.shape)}"


def as_number(name: str, value: object) -> float:
    """``value`` as a float.

    Raises:
        TypeError: it is no real number. A tensor is none: the layer would compute no gradient of it.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        hint = "; multiply lora_b by it" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name} must be a number, got a {type(value).__name__}{hint}")
    return float(value)


def check_dropout(dropout_p: float) -> None:
    """Raises ValueError unless ``dropout_p`` is a probability."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")


def check_arguments(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None) -> None:
    """Validates shapes, dtypes and devices of ``x [..., K]``, ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``
    and ``bias [N]``.

    Raises:
        ValueError: shapes that do not fit together, a rank of 0, tensors on different devices.
        TypeError: dtypes that the layer does not compute with.
    """
    # Few look-ups where all is well: a layer is called far more often than it is called wrongly.
    x_shape, w_shape, a_shape, b_shape = x.shape, weight.shape, lora_a.shape, lora_b.shape
    if not (x_shape and len(w_shape) == len(a_shape) == len(b_shape) == 2):
        raise ValueError(_shape_error(x, weight, lora_a, lora_b, bias))
    (n, k), (r, a_columns) = w_shape, a_shape
    if not (x_shape[-1] == k == a_columns and b_shape == (n, r) and r and (bias is None or bias.shape == (n,))):
        raise ValueError(_shape_error(x, weight, lora_a, lora_b, bias))
    dtype, device = x.dtype, x.device
    if not (dtype in _DTYPES and dtype == weight.dtype == lora_a.dtype == lora_b.dtype and bias is None):
        check_types(dtype, weight, lora_a, lora_b, bias)
    if not (device == weight.device == lora_a.device == lora_b.device and (bias is None or bias.device == device)):
        for name, tensor in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b), ("bias", bias)):
            if tensor is not None and tensor.device != device:
                raise ValueError(f"x is on {device} but {name} is on {tensor.device}; move them to one device")


def check_types(dtype: torch.dtype, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None) -> None:
    """Raises TypeError unless weight, A, B and bias are of dtypes that go with an x of ``dtype``."""
    if dtype not in _DTYPES:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {dtype}")
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        wide = torch.float64 in (dtype, weight.dtype)
        raise TypeError(
            f"x is {dtype}, weight {weight.dtype}{'' if bias is None else f', bias {bias.dtype}'}: cast them to one "
            + ("dtype; torch.autocast leaves float64 alone" if wide else "dtype, or run under torch.autocast")
        )
    for name, adapter in (("lora_a", lora_a), ("lora_b", lora_b)):
        if adapter.dtype != dtype and not (adapter.dtype == torch.float32 and dtype.itemsize == 2):
            allowed = f"{dtype} or float32" if dtype.itemsize == 2 else dtype
            raise TypeError(f"{name} is {adapter.dtype}; over a {dtype} layer it must be {allowed}")


def _shape_error(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None) -> str:
    given = [_describe(n, t) for n, t in (("x", x), ("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b))]
    if bias is not None:
        given.append(_describe("bias", bias))
    if lora_a.dim() == 2 and lora_a.shape[0] == 0:
        return f"the rank must be at least 1, got 0 ({', '.join(given)})"
    wanted = "x [..., K], weight [N, K], lora_a [R, K], lora_b [N, R]" + ("" if bias is None else ", bias [N]")
    return f"shapes do not fit together: expected {wanted}; got {', '.join(given)}"
