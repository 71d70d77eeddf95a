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
from fastlora.bench import orders
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


class Launches:
    """The operations of :mod:`fastlora.bench.orders` as launches of plain kernels; keeps every matrix by its name."""

    def __init__(self, layer, tile: TileConfig):
        self.layer, self.tile, self.made = layer, tile, {}

    def product(self, name: str, left: Tensor, right: Tensor, alpha: float = 1.0, like: Tensor | None = None) -> Tensor:
        self.made[name] = product(left, right, self.tile, alpha=alpha)
        return self.made[name]

    def add_product(self, onto: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
        product(left, right, self.tile, alpha=alpha, onto=onto)

    def product_and_branch(self, name, left, right, branch, scale: float, mask: Tensor | None) -> Tensor:
        self.made[name] = product(left, right, self.tile, branch=branch, branch_scale=scale, mask=mask)
        return self.made[name]

    def dropout(self, x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
        if not p:
            return x, None
        self.made["drop(X)"], self.made["mask"] = dropout(x, p, self.layer.seed, self.tile)
        return self.made["drop(X)"], self.made["mask"]

    def gradient_pair(self, dy: Tensor, s: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """By atomics into zeroed fp32."""
        sums = {"fp32 dB": zeros(b.shape[0], b.shape[1], like=dy), "fp32 dS": zeros(*s.shape, like=dy)}
        gradient_pair(dy, s, b, scale, self.tile, tuple(sums.values()))
        rounded = {name.removeprefix("fp32 "): elementwise(total, dtype=dy.dtype) for name, total in sums.items()}
        self.made |= {**sums, **rounded}
        return rounded["dB"], rounded["dS"]


def unsloth_forward(layer, tile: TileConfig) -> Tensors:
    launches = Launches(layer, tile)
    orders.unsloth_forward(launches, layer.x, layer.weight, layer.lora_a, layer.lora_b, layer.scaling)
    return launches.made


def unsloth_backward(layer, made: Tensors, tile: TileConfig) -> Tensors:
    launches = Launches(layer, tile)
    orders.unsloth_backward(launches, layer.dy, layer.x, layer.weight, layer.lora_a, layer.lora_b, layer.scaling)
    return launches.made


def lorafusion_forward(layer, tile: TileConfig) -> Tensors:
    launches = Launches(layer, tile)
    operands = (layer.x, layer.weight, layer.lora_a, layer.lora_b, layer.scaling, layer.dropout_p)
    orders.lorafusion_forward(launches, *operands)
    return launches.made


def lorafusion_backward(layer, made: Tensors, tile: TileConfig) -> Tensors:
    launches = Launches(layer, tile)
    kept = (made.get("drop(X)", layer.x), made.get("mask"), made["S"])
    scales = (layer.scaling, inverse_keep(layer.dropout_p))
    orders.lorafusion_backward(launches, layer.dy, *kept, layer.weight, layer.lora_a, layer.lora_b, *scales)
    return launches.made


ORDERS = {
    "frozen layer": Order(frozen_forward, frozen_backward, drops=False),
    "PEFT, eager": Order(eager_forward, eager_backward, drops=True),
    "Unsloth": Order(unsloth_forward, unsloth_backward, drops=False),
    "LoRAFusion": Order(lorafusion_forward, lorafusion_backward, drops=True),
}
