"""What a user could choose instead: each peer is built over given weights, or listed as missing with the reason."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora.bench import decompositions
from fastlora.bench.cases import LayerCase
from fastlora.ops import lora_linear
from fastlora.quantised_weight import quantised

SCALING = 1.5  # not 0 or 1, which hide a missing or a doubled scaling
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # codes, scales, and the scales' scales


@dataclass
class LayerTensors:
    """One set of inputs: x [M, K], dy [M, N], weight [N, K], lora_a [R, K], lora_b [N, R]."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor


@dataclass
class Layer:
    """A built layer: ``call`` maps x [M, K] to y [M, N]; its parameters by the names of LayerTensors.

    transposed: its parameters are those tensors transposed.
    """

    call: Callable[[Tensor], Tensor]
    parameters: dict[str, nn.Parameter]
    transposed: bool = False

    def load(self, tensors: LayerTensors) -> None:
        """Points every parameter at this set's tensors."""
        for name, parameter in self.parameters.items():
            tensor = getattr(tensors, name)
            parameter.data = tensor.t() if self.transposed else tensor

    def seen(self, tensors: LayerTensors) -> LayerTensors:
        """What the layer multiplies with, after ``load`` of this set."""
        return tensors

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.parameters.items() if name.startswith("lora")]


@dataclass
class PackedLayer(Layer):
    """A layer over nf4 weights with nested statistics, as QLoRA has them; each set's weight is quantised once.

    point: makes a ``bitsandbytes.nn.Params4bit`` the layer's weight.
    """

    point: Callable[[nn.Parameter], None] = lambda packed: None
    packed: dict[int, tuple] = field(default_factory=dict)  # by id, with the weight, which keeps the id its own

    def load(self, tensors: LayerTensors) -> None:
        self.point(self._of(tensors.weight))
        for name in ("lora_a", "lora_b"):
            self.parameters[name].data = getattr(tensors, name)

    def seen(self, tensors: LayerTensors) -> LayerTensors:
        return replace(tensors, weight=quantised(self._of(tensors.weight), tensors.x.dtype).dequantize())

    def _of(self, weight: Tensor) -> nn.Parameter:
        if id(weight) not in self.packed:
            from bitsandbytes.nn import Params4bit

            packed = Params4bit(weight.detach(), False, quant_type="nf4").to(weight.device)
            self.packed[id(weight)] = (weight, packed)
            self.parameters.setdefault("weight", packed)
        return self.packed[id(weight)][1]


Builder = Callable[[LayerCase, LayerTensors], Layer]


@dataclass(frozen=True)
class Peer:
    """One way to compute the layer.

    build: makes it for a case; raises ImportError where its package is missing.
    kind: "frozen" (no adapter), "ours", "backend" (one of ours by name, which may not serve every case), "package" (the
        real thing) or "stand-in" (our rewrite of its order).
    dropout: whether it can drop at all.
    mask: who draws the mask: "torch" (one F.dropout of x), "fastlora", or None (unknown: read out of its dX).
    weight_bytes: of an element of the base weight; None for the case's dtype.
    """

    name: str
    build: Builder
    kind: str
    dropout: bool = True
    mask: str | None = "torch"
    weight_bytes: float | None = None  # of an element of the base weight, where it is not in the case's dtype

    def refuses(self, case: LayerCase) -> str | None:
        """Why it cannot serve the case, or None."""
        return "no dropout" if case.dropout and not self.dropout else None


def _frozen_parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _from_function(function: Callable[..., Tensor], pass_dropout: bool = True) -> Builder:
    """A builder over ``function(x, weight, lora_a, lora_b, scaling[, dropout_p])``."""

    def build(case: LayerCase, tensors: LayerTensors) -> Layer:
        weight = _frozen_parameter(tensors.weight)
        lora_a, lora_b = nn.Parameter(tensors.lora_a), nn.Parameter(tensors.lora_b)
        tail = (SCALING, case.dropout) if pass_dropout else (SCALING,)
        parameters = {"weight": weight, "lora_a": lora_a, "lora_b": lora_b}
        return Layer(lambda x: function(x, weight, lora_a, lora_b, *tail), parameters)

    return build


def _build_frozen(case: LayerCase, tensors: LayerTensors) -> Layer:
    layer = nn.Linear(case.k, case.n, bias=False, device="meta")
    layer.weight = _frozen_parameter(tensors.weight)
    return Layer(layer, {"weight": layer.weight})


def _build_fastlora(case: LayerCase, tensors: LayerTensors) -> Layer:
    from fastlora.module import LoRALinear

    base = nn.Linear(case.k, case.n, bias=False, device="meta")
    base.weight = _frozen_parameter(tensors.weight)
    layer = LoRALinear.from_linear(base, r=case.r, alpha=SCALING * case.r, dropout=case.dropout)
    layer.lora_A, layer.lora_B = nn.Parameter(tensors.lora_a), nn.Parameter(tensors.lora_b)
    parameters = {"weight": layer.weight, "lora_a": layer.lora_A, "lora_b": layer.lora_B}
    return Layer(layer, parameters)


def _fastlora_backend(backend: str) -> Builder:
    def function(x, weight, lora_a, lora_b, scaling, dropout_p):
        return lora_linear(x, weight, lora_a, lora_b, scaling, dropout_p=dropout_p, backend=backend)

    return _from_function(function)


def _build_peft(case: LayerCase, tensors: LayerTensors) -> Layer:
    from peft import LoraConfig, inject_adapter_in_model

    holder = nn.Module()
    holder.linear = nn.Linear(case.k, case.n, bias=False, device=tensors.x.device, dtype=case.torch_dtype)
    config = LoraConfig(
        r=case.r, lora_alpha=SCALING * case.r, lora_dropout=case.dropout, target_modules=["linear"], bias="none"
    )
    layer = inject_adapter_in_model(config, holder).linear
    lora_a, lora_b = layer.lora_A["default"], layer.lora_B["default"]
    layer.base_layer.weight = _frozen_parameter(tensors.weight)
    lora_a.weight, lora_b.weight = nn.Parameter(tensors.lora_a), nn.Parameter(tensors.lora_b)
    parameters = {"weight": layer.base_layer.weight, "lora_a": lora_a.weight, "lora_b": lora_b.weight}
    return Layer(layer, parameters)


def _build_compiled_peft(case: LayerCase, tensors: LayerTensors) -> Layer:
    layer = _build_peft(case, tensors)
    torch._dynamo.reset()
    return Layer(torch.compile(layer.call, dynamic=False), layer.parameters)


def _build_loralib(case: LayerCase, tensors: LayerTensors) -> Layer:
    import loralib

    layer = loralib.Linear(case.k, case.n, r=case.r, lora_alpha=SCALING * case.r, lora_dropout=case.dropout, bias=False)
    layer.weight = _frozen_parameter(tensors.weight)
    layer.lora_A, layer.lora_B = nn.Parameter(tensors.lora_a), nn.Parameter(tensors.lora_b)
    parameters = {"weight": layer.weight, "lora_a": layer.lora_A, "lora_b": layer.lora_B}
    return Layer(layer, parameters)


def _build_torchtune(case: LayerCase, tensors: LayerTensors) -> Layer:
    from torchtune.modules.peft import LoRALinear

    layer = LoRALinear(case.k, case.n, rank=case.r, alpha=SCALING * case.r, dropout=case.dropout)
    layer.weight = _frozen_parameter(tensors.weight)
    layer.lora_a.weight, layer.lora_b.weight = nn.Parameter(tensors.lora_a), nn.Parameter(tensors.lora_b)
    parameters = {"weight": layer.weight, "lora_a": layer.lora_a.weight, "lora_b": layer.lora_b.weight}
    return Layer(layer, parameters)


def _build_unsloth(case: LayerCase, tensors: LayerTensors) -> Layer:
    from unsloth.kernels.fast_lora import LoRA_W

    def function(x, weight, lora_a, lora_b, scaling):
        return LoRA_W.apply(x.unsqueeze(0), weight, None, lora_a, lora_b, scaling).squeeze(0)

    return _from_function(function, pass_dropout=False)(case, tensors)


def _build_lorafusion(case: LayerCase, tensors: LayerTensors) -> Layer:
    from lorafusion.ops.lora_v1 import fused_linear_lora

    def function(x, weight, lora_a, lora_b, scaling, dropout_p):
        return fused_linear_lora(x.unsqueeze(0), weight, lora_a, lora_b, scaling, dropout_p=dropout_p).squeeze(0)

    return _from_function(function)(case, tensors)


def _build_runlora(case: LayerCase, tensors: LayerTensors) -> Layer:
    from runlora.runlora import RunLoRACollection

    weight = _frozen_parameter(tensors.weight.t())
    lora_a, lora_b = nn.Parameter(tensors.lora_a.t()), nn.Parameter(tensors.lora_b.t())
    operator = RunLoRACollection().get_best("flops", tensors.x, weight, lora_a, lora_b)
    parameters = {"weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    return Layer(lambda x: operator.apply(x, weight, lora_a * SCALING, lora_b, None), parameters, transposed=True)


def _packed_layer(tensors: LayerTensors) -> tuple[PackedLayer, list]:
    """A layer without a call yet, and a list of one: the weight of the set that was loaded last."""
    held: list = [None]
    parameters = {"lora_a": nn.Parameter(tensors.lora_a), "lora_b": nn.Parameter(tensors.lora_b)}
    layer = PackedLayer(lambda x: x, parameters, point=lambda packed: held.__setitem__(0, packed))
    layer.load(tensors)
    return layer, held


def _build_fastlora_nf4(case: LayerCase, tensors: LayerTensors) -> Layer:
    layer, held = _packed_layer(tensors)
    a, b = layer.parameters["lora_a"], layer.parameters["lora_b"]
    layer.call = lambda x: lora_linear(x, held[0], a, b, SCALING, dropout_p=case.dropout)
    return layer


def _build_dequantise_order(case: LayerCase, tensors: LayerTensors) -> Layer:
    layer, held = _packed_layer(tensors)
    a, b = layer.parameters["lora_a"], layer.parameters["lora_b"]

    def call(x):
        return decompositions.DequantiseOrder.apply(x, quantised(held[0], x.dtype), a, b, SCALING)

    layer.call = call
    return layer


def _build_peft_nf4(case: LayerCase, tensors: LayerTensors) -> Layer:
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit

    base = Linear4bit(case.k, case.n, False, case.torch_dtype, quant_type="nf4", device="meta")
    layer, _ = _packed_layer(tensors)
    base.weight = layer.parameters["weight"]
    config = LoraConfig(r=case.r, lora_alpha=SCALING * case.r, lora_dropout=case.dropout)
    peft = PeftLinear4bit(base, "default", config, r=case.r, lora_alpha=SCALING * case.r)
    peft.lora_A["default"].weight = layer.parameters["lora_a"]
    peft.lora_B["default"].weight = layer.parameters["lora_b"]

    def point(packed):
        base.weight, base.quant_state = packed, packed.quant_state

    layer.call, layer.point = peft, point
    return layer


FROZEN = Peer("frozen", _build_frozen, "frozen", mask=None)
FASTLORA = Peer("fastlora", _build_fastlora, "ours", mask="fastlora")
STORED_S = Peer("autograd.Function", _from_function(decompositions.StoredS.apply, False), "stand-in", dropout=False)

# In every run, where they are installed.
ORDINARY = (
    Peer("eager", _from_function(decompositions.eager), "stand-in"),
    Peer("peft", _build_peft, "package"),
    Peer("compiled peft", _build_compiled_peft, "package", mask=None),
    Peer("loralib", _build_loralib, "package"),
    Peer("torchtune", _build_torchtune, "package"),
    Peer("unsloth order", _from_function(decompositions.UnslothOrder.apply, False), "stand-in", dropout=False),
    Peer("lorafusion order", _from_function(decompositions.LoRAFusionOrder.apply), "stand-in"),
    Peer("runlora order", _from_function(decompositions.RunLoRAOrder.apply, False), "stand-in", dropout=False),
)

# Over an nf4 base weight: ours, PEFT's over bitsandbytes', and decoding it in front of dense products.
QUANTISED = (
    Peer("fastlora nf4", _build_fastlora_nf4, "backend", mask="fastlora", weight_bytes=NF4_BYTES),
    Peer("peft nf4", _build_peft_nf4, "package", weight_bytes=NF4_BYTES),
    Peer("dequantise order nf4", _build_dequantise_order, "stand-in", dropout=False, weight_bytes=NF4_BYTES),
)

# Only where asked for by name: they need a GPU, patch what they are imported beside, or have another base weight.
ON_REQUEST = (
    Peer("unsloth", _build_unsloth, "package", dropout=False),
    Peer("lorafusion", _build_lorafusion, "package", mask=None),
    Peer("runlora", _build_runlora, "package", dropout=False),
    *QUANTISED,
)


def preset_peers(preset: str) -> tuple[Peer, ...]:
    """Those of a preset's cases, beyond fastlora and the frozen layer, which are measured in every run."""
    return QUANTISED if preset == "qlora" else ORDINARY


def backend_peers(device: str) -> list[Peer]:
    """fastlora's backends one by one, where there is a choice."""
    if device != "cuda":
        return []
    from fastlora.selection import available_backends

    usable = [name for name, state in available_backends().items() if state == "usable"]
    return [Peer(f"fastlora[{name}]", _fastlora_backend(name), "backend", mask="fastlora") for name in usable]


def find_peer(name: str) -> Peer:
    """A peer by name, or ``module:function`` for one of the user's own.

    Such a function takes (weight [N, K], lora_a [R, K], lora_b [N, R], scaling, dropout_p) and returns a callable of x
    that uses the very parameters it was given.

    Raises:
        ValueError: no such peer, or the module cannot be imported or lacks the function.
    """
    for peer in (*ORDINARY, *ON_REQUEST):
        if peer.name == name:
            return peer
    module, colon, attribute = name.partition(":")
    if not colon:
        known = ", ".join(peer.name for peer in (*ORDINARY, *ON_REQUEST))
        raise ValueError(f"unknown peer {name!r}; choose from {known}, or name your own as module:function")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a user's module may fail in any way
        raise ValueError(f"peer {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"peer {name!r} cannot be called: it is of type {type(function).__name__}")

    def build(case: LayerCase, tensors: LayerTensors) -> Layer:
        weight = _frozen_parameter(tensors.weight)
        lora_a, lora_b = nn.Parameter(tensors.lora_a), nn.Parameter(tensors.lora_b)
        call = function(weight, lora_a, lora_b, SCALING, case.dropout)
        return Layer(call, {"weight": weight, "lora_a": lora_a, "lora_b": lora_b})

    return Peer(name, build, "package", mask=None)


def torch_mask(x: Tensor, dropout_p: float) -> Tensor:
    """The elements that the next ``F.dropout`` of a tensor like x would keep."""
    return F.dropout(torch.ones_like(x), dropout_p) > 0
