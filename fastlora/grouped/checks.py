"""The one place that validates the arguments of ``grouped_lora_linear``, but for the values of offsets and indices."""

import torch
from torch import Tensor

from fastlora.checks import FROZEN_WEIGHT, check_types
from fastlora.sharding import is_dtensor

_INDEX_DTYPES = (torch.int32, torch.int64)


def check_grouped(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scalings: Tensor | None,
    offsets: Tensor,
    bias: Tensor | None,
    experts: Tensor | None,
    adapters: Tensor | None,
    transposed: bool,
) -> None:
    """Validates shapes, dtypes and devices, as documented for ``grouped_lora_linear``; ``weight`` is a stack.

    Raises:
        ValueError: shapes that do not fit together, a size of 0, tensors on different devices, a weight or scalings
            that require a gradient.
        TypeError: dtypes that the layer does not compute with; nested tensors and DTensors.
    """
    tensors = {
        "x": x,
        "weight": weight,
        "lora_a": lora_a,
        "lora_b": lora_b,
        "scaling": scalings,
        "offsets": offsets,
        "bias": bias,
        "experts": experts,
        "adapters": adapters,
    }
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got a {type(tensor).__name__}")
        if tensor.is_nested or is_dtensor(tensor):
            raise TypeError(f"{name} is a nested tensor or a DTensor; rows in segments are served of plain tensors")
    _check_shapes(x, weight, lora_a, lora_b, bias, transposed)
    _check_segments(weight.shape[0], lora_a.shape[0], offsets, experts, adapters)
    if scalings is not None:
        if scalings.shape != lora_a.shape[:1]:
            raise ValueError(f"scaling has shape {list(scalings.shape)}; it must be a number or [{lora_a.shape[0]}]")
        if not scalings.is_floating_point():
            raise TypeError(f"scaling must be a floating-point tensor, got {scalings.dtype}")
        if scalings.requires_grad:
            raise ValueError("scaling requires a gradient, which is never computed: multiply lora_b by it")
    for name, tensor in given.items():
        if tensor.device != x.device:
            raise ValueError(f"x is on {x.device} but {name} is on {tensor.device}; move them to one device")
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError(FROZEN_WEIGHT)


def check_dtypes(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None) -> None:
    """Raises TypeError as ``lora_linear`` does."""
    check_types(x.dtype, weight, lora_a, lora_b, bias)


def _check_shapes(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, transposed: bool
) -> None:
    shapes = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, **({} if bias is None else {"bias": bias})}
    listing = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in shapes.items())
    wanted = f"x [M, K], weight {'[E, K, N]' if transposed else '[E, N, K]'}, lora_a [T, R, K], lora_b [T, N, R]" + (
        "" if bias is None else ", bias [E, N] or [N]"
    )
    fits = x.dim() == 2 and weight.dim() == lora_a.dim() == lora_b.dim() == 3
    if fits:
        n, k = weight.shape[1:][::-1] if transposed else weight.shape[1:]
        n_adapters, rank, _ = lora_a.shape
        fits = (
            x.shape[1] == k
            and lora_a.shape[2] == k
            and lora_b.shape == (n_adapters, n, rank)
            and (bias is None or bias.shape == (n,) or bias.shape == (weight.shape[0], n))
        )
    if not fits:
        raise ValueError(f"shapes do not fit together: expected {wanted}; got {listing}")
    if 0 in (*weight.shape, *lora_a.shape):
        raise ValueError(f"every size but the number of rows must be at least 1; got {listing}")


def _check_segments(
    n_weights: int, n_adapters: int, offsets: Tensor, experts: Tensor | None, adapters: Tensor | None
) -> None:
    if offsets.dtype != torch.int32:
        raise TypeError(f"offsets must be int32, got {offsets.dtype}")
    if offsets.dim() != 1 or not offsets.shape[0]:
        raise ValueError(f"offsets must be [G], where each of at least one segment ends; got {list(offsets.shape)}")
    g = offsets.shape[0]
    for name, indices in (("experts", experts), ("adapters", adapters)):
        if indices is None:
            continue
        if indices.dtype not in _INDEX_DTYPES:
            raise TypeError(f"{name} must be int32 or int64, got {indices.dtype}")
        if indices.shape != (g,):
            raise ValueError(f"{name} must be [{g}], one for each segment of offsets; got {list(indices.shape)}")
    if experts is None and n_weights not in (1, g):
        raise ValueError(f"{g} segments and {n_weights} weights: give experts, the weight of each segment")
    if adapters is None and n_adapters != g:
        raise ValueError(f"{g} segments and {n_adapters} adapters: give adapters, the adapter of each segment or -1")
