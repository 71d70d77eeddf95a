"""The error rule of this project and the cases it is applied to.

The oracle is fp64 on the same rounded inputs; "eager" is the plain ``linear`` composition in the inputs' own dtype. A
result passes where its largest and its RMS error are at most 1.25 times eager's, plus one unit in the last place of the
largest value, and where every single entry is within the bound for a sum of its length, so that small entries count
too."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastlora.philox import inverse_keep, keep_mask

NAMES = ("y", "dx", "da", "db", "dbias")


@dataclass(frozen=True)
class Case:
    """Inputs of one layer and the gradient that comes back to it."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    dy: Tensor
    scaling: float
    dropout_p: float
    seed: Tensor | None

    def to(self, dtype: torch.dtype) -> "Case":
        tensors = ("x", "weight", "lora_a", "lora_b", "bias", "dy")
        return replace(self, **{n: t.to(dtype) for n in tensors if (t := getattr(self, n)) is not None})


def draw_case(
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    *,
    dropout_p: float = 0.0,
    bias: bool = True,
    adapter_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Case:
    """Random inputs whose low-rank branch is about as large as the base product, with a scaling that is neither 0 nor
    1: a branch under the base product's rounding noise could be wrong unseen."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(dtype).to(device)

    scaling = 1.7
    return Case(
        x=normal(m, k),
        weight=normal(n, k, std=k**-0.5),
        lora_a=normal(r, k, std=k**-0.5, dtype=adapter_dtype or dtype),
        lora_b=normal(n, r, std=r**-0.5 / scaling, dtype=adapter_dtype or dtype),
        bias=normal(n) if bias else None,
        dy=normal(m, n),
        scaling=scaling,
        dropout_p=dropout_p,
        seed=torch.tensor(0x1234_5678_9ABC_DEF0 + seed) if dropout_p > 0.0 else None,
    )


def draw_integer_case(m: int, n: int, k: int, r: int, dtype: torch.dtype, *, seed: int = 0) -> Case:
    """Small sparse integers for which every product, S and result is exact in ``dtype``: the answer has one bit
    pattern."""
    generator = torch.Generator().manual_seed(seed)

    def sparse(*shape: int, density: float) -> Tensor:
        values = torch.randint(-2, 3, shape, generator=generator)
        return values * (torch.rand(shape, generator=generator) < density)

    case = Case(
        x=sparse(m, k, density=min(1.0, 24 / k)),
        weight=sparse(n, k, density=min(1.0, 48 / k)),
        lora_a=sparse(r, k, density=min(1.0, 6 / k)),
        lora_b=sparse(n, r, density=min(1.0, 3 / r)),
        bias=sparse(n, density=0.5),
        dy=sparse(m, n, density=min(1.0, 8 / n, 8 / m)),
        scaling=2.0,
        dropout_p=0.0,
        seed=None,
    ).to(torch.float64)
    for name, value in compose(case).items():
        if not torch.equal(value, value.to(dtype).double()):
            raise ValueError(f"{name} of integer case {m, n, k, r} is not exact in {dtype}: draw sparser numbers")
    return case.to(dtype)


def compose(case: Case, needs: tuple[str, ...] = NAMES[1:]) -> dict[str, Tensor]:
    """Y and the gradients of the plain ``linear`` composition, in the case's own dtype, by autograd."""
    sources = {"dx": case.x, "da": case.lora_a, "db": case.lora_b, "dbias": case.bias}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in sources.items() if t is not None}
    x = leaves["dx"]
    dropped = x
    if case.dropout_p > 0.0:
        mask = keep_mask(case.seed, case.dropout_p, *x.shape, x.device)
        dropped = x * mask * inverse_keep(case.dropout_p)
    branch = linear(linear(dropped, leaves["da"].to(x.dtype)), leaves["db"].to(x.dtype)) * case.scaling
    y = linear(x, case.weight, leaves.get("dbias")) + branch
    wanted = [name for name in needs if name in leaves]
    gradients = torch.autograd.grad(y, [leaves[name] for name in wanted], case.dy)
    return {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}


def bounds_of(case: Case) -> dict[str, Tensor]:
    """For each result, the same sums over absolute values, times the square root of their length."""
    c = case.to(torch.float64)
    x, w, a, b, dy = (t.abs() for t in (c.x, c.weight, c.lora_a, c.lora_b, c.dy))
    dropped = x
    keep = 1.0
    if case.dropout_p > 0.0:
        keep = keep_mask(case.seed, case.dropout_p, *x.shape, x.device) * inverse_keep(case.dropout_p)
        dropped = x * keep
    s, ds = abs(c.scaling) * dropped @ a.T, abs(c.scaling) * dy @ b
    (m, k), n = x.shape, w.shape[0]
    bias = 0.0 if c.bias is None else c.bias.abs()
    return {
        "y": (x @ w.T + s @ b.T + bias) * k**0.5,
        "dx": (dy @ w + keep * (ds @ a)) * n**0.5,
        "da": ds.T @ dropped * max(m, n) ** 0.5,
        "db": dy.T @ s * max(m, k) ** 0.5,
        "dbias": dy.sum(0) * m**0.5,
    }


def assert_accurate(results: dict[str, Tensor], case: Case, *, against_eager: bool = True) -> None:
    """Raises AssertionError unless every result obeys the error rule (see the module's docstring); without
    ``against_eager``, the bound on every single entry alone."""
    references = compose(case.to(torch.float64)), compose(case) if against_eager else None, bounds_of(case)
    assert_obeyed(results, *references, eps=torch.finfo(case.x.dtype).eps)


def assert_obeyed(
    results: dict[str, Tensor],
    exact: dict[str, Tensor],
    eager: dict[str, Tensor] | None,
    bounds: dict[str, Tensor],
    eps: float,
) -> None:
    """The error rule on results of any computation: against exact ones, eager's, and the bounds on single entries."""
    for name, result in results.items():
        error = (result.double() - exact[name]).abs()
        assert not error.isnan().any(), f"{name}: NaN at {error.isnan().nonzero()[0].tolist()}"
        if error.numel() == 0:
            continue
        excess = error - 4 * eps * bounds[name]
        assert (excess <= 0).all(), f"{name}: error {error.flatten()[excess.argmax()]:.3g} at {_where(excess)}"
        if eager is None:
            continue
        allowed = (eager[name].double() - exact[name]).abs()
        ulp = eps * exact[name].abs().max()
        assert error.max() <= 1.25 * allowed.max() + ulp, (
            f"{name}: largest error {error.max():.3g}, eager's {allowed.max():.3g}, at {_where(error)}"
        )
        rms, allowed_rms = error.square().mean().sqrt(), allowed.square().mean().sqrt()
        assert rms <= 1.25 * allowed_rms + ulp, f"{name}: RMS error {rms:.3g}, eager's {allowed_rms:.3g}"


def assert_exact(results: dict[str, Tensor], case: Case) -> None:
    """Raises AssertionError unless every result has the one right bit pattern (for integer cases)."""
    assert_equal(results, compose(case.to(torch.float64)))


def assert_equal(results: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Raises AssertionError unless every result is its exact value."""
    for name, result in results.items():
        wrong = result.double() != exact[name]
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, first at {_where(wrong.double())}"
        )


def assert_reordered(actual, expected, terms: int) -> None:
    """Results of one computation in two orders, whose longest sums have ``terms`` terms: each tensor within
    4·eps·√terms of its largest element, the componentwise rule's factor."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        error, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
        assert error <= 4 * torch.finfo(theirs.dtype).eps * terms**0.5 * largest, (error, largest)


def _where(values: Tensor) -> list[int]:
    return [int(i) for i in torch.unravel_index(values.argmax(), values.shape)]


def poison(monkeypatch):
    """Allocates outputs full of NaN, so that an element which a kernel forgets cannot pass for a number."""
    allocate = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        tensor = allocate(self, *args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
