"""A linear layer in a batch whose samples have different adapters, or none: by us, by PEFT and by a loop over adapters.

PEFT serves ``adapter_names`` at inference alone, by its models; its layers, which are measured here, train as well.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora.bench.cases import DTYPES, LayerCase
from fastlora.bench.cost import Cost, pass_cost
from fastlora.bench.grouped import FROZEN, Variant, check, measure
from fastlora.bench.peers import SCALING
from fastlora.grouped import grouped_lora_linear
from fastlora.segments import NO_ADAPTER

BASE = "__base__"


@dataclass(frozen=True)
class BatchCase:
    """A layer of n out_features and k in_features, and samples of ``length`` tokens, which have the adapters one after
    the other, then none, and so on."""

    samples: int
    length: int
    adapters: int
    n: int
    k: int
    r: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.samples} samples with {self.adapters} adapters or none"

    @property
    def note(self) -> str:
        return f"{self.length} tokens a sample, N {self.n}, K {self.k}, R {self.r}, {self.dtype}."

    @property
    def owners(self) -> list[int]:
        """The adapter of each sample."""
        turns = (sample % (self.adapters + 1) for sample in range(self.samples))
        return [turn if turn < self.adapters else NO_ADAPTER for turn in turns]

    @property
    def names(self) -> list[str]:
        """The same, as PEFT takes them."""
        return [BASE if owner == NO_ADAPTER else f"adapter{owner}" for owner in self.owners]

    def cost(self, which: str, lora: bool) -> Cost:
        """As if each row had an adapter."""
        rows = LayerCase(self.samples * self.length, self.n, self.k, self.r, dtype=self.dtype)
        return pass_cost(rows, which, lora, adapters=self.adapters)


def batch_cases(device: str) -> tuple[BatchCase, ...]:
    """A projection of Llama-3.1-8B in a batch of many short samples and in one of few long ones; on a CPU, of the demo
    model."""
    if device == "cpu":
        return (BatchCase(8, 64, 3, 576, 576, 8, "float32"),)
    return (BatchCase(64, 128, 8, 4096, 4096, 16, "bfloat16"), BatchCase(8, 1024, 3, 4096, 4096, 16, "bfloat16"))


def make_tensors(case: BatchCase, device: str) -> dict[str, Tensor]:
    """x and dY [samples, length, ·], W0 [N, K], A [T, R, K], B [T, N, R]; branch and base product alike."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device, generator=generator) * scale).to(DTYPES[case.dtype])

    return {
        "x": normal(case.samples, case.length, case.k),
        "dy": normal(case.samples, case.length, case.n),
        "weight": normal(case.n, case.k, scale=case.k**-0.5),
        "lora_a": normal(case.adapters, case.r, case.k, scale=case.k**-0.5),
        "lora_b": normal(case.adapters, case.n, case.r, scale=case.r**-0.5),
    }


class _Holder(nn.Module):
    """Parameters that a function multiplies by."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        self.weight = nn.Parameter(tensors["weight"], requires_grad=False)
        self.lora_a = nn.ParameterList([nn.Parameter(a.clone()) for a in tensors["lora_a"]])
        self.lora_b = nn.ParameterList([nn.Parameter(b.clone()) for b in tensors["lora_b"]])

    def trained(self) -> list[Tensor]:
        return [factor for pair in zip(self.lora_a, self.lora_b, strict=True) for factor in pair]


def _frozen(case: BatchCase, tensors: dict[str, Tensor]) -> Variant:
    held = _Holder(tensors)
    return Variant(lambda x: F.linear(x, held.weight), held, [])


def _fastlora(case: BatchCase, tensors: dict[str, Tensor]) -> Variant:
    held, device = _Holder(tensors), tensors["x"].device
    ends = torch.arange(1, case.samples + 1, dtype=torch.int32, device=device) * case.length
    owners = torch.tensor(case.owners, dtype=torch.int32, device=device)

    def call(x: Tensor) -> Tensor:
        lora_a, lora_b = torch.stack([*held.lora_a]), torch.stack([*held.lora_b])
        y = grouped_lora_linear(x.flatten(0, 1), held.weight, lora_a, lora_b, SCALING, ends, adapters=owners)
        return y.view(*x.shape[:2], case.n)

    return Variant(call, held, held.trained())


def _loop(case: BatchCase, tensors: dict[str, Tensor]) -> Variant:
    """One base product, and two small ones an adapter over its samples."""
    held, owners = _Holder(tensors), torch.tensor(case.owners, device=tensors["x"].device)
    samples = [torch.nonzero(owners == adapter)[:, 0] for adapter in range(case.adapters)]

    def call(x: Tensor) -> Tensor:
        y = F.linear(x, held.weight)
        for a, b, chosen in zip(held.lora_a, held.lora_b, samples, strict=True):
            y = y.index_add(0, chosen, F.linear(F.linear(x[chosen], a), b) * SCALING)
        return y

    return Variant(call, held, held.trained())


def _peft(case: BatchCase, tensors: dict[str, Tensor]) -> Variant:
    from peft import LoraConfig, inject_adapter_in_model

    holder = nn.Module()
    holder.linear = nn.Linear(case.k, case.n, bias=False, device="meta")
    holder.linear.weight = nn.Parameter(tensors["weight"], requires_grad=False)
    names, options = [f"adapter{t}" for t in range(case.adapters)], {"r": case.r, "lora_alpha": SCALING * case.r}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is another adapter
        for name in names:
            inject_adapter_in_model(LoraConfig(target_modules=["linear"], **options), holder, adapter_name=name)
    layer, trained = holder.linear, []
    for name, a, b in zip(names, tensors["lora_a"], tensors["lora_b"], strict=True):
        layer.lora_A[name].weight, layer.lora_B[name].weight = nn.Parameter(a.clone()), nn.Parameter(b.clone())
        trained += [layer.lora_A[name].weight, layer.lora_B[name].weight]
    names_of_samples = case.names
    return Variant(lambda x: layer(x, adapter_names=names_of_samples), holder, trained)


def _patched_peft(case: BatchCase, tensors: dict[str, Tensor]) -> Variant:
    from fastlora.integrations.peft import patch

    variant = _peft(case, tensors)
    patch(variant.held)
    return variant


VARIANTS: dict[str, Callable[[BatchCase, dict[str, Tensor]], Variant]] = {
    FROZEN: _frozen,
    "fastlora": _fastlora,
    "loop over adapters": _loop,
    "peft": _peft,
    "peft patched by fastlora": _patched_peft,
}


def build_variants(case: BatchCase, device: str) -> tuple[dict[str, Variant], Variant, dict[str, str], tuple]:
    """Variants over the same weight and factors, one in float64, name -> why one is missing, and x and dY."""
    tensors = make_tensors(case, device)
    built, missing = {}, {}
    for name, build in VARIANTS.items():
        try:
            built[name] = build(case, tensors)
        except ImportError as error:
            missing[name] = f"not installed: {error}"
    exact = _loop(case, {name: tensor.double() for name, tensor in tensors.items()})
    return built, exact, missing, (tensors["x"], tensors["dy"])


def measure_batches(case: BatchCase, device: str, seconds: float) -> tuple[list[dict], dict[str, str]]:
    """Rows per variant and pass, and name -> why it is missing.

    Raises:
        WrongResult: a variant is wrong.
    """
    variants, exact, missing, inputs = build_variants(case, device)
    check(variants, exact, *inputs)
    return measure(case, variants, inputs, case.cost, device, seconds), missing
