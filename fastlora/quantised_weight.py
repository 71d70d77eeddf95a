"""A frozen base weight as bitsandbytes or torchao packs it, and its values as those libraries' own code decodes them.

On a GPU, kernels make the same values in the launch that reads them.

Formats: bitsandbytes' nf4 and fp4, of any block size, with plain or nested statistics; torchao's int8 and float8
weight-only tensors. A value is code·scale in float32, rounded once to the dtype that is asked for; nested statistics
are code2·absmax2 + offset, with a rounding after each of the two. Where the dtype is not the one that the weight was
quantised from, bitsandbytes' own forward rounds once, as here, and its backward twice.

What quantises the input as well (LLM.int8, torchao's dynamic activations) is no format here: it computes another thing.
Neither library is imported before one of its tensors is there.
"""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # that the libraries decode to
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes'
FOUR_BIT = ("nf4", "fp4")
_LAYERS_4BIT = ("Linear4bit", "LinearNF4", "LinearFP4")
_LIBRARIES = ("bitsandbytes", "torchao")
QUANTISES_INPUT = "quantises the layer's input as well"


class QuantisedWeight(NamedTuple):
    """A weight [N, K], packed; takes a tensor's place in ``fastlora.lora_linear``.

    format: "nf4", "fp4", "int8" or "float8".
    tensors: nf4, fp4: codes (two elements a byte, the first in its high half), absmax, and where statistics are nested
        absmax2, code2 [256], offset; int8: codes [N, K], scales, and zero points where there are any; float8: values
        [N, K], scales.
    shape: N, K.
    dtype: of the values: float16, bfloat16 or float32.
    block: nf4, fp4: elements of the flattened weight that share a scale, and scales that share a nested one (0: plain);
        int8, float8: rows and columns that share a scale.
    """

    format: str
    tensors: tuple[Tensor, ...]
    shape: tuple[int, int]
    dtype: torch.dtype
    block: tuple[int, int]

    @property
    def requires_grad(self) -> bool:
        """Never: a quantised weight is frozen."""
        return False

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def is_4bit(self) -> bool:
        """Whether it is one of bitsandbytes' formats."""
        return self.format in FOUR_BIT

    @property
    def nested(self) -> bool:
        """Whether the scales are quantised themselves."""
        return self.is_4bit and self.block[1] > 0

    def to(self, dtype: torch.dtype) -> "QuantisedWeight":
        """The same weight with values of another dtype; nothing is decoded."""
        return self if dtype == self.dtype else self._replace(dtype=dtype)

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """The values [N, K] in ``dtype``, made by the library: a new tensor.

        Raises:
            ImportError: the library that has packed the weight is not installed.
        """
        library = "bitsandbytes" if self.is_4bit else "torchao"
        try:
            if self.is_4bit:
                from bitsandbytes import functional

                return _decode_4bit(self, functional)
            from torchao.quantization import quant_primitives

            return _decode_8bit(self, quant_primitives)
        except ImportError as error:
            raise ImportError(f"{library} decodes a {self.format} weight: pip install {library} ({error})") from error


def _decode_8bit(weight: QuantisedWeight, primitives: Any) -> Tensor:
    codes, scale, *zero_point = weight.tensors
    if weight.format == "float8":
        return primitives._dequantize_affine_float8(codes, scale, weight.dtype)
    zeros = zero_point[0] if zero_point else None
    # The bounds do not enter the values; they are the ones that torchao gives.
    return primitives.dequantize_affine(
        codes, weight.block, scale, zeros, torch.int8, -128, 127, output_dtype=weight.dtype
    )


def _decode_4bit(weight: QuantisedWeight, functional: Any) -> Tensor:
    codes, absmax, *inner = weight.tensors
    nested, offset = None, None
    if inner:
        absmax2, code2, offset = inner
        nested = functional.QuantState(absmax2, code=code2, blocksize=weight.block[1], dtype=torch.float32)
    # As one row: with AVX-512, bitsandbytes' code for CPUs takes a neighbour's scale for some elements of rows that are
    # no multiple of a block (0.50.2).
    row = torch.Size((1, prod(weight.shape)))
    state = functional.QuantState(absmax, row, None, weight.block[0], weight.format, weight.dtype, offset, nested)
    return functional.dequantize_4bit(codes.view(-1, 1), state).reshape(weight.shape)


def read_weight(weight: Any, dtype: torch.dtype | None = None) -> QuantisedWeight | str | None:
    """What a tensor of one of the libraries holds; or why no layer can be computed over it; None for any other tensor.

    Args:
        weight: a bitsandbytes ``Params4bit`` or a torchao tensor [N, K].
        dtype: of the values; by default the one that the weight was quantised from.
    """
    kind = type(weight)
    if not _is_known(kind):
        return None
    if weight.requires_grad:
        return f"the {kind.__name__} requires a gradient, which no LoRA layer computes: requires_grad_(False)"
    return _checked(kind.__name__, _READERS[kind.__name__](weight), dtype)


def _checked(kind: str, found: QuantisedWeight | str, dtype: torch.dtype | None) -> QuantisedWeight | str:
    """What was read of an object of this class, in this dtype, or why it cannot be used."""
    if isinstance(found, str):
        return f"this {kind} {found}"
    found = found if dtype is None else found.to(dtype)
    if found.dtype not in DTYPES:
        return f"a {found.format} weight is decoded to float16, bfloat16 or float32, not to {found.dtype}"
    if any(tensor.device != found.device for tensor in found.tensors):
        return f"this {kind} is on {found.device} and some of its scales are not: move the layer as a whole"
    return found


def quantised(weight: Any, dtype: torch.dtype | None = None) -> QuantisedWeight:
    """The description of a quantised weight that ``fastlora.lora_linear`` takes.

    Args:
        weight: a bitsandbytes ``Params4bit`` that is quantised, or a torchao int8 or float8 weight-only tensor [N, K].
        dtype: of the values that products read: the dtype of the layer's input. By default the one that the weight was
            quantised from.

    Returns:
        It shares the library's tensors; nothing is decoded or copied.

    Raises:
        TypeError: neither of these, or it quantises the layer's input as well.
        ValueError: it is not quantised yet, its statistics are missing or do not fit, or the dtype is another.
    """
    found = weight if isinstance(weight, QuantisedWeight) else read_weight(weight, dtype)
    if found is None:
        raise TypeError(f"a {type(weight).__name__} is no quantised weight of bitsandbytes or torchao")
    if isinstance(found, str):
        raise (TypeError if QUANTISES_INPUT in found else ValueError)(found)
    return found if dtype is None else found.to(dtype)


def read_layer(linear: Any) -> QuantisedWeight | str | None:
    """``read_weight`` of a layer's weight, decoded to the dtype that the layer computes in; None for any other layer.

    Args:
        linear: a ``bitsandbytes.nn.Linear4bit``, or a plain ``nn.Linear`` that torchao has quantised.
    """
    kind = type(linear)
    if kind is torch.nn.Linear:
        return read_weight(linear.weight)
    if kind.__name__ not in _LAYERS_4BIT or not kind.__module__.startswith("bitsandbytes."):
        return None
    weight = linear.weight
    if type(weight).__name__ not in ("Params4bit", "Parameter", "Tensor"):
        return f"a {kind.__name__} holds a {type(weight).__name__}"
    return read_codes(kind.__name__, weight, getattr(linear, "quant_state", None), linear.compute_dtype)


def read_codes(owner: str, weight: Any, layers_state: Any, dtype: torch.dtype | None = None) -> QuantisedWeight | str:
    """``read_weight`` of a layer's 4-bit codes. Pickle and FSDP leave a plain parameter, and the quant state on it or
    on the layer alone, where bitsandbytes finds it, too."""
    state = getattr(weight, "quant_state", None)
    return _checked(owner, _four_bit(weight, layers_state if state is None else state), dtype)


def is_packed(weight: Any) -> bool:
    """Whether this is what ``quantised`` takes, well-formed or not."""
    return isinstance(weight, QuantisedWeight) or _is_known(type(weight))


def _is_known(kind: type) -> bool:
    return kind.__name__ in _READERS and kind.__module__.partition(".")[0] in _LIBRARIES


def check_decoded_dtype(weight: QuantisedWeight, dtype: torch.dtype) -> None:
    """Raises TypeError unless a layer's input of this dtype can be multiplied by the weight as it is decoded."""
    if weight.dtype != dtype:
        raise TypeError(
            f"x is {dtype}, but the {weight.format} weight is decoded to {weight.dtype} (a layer's compute dtype):"
            " cast x, run under torch.autocast with that dtype, or take weight.to(x.dtype)"
        )


def _params4bit(weight: Any) -> QuantisedWeight | str:
    return _four_bit(weight, weight.quant_state)


def _four_bit(weight: Any, state: Any) -> QuantisedWeight | str:
    if state is None:
        if not getattr(weight, "bnb_quantized", False):
            return "is not quantised yet, which its layer does when it is moved: call layer.to(device) first"
        return "has lost its quant_state, without which its codes mean nothing: load the layer's state dict anew"
    if getattr(state, "packing_format_for_cpu", False):
        return (
            "is packed for bitsandbytes' own CPU inference, with rounded scales: reload the model, and train it before "
            "anything is run in eval mode"
        )
    shape, block = state.shape, state.blocksize
    if state.quant_type not in FOUR_BIT:
        return f"has the quant_type {state.quant_type!r}; nf4 and fp4 are served: quantise the layer with one of them"
    if block not in _BLOCKS:
        return f"has the block size {block}; bitsandbytes has {', '.join(map(str, _BLOCKS))}: quantise it with one"
    if shape is None or len(shape) != 2:
        return f"was made of a tensor {None if shape is None else list(shape)}, not of a matrix [out, in]"
    with torch._C.DisableTorchFunctionSubclass():
        codes = weight.detach()  # a plain tensor, whose changes in place are still noticed
    elements, absmax = prod(shape), state.absmax
    inner: tuple[Tensor, ...] = ()
    if codes.numel() * codes.element_size() != (elements + 1) // 2 or absmax.numel() != -(elements // -block):
        return (
            f"holds {codes.numel() * codes.element_size()} bytes of codes and {absmax.numel()} scales, which is not "
            f"{list(shape)} in blocks of {block}: quantise the whole weight anew"
        )
    if state.nested:
        second = state.state2
        if second.dtype != torch.float32 or second.code.numel() != 256:
            return "has nested statistics of another code than bitsandbytes' 8-bit one: quantise the layer anew"
        inner = (second.absmax, second.code, state.offset)
    elif absmax.dtype != torch.float32:
        return f"has scales in {absmax.dtype} without nested statistics: quantise the layer anew"
    blocks = (block, state.state2.blocksize if inner else 0)
    return QuantisedWeight(state.quant_type, (codes, absmax, *inner), (shape[0], shape[1]), state.dtype, blocks)


def _int8_tensor(weight: Any) -> QuantisedWeight | str:
    if weight.act_quant_kwargs is not None or weight.act_quant_scale is not None:
        return QUANTISES_INPUT
    if weight.act_pre_scale is not None:
        return "scales the layer's input: use torchao's own forward"
    tensors = (weight.qdata, weight.scale) + (() if weight.zero_point is None else (weight.zero_point,))
    return _of_torchao("int8", weight, tensors, weight.block_size)


def _float8_tensor(weight: Any) -> QuantisedWeight | str:
    if weight.act_quant_kwargs is not None:
        return QUANTISES_INPUT
    return _of_torchao("float8", weight, (weight.qdata, weight.scale), weight.block_size or weight.shape)


def _affine_tensor(weight: Any) -> QuantisedWeight | str:
    """The class that version 1 of Int8WeightOnlyConfig makes."""
    layout, domain = type(weight._layout).__name__, getattr(weight.zero_point_domain, "name", None)
    if layout != "PlainLayout" or domain != "INT" or weight.tensor_impl.int_data.dtype != torch.int8:
        return f"is of the layout {layout}; only plain int8 is served: use torchao's own forward"
    codes, scale, zero_point = weight.tensor_impl.get_plain()
    return _of_torchao(
        "int8", weight, (codes, scale) + (() if zero_point is None else (zero_point,)), weight.block_size
    )


def _activation_tensor(weight: Any) -> str:
    return QUANTISES_INPUT


def _of_torchao(name: str, weight: Any, tensors: tuple[Tensor, ...], block: Any) -> QuantisedWeight | str:
    if weight.dim() != 2:
        return f"has the shape {list(weight.shape)}, not [out, in]"
    return QuantisedWeight(name, tensors, (weight.shape[0], weight.shape[1]), weight.dtype, (block[0], block[1]))


_READERS = {
    "Params4bit": _params4bit,
    "Int8Tensor": _int8_tensor,
    "Float8Tensor": _float8_tensor,
    "AffineQuantizedTensor": _affine_tensor,
    "LinearActivationQuantizedTensor": _activation_tensor,
}
