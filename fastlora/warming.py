"""Kernels compiled before the first step, side by side, instead of one after the other within it."""

import itertools
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora import quantised_operands, scaled_operands
from fastlora.backends.configs import FEW_ROWS
from fastlora.dispatch import compile_ahead
from fastlora.experts import layers_ahead
from fastlora.experts_module import LoRAExperts
from fastlora.grouped import ahead
from fastlora.grouped.ahead import GroupedLayer
from fastlora.module import LoRALinear
from fastlora.one_launch import served_in_launch
from fastlora.operands import as_stored, describe_backward, describe_forward
from fastlora.problem import BackwardOperands, ForwardOperands, LaunchSpec, Needs, ScaledBackward, ScaledForward
from fastlora.projections import (
    Projection,
    SharedBackward,
    SharedForward,
    describe_shared_backward,
    describe_shared_forward,
)
from fastlora.quantised_module import QuantisedLoRALinear
from fastlora.quantised_weight import QuantisedWeight
from fastlora.selection import environment_backend
from fastlora.shared_input.plan import shared_inputs

# Numbers of tokens that stand for all above FEW_ROWS: a tile is chosen by how many there are, of 32 rows at least, and
# beyond 2048 rows of 128, so that no number in between has another.
LONGEST = 16384
_ANY_TOKENS = (*range(FEW_ROWS + 32, 2048, 32), *range(2048, LONGEST + 1, 128))
_MOST_WORKERS = 8


class Warmed(NamedTuple):
    """What a warm-up has done.

    layers: LoRA layers found; kernels: compiled for them, or found in Triton's cache; seconds: that it took.
    """

    layers: int
    kernels: int
    seconds: float


class _Layer(NamedTuple):
    weight: Tensor | QuantisedWeight
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dropout_p: float
    magnitude: Tensor | None  # of DoRA


def warmup(
    model: nn.Module,
    tokens: int | Iterable[int] | None = None,
    *,
    training: bool = True,
    evaluation: bool = True,
    adapter_names: Sequence[str] | None = None,
    backend: str | None = None,
    workers: int | None = None,
) -> Warmed:
    """Compiles and loads the kernels that a model's LoRA layers will launch, several at once, and launches none.

    Without it each kernel is compiled by the first call that needs it: seconds each, one after the other, within the
    first steps or within the capture of a CUDA graph. Compiled kernels stay in Triton's cache on disk. Call it where
    the model is on its device, has the dtypes that it will be used in, and, if it will be used under
    ``torch.autocast``, under that. Layers on the CPU, and calls that the CUDA backend or the reference serves, have
    nothing to compile; neither have FSDP units of single layers here. Where layers are grouped (``group=``), it is done
    for the group and for its layers one by one, which is what calls come to that cannot be served together.

    Args:
        model: any module with LoRALinear layers, or a PEFT model that ``fastlora.integrations.peft.patch`` has turned.
        tokens: numbers of rows of a call (batch x sequence), each at least 1. By default any number from 65 to
            16384, which is 12 kernels at most for all linear layers of one dtype and rank, and 14 for all experts.
            Experts have as many rows as their tokens choose experts: ``num_experts_per_tok`` of their config.
        training: compile for steps of training: the forward with dropout, and the backward.
        evaluation: compile for forwards without dropout.
        adapter_names: of a PEFT model, as a batch will be given them, one for each sample: compile for such batches,
            whose samples are tokens / len(adapter_names) long, in layers that serve them in one launch.
        backend: "cuda", "triton" or "reference" to insist on one; None for the best that serves a call.
        workers: threads that compile; by default one for each CPU, 8 at most.

    Returns:
        The numbers of layers and kernels, and how long it took.

    Raises:
        ValueError: a number of tokens below 1, or one that ``adapter_names`` do not share evenly; no LoRA layer that is
            ever fused; or ``backend`` cannot serve a call.
    """
    started = time.perf_counter()
    rows = _ANY_TOKENS if tokens is None else (tokens,) if isinstance(tokens, int) else tuple(tokens)
    if any(m < 1 for m in rows):
        raise ValueError(f"tokens must be at least 1, got {min(rows)}")
    samples = 1 if adapter_names is None else len(adapter_names)
    if tokens is None:
        rows = tuple({-(-m // samples) * samples for m in rows})
    elif any(m % samples for m in rows):
        raise ValueError(f"tokens {rows} are to be multiples of the {samples} samples that adapter_names has")
    found = _fused(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no LoRA layer of fastlora's; inject or patch it first")
    by_module = [_layers_of(module, adapter_names) for module in found]
    distinct = {_kind(layer): layer for _, layers in by_module for layer in layers}
    backend = backend or environment_backend()
    calls: Iterable[tuple] = (
        call
        for kind in distinct.values()
        for layer, trains, evaluates in _modes(kind, training, evaluation)
        for m in rows
        for call in (
            ahead.calls(layer, m, trains, evaluates)
            if isinstance(layer, GroupedLayer)
            else _calls(layer, m, trains, evaluates, backend)
        )
    )
    if adapter_names is None:
        groups = {tuple(map(_kind, layers)): layers for layers in _groups_of(model)}
        of_groups = (
            call for layers in groups.values() for m in rows for call in _group_calls(layers, m, training, evaluation)
        )
        calls = itertools.chain(calls, of_groups)
    workers = workers or min(os.cpu_count() or 1, _MOST_WORKERS)
    kernels = compile_ahead(calls, backend, workers)
    return Warmed(sum(count for count, _ in by_module), kernels, time.perf_counter() - started)


def _fused(model: nn.Module) -> list[nn.Module]:
    """Modules whose calls may be fused; of PEFT's wrappers around one experts module, the outermost."""
    kinds: tuple[type, ...] = (LoRALinear, LoRAExperts)
    inner: set[nn.Module] = set()
    if "peft" in sys.modules:
        from fastlora.integrations.peft_experts import FusedParamWrapper
        from fastlora.integrations.peft_layer import FusedForward

        kinds = (*kinds, FusedForward, FusedParamWrapper)
        inner = {module.base_layer for module in model.modules() if isinstance(module, FusedParamWrapper)}
    return [module for module in model.modules() if isinstance(module, kinds) and module not in inner]


def _layers_of(module: Any, names: Sequence[str] | None) -> tuple[int, Sequence[_Layer | GroupedLayer]]:
    """How many LoRA layers a module is, and what their fused calls would be made of, as it is now."""
    if isinstance(module, LoRAExperts):
        factors = module.factors()
        return len(factors), layers_ahead(module, factors) if factors else []
    if not isinstance(module, LoRALinear):
        from fastlora.integrations import peft_experts, peft_mixed

        if isinstance(module, peft_experts.FusedParamWrapper):
            return peft_experts.wrappers_ahead(module, names)
        if names is not None:
            mixed = peft_mixed.layer_ahead(module, names)
            return (0, []) if mixed is None else (1, [mixed])
    layer = _layer_of(module)
    return (0, []) if layer is None else (1, [layer])


def _layer_of(module: Any) -> _Layer | None:
    """Of a layer whose calls have one adapter for all rows; None where a call would not be fused."""
    if isinstance(module, LoRALinear):
        if module.merged:
            return None
        weight = module.packed() if isinstance(module, QuantisedLoRALinear) else module.weight_rows
        magnitude = module.lora_magnitude_vector if module.dora else None
        return _Layer(weight, module.bias, module.lora_A, module.lora_B, module.scaling, module.dropout, magnitude)
    from fastlora.integrations.peft_reasons import Parts, inspect

    parts = inspect(module)
    if not isinstance(parts, Parts):
        return None
    scaling = 1.0 if isinstance(parts.scaling, Tensor) else parts.scaling
    bias = parts.lora_bias if parts.bias is None else parts.bias
    return _Layer(parts.weight, bias, parts.lora_a, parts.lora_b, scaling, parts.dropout_p, parts.magnitude)


def _kind(layer: _Layer | GroupedLayer) -> tuple:
    """Layers of one kind have the same calls."""
    return (type(layer), *map(_kind_of, layer))


def _kind_of(field: Any) -> Any:
    if isinstance(field, Tensor):
        return field.shape, field.stride(), field.dtype, field.device, field.requires_grad
    if isinstance(field, QuantisedWeight):
        return field.format, field.shape, field.dtype, field.block, *((t.dtype, t.device) for t in field.tensors)
    return tuple(map(_kind_of, field)) if isinstance(field, tuple) else field


def _described(layer: _Layer, given: Any, needs: Needs | None, backend: str | None) -> tuple[tuple, LaunchSpec]:
    """Operands of a forward (without ``needs``) or a backward, and their description on the layer's device: over the
    packed weight where a launch decodes it, else over the dense one; with DoRA's scale where a launch has it, else
    without its scale and its bias."""
    device = layer.weight.device
    if isinstance(layer.weight, QuantisedWeight):
        place = 1 if needs is None else 2
        packed = layer.weight.to(given.weight.dtype)
        over = (*given[:place], packed, *given[place + 1 :])
        operands, spec = (
            quantised_operands.describe_forward(over)
            if needs is None
            else quantised_operands.describe_backward(over, needs)
        )
        spec = spec._replace(device=device)
        if served_in_launch(spec, backend):
            return operands, spec
    if layer.magnitude is not None:
        operands, spec = _described_scaled(layer.magnitude, given, needs)
        spec = spec._replace(device=device)
        if served_in_launch(spec, backend):
            return operands, spec
        given = given._replace(bias=None) if needs is None else given
        needs = needs and needs._replace(dbias=False)
    operands, spec = describe_forward(given) if needs is None else describe_backward(given, needs)
    return operands, spec._replace(device=device)


def _modes(
    layer: _Layer | GroupedLayer, training: bool, evaluation: bool
) -> Iterator[tuple[_Layer | GroupedLayer, bool, bool]]:
    """The layer as it trains and as it is evaluated. DoRA keeps more where its magnitude trains, by a kernel of its
    own; with dropout it is torch's."""
    if isinstance(layer, GroupedLayer) or layer.magnitude is None:
        yield layer, training, evaluation
        return
    if training and layer.dropout_p == 0.0:
        yield layer, True, False
    if evaluation:
        yield layer._replace(magnitude=layer.magnitude.detach()), False, True


def _described_scaled(magnitude: Tensor, given: Any, needs: Needs | None) -> tuple[tuple, LaunchSpec]:
    """A call of a DoRA layer, and its description."""
    meta = magnitude.to("meta")
    norm, trains = meta.to(torch.promote_types(given.weight.dtype, torch.float32)), magnitude.requires_grad
    if needs is None:
        return scaled_operands.describe_forward(ScaledForward(given, meta, norm, trains))
    unscaled = torch.empty_like(given.dy) if trains else None
    return scaled_operands.describe_backward(ScaledBackward(given, meta, norm, unscaled), needs)


def _calls(
    layer: _Layer, m: int, training: bool, evaluation: bool, backend: str | None
) -> Iterator[tuple[tuple, LaunchSpec]]:
    """Operands on the "meta" device of a layer's calls with m rows, and their descriptions on its own."""
    probabilities = {layer.dropout_p} if training else set()
    for p in probabilities | ({0.0} if evaluation else set()):
        operands = _forward_of(layer, m, p)
        yield _described(layer, operands, None, backend)
        if training and p == layer.dropout_p:
            x, weight, lora_a, lora_b, _, scaling, _, seed = operands
            dy, s = (x.new_empty(m, size) for size in lora_b.shape)
            saved = BackwardOperands(dy, x, weight, lora_a, lora_b, s, scaling, p, seed)
            yield _described(layer, saved, _needs_of(layer), backend)


def _forward_of(layer: _Layer, m: int, dropout_p: float) -> ForwardOperands:
    """A layer's call with m rows, on the "meta" device."""
    device, dtype = layer.weight.device, layer.weight.dtype
    if device.type != "meta" and torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)

    def meta(shape: Iterable[int], dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device="meta")

    n, k = layer.weight.shape
    lora_a, lora_b = (
        meta(t.shape, torch.float32 if t.dtype == torch.float32 else dtype) for t in (layer.lora_a, layer.lora_b)
    )
    transposed = isinstance(layer.weight, Tensor) and as_stored(layer.weight)[1] is not layer.weight
    x, weight = meta((m, k)), meta((k, n)).t() if transposed else meta((n, k))
    bias = None if layer.bias is None else meta((n,))
    seed = meta((), torch.int64) if dropout_p > 0.0 else None
    return ForwardOperands(x, weight, lora_a, lora_b, bias, layer.scaling, dropout_p, seed)


def _needs_of(layer: _Layer) -> Needs:
    trains_bias = layer.bias is not None and layer.bias.requires_grad
    return Needs(True, layer.lora_a.requires_grad, layer.lora_b.requires_grad, trains_bias)


def _groups_of(model: nn.Module) -> Iterator[tuple[_Layer, ...]]:
    """Layers that are computed together because they share an input."""
    for path, groups in shared_inputs(model).items():
        parent = model.get_submodule(path)
        for names in groups:
            layers = [layer for name in names if (layer := _layer_of(parent.get_submodule(name))) is not None]
            dense = [each for each in layers if isinstance(each.weight, Tensor) and each.magnitude is None]
            if len(dense) > 1:
                yield tuple(dense)


def _group_calls(layers: tuple[_Layer, ...], m: int, training: bool, evaluation: bool) -> Iterator[tuple]:
    """As ``_calls``, of layers that are computed together."""
    for trains in (True,) * training + (False,) * evaluation:
        of_each = [_forward_of(layer, m, layer.dropout_p if trains else 0.0) for layer in layers]
        x, projections = of_each[0].x, tuple(Projection(*each[1:]) for each in of_each)
        described = [describe_shared_forward(SharedForward(x, projections))]
        if trains:
            dys, ss = (tuple(x.new_empty(m, each.lora_b.shape[i]) for each in of_each) for i in (0, 1))
            needs = tuple(map(_needs_of, layers))
            described.append(describe_shared_backward(SharedBackward(dys, x, projections, ss, needs)))  # type: ignore[arg-type]
        for operands, spec in described:
            device = layers[0].weight.device
            members = tuple(each._replace(device=device) for each in spec.members)
            yield operands, spec._replace(device=device, members=members)
