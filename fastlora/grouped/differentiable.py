"""The layer on rows in segments by torch's own operators, segment by segment: what can be differentiated again.

For transforms of ``torch.func``, forward-mode AD and gradients of gradients. It reads on the host where segments end.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.philox import drop_mask, inverse_keep
from fastlora.problem import Needs
from fastlora.segments import NO_ADAPTER, GroupedBackward, GroupedForward, read_ends, read_indices


def layer(operands: GroupedForward) -> Tensor:
    """Y [M, N] as a function of x, A, B and bias. Without a seed, torch draws the mask, as ``vmap`` needs."""
    x, weight, lora_a, lora_b, bias, _, _, segments, transposed, dropout_p, seed = operands
    m = x.shape[0]
    ends = read_ends(segments, m)
    experts = read_indices("experts", segments.experts, weight.shape[0], len(ends))
    adapters = read_indices("adapters", segments.adapters, lora_a.shape[0], len(ends), NO_ADAPTER)
    seen = x
    if dropout_p > 0.0 and seed is None:
        seen = F.dropout(x, dropout_p)
    elif dropout_p > 0.0:
        drop = drop_mask(seed, dropout_p, m, x.shape[1], x.device)  # type: ignore[arg-type]
        seen = x.masked_fill(drop, 0.0) * inverse_keep(dropout_p)
    pieces, start = [], 0
    for end, expert, adapter in zip(ends, experts, adapters, strict=True):
        matrix = weight[expert].to(x.dtype)
        y = x[start:end] @ (matrix if transposed else matrix.t())
        if bias is not None:
            y = y + (bias if bias.dim() == 1 else bias[expert])
        if adapter != NO_ADAPTER:
            scaling = operands.scaling if operands.scalings is None else operands.scalings[adapter].to(x.dtype)
            shrunk = seen[start:end] @ lora_a[adapter].to(x.dtype).t()
            y = y + scaling * (shrunk @ lora_b[adapter].to(x.dtype).t())
        pieces.append(y)
        start = end
    pieces.append(x.new_zeros(m - start, weight.shape[2 if transposed else 1]))
    return torch.cat(pieces)


def gradients(operands: GroupedBackward, bias_shape: torch.Size | None, needs: Needs) -> list[Tensor]:
    """The gradients that ``needs`` names, as functions of every operand that they depend on.

    Raises:
        RuntimeError: dB is asked for and x was not saved for it, since A is frozen.
    """
    if operands.x is None and needs.db:
        raise RuntimeError(
            "grouped_lora_linear does not differentiate the gradient of lora_b (create_graph=True) where lora_a is "
            "frozen: let lora_a require a gradient as well"
        )
    dy = operands.dy
    x = operands.x
    if x is None:  # of which dX and dbias are no functions
        x = dy.new_zeros(dy.shape[0], operands.lora_a.shape[2], requires_grad=True)
    with torch.enable_grad(), torch.autocast(dy.device.type, enabled=False):
        bias = None if bias_shape is None else dy.new_zeros(bias_shape, requires_grad=True)
        y = layer(
            GroupedForward(
                x,
                operands.weight,
                operands.lora_a,
                operands.lora_b,
                bias,
                operands.scaling,
                operands.scalings,
                operands.segments,
                operands.transposed,
                operands.dropout_p,
                operands.seed,
            )
        )
        sources = (x, operands.lora_a, operands.lora_b, bias)
        wanted = [source for source, need in zip(sources, needs, strict=True) if need and source is not None]
        found = torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]
