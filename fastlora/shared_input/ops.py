"""The differentiable projections of one input: the autograd.Function over them, and ``lora_linears``."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastlora.checks import as_number, check_arguments, check_dropout, check_types, frozen_weight_reason
from fastlora.counts import count_fallback
from fastlora.differentiable import backward_reason, linked, transform_reason
from fastlora.differentiable import gradients as differentiable_gradients
from fastlora.ops import lora_linear
from fastlora.philox import draw_seed
from fastlora.problem import Gradients, Needs
from fastlora.projections import NO_GRADIENTS
from fastlora.quantised_weight import QuantisedWeight, is_packed
from fastlora.rows import flat
from fastlora.saved_tensors import saved_tensors
from fastlora.selection import environment_backend
from fastlora.shared_input import compute

DISPATCH_MODE = "a dispatch mode"

PLAIN = frozenset((torch.nn.Parameter, Tensor))  # subclasses of Tensor behave as they like
_TENSORS = 4  # of one projection among a node's inputs: weight, lora_a, lora_b, bias
_NONE_NEEDED = Needs(False, False, False, False)

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # of the older kind of vmap


def alone_reason() -> str | None:
    """What goes on around a call in which each projection has to be a call of its own, or None."""
    return DISPATCH_MODE if _dispatch_modes() else transform_reason()


def _operands_reason(x: Tensor, projections: list[tuple]) -> str | None:
    """Why these operands cannot be of one node, or None."""
    for tensor in (x, *(tensor for projection in projections for tensor in projection[:_TENSORS])):
        if type(tensor) not in PLAIN and tensor is not None:
            return f"a {type(tensor).__name__}"
    return "a nested tensor" if x.is_nested else None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of x and the weights, or None where it leaves them as they are."""
    device_type = "cpu" if x.is_cpu else x.device.type
    # torch refuses to say for "meta", where shapes alone are computed.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device_type)


def checked(x: Tensor, projection: tuple, dtype: torch.dtype | None) -> tuple:
    """The fields of a Projection without its seed, as they are computed with: cast where autocast says so.

    Args:
        x: [..., K], cast already.
        projection: its fields, whose numbers have been checked.
        dtype: of ``autocast_dtype``.

    Raises:
        ValueError, TypeError: as for ``lora_linear``.
    """
    weight, lora_a, lora_b, bias, scaling, dropout_p = projection
    if dtype is not None:
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        lora_a, lora_b = (t if t is None or t.dtype == torch.float32 else t.to(dtype) for t in (lora_a, lora_b))
        projection = weight, lora_a, lora_b, bias, scaling, dropout_p
    if lora_a is not None and lora_b is not None:
        check_arguments(x, weight, lora_a, lora_b, bias)
    else:
        _check_base(x, weight, lora_a, lora_b, bias)
    if weight.requires_grad and _is_grad_enabled():
        raise ValueError(frozen_weight_reason(weight))
    return projection


def _check_base(x: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, bias: Tensor | None) -> None:
    """Raises unless this is a projection without an adapter that fits x."""
    if lora_a is not None or lora_b is not None:
        raise ValueError("lora_a and lora_b must both be tensors, or both None for a projection without an adapter")
    fits = x.dim() and weight.dim() == 2 and weight.shape[1] == x.shape[-1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        given = f"x {list(x.shape)}, weight {list(weight.shape)}"
        given += "" if bias is None else f", bias {list(bias.shape)}"
        raise ValueError(f"shapes do not fit together: expected x [..., K], weight [N, K], bias [N]; got {given}")
    check_types(x.dtype, weight, weight, weight, bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"x is on {x.device} but {name} is on {tensor.device}; move them to one device")


def together(x: Tensor, projections: Sequence[tuple], backend: str | None, copy_input: bool) -> Sequence[Tensor]:
    """Y [..., N] of each projection, by one node of autograd.

    Args:
        x: [..., K].
        projections: ``checked`` with it. Seeds are drawn here, in their order.
        backend: one to insist on, or None.
        copy_input: save a copy of x, not x itself.
    """
    seeded: list[tuple] = []
    tensors: list[Tensor | None] = []
    for projection in projections:
        _, lora_a, _, _, _, dropout_p = projection
        seeded += ((*projection, draw_seed(x.device) if dropout_p > 0.0 and lora_a is not None else None),)
        tensors += projection[:_TENSORS]
    if not _is_grad_enabled():
        return _outputs(x, seeded, backend)[0]
    if copy_input and any(a is not None and a.requires_grad for a in tensors[1::_TENSORS]):
        x = x.clone()
    return _apply(x, seeded, backend, *tensors)


def _outputs(x: Tensor, projections: list[tuple], backend: str | None):
    """Y [..., N] and S [M, R] of each projection of x [..., K]."""
    if x.dim() == 2:
        return compute.forward(x, projections, backend)
    ys, ss = compute.forward(flat(x), projections, backend)
    lead = x.shape[:-1]
    # A tracked view made in here could not be modified in place by what follows the layer.
    return [torch.ops.aten._unsafe_view.default(y, [*lead, y.shape[1]]) for y in ys], ss


class SharedInputFunction(torch.autograd.Function):
    """Several LoRA layers on one x as one autograd node: one dX, whatever their number.

    ``apply(x, projections, backend, *tensors)`` with checked arguments: the fields of each Projection, and then weight,
    lora_a, lora_b and bias of each once more, for autograd to see; use :func:`lora_linears`. It saves x once, and each
    S, only where a gradient reads them; weights and factors go by reference.
    """

    @staticmethod
    def forward(ctx, x, projections, backend, *tensors):
        ys, ss = _outputs(x, projections, backend)
        need_dx, _, _, *need = ctx.needs_input_grad
        need_da = True in need[1::_TENSORS]
        ctx.set_materialize_grads(False)
        if not need_dx:
            _mark_constants(ctx, ys, need)
        saved: list[Tensor | None] = [x if need_da else None]
        numbers: list[tuple[float, float]] = []
        for p, s, need_db in zip(projections, ss, need[2::_TENSORS], strict=True):
            weight, lora_a, lora_b, _, scaling, dropout_p, seed = p
            if not need_db:
                s = None
            elif need_dx and not need_da:
                s = linked(s, x, lora_a, scaling, dropout_p, seed)
            saved += (weight, lora_a, lora_b, seed, s)
            numbers += ((scaling, dropout_p),)
        ctx.save_for_backward(*saved)
        ctx.numbers, ctx.backend = numbers, backend
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        return _gradients(ctx, dys)


# As of LoRALinearFunction: no transform of torch.func is active where this is called.
_apply = super(torch.autograd.Function, SharedInputFunction).apply


def _mark_constants(ctx, ys: Sequence[Tensor], need: list[bool]) -> None:
    """Outputs that depend on nothing that trains are no more differentiable than they would be alone."""
    of_each = [True in need[i : i + _TENSORS] for i in range(0, len(need), _TENSORS)]
    ctx.mark_non_differentiable(*(y for y, needed in zip(ys, of_each, strict=True) if not needed))


def _gradients(ctx, dys: tuple[Tensor | None, ...]):
    """What a node returns for each input, whatever autocast surrounds the call of backward."""
    need_dx, _, _, *need = ctx.needs_input_grad
    given = None
    for dy in dys:
        given = dy if given is None else given
    if given is None:
        return (None,) * (3 + len(need))
    device_type = "cpu" if given.is_cpu else given.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return _gradients(ctx, dys)
    x, *saved = saved_tensors(ctx)
    projections, ss, needs = [], [], []
    for i, (dy, (scaling, dropout_p)) in enumerate(zip(dys, ctx.numbers, strict=True)):
        weight, lora_a, lora_b, seed, s = saved[5 * i : 5 * i + 5]
        projections.append((weight, lora_a, lora_b, None, scaling, dropout_p, seed))
        ss.append(s)
        _, need_da, need_db, need_dbias = need[_TENSORS * i : _TENSORS * (i + 1)]
        needs.append(_NONE_NEEDED if dy is None else Needs(need_dx, need_da, need_db, need_dbias))
    lead = given.shape[:-1]
    if given.dim() != 2:
        dys = tuple([None if dy is None else flat(dy) for dy in dys])
        x = None if x is None else flat(x)
    reason = _backward_reason(dys, given.is_cpu)
    if reason is None:
        dx, others = compute.backward(dys, x, projections, ss, needs, ctx.backend)
    else:
        count_fallback(reason)
        dx, others = _differentiable(dys, x, projections, ss, needs)
    found = [dx if dx is None or given.dim() == 2 else dx.view(*lead, dx.shape[1]), None, None]
    for _, da, db, dbias in others:
        found += (None, da, db, dbias)
    return tuple(found)


def _backward_reason(dys: tuple[Tensor | None, ...], on_cpu: bool) -> str | None:
    """Why a backward has to be made of torch's own operators, or None."""
    reason = backward_reason()
    if reason is None and any(dy is not None and _is_batched(dy) for dy in dys):
        return "vectorized backward"
    if reason is None and not on_cpu and _dispatch_modes():
        return DISPATCH_MODE  # which sees no kernel
    return reason


def _differentiable(dys, x, projections, ss, needs) -> tuple[Tensor | None, list[Gradients]]:
    """The gradients made of torch's own operators, which can be differentiated again."""
    dx, others = None, []
    for dy, (weight, lora_a, lora_b, _, *numbers), s, need in zip(dys, projections, ss, needs, strict=True):
        if dy is None:
            found = NO_GRADIENTS
        elif lora_a is None:
            found = Gradients(dy @ weight if need.dx else None, None, None, dy.sum(0) if need.dbias else None)
        else:
            s = s if x is None else None  # S of x and A: a constant would hide that dB depends on them
            found = differentiable_gradients(dy, x, weight, lora_a, lora_b, s, *numbers, need)  # type: ignore[call-arg]
        if found.dx is not None:
            dx = found.dx if dx is None else dx + found.dx
        others.append(found)
    return dx, others


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor | QuantisedWeight],
    lora_as: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor | None],
    scalings: Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    *,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
    backend: str | None = None,
    copy_input: bool = False,
) -> list[Tensor]:
    """Several LoRA layers on one x, as q, k and v of attention, or gate and up of an MLP: one autograd node, x saved
    once, one dX.

    Output i is ``x·weights[i]ᵀ + scalings[i]·(dropout_i(x)·lora_as[i]ᵀ)·lora_bs[i]ᵀ + biases[i]``, as ``lora_linear``
    has it.

    Args:
        x: input [..., in_features]; float16, bfloat16, float32 or (in plain PyTorch) float64.
        weights: frozen weights [out_features_i, in_features] of x's dtype; none may require a gradient.
        lora_as: [r_i, in_features] each, x's dtype, or float32 over a 16-bit x; None for a projection without an
            adapter.
        lora_bs: [out_features_i, r_i], likewise.
        scalings: factor of each low-rank branch; not read where there is no adapter.
        biases: [out_features_i] of x's dtype or None each, trainable if they require a gradient; None for no bias at
            all.
        dropout_p: probability of dropping an element of x in front of a branch: one for all, or one each. Each
            projection has a mask of its own; seeds are drawn in order, as calls of ``lora_linear`` would draw them.
        training: whether dropout applies.
        backend: "cuda", "triton", "composed" or "reference" to insist on one; None for the best that serves the call.
        copy_input: save a copy of x for the backward, not x itself, so that x may be modified in place after the call.

    Returns:
        Tensors [..., out_features_i] of x's dtype, none a view of another. An output that nothing depends on costs the
        backward nothing, and its parameters get no gradient. On a GPU one launch computes them all, and one their
        gradients; where no backend has such a launch (more than eight projections, weights as [K, N], say), each is a
        launch of its own, and the reason is counted as a fallback.

        Under ``torch.compile``, a transform of ``torch.func``, forward-mode AD, ``torch.jit.trace`` or a dispatch mode,
        and over tensors that are no plain ones (quantised weights, nested tensors, DTensors), each projection is a
        call of ``lora_linear``, counted as a fallback (except within a graph). Two backward passes through different
        outputs need ``retain_graph=True`` in the first: they are outputs of one node.

    Raises:
        ValueError: lists of different lengths, or empty; shapes, devices or dropout_p do not fit, a weight requires a
            gradient, one of lora_a and lora_b alone is None, or the backend insisted on cannot serve the call.
        TypeError: dtypes do not fit, or a scaling is no number.
        RuntimeError: in backward, where x was modified in place after the call and ``copy_input`` is not set.

    Source:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, equation 3, for each projection.
    """
    projections = _as_projections(weights, lora_as, lora_bs, scalings, biases, dropout_p, training)
    compiles = _is_compiling()
    reason = None if compiles else alone_reason() or _operands_reason(x, projections)
    if compiles or reason is not None:
        if reason is not None:
            count_fallback(f"shared input: {reason}")
        return [_alone(x, p, i, backend, copy_input) for i, p in enumerate(projections)]
    dtype = autocast_dtype(x)
    given, x = x, x if dtype is None else x.to(dtype)
    for i, projection in enumerate(projections):
        try:
            projections[i] = checked(x, projection, dtype)
        except (ValueError, TypeError) as error:
            raise type(error)(f"projection {i}: {error}") from None
    if backend is None:
        backend = environment_backend()
    return list(together(x, projections, backend, copy_input and x is given))


def _as_projections(weights, lora_as, lora_bs, scalings, biases, dropout_p, training) -> list[tuple]:
    """The fields of a Projection without its seed, of each; lengths and numbers are checked."""
    count = len(weights)
    biases = [None] * count if biases is None else biases
    dropouts = [dropout_p] * count if isinstance(dropout_p, int | float) else dropout_p
    lists = {"lora_as": lora_as, "lora_bs": lora_bs, "scalings": scalings, "biases": biases, "dropout_p": dropouts}
    odd = [f"{name} {len(values)}" for name, values in lists.items() if len(values) != count]
    if odd or not count:
        raise ValueError(
            f"lora_linears needs one entry for each of at least one projection in every list; got weights {count}"
            + "".join(f", {each}" for each in odd)
        )
    found = []
    for i, (weight, a, b, scaling, bias, p) in enumerate(
        zip(weights, lora_as, lora_bs, scalings, biases, dropouts, strict=True)
    ):
        scaling = 1.0 if a is None and b is None else as_number(f"scalings[{i}]", scaling)
        check_dropout(p)
        found.append((weight, a, b, bias, scaling, float(p) if training else 0.0))
    return found


def _alone(x: Tensor, projection: tuple, i: int, backend: str | None, copy_input: bool) -> Tensor:
    weight, lora_a, lora_b, bias, scaling, dropout_p = projection
    if lora_a is not None and lora_b is not None:
        return lora_linear(
            x, weight, lora_a, lora_b, scaling, bias, dropout_p=dropout_p, backend=backend, copy_input=copy_input
        )
    if is_packed(weight):
        raise TypeError(f"projection {i}: without an adapter its weight must be dense, got {type(weight).__name__}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"projection {i}: {frozen_weight_reason(weight)}")
    if lora_a is not None or lora_b is not None:
        _check_base(x, weight, lora_a, lora_b, bias)
    return linear(x, weight, bias)
