"""No variant is timed before its output and gradients are right."""

import torch
from torch import Tensor

from fastlora.bench.cases import LayerCase
from fastlora.bench.peers import SCALING, Layer, LayerTensors, Peer, torch_mask

SEED = 1234
# Relative Frobenius error against fp64. Rounding the intermediates leaves about eps / 2; a missing branch leaves 0.8, a
# missing 1 / (1 - p) at p = 0.1 still 0.08.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}


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
    dropout_p, mask = case.dropout, None
    evaluated = bool(dropout_p) and peer.mask is None and layer.module is not None
    if evaluated:  # nobody knows its mask: check it with dropout off
        layer.module.eval()
        dropout_p = 0.0
    elif dropout_p and peer.mask is None:
        return
    layer.load(tensors)
    x = tensors.x.detach().requires_grad_(True)
    if dropout_p:
        mask = _mask(peer, case, tensors)
    torch.manual_seed(SEED)
    y = layer.call(x)
    trained = layer.trained
    found = dict(zip(("dx", "lora_a", "lora_b"), torch.autograd.grad(y, [x, *trained], tensors.dy), strict=False))
    found["y"] = y.detach()
    if evaluated:
        layer.module.train()
    for name, wanted in expected(tensors, mask, dropout_p, bool(trained)).items():
        value = found[name].double()
        if layer.transposed and name.startswith("lora"):
            value = value.t()
        error = ((value - wanted).norm() / wanted.norm()).item()
        if not error <= TOLERANCE[case.torch_dtype]:
            raise WrongResult(
                f"{peer.name}: {name} is off by {error:.2e} of its norm at {case.label}; "
                f"rounding explains {TOLERANCE[case.torch_dtype]:.0e}"
            )


def _mask(peer: Peer, case: LayerCase, tensors: LayerTensors) -> Tensor:
    """The mask that the variant draws after torch.manual_seed(SEED)."""
    torch.manual_seed(SEED)
    if peer.mask == "torch":
        return torch_mask(tensors.x, case.dropout)
    from fastlora.philox import draw_seed, keep_mask

    return keep_mask(draw_seed(tensors.x.device), case.dropout, case.m, case.k, tensors.x.device)
