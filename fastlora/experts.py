"""transformers' MoE experts with LoRA on their weights: an implementation of transformers' ``ExpertsInterface``.

Rows are sorted by expert and the two projections are two calls of ``grouped_lora_linear``; W + ΔW of the experts is
never made. transformers calls an implementation by the name in an experts module's config. So for the length of one
call the module has a ``Served`` config, which gives this implementation's name and carries the factors. Meanwhile no
other thread calls experts this way.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from threading import RLock, get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.grouped import grouped_lora_linear
from fastlora.grouped.ahead import GroupedLayer
from fastlora.segments import NO_ADAPTER, Segments

IMPLEMENTATION = "fastlora"
_lock = RLock()


class Factors(NamedTuple):
    """The branches of all experts' matrices of one name: of one adapter, or of T, one behind the other."""

    lora_a: Tensor  # [E, R, in] or [T·E, R, in]
    lora_b: Tensor  # [E, out, R] or [T·E, out, R]
    scaling: float | Tensor  # [T·E]


def per_expert(lora_a: Tensor, lora_b: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """Views [E, R, in] and [E, out, R] of PEFT's factors of all experts: [R·E, in], in which the expert varies slowest,
    and [out, R·E], in which it varies fastest."""
    a = lora_a.view(n_experts, -1, lora_a.shape[1])
    return a, lora_b.view(lora_b.shape[0], -1, n_experts).permute(2, 0, 1)


class Tenants(NamedTuple):
    """Which of several adapters each token has."""

    owners: Tensor  # int64 [tokens]; NO_ADAPTER for none
    number: int  # T


class Served:
    """The config of an experts module during a call that is served with ``factors`` by parameter name."""

    _experts_implementation = IMPLEMENTATION

    def __init__(self, config: Any, factors: Mapping[str, Factors], tenants: Tenants | None):
        self.__config, self.factors, self.tenants, self.thread = config, factors, tenants, _thread()

    def __getattr__(self, name: str) -> Any:
        if name == "_Served__config":  # of a copy that has nothing yet
            raise AttributeError(name)
        return getattr(self.__config, name)


def is_experts(module: nn.Module) -> bool:
    """Whether transformers calls this module's forward by the implementation that its config names."""
    kind: Any = type(module)
    return _goes_by_interface(kind) and {"config", "num_experts", "has_gate"} <= vars(module).keys()


@lru_cache
def _goes_by_interface(kind: Any) -> bool:
    """Whether the class has transformers' decorator, which keeps the interface in a closure of its forward."""
    code, cells = getattr(kind.forward, "__code__", None), getattr(kind.forward, "__closure__", None)
    if code is None or "experts_interface" not in code.co_freevars:
        return False
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if (cells or ())[code.co_freevars.index("experts_interface")].cell_contents is not ALL_EXPERTS_FUNCTIONS:
        return False
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    return True


def projections(experts: Any) -> tuple[str, str]:
    """The names of the two parameters that an experts module multiplies by."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def matrix_sizes(experts: Any, name: str) -> tuple[int, int, int]:
    """How many matrices a parameter holds, and out_features and in_features of each."""
    n_experts, *sizes = experts.get_parameter(name).shape
    n, k = sizes[::-1] if experts.is_transposed else sizes
    return n_experts, n, k


@contextmanager
def serving(experts: Any, factors: Mapping[str, Factors], tenants: Tenants | None = None) -> Iterator[None]:
    """Within it a call of ``experts`` is served with these factors; with ``tenants``, each token with its adapter's."""
    with nullcontext() if torch.compiler.is_compiling() else _lock:
        config = experts.config
        experts.config = Served(config, factors, tenants)
        try:
            yield
        finally:
            experts.config = config


def is_serving(experts: Any) -> bool:
    """Whether this is within ``serving`` of this thread."""
    return isinstance(experts.config, Served) and experts.config.thread == _thread()


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else get_ident()


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers' experts compute of hidden_states [tokens, hidden], with the branches of ``serving``.

    Args:
        experts: the module.
        top_k_index, top_k_weights: [tokens, k], the experts of each token and their weights in its result. An index
            past the last expert, as expert parallelism has them, gives nothing.

    Raises:
        ValueError: the module is called without the factors of a LoRA layer.
    """
    if not is_serving(experts):
        raise ValueError(
            f"experts_implementation={IMPLEMENTATION!r} serves LoRA layers that fastlora.inject has made, or that "
            "fastlora.integrations.peft.patch has seen, and they choose it by themselves: leave the model's "
            "experts_implementation as it was"
        )
    (tokens, hidden), k = hidden_states.shape, top_k_index.shape[-1]
    order, segments = _sort(top_k_index, experts.num_experts, experts.config.tenants)
    # Every row is selected once, so that no sum of the backward depends on the order of its terms.
    rows = hidden_states.unsqueeze(1).expand(-1, k, -1).reshape(tokens * k, hidden).index_select(0, order)
    first, second = projections(experts)
    rows = _project(experts, first, rows, segments)
    rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
    rows = _project(experts, second, rows, segments)
    if getattr(experts, "has_post_expert_norm", False):
        rows = experts.post_expert_norm(rows)
    rows = rows * top_k_weights.reshape(-1).index_select(0, order).unsqueeze(-1)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * k, device=order.device))
    return rows.index_select(0, back).view(tokens, k, hidden).sum(1).to(hidden_states.dtype)


def _sort(top_k_index: Tensor, n_experts: int, tenants: Tenants | None) -> tuple[Tensor, Segments]:
    """The order [tokens·k] that brings rows into segments, and the segments: where rows sorted by expert, and by
    adapter within an expert, change one of the two. Nothing is read on the host."""
    choices, places = top_k_index.long(), 1
    if tenants is not None:  # within an expert: the rows without an adapter, then those of each
        places = tenants.number + 1
        choices = choices * places + (tenants.owners - NO_ADAPTER).unsqueeze(1)
    sorted_choices, order = torch.sort(choices.reshape(-1), stable=True)
    numbers = torch.arange(n_experts * places, device=order.device)
    ends = torch.searchsorted(sorted_choices, numbers, right=True, out_int32=True)
    if tenants is None:
        return order, Segments(ends, None, None)
    expert, adapter = numbers // places, numbers % places + NO_ADAPTER
    return order, Segments(ends, expert, torch.where(adapter == NO_ADAPTER, adapter, adapter * n_experts + expert))


def _project(experts: Any, name: str, rows: Tensor, segments: Segments) -> Tensor:
    """Sorted rows [M, ·] times the experts' matrices of one name."""
    factors = experts.config.factors.get(name)
    weight, bias, (lora_a, lora_b, scaling), where = _operands(experts, name, rows, segments, factors)
    options: dict[str, Any] = {
        "experts": where.experts, "adapters": where.adapters, "transposed": experts.is_transposed
    }  # fmt: skip
    return grouped_lora_linear(rows, weight, lora_a, lora_b, scaling, where.ends, bias, **options)


def _operands(
    experts: Any, name: str, like: Tensor, segments: Segments, factors: Factors | None
) -> tuple[Tensor, Tensor | None, Factors, Segments]:
    """What the rows of one projection are multiplied by; a parameter without factors has no adapter."""
    weight, bias = getattr(experts, name), getattr(experts, f"{name}_bias") if experts.has_bias else None
    if factors is None:
        n, k = weight.shape[1:][::-1] if experts.is_transposed else weight.shape[1:]
        factors = Factors(like.new_zeros(1, 1, k), like.new_zeros(1, n, 1), 0.0)
        segments = segments._replace(adapters=torch.full_like(segments.ends, NO_ADAPTER))
    return weight, bias, factors, segments


def layers_ahead(experts: Any, factors: Mapping[str, Factors], n_tenants: int | None = None) -> list[GroupedLayer]:
    """The two calls of an experts module that is served with these factors, before it is called.

    Args:
        n_tenants: of how many adapters each token has one, or None.
    """
    k = getattr(experts.config, "num_experts_per_tok", 1)
    token = torch.zeros(1, dtype=torch.int64, device="meta")
    tenants = None if n_tenants is None else Tenants(token, n_tenants)
    _, segments = _sort(token.expand(1, k), experts.num_experts, tenants)
    found = []
    for name in projections(experts):
        like = torch.empty(0, dtype=getattr(experts, name).dtype, device="meta")
        weight, bias, (lora_a, lora_b, scaling), where = _operands(experts, name, like, segments, factors.get(name))
        number, scalings = (1.0, scaling) if isinstance(scaling, Tensor) else (scaling, None)
        layer = GroupedLayer(weight, bias, lora_a, lora_b, number, scalings, where, experts.is_transposed)
        found.append(layer._replace(rows_per_token=k))
    return found
