"""DoRA: the columns of base product and branch scaled by a trained magnitude over a weight's norm.

``Y = g∘(X·W0ᵀ + s·X·Aᵀ·Bᵀ) + bias`` with ``g = m / ‖W0 + s·B·A‖`` by output row, the norm a constant to autograd. On a
GPU that is one launch each way (``fastlora.scaled_layer``). Where Triton does not serve it, on the CPU, and where the
call must be of torch's operators, the term in brackets is the fused layer without a bias, and the scale a pass over it
(``fastlora.column_scale``). The norm needs no N x K temporary:
``‖W0 + s·B·A‖² = ‖W0‖² + 2s·Σ_r (W0·Aᵀ)∘B + s²·Σ_r (B·(A·Aᵀ))∘B``.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353), with its section 4.3.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from fastlora.column_scale import ScaledColumns, scaled, without_autocast
from fastlora.counts import count_fallback
from fastlora.one_launch import may_launch
from fastlora.ops import lora_linear
from fastlora.rows import on_jagged
from fastlora.scaled_layer import scaled_linear
from fastlora.selection import environment_backend

WITH_DROPOUT = "DoRA with dropout, which drops the base product's input too"
_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 18, 1 << 24  # of a weight that are widened at once


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
    with without_autocast(rows):
        base = squared_norm(rows) if base is None else base
        a, b = lora_a.to(base.dtype), lora_b.to(base.dtype)
        cross = torch.cat([part.to(base.dtype) @ a.t() for part in _parts(rows)])  # [N, R]
        branch = b @ (a @ a.t())
        squared = base + scaling * ((2 * cross + scaling * branch) * b).sum(1)
        return squared.clamp_(min=0.0).sqrt_()


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
    products; counted as a fallback. Where m trains, the term in brackets is kept for its gradient: as many elements as
    the output has.

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
    torchs_own = _needs_torchs_own()
    if not (torchs_own or torch._C._len_torch_dispatch_stack()):
        backend = backend or environment_backend()
        if may_launch(x.device, backend):
            factors = (magnitude, norm, bias, norms)
            fused = scaled_linear(x, weight, lora_a, lora_b, scaling, *factors, backend, copy_input)
            if fused is not None:
                return fused
    y = lora_linear(x, weight, lora_a, lora_b, scaling, backend=backend, copy_input=copy_input)
    if bias is not None and bias.dtype != y.dtype:  # by autocast
        bias = bias.to(y.dtype)
    if torchs_own:
        return scaled(y, magnitude / norm, bias)
    trains = lora_a.requires_grad or lora_b.requires_grad
    return ScaledColumns.apply(y, magnitude, norm, bias, norms if trains else None)


def _needs_torchs_own() -> bool:
    """Whether something looks on that can follow torch's operators alone."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


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
