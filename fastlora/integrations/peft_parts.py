"""What one fused call of a PEFT layer is made of, and the parts of several active adapters made one."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.quantised_weight import QuantisedWeight
from fastlora.sharding import is_dtensor


class Parts(NamedTuple):
    """What one fused call uses. Looked up at every call: PEFT replaces weights and changes scalings in place."""

    weight: Tensor | QuantisedWeight  # [N, K]
    bias: Tensor | None  # [N]
    lora_a: Tensor  # [R, K]
    lora_b: Tensor  # [N, R]
    lora_bias: Tensor | None  # [N]
    scaling: float | Tensor
    dropout_p: float
    training: bool
    magnitude: Tensor | None = None  # [N], of DoRA
    adapter: str | None = None  # whose norms DoRA keeps
    stored: Tensor | None = None  # the weight's own tensor, of which ``weight`` may be a view


def stacked(parts: list[Parts]) -> Parts | str:
    """The parts of one adapter that computes the sum of several: their ranks stacked, A = [A₁; A₂], B = [f₁B₁, f₂B₂].

    The largest scaling stays that of the call, so that no factor fᵢ = sᵢ / s exceeds 1 and B cannot overflow. Both
    stacks are functions of the adapters' own parameters, where autograd brings their gradients back to.

    Args:
        parts: those of each adapter, over one base weight.

    Returns:
        The parts, or the reason why PEFT's forward has to serve them.
    """
    count = f"{len(parts)} active adapters"
    if any(each.magnitude is not None for each in parts):
        return f"{count} with DoRA"  # PEFT scales what the adapters before it have added
    if any(each.dropout_p > 0.0 and each.training for each in parts):
        return f"{count} with dropout"  # a mask each
    if any(is_dtensor(tensor) for each in parts for tensor in (each.weight, each.lora_a, each.lora_b)):
        return f"{count} over DTensors"
    if any(each.lora_a.dtype != each.lora_b.dtype for each in parts):
        return "lora_A and lora_B differ in dtype"
    weight = parts[0].weight
    dtypes = {each.lora_a.dtype for each in parts}
    if len(dtypes) > 1 and not (weight.dtype.itemsize == 2 and dtypes == {weight.dtype, torch.float32}):
        return f"{count} of {', '.join(sorted(map(str, dtypes)))}"
    scaling, factors = split_scalings([each.scaling for each in parts])
    lora_a = torch.cat([each.lora_a for each in parts])
    lora_b = torch.cat([scaled(each.lora_b, factor) for each, factor in zip(parts, factors, strict=True)], dim=1)
    biases = [scaled(p.lora_bias, f) for p, f in zip(parts, factors, strict=True) if p.lora_bias is not None]
    lora_bias = torch.stack([bias.to(lora_b.dtype) for bias in biases]).sum(0) if biases else None
    return Parts(weight, parts[0].bias, lora_a, lora_b, lora_bias, scaling, 0.0, False)


def split_scalings(scalings: list[float | Tensor]) -> tuple[float, list[float | Tensor]]:
    """One scaling for all, and what each adapter's B is multiplied by besides."""
    if any(isinstance(scaling, Tensor) for scaling in scalings):  # made so for hotswapping; not to be waited for
        return 1.0, scalings
    scaling = max(scalings, key=abs)  # type: ignore[arg-type]  # numbers
    if scaling == 0 or not math.isfinite(scaling):
        return 1.0, scalings
    return float(scaling), [each / scaling for each in scalings]


def scaled(tensor: Tensor, factor: float | Tensor) -> Tensor:
    return tensor if isinstance(factor, float) and factor == 1.0 else tensor * factor
