"""Calls of a layer on rows in segments before there are any, with their descriptions: what ``warmup`` compiles for."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.problem import LaunchSpec, Needs
from fastlora.segments import GroupedBackward, GroupedForward, Segments, describe_segments


class GroupedLayer(NamedTuple):
    """What all calls of a layer have in common; of segments, how many they are and which indices are given."""

    weight: Tensor  # [E, N, K]; [E, K, N] where transposed
    bias: Tensor | None  # [E, N] or [N]
    lora_a: Tensor  # [T, R, K]
    lora_b: Tensor  # [T, N, R]
    scaling: float
    scalings: Tensor | None  # [T]; in the place of scaling
    segments: Segments
    transposed: bool = False
    dropout_p: float = 0.0
    rows_per_token: int = 1


def calls(
    layer: GroupedLayer, tokens: int, training: bool, evaluation: bool
) -> Iterator[tuple[GroupedForward | GroupedBackward, LaunchSpec]]:
    """Operands on the "meta" device of a layer's calls with so many tokens, and their descriptions on its own.

    Args:
        training: of steps of training: the forward with dropout, and the backward.
        evaluation: of forwards without dropout.
    """
    device = layer.weight.device
    m = tokens * layer.rows_per_token
    casts = device.type != "meta" and torch.is_autocast_enabled(device.type) and layer.weight.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device.type) if casts else layer.weight.dtype

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    n, k = layer.weight.shape[1:][::-1] if layer.transposed else layer.weight.shape[1:]
    lora_a, lora_b = (
        meta(*t.shape, dtype=torch.float32 if t.dtype == torch.float32 else dtype) for t in (layer.lora_a, layer.lora_b)
    )
    weight = torch.empty_strided(layer.weight.shape, layer.weight.stride(), dtype=layer.weight.dtype, device="meta")
    bias = None if layer.bias is None else meta(*layer.bias.shape)
    where = layer.segments, layer.transposed
    scales = layer.scaling, layer.scalings
    trains_bias = layer.bias is not None and layer.bias.requires_grad
    needs = Needs(True, layer.lora_a.requires_grad, layer.lora_b.requires_grad, trains_bias)
    for p in ({layer.dropout_p} if training else set()) | ({0.0} if evaluation else set()):
        drop = p, meta(dtype=torch.int64) if p > 0.0 else None
        x = meta(m, k)
        operands: GroupedForward | GroupedBackward = GroupedForward(
            x, weight, lora_a, lora_b, bias, *scales, *where, *drop
        )
        yield _described(operands, None, device)
        if training and p == layer.dropout_p:
            s = meta(m, lora_a.shape[1])
            bias_dims = 0 if bias is None else bias.dim()
            operands = GroupedBackward(meta(m, n), x, weight, lora_a, lora_b, s, bias_dims, *scales, *where, *drop)
            yield _described(operands, needs, device)


def _described(
    operands: GroupedForward | GroupedBackward, needs: Needs | None, device: torch.device
) -> tuple[GroupedForward | GroupedBackward, LaunchSpec]:
    operands, spec = describe_segments(operands) if needs is None else describe_segments(operands, needs)
    return operands, spec._replace(device=device)
