"""Batches whose rows have different adapters, or one that begins late in each sample (aLoRA).

PEFT's ``adapter_names`` are served at inference and, unlike in PEFT, in training. A layer's samples, or parts of them,
are segments of rows over one weight: one base product, and branches for the rows that have one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora.differentiable import transform_reason
from fastlora.grouped import grouped_lora_linear
from fastlora.grouped.ahead import GroupedLayer
from fastlora.integrations.peft_reasons import BASE, base_reason, dropout_of, dtype_reason, is_plain, segments_reason
from fastlora.rows import flat
from fastlora.segments import NO_ADAPTER, Segments

ACTIVATED = ALoraLinearVariant.__name__  # what ``inspect`` says of a layer whose adapter begins late in a sample
_replaying: ContextVar[bool] = ContextVar("replaying", default=False)


class Mixed(NamedTuple):
    """What one call with several adapters uses."""

    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    factors: list[tuple[Tensor, Tensor]]  # A [R, K] and B [N, R] of each adapter, of ranks of their own
    scalings: tuple[float, ...]
    runs: tuple[tuple[int, int], ...]  # of neighbouring rows: how many, and their adapter or NO_ADAPTER
    dropout_p: float
    training: bool


def inspect_mixed(layer: Linear, x: Tensor, names: Sequence[str]) -> Mixed | str:
    """The parts of a layer for samples x [B, ..., K] with these adapters, or why PEFT has to serve them."""
    if layer._disable_adapters:
        return "adapters disabled"
    if layer.merged_adapters:
        return "merged"
    if x.dim() < 2 or len(x) != len(names):
        return f"{len(names)} adapter_names for an input {list(x.shape)}"
    used = [name for name in dict.fromkeys(names) if name != BASE and name in layer.lora_A]
    if not used:
        return "adapter_names without an adapter of this layer"
    for name in used:
        if name in layer.lora_variant:
            return type(layer.lora_variant[name]).__name__
    number = {name: index for index, name in enumerate(used)}
    rows = x[0].numel() // x.shape[-1] if len(x) else 0
    return _inspect_rows(layer, x, used, tuple((rows, number.get(name, NO_ADAPTER)) for name in names))


def inspect_activated(layer: Linear, x: Tensor, offsets: Sequence[int | None] | None) -> Mixed | str:
    """Likewise for the one active adapter of a layer, an aLoRA one, which ``inspect`` has found.

    Args:
        x: samples [B, T, K], or [B, K] of one token each.
        offsets: PEFT's alora_offsets: of how many tokens from the end the adapter sees a sample; None: of none.
    """
    if x.dim() not in (2, 3) or not len(x) or (offsets is not None and len(offsets) != len(x)):
        return f"{0 if offsets is None else len(offsets)} alora_offsets for an input {list(x.shape)}"
    tokens = x.shape[1] if x.dim() == 3 else 1
    runs = []
    for offset in offsets or [None] * len(x):
        seen = min(int(offset or 0), tokens)
        runs += [(tokens - seen, NO_ADAPTER), (seen, 0)]
    used = [name for name in layer.active_adapters if name in layer.lora_A]
    return _inspect_rows(layer, x, used, tuple(runs))


def activated_reason(layer: Linear) -> str | None:
    """Why a call of such a layer would not be fused now, or None, for an input of the base weight's dtype."""
    reason = base_reason(layer)
    if reason is not None:
        return reason
    found = inspect_activated(layer, layer.base_layer.weight.new_empty(1, layer.in_features), None)
    return found if isinstance(found, str) else None


def _inspect_rows(layer: Linear, x: Tensor, used: list[str], runs: tuple[tuple[int, int], ...]) -> Mixed | str:
    """The parts of a layer for runs of rows of x that have these adapters, by number, or why PEFT has to serve them."""
    reason = base_reason(layer)
    if reason is not None:
        return reason
    factors, scalings, dropouts = [], [], set()
    for name in used:
        a, b, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        reason = base_reason(layer, ("lora_A", a), ("lora_B", b))
        if reason is not None:
            return reason
        if b.bias is not None:
            return "lora_bias in a mixed batch"
        dropout = dropout_of(layer, name)
        if isinstance(dropout, str):
            return dropout
        dropouts.add(dropout if dropout[1] else (0.0, False))
        is_tensor = isinstance(scaling, Tensor)  # made one for hotswapping; its value is not waited for
        factors.append((a.weight, b.weight * scaling if is_tensor else b.weight))
        scalings.append(1.0 if is_tensor else float(scaling))
    if len(dropouts) > 1:
        return "adapters of several lora_dropout"
    if not is_plain(x):
        return f"the input is a {type(x).__name__}"
    if not torch.compiler.is_compiling() and (reason := transform_reason()):
        return reason
    base = layer.base_layer
    dtypes = {factor.dtype for pair in factors for factor in pair}
    if len(dtypes) > 1:
        return "lora_A and lora_B differ in dtype"
    (dtype,) = dtypes
    rank = max(a.shape[0] for a, _ in factors)
    reason = dtype_reason(layer, base.weight.dtype, (dtype, dtype), x.dtype, x.device.type) or segments_reason(
        x.dtype, x.device, (dtype, dtype), (flat(x).shape[0], *base.weight.shape, rank)
    )
    if reason is not None:
        return reason
    ((p, training),) = dropouts
    return Mixed(base.weight, base.bias, factors, tuple(scalings), runs, p, training)


def mixed_forward(parts: Mixed, x: Tensor) -> Tensor:
    """Y [B, ..., N] of samples x [B, ..., K]."""
    lora_a, lora_b, scaling, where = _stacked(parts, x.device)
    options: dict[str, Any] = {"adapters": where.adapters, "dropout_p": parts.dropout_p, "training": parts.training}
    y = grouped_lora_linear(flat(x), parts.weight, lora_a, lora_b, scaling, where.ends, parts.bias, **options)
    return y.view(*x.shape[:-1], y.shape[1])


def layer_ahead(layer: Linear, names: Sequence[str]) -> GroupedLayer | None:
    """The call of a layer by a batch whose samples have these adapters, before there is one, or None where it would not
    be served."""
    parts = inspect_mixed(layer, layer.base_layer.weight.new_empty(len(names), 1, layer.in_features), names)
    if isinstance(parts, str):
        return None
    lora_a, lora_b, scaling, where = _stacked(parts, parts.weight.device)
    number, scalings = (1.0, scaling) if isinstance(scaling, Tensor) else (scaling, None)
    p = parts.dropout_p if parts.training else 0.0
    return GroupedLayer(parts.weight[None], parts.bias, lora_a, lora_b, number, scalings, where, dropout_p=p)


def _stacked(parts: Mixed, device: torch.device) -> tuple[Tensor, Tensor, float | Tensor, Segments]:
    """A [T, R, K], B [T, N, R], their scaling or scalings, and the segments."""
    rank = max(a.shape[0] for a, _ in parts.factors)
    lora_a = torch.stack([F.pad(a, (0, 0, 0, rank - a.shape[0])) for a, _ in parts.factors])
    lora_b = torch.stack([F.pad(b, (0, rank - b.shape[1])) for _, b in parts.factors])
    find, numbers = (_segments.__wrapped__, _numbers.__wrapped__) if _is_traced() else (_segments, _numbers)
    same = len(set(parts.scalings)) == 1
    scaling = parts.scalings[0] if same else numbers(parts.scalings, device)
    ends, adapters = find(parts.runs, device)
    return lora_a, lora_b, scaling, Segments(ends, None, adapters)


def _is_traced() -> bool:
    """Whether a tensor that is made now may be none that a later call could use."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


@lru_cache(maxsize=256)
def _segments(runs: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the segments of runs of rows end, and their adapters; neighbours of one adapter are one."""
    ends, owners, end = [], [], 0
    for rows, adapter in runs:
        end += rows
        if owners and (owners[-1] == adapter or not rows):
            ends[-1] = end
        else:
            ends.append(end)
            owners.append(adapter)
    with torch.inference_mode(False):
        as_tensor = partial(torch.tensor, dtype=torch.int32, device=device)
        return as_tensor(ends), as_tensor(owners)


@lru_cache(maxsize=256)
def _numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


class MixedLoraModel(LoraModel):
    """PEFT's ``LoraModel`` with ``adapter_names`` in training as well.

    A checkpointed block is computed again in the backward, when the names of the forward are gone. So what is
    checkpointed by the models of transformers takes its names along; other checkpoints are refused where they can be
    known, in front of a forward without gradients, and torch itself finds that the rest saved other tensors.
    """

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None or not self.training or kwargs.get("alora_offsets") is not None:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        _check_names(self, names)
        with _named(self, names), _checkpoints_named(self, names):
            yield


def _check_names(model: nn.Module, names: Sequence[str]) -> None:
    """PEFT's own check: a name must be known in some layer."""
    known = {BASE}
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            known |= {*layer.lora_A.keys(), *layer.lora_embedding_A.keys()}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(f"adapter_names of adapters that do not exist: {', '.join(unknown)}")


@contextmanager
def _named(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within it every layer of the model is called with ``adapter_names``, as PEFT's own hooks do it."""
    layers = [module for module in model.modules() if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper))]
    handles = [layer.register_forward_pre_hook(partial(_give_names, names=names), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _give_names(layer: nn.Module, args: tuple, kwargs: dict, names: Sequence[str]) -> tuple[tuple, dict]:
    if not torch.is_grad_enabled() and not _replaying.get():
        raise ValueError(
            "adapter_names in training mode without gradients: a checkpoint that is not the model's own would not know "
            "them when it computes the layer again; call model.eval() where nothing trains, and "
            "model.gradient_checkpointing_enable() for checkpoints"
        )
    return args, {**kwargs, "adapter_names": names}


@contextmanager
def _checkpoints_named(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within it what transformers' modules checkpoint knows its names when it is computed again."""
    modules = [m for m in model.modules() if "_gradient_checkpointing_func" in vars(m)]
    checkpoints = [vars(module)["_gradient_checkpointing_func"] for module in modules]
    for module, checkpoint in zip(modules, checkpoints, strict=True):
        vars(module)["_gradient_checkpointing_func"] = partial(_checkpoint_named, checkpoint, module, names)
    try:
        yield
    finally:
        for module, checkpoint in zip(modules, checkpoints, strict=True):
            vars(module)["_gradient_checkpointing_func"] = checkpoint


def _checkpoint_named(
    checkpoint: Callable, module: nn.Module, names: Sequence[str], function: Callable, *args: Any, **kwargs: Any
) -> Any:
    def compute(*inputs: Any, **options: Any) -> Any:
        before = _replaying.set(True)
        try:
            with _named(module, names):
                return function(*inputs, **options)
        finally:
            _replaying.reset(before)

    return checkpoint(compute, *args, **kwargs)
