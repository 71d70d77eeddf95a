"""What other packages launch for a LoRA layer, and in which order, from the plain kernels of peer_kernels.py.

Each order is a pair of functions over a layer (x [M, K], weight [N, K], lora_a [R, K], lora_b [N, R], dy [M, N],
scaling, dropout_p, seed; all in one dtype) that return every tensor they make, by name: Y, S, dS, dX, dA, dB, or what
it is. They keep each package's order of products and what it writes to memory between them. Tiles are those asked for;
where a package casts adapters to fp32, these do not.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from benchmarks.traffic.peer_kernels import dropout, elementwise, gradient_pair, product, zeros
from fastlora.backends.configs import TileConfig
from fastlora.philox import inverse_keep

Tensors = dict[str, Tensor]


class Order(NamedTuple):
    """forward(layer, tile) and backward(layer, what the forward made, tile); ``drops``: whether it knows dropout."""

    forward: Callable[..., Tensors]
    backward: Callable[..., Tensors]
    drops: bool


def frozen_forward(layer, tile: TileConfig) -> Tensors:
    """The layer without a branch: what everything else is compared with."""
    return {"Y": product(layer.x, layer.weight.t(), tile)}


def frozen_backward(layer, made: Tensors, tile: TileConfig) -> Tensors:
    return {"dX": product(layer.dy, layer.weight, tile)}


def eager_forward(layer, tile: TileConfig) -> Tensors:
    """PEFT: base + lora_B(lora_A(dropout(x))) * scaling, a launch for each operation."""
    made = {"base Y": product(layer.x, layer.weight.t(), tile)}
    dropped = layer.x
    if layer.dropout_p:
        made["drop(X)"], made["mask"] = dropout(layer.x, layer.dropout_p, layer.seed, tile)
        dropped = made["drop(X)"]
    made["S"] = product(dropped, layer.lora_a.t(), tile)
    made["branch"] = product(made["S"], layer.lora_b.t(), tile)
    made["scaled branch"] = elementwise(made["branch"], factor=layer.scaling)
    made["Y"] = elementwise(made["scaled branch"], plus=made["base Y"])
    return made


def eager_backward(layer, made: Tensors, tile: TileConfig) -> Tensors:
    """Autograd's way back through eager_forward; the two gradients of x are added in place."""
    dropped = made.get("drop(X)", layer.x)
    grads = {"scaled dY": elementwise(layer.dy, factor=layer.scaling)}
    grads["dB"] = product(grads["scaled dY"].t(), made["S"], tile)
    grads["dS"] = product(grads["scaled dY"], layer.lora_b, tile)
    grads["dA"] = product(grads["dS"].t(), dropped, tile)
    branch = grads["d drop(X)"] = product(grads["dS"], layer.lora_a, tile)
    if layer.dropout_p:
        scale = inverse_keep(layer.dropout_p)
        branch = grads["masked d drop(X)"] = elementwise(branch, factor=scale, mask=made["mask"])
    grads["dX"] = product(layer.dy, layer.weight, tile)
    elementwise(branch, plus=grads["dX"], out=grads["dX"])
    return grads


def unsloth_forward(layer, tile: TileConfig) -> Tensors:
    """Unsloth's LoRA_W: ``addmm_`` onto the base product.

    Source: unslothai/unsloth, kernels/fast_lora.py (``matmul_lora``, ``LoRA_W``).
    """
    made = {"Y": product(layer.x, layer.weight.t(), tile), "S": product(layer.x, layer.lora_a.t(), tile)}
    product(made["S"], layer.lora_b.t(), tile, alpha=layer.scaling, onto=made["Y"])
    return made


def unsloth_backward(layer, made: Tensors, tile: TileConfig) -> Tensors:
    """S is made again, dY·B twice."""
    grads = {"dS": product(layer.dy, layer.lora_b, tile)}
    grads["dA"] = product(grads["dS"].t(), layer.x, tile, alpha=layer.scaling)
    grads["S again"] = product(layer.x, layer.lora_a.t(), tile)
    grads["dB"] = product(layer.dy.t(), grads["S again"], tile, alpha=layer.scaling)
    grads["dX"] = product(layer.dy, layer.weight, tile)
    grads["dS again"] = product(layer.dy, layer.lora_b, tile)
    product(grads["dS again"], layer.lora_a, tile, alpha=layer.scaling, onto=grads["dX"])
    return grads


def lorafusion_forward(layer, tile: TileConfig) -> Tensors:
    """LoRAFusion's split around a stored S; without dropout, whose kernels they skip, the same from X itself.

    Source: CentML/lorafusion, ops/lora_v1.py; Zhu et al., "LoRAFusion: Efficient LoRA Fine-Tuning for LLMs", 2025.
    """
    made, dropped = {}, layer.x
    if layer.dropout_p:
        made["drop(X)"], made["mask"] = dropout(layer.x, layer.dropout_p, layer.seed, tile)
        dropped = made["drop(X)"]
    made["S"] = product(dropped, layer.lora_a.t(), tile)
    branch = (made["S"], layer.lora_b.t())
    made["Y"] = product(layer.x, layer.weight.t(), tile, branch=branch, branch_scale=layer.scaling)
    return made


def lorafusion_backward(layer, made: Tensors, tile: TileConfig) -> Tensors:
    """dB and dS from one reading of dY, by atomics into zeroed fp32; dX with its branch in one kernel."""
    (m, n), r = layer.dy.shape, layer.lora_a.shape[0]
    sums = {"fp32 dB": zeros(n, r, like=layer.dy), "fp32 dS": zeros(m, r, like=layer.dy)}
    gradient_pair(layer.dy, made["S"], layer.lora_b, layer.scaling, tile, tuple(sums.values()))
    dtype = layer.dy.dtype
    grads = {**sums, "dB": elementwise(sums["fp32 dB"], dtype=dtype), "dS": elementwise(sums["fp32 dS"], dtype=dtype)}
    grads["dA"] = product(grads["dS"].t(), made.get("drop(X)", layer.x), tile)
    grads["dX"] = product(
        layer.dy, layer.weight, tile,
        branch=(grads["dS"], layer.lora_a), branch_scale=inverse_keep(layer.dropout_p), mask=made.get("mask"),
    )  # fmt: skip
    return grads


ORDERS = {
    "frozen layer": Order(frozen_forward, frozen_backward, drops=False),
    "PEFT, eager": Order(eager_forward, eager_backward, drops=True),
    "Unsloth": Order(unsloth_forward, unsloth_backward, drops=False),
    "LoRAFusion": Order(lorafusion_forward, lorafusion_backward, drops=True),
}
