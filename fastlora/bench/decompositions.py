"""How others order the products of a LoRA layer, written by us from their papers and sources with ATen products alone.

They stand in for packages that most machines do not have. They keep each package's order of products, what it saves for
backward and its launches' shape, but not its fused kernels; ``--peer`` runs the real package beside its stand-in.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastlora.bench import orders


def eager(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dropout_p: float) -> Tensor:
    """Plain composition of ``F.linear``, differentiated by autograd: x [M, K] -> [M, N]."""
    dropped = F.dropout(x, dropout_p) if dropout_p else x
    return F.linear(x, weight) + F.linear(F.linear(dropped, lora_a), lora_b) * scaling


class Aten:
    """ATen's products, as packages call them: fused kernels of theirs are ``addmm_`` here."""

    @staticmethod
    def product(name: str, left: Tensor, right: Tensor, alpha: float = 1.0, like: Tensor | None = None) -> Tensor:
        return left @ right if like is None else torch.addmm(like, left, right, alpha=alpha, beta=0)

    @staticmethod
    def add_product(onto: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
        onto.addmm_(left, right, alpha=alpha)

    @staticmethod
    def product_and_branch(
        name, left, right, branch: tuple[Tensor, Tensor], scale: float, mask: Tensor | None
    ) -> Tensor:
        out = left @ right
        if mask is None:
            return out.addmm_(*branch, alpha=scale)
        return out.addcmul_(branch[0] @ branch[1], mask.to(out.dtype), value=scale)

    @staticmethod
    def dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
        return torch.native_dropout(x, p, True) if p else (x, None)

    @staticmethod
    def gradient_pair(dy: Tensor, s: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return torch.addmm(b, dy.t(), s, alpha=scale, beta=0), torch.addmm(s, dy, b, alpha=scale, beta=0)


class UnslothOrder(torch.autograd.Function):
    """:func:`fastlora.bench.orders.unsloth_forward`; S is computed again in backward. No dropout."""

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, scaling):
        ctx.save_for_backward(x, weight, lora_a, lora_b)
        ctx.scaling = scaling
        return orders.unsloth_forward(Aten, x, weight, lora_a, lora_b, scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx, da, db = orders.unsloth_backward(Aten, dy, *ctx.saved_tensors, ctx.scaling)
        return dx, None, da, db, None


class DequantiseOrder(torch.autograd.Function):
    """:class:`UnslothOrder` over a ``fastlora.QuantisedWeight``: decoded in front of the products, each way."""

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, scaling):
        ctx.save_for_backward(x, lora_a, lora_b)
        ctx.weight, ctx.scaling = weight, scaling
        return orders.unsloth_forward(Aten, x, weight.dequantize(), lora_a, lora_b, scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, lora_a, lora_b = ctx.saved_tensors
        weight = ctx.weight.dequantize()
        dx, da, db = orders.unsloth_backward(Aten, dy, x, weight, lora_a, lora_b, ctx.scaling)
        return dx, None, da, db, None


class LoRAFusionOrder(torch.autograd.Function):
    """:func:`fastlora.bench.orders.lorafusion_forward`: dropped X, mask and S are kept."""

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, scaling, dropout_p):
        y, dropped, mask, s = orders.lorafusion_forward(Aten, x, weight, lora_a, lora_b, scaling, dropout_p)
        ctx.save_for_backward(dropped, mask, s, weight, lora_a, lora_b)
        ctx.scaling, ctx.inverse_keep = scaling, 1 / (1 - dropout_p)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx, da, db = orders.lorafusion_backward(Aten, dy, *ctx.saved_tensors, ctx.scaling, ctx.inverse_keep)
        return dx, None, da, db, None, None


class RunLoRAOrder(torch.autograd.Function):
    """RunLoRA's choice of contraction order by FLOPs: through R, or through the merged N×K weight where that is fewer.

    Only X and the weights are saved. No dropout. Source: Cherniuk et al., "Run LoRA Run: Faster and Lighter LoRA
    Implementations", 2023.
    """

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, scaling):
        ctx.save_for_backward(x, weight, lora_a, lora_b)
        ctx.scaling = scaling
        if _through_rank(x, lora_a, lora_b):
            return torch.addmm(x @ weight.t(), x @ lora_a.t(), lora_b.t(), alpha=scaling)
        return x @ torch.addmm(weight, lora_b, lora_a, alpha=scaling).t()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, lora_a, lora_b = ctx.saved_tensors
        s = ctx.scaling
        if _through_rank(x, lora_a, lora_b):
            ds = dy @ lora_b
            dx = torch.addmm(dy @ weight, ds, lora_a, alpha=s)
        else:
            ds = None
            dx = dy @ torch.addmm(weight, lora_b, lora_a, alpha=s)
        (m, k), n, r = x.shape, dy.shape[1], lora_a.shape[0]
        products_of_rank = 2 * m * r * (n + k) * (1 if ds is None else 0) + 2 * m * r * (n + 2 * k)
        if products_of_rank <= 2 * n * k * (m + 2 * r):
            ds = dy @ lora_b if ds is None else ds
            da, db = ds.t() @ x, dy.t() @ (x @ lora_a.t())
        else:
            dw = dy.t() @ x
            da, db = lora_b.t() @ dw, dw @ lora_a.t()
        return dx, None, da.mul_(s), db.mul_(s), None


def _through_rank(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> bool:
    """Whether (x·Aᵀ)·Bᵀ takes no more FLOPs than forming B·A."""
    (m, k), (n, r) = x.shape, lora_b.shape
    return m * r * (n + k) <= n * k * r


class StoredS(torch.autograd.Function):
    """The fewest products that keep X and S: what a bare Python autograd.Function costs. No dropout."""

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, scaling):
        s = x @ lora_a.t()
        y = F.linear(x, weight)
        y.addmm_(s, lora_b.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, lora_a, lora_b, s)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, lora_a, lora_b, s = ctx.saved_tensors
        ds = torch.addmm(s, dy, lora_b, alpha=ctx.scaling, beta=0)
        dx = dy @ weight
        dx.addmm_(ds, lora_a)
        return dx, None, ds.t() @ x, torch.addmm(lora_b, dy.t(), s, alpha=ctx.scaling, beta=0), None
