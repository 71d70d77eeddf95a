"""Tensors of any number of dimensions as the rows that a LoRA layer is computed on."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlora.problem import Gradients


def flat(tensor: Tensor) -> Tensor:
    """[..., K] as [M, K]; also where K or M is 0, which ``reshape(-1, K)`` cannot divide by."""
    shape = tensor.shape
    return tensor.reshape(math.prod(shape[:-1]), shape[-1])


def in_rows(backward: Callable[..., Gradients], dy: Tensor, x: Tensor | None, weight: Any, *rest) -> Gradients:
    """``backward(dy, x, weight, *rest)`` of matrices, for dY [..., N] and x [..., K]: dX is [..., K]. The weight is
    anything of the shape [N, K]."""
    dx, *others = backward(flat(dy), None if x is None else flat(x), weight, *rest)
    return Gradients(None if dx is None else dx.view(*dy.shape[:-1], weight.shape[1]), *others)


def on_jagged(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer on the values of a jagged nested tensor, whose last dimension it reads; the ragged one stays as it is.

    Raises:
        TypeError: the nested tensor is of the strided layout.
        ValueError: its last dimension is the ragged one.
    """
    if x.layout != torch.jagged:
        raise TypeError("a nested x must be of the jagged layout: torch.nested.nested_tensor(..., layout=torch.jagged)")
    nested: Any = x
    ragged = nested._ragged_idx
    if ragged == x.dim() - 1:
        raise ValueError("the last dimension of a nested x must be in_features, but it is the ragged one")
    return torch.nested.nested_tensor_from_jagged(
        layer(x.values()), nested.offsets(), lengths=nested.lengths(), jagged_dim=ragged
    )
