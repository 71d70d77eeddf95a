"""LoRA on the experts of transformers' Qwen3-MoE: by us, by PEFT's ParamWrapper, and by a loop over experts.

Stock PEFT runs over transformers' default, torch's grouped product; over its eager loop, PEFT's backward would fill a
gradient of all experts' weights once an expert.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora.bench.cases import DTYPES, LayerCase
from fastlora.bench.cost import Cost, pass_cost
from fastlora.bench.grouped import FROZEN, Variant, check, measure
from fastlora.bench.peers import SCALING
from fastlora.experts import per_expert
from fastlora.finetune.models import shared_copy

PARAMETERS = ("gate_up_proj", "down_proj")
STOCK, PATCHED, LOOP, OURS = "peft", "peft patched by fastlora", "loop over experts", "fastlora"


@dataclass(frozen=True)
class ExpertsCase:
    """An experts module, hidden -> 2 x intermediate -> hidden for each expert, and the tokens of a call."""

    experts: int
    hidden: int
    intermediate: int
    tokens: int
    top_k: int
    r: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.experts} experts"

    @property
    def note(self) -> str:
        return (
            f"{self.hidden} -> 2 x {self.intermediate} -> {self.hidden}, {self.tokens} tokens x {self.top_k}, "
            f"R {self.r}, {self.dtype}."
        )

    def cost(self, which: str, lora: bool) -> Cost:
        """Of the two products of a pass, if every row's expert is read once."""
        m, r, stacks = self.tokens * self.top_k, self.r, {"weights": self.experts, "adapters": self.experts}
        up = LayerCase(m, 2 * self.intermediate, self.hidden, r, dtype=self.dtype)
        down = LayerCase(m, self.hidden, self.intermediate, r, dtype=self.dtype)
        return pass_cost(up, which, lora, **stacks) + pass_cost(down, which, lora, **stacks)


def experts_cases(device: str) -> tuple[ExpertsCase, ...]:
    """Qwen3-30B-A3B's and Mixtral-8x7B's on a GPU; on a CPU what takes seconds."""
    if device == "cpu":
        return (ExpertsCase(16, 256, 96, 256, 4, 8, "float32"),)
    return (
        ExpertsCase(128, 2048, 768, 4096, 8, 16, "bfloat16"),
        ExpertsCase(8, 4096, 14336, 4096, 2, 16, "bfloat16"),
    )


class Block(nn.Module):
    """An experts module where target_parameters finds it, called with the routing of one batch."""

    def __init__(self, experts: nn.Module, index: Tensor, weights: Tensor):
        super().__init__()
        self.experts = experts
        self.register_buffer("index", index)
        self.register_buffer("weights", weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.index, self.weights)


def make_block(case: ExpertsCase, device: str) -> Block:
    """Frozen random experts, and a routing that chooses some experts more often than others."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(num_experts=case.experts, hidden_size=case.hidden, moe_intermediate_size=case.intermediate)
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        experts = Qwen3MoeExperts(config).to(DTYPES[case.dtype]).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in experts.parameters():
        parameter.normal_(std=parameter.shape[2] ** -0.5, generator=generator)
    logits = torch.randn(case.tokens, case.experts, device=device, generator=generator)
    weights, index = logits.softmax(-1).topk(case.top_k)
    return Block(experts, index, (weights / weights.sum(-1, keepdim=True)).to(DTYPES[case.dtype]))


def make_inputs(case: ExpertsCase, device: str) -> tuple[Tensor, Tensor]:
    """x and dY, [tokens, hidden]."""
    generator = torch.Generator(device).manual_seed(1)
    x, dy = (torch.randn(case.tokens, case.hidden, device=device, generator=generator) for _ in range(2))
    return x.to(DTYPES[case.dtype]), dy.to(DTYPES[case.dtype])


def make_factors(case: ExpertsCase, device: str) -> list[Tensor]:
    """A and B of the two parameters, as PEFT has them; branches about as large as the frozen products."""
    generator = torch.Generator(device).manual_seed(2)
    rows, made = case.r * case.experts, []
    for n, k in ((2 * case.intermediate, case.hidden), (case.hidden, case.intermediate)):
        a = torch.randn(rows, k, device=device, generator=generator) * k**-0.5
        b = torch.randn(n, rows, device=device, generator=generator) * case.r**-0.5
        made += [a.to(DTYPES[case.dtype]), b.to(DTYPES[case.dtype])]
    return made


def _filled(trained: list[nn.Parameter], factors: list[Tensor]) -> list[nn.Parameter]:
    for parameter, value in zip(trained, factors, strict=True):
        parameter.data = value.clone()
    return trained


def _with_fastlora(block: Block, case: ExpertsCase, factors: list[Tensor]) -> Variant:
    from fastlora.model import inject

    targets = [f"experts.{name}" for name in PARAMETERS]
    inject(block, None, target_parameters=targets, r=case.r, alpha=SCALING * case.r)
    branches = [block.experts.lora[name] for name in PARAMETERS]
    trained = [factor for branch in branches for factor in (branch.lora_A, branch.lora_B)]
    return Variant(block, block, _filled(trained, factors))


def _with_peft(block: Block, case: ExpertsCase, factors: list[Tensor]) -> Variant:
    from peft import LoraConfig, inject_adapter_in_model

    targets = [f"experts.{name}" for name in PARAMETERS]
    config = LoraConfig(r=case.r, lora_alpha=SCALING * case.r, target_modules=[], target_parameters=targets)
    block = inject_adapter_in_model(config, block)
    wrappers = {wrapper.parameter_name: wrapper for wrapper in (block.experts, block.experts.base_layer)}
    layers = [layer["default"] for name in PARAMETERS for layer in (wrappers[name].lora_A, wrappers[name].lora_B)]
    return Variant(block, block, _filled([layer.weight for layer in layers], factors))


def _with_patched_peft(block: Block, case: ExpertsCase, factors: list[Tensor]) -> Variant:
    from fastlora.integrations.peft import patch

    variant = _with_peft(block, case, factors)
    patch(variant.held, strict=True)
    return variant


def loop(block: Block, factors: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """transformers' eager loop, with a branch of two products beside each of an expert's."""
    experts = block.experts

    def matrices(name: str, a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        a, b = per_expert(a, b, experts.num_experts)
        return zip(getattr(experts, name).unbind(0), a.unbind(0), b.unbind(0), strict=True)

    def linear(rows: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(rows, weight) + F.linear(F.linear(rows, a), b) * SCALING

    def call(x: Tensor) -> Tensor:
        first, second = matrices(PARAMETERS[0], *factors[:2]), matrices(PARAMETERS[1], *factors[2:])
        y = torch.zeros_like(x)
        for expert, (up, down) in enumerate(zip(first, second, strict=True)):
            token, place = torch.where(block.index == expert)
            rows = experts._apply_gate(linear(x[token], *up))
            y.index_add_(0, token, linear(rows, *down) * block.weights[token, place, None])
        return y

    return call


def _with_loop(block: Block, case: ExpertsCase, factors: list[Tensor]) -> Variant:
    trained = [nn.Parameter(value.clone()) for value in factors]
    return Variant(loop(block, trained), nn.ModuleList([block, nn.ParameterList(trained)]), trained)


VARIANTS: dict[str, Callable[[Block, ExpertsCase, list[Tensor]], Variant]] = {
    FROZEN: lambda block, case, factors: Variant(block, block, []),
    OURS: _with_fastlora,
    LOOP: _with_loop,
    STOCK: _with_peft,
    PATCHED: _with_patched_peft,
}


def build_variants(case: ExpertsCase, device: str) -> tuple[dict[str, Variant], Variant, dict[str, str]]:
    """Variants over the same weights and factors, one in float64, and name -> why one is missing.

    Raises:
        ImportError: there is no transformers with experts.
    """
    block, factors = make_block(case, device), make_factors(case, device)
    built, missing = {}, {}
    for name, build in VARIANTS.items():
        try:
            built[name] = build(shared_copy(block), case, factors)
        except ImportError as error:
            missing[name] = f"not installed: {error}"
    exact = copy.deepcopy(block).double()
    return built, _with_loop(exact, case, [value.double() for value in factors]), missing


def measure_experts(case: ExpertsCase, device: str, seconds: float) -> tuple[list[dict], dict[str, str]]:
    """Rows per variant and pass, and name -> why it is missing.

    Raises:
        WrongResult: a variant is wrong.
    """
    try:
        variants, exact, missing = build_variants(case, device)
    except ImportError as error:
        return [], {case.name: f"not installed: {error}"}
    inputs = make_inputs(case, device)
    check(variants, exact, *inputs)
    del exact
    return measure(case, variants, inputs, case.cost, device, seconds), missing
