"""DoRA over a fused layer: the columns of base product and branch scaled by a trained magnitude over a weight's norm.

``Y = g∘(X·W0ᵀ + s·X·Aᵀ·Bᵀ) + bias`` with ``g = m / ‖W0 + s·B·A‖`` by output row, the norm a constant to autograd. The
term in brackets is one fused launch without a bias; the scale is one pass over it. The norm needs no N x K temporary:
``‖W0 + s·B·A‖² = ‖W0‖² + 2s·Σ_r (W0·Aᵀ)∘B + s²·Σ_r (B·(A·Aᵀ))∘B``.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353), with its section 4.3.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from fastlora.dispatch import count_fallback
from fastlora.ops import lora_linear
from fastlora.rows import on_jagged

WITH_DROPOUT = "DoRA with dropout, which drops the base product's input too"
_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 18, 1 << 24  # of a weight that are widened at once
_ROWS_AT_A_TIME = 256  # of dY∘T that are summed at once


class Norms:
    """The norms of a layer's weight rows with its branch, made anew when what they depend on has changed.

    That is seen by storage, address and torch's version counter of W0, A and B, and by the scaling. A backward that
    trains A or B makes them anew as well, for optimisers may write past that counter; and among several processes they
    are made at every call, for FSDP refills parameters and restores their counters. A write through ``.data`` between
    two calls without a backward is not seen: ``forget`` makes it so.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._base_key: tuple | None = None
        self._base: Tensor | None = None
        self._base_pin: StorageWeakRef | None = None
        self._key: tuple | None = None
        self._norm: Tensor | None = None
        self._pins: tuple[StorageWeakRef, ...] = ()

    def forget_branch(self) -> None:
        self._key = None

    def __deepcopy__(self, memo: dict) -> "Norms":
        return Norms()

    def __reduce__(self) -> tuple:
        return Norms, ()

    def of(self, stored: Tensor, rows: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float | Tensor) -> Tensor:
        """‖W0 + s·B·A‖ [N], in float32 at least.

        Args:
            stored: the weight's own tensor, by which a change is seen.
            rows: the same as [N, K].
            lora_a: [R, K]. lora_b: [N, R].
            scaling: s; as a tensor, whose value is not waited for, it is taken for another at every call.
        """
        if _may_change_unseen(scaling, (stored, lora_a, lora_b)):
            return weight_norm(rows, lora_a, lora_b, scaling)
        with torch.inference_mode(False):  # what is made within it, a later backward could not save
            return self._kept(stored, rows, lora_a, lora_b, scaling)

    def _kept(self, stored: Tensor, rows: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float | Tensor) -> Tensor:
        base_key = _state(stored)
        if self._base is None or base_key != self._base_key:
            self._base, self._base_key, self._key = squared_norm(rows), base_key, None
            self._base_pin = _pin(stored)
        key = (_state(lora_a), _state(lora_b), scaling)
        if self._norm is None or key != self._key:
            self._norm, self._key = weight_norm(rows, lora_a, lora_b, scaling, self._base), key
            self._pins = _pin(lora_a), _pin(lora_b)
        return self._norm


def _may_change_unseen(scaling: float | Tensor, tensors: tuple[Tensor, ...]) -> bool:
    if _needs_torchs_own() or isinstance(scaling, Tensor):
        return True
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return True
    return any(tensor.is_inference() or tensor.is_meta for tensor in tensors)


def _state(tensor: Tensor) -> tuple:
    """What changes with a tensor's values, as far as torch counts; of a pinned storage only."""
    return tensor.untyped_storage()._cdata, tensor._version, tensor.data_ptr(), tensor.dtype, tensor.shape


def _pin(tensor: Tensor) -> StorageWeakRef:
    """Keeps a storage's identity from being another's later, and not its memory. No weak reference to the tensor
    itself, which ``torch.utils.swap_tensors`` would refuse."""
    return StorageWeakRef(tensor.untyped_storage())


@torch.no_grad()
def weight_norm(
    rows: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float | Tensor, base: Tensor | None = None
) -> Tensor:
    """‖W0 + s·B·A‖ [N] of W0 [N, K], A [R, K] and B [N, R], in float32 at least and outside autocast.

    Args:
        base: ``squared_norm`` of W0, where it is known.
    """
    with _without_autocast(rows):
        base = squared_norm(rows) if base is None else base
        a, b = lora_a.to(base.dtype), lora_b.to(base.dtype)
        cross = torch.cat([part.to(base.dtype) @ a.t() for part in _parts(rows)])  # [N, R]
        branch = b @ (a @ a.t())
        squared = base + scaling * ((2 * cross + scaling * branch) * b).sum(1)
        return squared.clamp_(min=0.0).sqrt_()


def _without_autocast(tensor: Tensor) -> AbstractContextManager:
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


@torch.no_grad()
def squared_norm(rows: Tensor) -> Tensor:
    """‖W0‖² [N] of W0 [N, K], in float32 at least."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=dtype).square_() for part in _parts(rows)])


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    """The rows, a few at a time where they are to be widened."""
    if rows.dtype.itemsize > 2 or rows.is_meta:
        return (rows,)
    elements = _CPU_ELEMENTS if rows.is_cpu else _GPU_ELEMENTS
    return rows.split(max(1, elements // max(1, rows.shape[1])))


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    norms: Norms | None = None,
    stored: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | None = None,
    copy_input: bool = False,
) -> Tensor:
    """A DoRA layer: ``m/‖W0 + s·B·A‖ ∘ (x·W0ᵀ + s·x·Aᵀ·Bᵀ) + bias``, by output column; the norm is a constant.

    With dropout in training it computes what PEFT does, which drops the base product's input as well, by torch's own
    products; counted as a fallback.

    Args:
        x: input [..., in_features], as for ``fastlora.lora_linear``.
        weight: frozen weight [out_features, in_features]. lora_a: [r, in_features]. lora_b: [out_features, r].
        scaling: factor of the branch; a tensor of one element is taken as well, and gets no gradient.
        magnitude: m [out_features].
        bias: [out_features], or None.
        norms: keeps the norm between calls; without it, it is made at every call.
        stored: the tensor that holds the weight, where ``weight`` is a view of it made for this call.
        dropout_p, training, backend, copy_input: as for ``fastlora.lora_linear``.

    Returns:
        Tensor [..., out_features] of x's dtype, or of autocast's.

    Raises:
        ValueError, TypeError, RuntimeError: as ``fastlora.lora_linear``.
    """
    if x.is_nested:
        options: dict[str, Any] = {"norms": norms, "stored": stored, "dropout_p": dropout_p, "training": training}
        options |= {"backend": backend, "copy_input": copy_input}
        return on_jagged(lambda v: dora_linear(v, weight, lora_a, lora_b, scaling, magnitude, bias, **options), x)
    if magnitude.shape != weight.shape[:1]:
        raise ValueError(f"magnitude must be [{weight.shape[0]}], got {list(magnitude.shape)}")
    norm = (Norms() if norms is None else norms).of(
        weight if stored is None else stored, weight, lora_a, lora_b, scaling
    )
    if isinstance(scaling, Tensor):
        lora_b, scaling = lora_b * scaling, 1.0
    if dropout_p > 0.0 and training:
        if not torch.compiler.is_compiling():
            count_fallback(WITH_DROPOUT)
        return _with_dropout(x, weight, lora_a, lora_b, scaling, magnitude / norm, bias, dropout_p)
    y = lora_linear(x, weight, lora_a, lora_b, scaling, backend=backend, copy_input=copy_input)
    if bias is not None and bias.dtype != y.dtype:  # by autocast
        bias = bias.to(y.dtype)
    if _needs_torchs_own():
        return _scaled(y, magnitude / norm, bias)
    trains = lora_a.requires_grad or lora_b.requires_grad
    return _ScaledColumns.apply(y, magnitude, norm, bias, norms if trains else None)


def _needs_torchs_own() -> bool:
    """Whether something looks on that can follow torch's operators alone."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def _scaled(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y∘scale + bias, rounded once to y's dtype."""
    scaled = y * scale
    return (scaled if bias is None else scaled + bias).to(y.dtype)


def _scaled_fused(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Likewise, in one pass and without a wider copy on a GPU."""
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    return torch.mul(y, scale, out=out) if bias is None else torch.addcmul(bias, y, scale, out=out)


class _ScaledColumns(torch.autograd.Function):
    """``y∘(m / norm) + bias`` of y [..., N]: what its backward reads of y is kept where m trains."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, norms: Norms | None):
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, magnitude, norm)
        ctx.norms, ctx.bias_dtype = norms, None if bias is None else bias.dtype
        return _scaled_fused(y, magnitude / norm, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        y, magnitude, norm = ctx.saved_tensors
        need_y, need_m, _, need_bias, _ = ctx.needs_input_grad
        if ctx.norms is not None:
            ctx.norms.forget_branch()  # A and B are about to change, perhaps unseen
        differentiable = torch.is_grad_enabled()
        with _without_autocast(dy):
            scale = magnitude / norm
            in_y = dm = dbias = None
            if need_y:
                in_y = _scaled(dy, scale, None) if differentiable else _scaled_fused(dy, scale, None)
            if need_m:
                products = _differentiable_sum(dy, y) if differentiable else _column_sum(dy, y, norm.dtype)
                dm = (products / norm).to(magnitude.dtype)
            if need_bias:
                dbias = dy.flatten(0, -2).sum(0).to(ctx.bias_dtype) if dy.dim() > 1 else dy.to(ctx.bias_dtype)
        return in_y, dm, None, dbias, None


def _differentiable_sum(dy: Tensor, y: Tensor) -> Tensor:
    dtype = torch.promote_types(dy.dtype, torch.float32)
    return (dy.to(dtype) * y.to(dtype)).sum(tuple(range(dy.dim() - 1)))


def _column_sum(dy: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ dy∘y [N] over all leading dimensions, a few rows at a time."""
    n = y.shape[-1]
    dy, y = dy.reshape(-1, n) if n else dy.new_empty(0, 0), y.reshape(-1, n) if n else y.new_empty(0, 0)
    total = torch.zeros(n, dtype=dtype, device=dy.device)
    for some, others in zip(dy.split(_ROWS_AT_A_TIME), y.split(_ROWS_AT_A_TIME), strict=True):
        total += (some.to(dtype) * others).sum(0)
    return total


def _with_dropout(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    scale: Tensor,
    bias: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """PEFT's DoRA in training: base product of x, and all that differs from it of the dropped x."""
    y = F.linear(x, weight, bias)
    dropped = F.dropout(x, dropout_p)
    branch = F.linear(F.linear(dropped.to(lora_a.dtype), lora_a), lora_b)
    return (y + (scale - 1) * F.linear(dropped, weight) + scale * scaling * branch).to(y.dtype)
