"""LoRA layers on rows in segments: cases, their loop over segments by autograd, and the error rule of ``numerics``."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

import fastlora
from fastlora.philox import inverse_keep, keep_mask

NAMES = ("y", "dx", "da", "db", "dbias")


@dataclass(frozen=True)
class Case:
    """Inputs of one layer and the gradient that comes back to it."""

    x: Tensor  # [M, K]
    weight: Tensor  # [E, N, K], or [E, K, N] where transposed
    lora_a: Tensor  # [T, R, K]
    lora_b: Tensor  # [T, N, R]
    bias: Tensor | None  # [E, N] or [N]
    dy: Tensor  # [M, N]
    scaling: float | Tensor
    ends: Tensor
    experts: Tensor | None
    adapters: Tensor | None
    transposed: bool = False
    dropout_p: float = 0.0
    seed: int = 0  # of torch's generator

    def to(self, dtype: torch.dtype) -> "Case":
        tensors = ("x", "weight", "lora_a", "lora_b", "bias", "dy")
        return replace(self, **{name: t.to(dtype) for name in tensors if (t := getattr(self, name)) is not None})

    def arguments(self) -> tuple[tuple, dict]:
        """Of ``grouped_lora_linear``, after x, A, B and bias."""
        options = {"experts": self.experts, "adapters": self.adapters, "transposed": self.transposed}
        return (self.scaling, self.ends), {**options, "dropout_p": self.dropout_p}


def draw_case(
    lengths: list[int],
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype = torch.float32,
    *,
    n_weights: int | None = None,
    n_adapters: int | None = None,
    adapter_dtype: torch.dtype | None = None,
    rows_after: int = 0,
    experts: list[int] | None = None,
    adapters: list[int] | None = None,
    bias: str | None = None,
    scaling: str = "number",
    transposed: bool = False,
    dropout_p: float = 0.0,
    integers: bool = False,
    seed: int = 0,
) -> Case:
    """Random inputs whose branch is about as large as the base product; small integers on request, so
    sparse that all results are exact in 16 bits as well.

    Args:
        lengths: rows of each segment.
        n_weights, n_adapters: E and T; as many as segments by default.
        bias: "each" for [E, N], "one" for [N].
        scaling: "number", or "each" for [T].
    """
    generator = torch.Generator().manual_seed(seed)
    e = n_weights or len(lengths)
    t = n_adapters or len(lengths)
    m = sum(lengths) + rows_after

    def draw(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype, density: float = 1.0) -> Tensor:
        if integers:
            values = torch.randint(-2, 3, shape, generator=generator)
            return (values * (torch.rand(shape, generator=generator) < density)).to(dtype)
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    factor = 2.0 if integers else 1.7
    factors = torch.tensor([2.0, 0.5, 4.0] if integers else [1.7, 0.6, 2.9])[torch.arange(t) % 3]
    weight = draw(e, n, k, std=k**-0.5, density=48 / k)
    return Case(
        x=draw(m, k, density=24 / k),
        weight=weight.transpose(1, 2).contiguous() if transposed else weight,
        lora_a=draw(t, r, k, std=k**-0.5, dtype=adapter_dtype or dtype, density=6 / k),
        lora_b=draw(t, n, r, std=r**-0.5 / factor, dtype=adapter_dtype or dtype, density=3 / r),
        bias={None: None, "each": draw(e, n), "one": draw(n)}[bias],
        dy=draw(m, n, density=min(8 / n, 8 / max(m, 1))),
        scaling=factor if scaling == "number" else factors,
        ends=torch.tensor(lengths).cumsum(0).to(torch.int32),
        experts=None if experts is None else torch.tensor(experts),
        adapters=None if adapters is None else torch.tensor(adapters, dtype=torch.int32),
        transposed=transposed,
        dropout_p=dropout_p,
        seed=seed,
    )


def by_loop(case: Case) -> dict[str, Tensor]:
    """Y and the gradients, each segment by itself, in the case's own dtype, by autograd."""
    leaves = {
        name: t.detach().clone().requires_grad_()
        for name, t in (("dx", case.x), ("da", case.lora_a), ("db", case.lora_b), ("dbias", case.bias))
        if t is not None
    }
    x, seen, start = leaves["dx"], leaves["dx"], 0
    if case.dropout_p:
        torch.manual_seed(case.seed)
        mask = keep_mask(torch.randint(0, 2**63 - 1, ()), case.dropout_p, *x.shape)
        seen = x * mask * inverse_keep(case.dropout_p)
    y = torch.zeros_like(case.dy)
    for g, end in enumerate(case.ends.tolist()):
        rows = slice(start, start := end)
        e = (0 if len(case.weight) == 1 else g) if case.experts is None else int(case.experts[g])
        t = g if case.adapters is None else int(case.adapters[g])
        w = case.weight[e].T if case.transposed else case.weight[e]
        out = x[rows] @ w.T
        if case.bias is not None:
            out = out + (leaves["dbias"] if case.bias.dim() == 1 else leaves["dbias"][e])
        if t >= 0:
            scaling = case.scaling if isinstance(case.scaling, float) else case.scaling[t].item()
            a, b = leaves["da"][t].to(x.dtype), leaves["db"][t].to(x.dtype)
            out = out + (seen[rows] @ a.T) @ b.T * scaling
        y = torch.cat([y[: rows.start], out, y[rows.stop :]])
    gradients = torch.autograd.grad(y, list(leaves.values()), case.dy, allow_unused=True)
    found = zip(leaves.items(), gradients, strict=True)
    return {"y": y.detach(), **{name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in found}}


def compute(case: Case, **options) -> dict[str, Tensor]:
    """Y and the gradients of ``grouped_lora_linear``."""
    leaves = {
        name: t.detach().requires_grad_()
        for name, t in (("dx", case.x), ("da", case.lora_a), ("db", case.lora_b), ("dbias", case.bias))
        if t is not None
    }
    arguments, keywords = case.arguments()
    torch.manual_seed(case.seed)
    y = fastlora.grouped_lora_linear(
        leaves["dx"], case.weight, leaves["da"], leaves["db"], *arguments, leaves.get("dbias"), **keywords, **options
    )
    gradients = torch.autograd.grad(y, list(leaves.values()), case.dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def _bounds(case: Case) -> dict[str, Tensor]:
    """For each result, the same sums over absolute values, times the square root of their length."""
    c = case.to(torch.float64)
    absolute = {name: t.abs() for name, t in vars(c).items() if torch.is_tensor(t) and t.is_floating_point()}
    if not torch.is_tensor(c.scaling):
        absolute["scaling"] = abs(c.scaling)
    m, n, k = len(c.x), c.dy.shape[1], c.x.shape[1]
    lengths = {"y": k, "dx": n, "da": max(m, n), "db": max(m, k), "dbias": m}
    return {name: value * max(lengths[name], 1) ** 0.5 for name, value in by_loop(replace(c, **absolute)).items()}


def assert_accurate(results: dict[str, Tensor], case: Case, *, against_eager: bool = True) -> None:
    """Raises AssertionError unless each entry is within the bound for a sum of its length, and each result's largest
    and RMS error are at most 1.25 times the loop's in the case's dtype, plus one unit in the last place of the largest
    value; without ``against_eager``, the former alone."""
    exact, eager, bounds = by_loop(case.to(torch.float64)), by_loop(case), _bounds(case)
    eps = torch.finfo(case.x.dtype).eps
    for name, result in results.items():
        error, allowed = (result.double() - exact[name]).abs(), (eager[name].double() - exact[name]).abs()
        assert result.dtype == eager[name].dtype and result.shape == exact[name].shape, name
        assert not error.isnan().any(), f"{name}: NaN"
        assert (error <= 4 * eps * bounds[name]).all(), f"{name}: {(error - 4 * eps * bounds[name]).max():.3g} too much"
        if not error.numel() or not against_eager:
            continue
        ulp = eps * exact[name].abs().max()
        assert error.max() <= 1.25 * allowed.max() + ulp, f"{name}: {error.max():.3g}, the loop's {allowed.max():.3g}"
        rms, allowed_rms = (e.square().mean().sqrt() for e in (error, allowed))
        assert rms <= 1.25 * allowed_rms + ulp, f"{name}: RMS {rms:.3g}, the loop's {allowed_rms:.3g}"


def assert_exact(results: dict[str, Tensor], case: Case) -> None:
    """Raises AssertionError unless each result has the one right value, for cases of integers."""
    for name, value in by_loop(case.to(torch.float64)).items():
        if name not in results:
            continue
        assert torch.equal(value, value.to(results[name].dtype).double()), f"{name} of the case is not exact"
        assert torch.equal(results[name].double(), value), name


def changed(case: Case, **fields_) -> Case:
    """The case with other fields."""
    assert {f.name for f in fields(case)} >= fields_.keys()
    return replace(case, **fields_)
