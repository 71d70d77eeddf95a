"""A LoRA layer over a quantised base weight, decoded each way: on a GPU by tiles of the one launch that multiplies with
it, else by its library in front of a dense launch, into one buffer that is freed.

What is saved for backward is the packed weight, by reference, and x and S as over a dense weight: nothing of N×K. On a
GPU a launch asks for the kernels that decode (``one_launch.packed_forward``); where they do not serve the call, or
another backend is insisted on, the library decodes, which is counted as a fallback, beside the reason.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastlora import dispatch, one_launch
from fastlora.counts import count_fallback
from fastlora.differentiable import backward_reason, linked
from fastlora.differentiable import gradients as differentiable_gradients
from fastlora.problem import Gradients, Needs
from fastlora.quantised_weight import QuantisedWeight
from fastlora.rows import flat, in_rows
from fastlora.selection import environment_backend

_ARGUMENTS = "Tensor[] packed, str format, int[] numbers, ScalarType dtype"  # a QuantisedWeight, see _as_arguments
_library = torch.library.Library("fastlora", "FRAGMENT")
_library.define(
    f"lora_forward_quantised(Tensor x, {_ARGUMENTS}, Tensor lora_a, Tensor lora_b, Tensor? bias, float scaling,"
    " float dropout_p, Tensor? seed, str? backend) -> (Tensor y, Tensor s)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    f"lora_backward_quantised(Tensor dy, Tensor? x, {_ARGUMENTS}, Tensor lora_a, Tensor lora_b, Tensor? s,"
    " float scaling, float dropout_p, Tensor? seed, bool[] needs, str? backend) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


def _as_arguments(weight: QuantisedWeight) -> tuple[list[Tensor], str, list[int], torch.dtype]:
    return list(weight.tensors), weight.format, [*weight.shape, *weight.block], weight.dtype


def _as_weight(packed: Any, name: str, numbers: Any, dtype: torch.dtype) -> QuantisedWeight:
    n, k, *block = numbers
    return QuantisedWeight(name, tuple(packed), (n, k), dtype, (block[0], block[1]))


def _decoded(weight: QuantisedWeight) -> Tensor:
    """The dense weight that a launch reads; counted where a kernel should have decoded it."""
    if weight.device.type != "cpu":
        count_fallback(f"{weight.format} base: decoded in front of the launch")
    return weight.dequantize()


def _forward(x: Tensor, weight: QuantisedWeight, *rest: Any) -> tuple[Tensor, Tensor]:
    *operands, backend = rest
    rows = flat(x)
    made = one_launch.packed_forward((rows, weight, *operands), backend)
    y, s = dispatch.forward((rows, _decoded(weight), *operands), backend) if made is None else made
    # A tracked view made in here could not be modified in place by what follows the layer.
    return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[1]]), s


def _backward(dy: Tensor, x: Tensor | None, weight: QuantisedWeight, *rest: Any) -> Gradients:
    """The gradients, differentiable ones where that is the ``reason`` that comes last."""
    *operands, needs, backend, reason = rest
    if reason is not None:
        return in_rows(differentiable_gradients, dy, x, _dense(dy, weight, needs), *operands, needs)

    def gradients(dy, x, weight, *operands):
        made = one_launch.packed_backward((dy, x, weight, *operands), needs, backend)
        if made is not None:
            return made
        return dispatch.backward((dy, x, _dense(dy, weight, needs), *operands), needs, backend)

    return in_rows(gradients, dy, x, weight, *operands)


def _dense(dy: Tensor, weight: QuantisedWeight, needs: Needs) -> Tensor:
    """dX alone reads values of the weight; the rest needs its shape. (An expanded scalar would be made contiguous.)"""
    return _decoded(weight) if needs.dx else dy.new_empty(weight.shape)


def _forward_op(x, packed, name, numbers, dtype, *rest):
    *operands, backend = rest
    y, s = _forward(x, _as_weight(packed, name, numbers, dtype), *operands, backend or environment_backend())
    return y, s.contiguous()  # as its fake says


def _backward_op(dy, x, packed, name, numbers, dtype, *rest):
    *operands, needs, backend = rest
    weight = _as_weight(packed, name, numbers, dtype)
    gradients = _backward(dy, x, weight, *operands, Needs(*needs), backend or environment_backend(), None)
    return [gradient.contiguous() for gradient in gradients if gradient is not None]


def _fake_forward(x, packed, name, numbers, dtype, lora_a, *rest):
    return x.new_empty(*x.shape[:-1], numbers[0]), x.new_empty(math.prod(x.shape[:-1]), lora_a.shape[0])


def _fake_backward(dy, x, packed, name, numbers, dtype, lora_a, lora_b, s, scaling, dropout_p, seed, needs, backend):
    shapes = ((*dy.shape[:-1], numbers[1]), lora_a.shape, lora_b.shape, (numbers[0],))
    dtypes = (dy.dtype, lora_a.dtype, lora_b.dtype, dy.dtype)
    return [dy.new_empty(z, dtype=t) for z, t, need in zip(shapes, dtypes, needs, strict=True) if need]


def _save(ctx, needs, s, x, weight, lora_a, lora_b, scaling, dropout_p, seed, backend):
    """Keeps what the backward reads, each only where a gradient does; ``needs`` is what the node has to compute."""
    if not needs.db:
        s = None
    elif needs.dx and not needs.da and not torch.compiler.is_compiling():
        s = linked(s, x, lora_a, scaling, dropout_p, seed)
    ctx.save_for_backward(x if needs.da else None, lora_a, lora_b, s, seed, *weight.tensors)
    ctx.description = _as_arguments(weight)[1:]
    ctx.needs, ctx.scaling, ctx.dropout_p, ctx.backend = needs, scaling, dropout_p, backend


def _gradients(ctx, dy, skips_op) -> Gradients:
    """What a node returns, whatever autocast surrounds the call of backward."""
    device_type = dy.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return _gradients(ctx, dy, skips_op)
    x, lora_a, lora_b, s, seed, *packed = _saved(ctx)
    reason = backward_reason()
    if reason is not None:
        count_fallback(reason)
        s = s if x is None else None  # S of x and A: a constant would hide that dB depends on them
    operands = (lora_a, lora_b, s, ctx.scaling, ctx.dropout_p, seed)
    if reason is not None or skips_op:
        weight = _as_weight(packed, *ctx.description)
        return _backward(dy, x, weight, *operands, ctx.needs, ctx.backend, reason)
    call = torch.ops.fastlora.lora_backward_quantised.default
    computed = iter(call(dy, x, packed, *ctx.description, *operands, ctx.needs, ctx.backend))
    return Gradients(*(next(computed) if need else None for need in ctx.needs))


def _saved(ctx) -> tuple[Tensor | None, ...]:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"a tensor that a LoRA layer over a {ctx.description[0]} weight has saved for its backward was modified in "
            "place after its forward. Where it is the layer's input: write x = x + ... for x += ..., or give "
            "copy_input=True, and the layer saves a copy. Where it is the weight: run forward and backward, then merge "
            "or load"
        ) from error


class QuantisedLoRAFunction(torch.autograd.Function):
    """``LoRALinearFunction`` over a quantised weight; it saves its packed tensors."""

    @staticmethod
    def forward(ctx, x, lora_a, lora_b, bias, weight, scaling, dropout_p, seed, backend):
        rest = (lora_a, lora_b, bias, scaling, dropout_p, seed, backend)
        if _skips_op(x):
            y, s = _forward(x, weight, *rest)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                y, s = torch.ops.fastlora.lora_forward_quantised.default(x, *_as_arguments(weight), *rest)
        needs = Needs(*ctx.needs_input_grad[:4])
        _save(ctx, needs, s, x, weight, lora_a, lora_b, scaling, dropout_p, seed, backend)
        return y

    @staticmethod
    def backward(ctx, dy):
        return (*_gradients(ctx, dy, _skips_op(dy)), None, None, None, None, None)


def _skips_op(tensor: Tensor) -> bool:
    """As over a dense weight, see ops._skips_ops."""
    return tensor.is_cpu and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()


def _setup(ctx, inputs, output):
    """What the op's own node keeps, which compiled and exported graphs train through."""
    x, packed, name, numbers, dtype, lora_a, lora_b, _, scaling, dropout_p, seed, backend = inputs
    y, s = output
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    wanted = ctx.needs_input_grad  # flat: one for each packed tensor
    needs = Needs(wanted[0], *wanted[len(packed) + 4 : len(packed) + 7])
    weight = _as_weight(packed, name, numbers, dtype)
    ctx.n_packed = len(packed)
    _save(ctx, needs, s, x, weight, lora_a, lora_b, scaling, dropout_p, seed, backend)


def _op_gradients(ctx, dy, _):
    dx, da, db, dbias = (None,) * 4 if dy is None else _gradients(ctx, dy, False)
    return dx, [None] * ctx.n_packed, None, None, None, da, db, dbias, None, None, None, None


for _name, _kernel, _fake in (
    ("lora_forward_quantised", _forward_op, _fake_forward),
    ("lora_backward_quantised", _backward_op, _fake_backward),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{_name}", _fake, lib=_library)
torch.library.register_autograd("fastlora::lora_forward_quantised", _op_gradients, setup_context=_setup, lib=_library)


def quantised_linear(
    x: Tensor,
    weight: QuantisedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
) -> Tensor:
    """Y [..., N] of checked arguments in one dtype; see ``fastlora.lora_linear``."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return QuantisedLoRAFunction.apply(x, lora_a, lora_b, bias, weight, scaling, dropout_p, seed, backend)
    rest = (lora_a, lora_b, bias, scaling, dropout_p, seed, backend)
    if _skips_op(x):
        return _forward(x, weight, *rest)[0]
    return torch.ops.fastlora.lora_forward_quantised.default(x, *_as_arguments(weight), *rest)[0]
