"""``LoRAExperts``: transformers' experts modules with a LoRA branch on their weights, as PEFT's ``target_parameters``.

An experts module stays the object that it is and gets another class, a subclass of its own, so that whatever reads its
attributes, asks for its class or holds its weights by name finds them where they were. Its branches are children.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.branch import MERGED_MARK, PLAIN_UNDER_BRANCH, Branch
from fastlora.experts import Factors, matrix_sizes, per_expert, projections, serving
from fastlora.layer_checks import check_adapter_dtype, check_hyperparameters
from fastlora.placement import stored

_UNITS = ("FSDPModule", "FullyShardedDataParallel")
BRANCHES = "lora"  # the child of an experts module that holds its branches, by parameter name


class ExpertsBranch(Branch):
    """LoRA on one parameter of an experts module, which holds a matrix for each of its E experts.

    Args:
        experts: the module, frozen or about to be.
        parameter_name: of its parameter, [E, out, in] or, where the module says ``is_transposed``, [E, in, out].
        r, alpha, rslora, init: as for ``LoRALinear``; r is the rank of each expert's branch.
        adapter_dtype: dtype of A and B; the parameter's own by default, or float32 over a 16-bit one.

    Attributes:
        lora_A: parameter [r·E, in_features], in which the expert varies slowest.
        lora_B: parameter [out_features, r·E], in which it varies fastest; both as PEFT has them.
        merged: whether the experts' parameter holds the branch, which does not train then.

    Raises:
        ValueError, TypeError: as for ``LoRALinear``.
    """

    def __init__(
        self,
        experts: nn.Module,
        parameter_name: str,
        *,
        r: int = 8,
        alpha: float = 16,
        rslora: bool = False,
        init: str = "kaiming",
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        check_hyperparameters(r, alpha, 0.0, init)
        super().__init__()
        self._owner = (experts,)  # in a tuple, so that it does not become a child
        self.parameter_name = parameter_name
        self.num_experts, self.out_features, self.in_features = matrix_sizes(experts, parameter_name)
        self._configure(r, alpha, 0.0, rslora, init)
        dtype = self.weight.dtype if adapter_dtype is None else adapter_dtype
        check_adapter_dtype(dtype, self.weight.dtype)
        rows = self.r * self.num_experts
        self.lora_A = nn.Parameter(self.weight.new_empty(rows, self.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(self.weight.new_empty(self.out_features, rows, dtype=dtype))
        self.reset_lora_parameters()

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The experts' parameter."""
        return getattr(*self.place("weight"))

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        """The weight's shape, also where its value is elsewhere."""
        n, k = self.out_features, self.in_features
        return (self.num_experts, k, n) if self._owner[0].is_transposed else (self.num_experts, n, k)

    def place(self, name: str) -> tuple[nn.Module, str]:
        return (self._owner[0], self.parameter_name) if name == "weight" else (self, name)

    def forward(self) -> Factors:
        """What a call of the experts module is served with: views."""
        return Factors(*per_expert(self.lora_A, self.lora_B, self.num_experts), self.scaling)

    def _add_branch(self, weight: Tensor, factor: float) -> Tensor:
        """Expert by expert, so that one matrix at a time is widened."""
        lora_a, lora_b = per_expert(stored(self, "lora_A"), stored(self, "lora_B"), self.num_experts)
        compute = torch.promote_types(weight.dtype, torch.float32)
        merged = torch.empty_like(weight)
        for matrix, result, a, b in zip(weight, merged, lora_a.to(compute), lora_b.to(compute), strict=True):
            first, second = (a.t(), b.t()) if self._owner[0].is_transposed else (b, a)
            result.copy_(torch.addmm(matrix.to(compute), first, second, alpha=factor))
        return merged

    def extra_repr(self) -> str:
        """Sizes, rank, alpha and whatever differs from the defaults."""
        sizes = f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {super().extra_repr()}"


class LoRAExperts(nn.Module):
    """The part of an experts module with branches that is not its own class's; ``put_branches`` makes one.

    A call is served by grouped products in which each expert's rows go through its factors: W + ΔW is never made. Where
    all branches are merged it is the module's own.

    Attributes:
        plain_class: what ``unload`` makes of it.
        lora: ``nn.ModuleDict`` of ``ExpertsBranch`` by parameter name.
    """

    plain_class: Any
    lora: nn.ModuleDict

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states [tokens, hidden] and what the experts module takes besides.

        Raises:
            ValueError: a branch is an FSDP unit by itself.
        """
        if any(map(_is_unit, self.lora.values())):
            raise ValueError(
                "a branch of experts is sharded by itself, and FSDP would free its factors before they are read: "
                "shard the experts module or the block around it"
            )
        factors = self.factors()
        if not factors:
            return super().forward(*args, **kwargs)
        with serving(self, factors):
            return super().forward(*args, **kwargs)

    def factors(self) -> dict[str, Factors]:
        """What a call is served with: of each branch that is not merged, by parameter name."""
        return {name: branch() for name, branch in self.lora.items() if not branch.merged}

    def unload(self) -> None:
        """Makes this object one of its plain class with the weights that it has: to be called on a merged one.

        Raises:
            ValueError: a branch is not merged.
        """
        if not all(branch.merged for branch in self.branches()):
            raise ValueError("unload turns merged experts into plain ones; call merge() first")
        for name in ("forward", "_old_forward"):  # accelerate's hooks leave them on the object
            if getattr(vars(self).get(name), "__func__", None) is type(self).forward:
                setattr(self, name, self.plain_class.forward.__get__(self))
        delattr(self, BRANCHES)
        self.__class__ = self.plain_class

    def branches(self) -> Iterator[ExpertsBranch]:
        """In the order in which the parameters that they are on are multiplied by."""
        for name in projections(self):
            if name in self.lora:
                yield self.lora[name]  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made at run time, and pickles name what is found by its name."""
        if type(self) is not _class_over(self.plain_class):  # another class made at run time, FSDP's say
            return super().__reduce_ex__(protocol)
        return _blank, (self.plain_class,), dict(vars(self))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """Weights under merged branches, and merged weights under branches, are refused as by ``LoRALinear``."""
        marks = [f"{prefix}{BRANCHES}.{branch.parameter_name}.{MERGED_MARK}" for branch in self.branches()]
        if any(mark in state_dict for mark in marks):  # each branch says so
            return
        given = [branch for branch in self.branches() if prefix + branch.parameter_name in state_dict]
        merged = [f"{prefix}{branch.parameter_name}" for branch in given if branch.merged]
        if merged:
            errors.append(f"{', '.join(merged)}: merged; call unmerge() before loading parameters")
            return
        plain = not any(key.startswith(f"{prefix}{BRANCHES}.") for key in state_dict)
        if plain and any(branch.branch_is_trained() for branch in given):
            warnings.warn(PLAIN_UNDER_BRANCH, stacklevel=2)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


def _is_unit(branch: nn.Module) -> bool:
    return any(base.__name__ in _UNITS for base in type(branch).__mro__)


@cache
def _class_over(kind: Any) -> Any:
    """The class of experts modules of a plain class that have branches."""
    return type(f"LoRA{kind.__name__}", (LoRAExperts, kind), {"plain_class": kind, "__module__": __name__})


def _blank(kind: Any) -> LoRAExperts:
    """What a pickle fills."""
    made = _class_over(kind)
    return made.__new__(made)


def make_branches(experts: nn.Module, options: Mapping[str, Mapping[str, Any]]) -> nn.ModuleDict:
    """Branches by parameter name, each with its ``ExpertsBranch`` options; the module is left as it is."""
    return nn.ModuleDict({name: ExpertsBranch(experts, name, **given) for name, given in options.items()})


def put_branches(experts: nn.Module, branches: nn.ModuleDict) -> None:
    """Makes an experts module a ``LoRAExperts`` with these branches, which ``make_branches`` has made for it."""
    plain: Any = type(experts)
    setattr(experts, BRANCHES, branches.train(experts.training))
    experts.__class__ = _class_over(plain)


def peft_paths(paths: Iterable[str]) -> dict[str, str]:
    """Where PEFT has the branch of each of these parameters, given by path and in order.

    PEFT puts one wrapper around another for each parameter of a module, the last around them all.
    """
    by_module: dict[str, list[str]] = {}
    for path in paths:
        by_module.setdefault(path.rpartition(".")[0], []).append(path)
    return {
        path: module + ".base_layer" * (len(found) - 1 - place)
        for module, found in by_module.items()
        for place, path in enumerate(found)
    }
