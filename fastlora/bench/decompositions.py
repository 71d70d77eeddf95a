"""How others order the products of a LoRA layer, written by us from their papers and sources with ATen products alone.

They stand in for packages that most machines do not have. They keep each package's order of products, what it saves for
backward and its launches' shape, but not its fused kernels; ``--peer`` runs the real package beside its stand-in.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def eager(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dropout_p: float) -> Tensor:
    """Plain composition of ``F.linear``, differentiated by autograd: x [M, K] -> [M, N]."""
    dropped = F.dropout(x, dropout_p) if dropout_p else x
    return F.linear(x, weight) + F.linear(F.linear(dropped, lora_a), lora_b) * scaling


class UnslothOrder(torch.autograd.Function):
    """Unsloth's LoRA_W: ``addmm_`` onto the base product; S is computed again in backward. No dropout.

    Source: unslothai/unsloth, kernels/fast_lora.py (``matmul_lora``, ``LoRA_W``). 3 products forward, 7 backward.
    """

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, scaling):
        y = F.linear(x, weight)
        y.addmm_(x @ lora_a.t(), lora_b.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, lora_a, lora_b)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, lora_a, lora_b = ctx.saved_tensors
        s = ctx.scaling
        da = torch.addmm(lora_a, (dy @ lora_b).t(), x, alpha=s, beta=0)
        db = torch.addmm(lora_b, dy.t(), x @ lora_a.t(), alpha=s, beta=0)
        dx = dy @ weight
        dx.addmm_(dy @ lora_b, lora_a, alpha=s)
        return dx, None, da, db, None


class LoRAFusionOrder(torch.autograd.Function):
    """LoRAFusion's split around a stored S: dropped X, mask and S are kept; products that it fuses are ``addmm_`` here.

    Source: CentML/lorafusion, ops/lora_v1.py; Zhu et al., "LoRAFusion: Efficient LoRA Fine-Tuning for LLMs", 2025.
    """

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, scaling, dropout_p):
        dropped, mask = torch.native_dropout(x, dropout_p, True) if dropout_p else (x, None)
        s = dropped @ lora_a.t()
        y = F.linear(x, weight)
        y.addmm_(s, lora_b.t(), alpha=scaling)
        ctx.save_for_backward(dropped, weight, lora_a, lora_b, s, mask)
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dropped, weight, lora_a, lora_b, s, mask = ctx.saved_tensors
        db = torch.addmm(lora_b, dy.t(), s, alpha=ctx.scaling, beta=0)
        ds = torch.addmm(s, dy, lora_b, alpha=ctx.scaling, beta=0)
        da = ds.t() @ dropped
        dx = dy @ weight
        if mask is None:
            dx.addmm_(ds, lora_a)
        else:
            dx.addcmul_(ds @ lora_a, mask.to(dx.dtype), value=1 / (1 - ctx.dropout_p))
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
