"""What torch's tools know of the ops: their FLOPs, their decomposition into ATen, the derivative of the backward op."""

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.counts import count_fallback
from fastlora.differentiable import dropped, gradients
from fastlora.philox import drop_mask
from fastlora.problem import Needs, split_scaling
from fastlora.rows import flat, in_rows

_COUNTER = "torch.utils.flop_counter"


def decompositions() -> dict:
    """The ops in terms of ATen, for ``ExportedProgram.run_decompositions``::

    table = torch.export.default_decompositions()
    table.update(fastlora.decompositions())
    program = program.run_decompositions(table)
    """
    ops = torch.ops.fastlora
    return {ops.lora_forward.default: _forward_in_aten, ops.lora_backward.default: _backward_in_aten}


def register_tools(library: torch.library.Library) -> None:
    """Registers all of it for the ops that ``library`` defines."""
    torch.library.register_autograd(
        "fastlora::lora_backward", _second_gradients, setup_context=_save_operands, lib=library
    )
    # The older kind of vmap: is_grads_batched, and functional.jacobian and hessian where they are vectorized.
    library.impl("lora_backward", _backward_of_a_batch, "Batched")
    formulas: dict[str, Callable[..., int]] = {
        "lora_forward": _forward_flops,
        "lora_backward": _backward_flops,
        "lora_forward_quantised": _quantised_forward_flops,
        "lora_backward_quantised": _quantised_backward_flops,
    }
    register_flops(formulas)


def register_flops(formulas: dict[str, Callable[..., int]]) -> None:
    """Registers formulas by the name of a fastlora op: functions of its arguments, with shapes for tensors."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER], formulas)
    else:
        sys.meta_path.insert(0, _AfterImport(formulas))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers the FLOPs as soon as torch's counter is imported, and does not import it, since it imports Triton."""

    def __init__(self, formulas: dict[str, Callable[..., int]]):
        self.formulas = formulas

    def find_spec(self, name, path, target=None):
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(name)  # by the next of these, where there is one
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _register(module, self.formulas)

        spec.loader.exec_module = exec_module
        return spec


def _register(counter, formulas) -> None:
    for name, formula in formulas.items():
        counter.register_flop_formula(getattr(torch.ops.fastlora, name))(formula)


def grouped_forward_flops(x_shape, _, a_shape, b_shape, *rest, **__) -> int:
    """As if each row had a segment with a weight and an adapter: which do is known on the device alone."""
    return _forward_flops(x_shape, (b_shape[1], x_shape[1]), a_shape[1:], *rest)


def grouped_backward_flops(dy_shape, x_shape, _, a_shape, b_shape, *rest, **__) -> int:
    """Likewise."""
    return _backward_flops(dy_shape, x_shape, (dy_shape[1], a_shape[2]), a_shape[1:], b_shape, *rest)


def _forward_flops(x_shape, weight_shape, a_shape, *_, **__) -> int:
    m, (n, k), r = math.prod(x_shape[:-1]), weight_shape, a_shape[0]
    return 2 * m * (n * k + r * (k + n))


def _backward_flops(dy_shape, _, weight_shape, a_shape, *rest, **__) -> int:
    m, (n, k), r = math.prod(dy_shape[:-1]), weight_shape, a_shape[0]
    need_dx, need_da, need_db, _ = rest[-2]
    shrink = n * r if need_dx or need_da else 0
    return 2 * m * (shrink + (n * k + r * k if need_dx else 0) + (r * k if need_da else 0) + (n * r if need_db else 0))


def _quantised_forward_flops(x_shape, packed, name, numbers, dtype, *rest, **__) -> int:
    return _forward_flops(x_shape, numbers[:2], *rest)


def _quantised_backward_flops(dy_shape, x_shape, packed, name, numbers, dtype, *rest, **__) -> int:
    return _backward_flops(dy_shape, x_shape, numbers[:2], *rest)


def _forward_in_aten(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, backend):
    if seed is not None and type(seed) is not Tensor:  # in a graph, where it has no value
        raise ValueError("a program with active dropout has no form in plain ATen: export it after model.eval()")
    rows = flat(x)
    drop = None if seed is None else drop_mask(seed, dropout_p, rows.shape[0], rows.shape[1], x.device)
    in_s, on_branch = split_scaling(scaling, x.dtype)
    s = F.linear(dropped(rows, drop, dropout_p), lora_a.to(x.dtype)) * in_s
    branch = F.linear(s, lora_b.to(x.dtype)) * on_branch
    return F.linear(x, weight, bias) + branch.view(*x.shape[:-1], weight.shape[0]), s


def _backward_in_aten(dy, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed, needs, backend):
    computed = in_rows(gradients, dy, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed, Needs(*needs))
    return [gradient for gradient in computed if gradient is not None]


def _backward_of_a_batch(*args):
    count_fallback("vectorized backward")
    return _backward_in_aten(*args)


def _save_operands(ctx, inputs, output):
    dy, x, weight, lora_a, lora_b, s, *ctx.constants, seed, needs, _ = inputs
    ctx.save_for_backward(dy, x, weight, lora_a, lora_b, s, seed)
    ctx.needs = needs


def _second_gradients(ctx, grads: list[Tensor]):
    """The backward op's own gradients, of an expression in differentiable operators."""
    *operands, seed = ctx.saved_tensors
    wanted = [t for t, need in zip(operands, ctx.needs_input_grad, strict=False) if need]
    with torch.enable_grad():
        scaling, dropout_p = ctx.constants
        outputs = _backward_in_aten(*operands, scaling, dropout_p, seed, ctx.needs, None)  # type: ignore[call-arg]
    computed = iter(
        torch.autograd.grad(outputs, wanted, grads, create_graph=torch.is_grad_enabled(), allow_unused=True)
    )
    return tuple(next(computed) if need else None for need in ctx.needs_input_grad)
