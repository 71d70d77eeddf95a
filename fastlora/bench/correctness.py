"""No variant is timed before its output and gradients are right."""

import torch
from torch import Tensor

from fastlora.bench.cases import LayerCase
from fastlora.bench.peers import SCALING, Layer, LayerTensors, Peer, torch_mask

SEED = 1234
# Relative Frobenius error against fp64. Rounding the intermediates leaves about eps / 2; a missing branch leaves 0.8, a
# missing 1 / (1 - p) at p = 0.1 still 0.08.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}

# How far the share of dropped elements may be off: standard deviations, and the rounding of p to eight random bits.
MASK_DEVIATIONS, MASK_ROUNDING = 6, 2**-9


class WrongResult(Exception):
    """A variant's output or gradient differs from the reference by more than rounding."""


def expected(tensors: LayerTensors, mask: Tensor | None, dropout_p: float, lora: bool) -> dict[str, Tensor]:
    """y, dx, da, db in fp64 on the tensors' device, by the formulas themselves."""
    x, dy, weight, a, b = (getattr(tensors, name).double() for name in ("x", "dy", "weight", "lora_a", "lora_b"))
    y, dx = x @ weight.t(), dy @ weight
    if not lora:
        return {"y": y, "dx": dx}
    keep = None if mask is None else mask.double() / (1 - dropout_p)
    dropped = x if keep is None else x * keep
    s, ds = SCALING * dropped @ a.t(), SCALING * dy @ b
    side = ds @ a
    return {
        "y": y + s @ b.t(),
        "dx": dx + (side if keep is None else side * keep),
        "lora_a": ds.t() @ dropped,
        "lora_b": dy.t() @ s,
    }


def check_variant(peer: Peer, layer: Layer, case: LayerCase, tensors: LayerTensors) -> None:
    """Runs one step of a built variant and compares it with fp64.

    Raises:
        WrongResult: naming the variant, the tensor and its error.
    """
    mask = _mask(peer, layer, case, tensors) if case.dropout and peer.kind != "frozen" else None
    found = _step(layer, tensors)
    for name, wanted in expected(layer.seen(tensors), mask, case.dropout, bool(layer.trained)).items():
        value = found[name].double()
        if layer.transposed and name.startswith("lora"):
            value = value.t()
        error = ((value - wanted).norm() / wanted.norm()).item()
        if not error <= TOLERANCE[case.torch_dtype]:
            raise WrongResult(
                f"{peer.name}: {name} is off by {error:.2e} of its norm at {case.label}; "
                f"rounding explains {TOLERANCE[case.torch_dtype]:.0e}"
            )


def _step(layer: Layer, tensors: LayerTensors) -> dict[str, Tensor]:
    """Output and gradients by the names of :func:`expected`, with the mask that follows torch.manual_seed(SEED)."""
    layer.load(tensors)
    x = tensors.x.detach().requires_grad_(True)
    torch.manual_seed(SEED)
    y = layer.call(x)
    gradients = torch.autograd.grad(y, [x, *layer.trained], tensors.dy)
    return {"y": y.detach(), **dict(zip(("dx", "lora_a", "lora_b"), gradients, strict=False))}


def _mask(peer: Peer, layer: Layer, case: LayerCase, tensors: LayerTensors) -> Tensor:
    """The mask that the variant draws after torch.manual_seed(SEED)."""
    if peer.mask is None:
        return _read_mask(peer, layer, case, tensors)
    torch.manual_seed(SEED)
    if peer.mask == "torch":
        return torch_mask(tensors.x, case.dropout)
    from fastlora.philox import draw_seed, keep_mask

    return keep_mask(draw_seed(tensors.x.device), case.dropout, case.m, case.k, tensors.x.device)


def _read_mask(peer: Peer, layer: Layer, case: LayerCase, tensors: LayerTensors) -> Tensor:
    """The mask of a variant that draws it in a way of its own, seen in its dX: with W0 = 0 and constant A, B and dY,
    dX is one constant where an element is kept and 0 where it is dropped.

    Raises:
        WrongResult: the mask does not follow torch.manual_seed, or drops another share of the elements.
    """
    probe = LayerTensors(
        x=torch.ones_like(tensors.x),
        dy=torch.ones_like(tensors.dy),
        weight=torch.zeros_like(tensors.weight),
        lora_a=torch.full_like(tensors.lora_a, 1 / case.r),
        lora_b=torch.full_like(tensors.lora_b, 1 / case.n),
    )
    mask, again = (_step(layer, probe)["dx"] != 0 for _ in range(2))
    if not torch.equal(mask, again):
        raise WrongResult(f"{peer.name}: its dropout cannot be checked, as it does not follow torch.manual_seed")
    dropped, spread = 1 - mask.double().mean().item(), (case.dropout * (1 - case.dropout) / mask.numel()) ** 0.5
    if abs(dropped - case.dropout) > MASK_DEVIATIONS * spread + MASK_ROUNDING:
        raise WrongResult(f"{peer.name}: drops {dropped:.4f} of the elements where {case.dropout:g} were asked for")
    return mask
