"""The LoRA layer on DTensors: each process runs the fused layer on its own shards, wherever that is exact.

Per mesh dimension the frozen weight decides, as in tensor parallelism:

    weight      x            lora_a     lora_b     bias       y           gradients that are partial sums
    Shard(0)    Replicate    Replicate  Shard(0)   Shard(0)   Shard(-1)   dx, da
    Shard(1)    Shard(-1)    Shard(1)   Replicate  added last Partial     db
    Replicate   Shard(batch) Replicate  Replicate  Replicate  as x        da, db, dbias
    Replicate   Replicate    Replicate  Replicate  Replicate  Replicate   none

An operand that is placed otherwise is redistributed first; A and B are small. All of it is differentiable.
"""

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from fastlora.differentiable import composed
from fastlora.ops import lora_linear

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor, without importing torch.distributed.tensor where none can exist."""
    return type(tensor) not in (Tensor, torch.nn.Parameter) and hasattr(tensor, "placements")


def lora_linear_sharded(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    copy_input: bool = False,
) -> Tensor:
    """``lora_linear`` on DTensors; plain A, B and bias count as replicated.

    Active dropout is left to torch's own operators on DTensors, which know how to draw one mask over all shards, and
    counted as a fallback.

    Args:
        x: DTensor [..., in_features].
        weight: DTensor [out_features, in_features] on the same mesh, frozen.
        lora_a, lora_b, bias: as for ``lora_linear``, DTensors on that mesh or plain tensors.
        scaling, dropout_p, training, copy_input: as for ``lora_linear``.

    Returns:
        DTensor [..., out_features]; where the weight is sharded by columns it holds partial sums.

    Raises:
        ValueError: x or weight is no DTensor, they live on different meshes, or the weight's placement is neither
            Shard(0), Shard(1) nor Replicate.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if not is_dtensor(x) or not is_dtensor(weight) or x.device_mesh != weight.device_mesh:
        raise ValueError(
            "x and weight must be DTensors on one mesh, got "
            + " and ".join(str(t.device_mesh) if is_dtensor(t) else "a plain tensor" for t in (x, weight))
        )
    mesh, last = weight.device_mesh, x.dim() - 1

    def distributed(tensor: Tensor) -> Any:
        if is_dtensor(tensor):
            return tensor
        return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)

    bias = None if bias is None else distributed(bias)
    if dropout_p > 0.0 and training:
        reason = "dropout over DTensors"
        return composed(x, weight, distributed(lora_a), distributed(lora_b), scaling, bias, dropout_p, reason)
    # Per mesh dimension: placements of x, lora_a, lora_b, bias, y; then of the gradients of the first four.
    columns: list[tuple[Any, ...]] = []
    layout: tuple[Any, ...]
    gradients: tuple[Any, ...]
    placed: Any
    for held, placed in zip(weight.placements, x.placements, strict=True):
        if held == Shard(0):
            layout = (Replicate(), Replicate(), Shard(0), Shard(0), Shard(last))
            gradients = (Partial(), Partial(), Shard(0), Shard(0))
        elif held == Shard(1):
            layout = (Shard(last), Shard(1), Replicate(), Replicate(), Partial())
            gradients = (Shard(last), Shard(1), Partial(), Replicate())
        elif held == Replicate() and placed.is_shard() and placed.dim != last:
            layout = (placed, Replicate(), Replicate(), Replicate(), placed)
            gradients = (placed, Partial(), Partial(), Partial())
        elif held == Replicate():
            layout = (Replicate(),) * 5
            gradients = (Replicate(),) * 4
        else:
            raise ValueError(f"weight is placed as {held}; a LoRA layer needs Shard(0), Shard(1) or Replicate")
        columns.append((*layout, *gradients))
    placements = [list(column) for column in zip(*columns, strict=True)]

    def local(tensor: Tensor, index: int) -> Tensor:
        placed = distributed(tensor).redistribute(mesh, placements[index])
        return placed.to_local(grad_placements=placements[index + 5])

    summed = any(placement.is_partial() for placement in placements[4])
    y = lora_linear(
        local(x, 0),
        weight.to_local(),
        local(lora_a, 1),
        local(lora_b, 2),
        scaling,
        None if bias is None or summed else local(bias, 3),
        copy_input=copy_input,
    )
    shape = (*x.shape[:-1], weight.shape[0])
    y = DTensor.from_local(y, mesh, placements[4], run_check=False, shape=torch.Size(shape), stride=_strides(shape))
    return y if bias is None or not summed else y + bias


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides))
