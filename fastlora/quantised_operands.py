"""Operands with a quantised base weight in the form that kernels take, and the LaunchSpec that describes them.

They are those of the layer over the dense weight, with a ``QuantisedWeight`` in its place."""

from typing import Any

import torch
from torch import Tensor

from fastlora import operands
from fastlora.problem import LaunchSpec, Needs, Packed
from fastlora.quantised_weight import QuantisedWeight

_ALIGNMENT = 16  # bytes


def describe_forward(given: Any) -> tuple[tuple, LaunchSpec]:
    """The operands of a forward (the fields of ForwardOperands, in order) as kernels take them, and their
    description."""
    x, weight, *rest = given
    dense, spec = operands.describe_forward((x, _dense(weight), *rest))  # type: ignore[arg-type]  # its fields
    return (dense[0], weight, *dense[2:]), _over(weight, spec)


def describe_backward(given: Any, needs: Needs) -> tuple[tuple, LaunchSpec]:
    """Likewise of a backward, with the fields of BackwardOperands."""
    dy, x, weight, *rest = given
    dense, spec = operands.describe_backward((dy, x, _dense(weight), *rest), needs)  # type: ignore[arg-type]
    return (*dense[:2], weight, *dense[3:]), _over(weight, spec)


def forward_key(given: Any) -> tuple:
    """What ``describe_forward`` reads of operands: calls of one key have one description, and are in one form."""
    x, weight, *rest = given
    return *operands.forward_key((x, weight.tensors[0], *rest)), *_weight_key(weight)  # type: ignore[arg-type]


def backward_key(given: Any, needs: Needs) -> tuple:
    """Likewise of ``describe_backward``."""
    dy, x, weight, *rest = given
    key = operands.backward_key((dy, x, weight.tensors[0], *rest), needs)  # type: ignore[arg-type]
    return *key, *_weight_key(weight)


def _dense(weight: QuantisedWeight) -> Tensor:
    """What the decoded weight lies like; it takes no memory."""
    return torch.empty(weight.shape, dtype=weight.dtype, device="meta")


def _over(weight: QuantisedWeight, spec: LaunchSpec) -> LaunchSpec:
    packed = Packed(
        weight.block,
        tuple(tensor.dtype for tensor in weight.tensors),
        tuple(tensor.numel() for tensor in weight.tensors),
        tuple(tensor.data_ptr() % _ALIGNMENT == 0 for tensor in weight.tensors),
        all(tensor.is_contiguous() for tensor in weight.tensors),
    )
    return spec._replace(base_format=weight.format, packed=packed)


def _weight_key(weight: QuantisedWeight) -> tuple:
    each = [(t.dtype, t.shape, t.stride(), t.data_ptr() % _ALIGNMENT) for t in weight.tensors]
    return weight.format, weight.shape, weight.dtype, weight.block, *each
