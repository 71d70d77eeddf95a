"""Other packages' order of the products of a LoRA layer, from their papers and sources, over any set of operations.

Two sets exist: ATen's (decompositions.py), which stand-ins are timed with, and plain Triton kernels in the emulator,
whose traffic is counted (benchmarks/traffic). An order names every matrix that it makes; X is [M, K], W [N, K],
A [R, K], B [N, R], dY [M, N].
"""

from typing import Protocol

from torch import Tensor


class Operations(Protocol):
    """What an order is made of. ``name`` says which matrix the result is."""

    def product(self, name: str, left: Tensor, right: Tensor, alpha: float = 1.0, like: Tensor | None = None) -> Tensor:
        """alpha·left·right. ``like`` has the result's shape; given where alpha is not 1."""
        ...

    def add_product(self, onto: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
        """onto += alpha·left·right, in place."""
        ...

    def product_and_branch(
        self, name: str, left: Tensor, right: Tensor, branch: tuple[Tensor, Tensor], scale: float, mask: Tensor | None
    ) -> Tensor:
        """left·right + scale·mask∘(S·P) with the branch (S, P)."""
        ...

    def dropout(self, x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
        """mask∘x / (1 - p), "drop(X)", and the mask; x itself and None where p is 0."""
        ...

    def gradient_pair(self, dy: Tensor, s: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """scale·dYᵀ·S and scale·dY·B: "dB" and "dS"."""
        ...


def unsloth_forward(ops: Operations, x, weight, lora_a, lora_b, scaling: float) -> Tensor:
    """Unsloth's LoRA_W: ``addmm_`` onto the base product; no dropout, and S is not kept. Returns Y.

    Source: unslothai/unsloth, kernels/fast_lora.py (``matmul_lora``, ``LoRA_W``). 3 products forward, 7 backward.
    """
    y = ops.product("Y", x, weight.t())
    ops.add_product(y, ops.product("S", x, lora_a.t()), lora_b.t(), scaling)
    return y


def unsloth_backward(ops: Operations, dy, x, weight, lora_a, lora_b, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """S is made again, dY·B twice. Returns dX, dA, dB."""
    da = ops.product("dA", ops.product("dS", dy, lora_b).t(), x, scaling, like=lora_a)
    db = ops.product("dB", dy.t(), ops.product("S again", x, lora_a.t()), scaling, like=lora_b)
    dx = ops.product("dX", dy, weight)
    ops.add_product(dx, ops.product("dS again", dy, lora_b), lora_a, scaling)
    return dx, da, db


def lorafusion_forward(ops: Operations, x, weight, lora_a, lora_b, scaling: float, dropout_p: float):
    """LoRAFusion's split around a stored S; without dropout, whose kernels they skip, the same from X itself.

    Source: CentML/lorafusion, ops/lora_v1.py; Zhu et al., "LoRAFusion: Efficient LoRA Fine-Tuning for LLMs", 2025.

    Returns:
        Y, and what backward needs: the dropped X, the mask (or None) and S.
    """
    dropped, mask = ops.dropout(x, dropout_p)
    s = ops.product("S", dropped, lora_a.t())
    y = ops.product_and_branch("Y", x, weight.t(), (s, lora_b.t()), scaling, None)
    return y, dropped, mask, s


def lorafusion_backward(
    ops: Operations, dy, dropped, mask, s, weight, lora_a, lora_b, scaling: float, inverse_keep: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dB and dS from one reading of dY; dX with its branch in one kernel. Returns dX, dA, dB."""
    db, ds = ops.gradient_pair(dy, s, lora_b, scaling)
    da = ops.product("dA", ds.t(), dropped)
    dx = ops.product_and_branch("dX", dy, weight, (ds, lora_a), inverse_keep, mask)
    return dx, da, db
