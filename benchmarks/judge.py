"""Whether a launch's results are right, before it is timed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fastlora.bench.cases import LayerCase
from fastlora.bench.correctness import TOLERANCE, expected
from fastlora.bench.peers import SCALING, LayerTensors

NORM_LIMIT = 5e-3  # of a 16-bit result: one rounding leaves 1.7e-3, those of the plain composition 3e-3
EAGER_FACTOR = 1.25  # of the plain composition's largest error, plus one unit in the last place of the largest value


_ALLOCATING = {
    torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty, torch.Tensor.new_empty_strided,
}  # fmt: skip


class NanFilled(TorchFunctionMode):
    """Within it what is allocated is full of NaN: an element that is not written cannot pass for a number."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _ALLOCATING and result.is_floating_point():
            result.fill_(float("nan"))
        return result


def composed(tensors: LayerTensors) -> dict[str, Tensor]:
    """The layer by plain products in the tensors' own dtype, by the names of fastlora.bench.correctness.expected: its
    errors are the yardstick."""
    t = tensors
    s, ds = functional.linear(t.x, t.lora_a) * SCALING, t.dy @ t.lora_b * SCALING
    return {
        "y": functional.linear(t.x, t.weight) + functional.linear(s, t.lora_b),
        "dx": t.dy @ t.weight + ds @ t.lora_a,
        "lora_a": ds.t() @ t.x,
        "lora_b": t.dy.t() @ s,
    }


class Judge:
    """Compares launches with fp64 on one set of inputs; what they are compared with is computed once."""

    def __init__(self, case: LayerCase, tensors: LayerTensors):
        self.case, self.tensors = case, tensors
        self.wanted = expected(tensors, None, 0.0, lora=True)
        eager = composed(tensors)
        self.eager = {name: (eager[name].double() - value).abs().max() for name, value in self.wanted.items()}

    def verdict(self, launch: Callable[[LayerTensors], dict[str, Tensor]]) -> dict:
        """``error``, the largest relative Frobenius error of the results; ``largest``, the largest error of an element
        as a share of what is allowed; ``failure``: None, or what is wrong.

        The norm sees what is wrong by a little everywhere; a single wrong block of a large result passes it, and is
        what the largest element shows.
        """
        with NanFilled():
            found = launch(self.tensors)
        eps = torch.finfo(self.case.torch_dtype).eps
        limit = min(TOLERANCE[self.case.torch_dtype], NORM_LIMIT)
        verdict: dict = {"error": 0.0, "largest": 0.0, "failure": None}
        for name, result in found.items():
            wanted = self.wanted[name]
            difference = (result.double() - wanted).abs()
            unwritten = int(difference.isnan().sum())
            if unwritten:
                return {"failure": f"wrong: {name} has {unwritten} NaN of {difference.numel()}"}
            norm = (difference.norm() / wanted.norm()).item()
            allowed = EAGER_FACTOR * self.eager[name] + eps * wanted.abs().max()
            largest = (difference.max() / allowed).item()
            verdict["error"], verdict["largest"] = max(verdict["error"], norm), max(verdict["largest"], largest)
            if not norm <= limit:
                verdict["failure"] = f"wrong: {name} is off by {norm:.2e} of its norm"
            elif not largest <= 1.0:
                at = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
                verdict["failure"] = f"wrong: {name} is off by {difference.max():.3g} at {at}, {allowed:.3g} is allowed"
        return verdict
