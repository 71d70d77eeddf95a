"""``QuantisedLoRALinear``: a LoRA branch on a layer whose frozen weight bitsandbytes or torchao has quantised."""

from typing import Any

import torch
from torch import Tensor, nn

from fastlora.layer_checks import check_adapter_dtype
from fastlora.module import LoRALinear
from fastlora.ops import lora_linear
from fastlora.quantised_weight import QuantisedWeight, read_codes, read_layer, read_weight

_STATE = "weight."  # in front of bitsandbytes' statistics in a state dict
_NOT_MERGED = (
    "the {} weight would be rounded to few bits again, and most of the branch with it: save_adapter, then merge into "
    "the model before it was quantised (fastlora merge)"
)


class QuantisedLoRALinear(LoRALinear):
    """``LoRALinear`` over a quantised weight, which keeps its packed form; made by ``inject`` and ``from_linear``.

    x is multiplied by the values that the library decodes, rounded once to x's dtype. The state dict has the entries
    that the quantised layer's own has, and lora_A and lora_B.

    Attributes:
        weight: the library's own frozen parameter.
        compute_dtype: what a 4-bit layer was told to compute in, and the only dtype that x may have, but under
            autocast; None where it was told nothing.

    Raises:
        TypeError: in forward, where x has another dtype than the layer computes in.
        ValueError: ``merge``; and in forward, where the weight has lost its quant state since.
    """

    compute_dtype: torch.dtype | None
    quant_state: Any  # bitsandbytes', or None

    @classmethod
    def from_linear(cls, linear: nn.Module, r: int = 8, alpha: float = 16, *args: Any, **options: Any):
        """Puts a branch on a ``bitsandbytes.nn.Linear4bit`` or on an ``nn.Linear`` quantised by torchao, whose weight
        and bias it shares.

        Args:
            linear: the layer, quantised already.
            r, alpha, dropout, rslora, init, copy_input, adapter_dtype: as for ``LoRALinear.from_linear``; adapter_dtype
                is the dtype that the layer computes in, by default, or float32 over a 16-bit one.

        Raises:
            TypeError: no such layer, or ``adapter_dtype`` does not go with it.
            ValueError: it is not quantised yet; ``dora``; and as for ``LoRALinear``.
        """
        packed = read_layer(linear)
        if not isinstance(packed, QuantisedWeight):
            raise (TypeError if packed is None else ValueError)(
                f"from_linear needs a quantised layer, got a {type(linear).__name__}" if packed is None else packed
            )
        return cls._over(linear, packed, r, alpha, *args, **options)

    @classmethod
    def _over(
        cls, linear: Any, packed: QuantisedWeight, r, alpha, dropout=0.0, rslora=False, init="kaiming",
        copy_input=False, adapter_dtype=None, dora=False,
    ):  # fmt: skip
        if dora:
            raise ValueError(f"DoRA needs the norms of a dense weight, and this one is {packed.format}: leave dora out")
        n, k = packed.shape
        dtype = packed.dtype if adapter_dtype is None else adapter_dtype
        check_adapter_dtype(dtype, packed.dtype)
        layer = cls(
            k, n, linear.bias is not None, r=r, alpha=alpha, dropout=dropout, rslora=rslora, init=init,
            copy_input=copy_input, device="meta", dtype=dtype,
        )  # fmt: skip
        layer.weight = linear.weight
        layer.compute_dtype = getattr(linear, "compute_dtype", None)
        layer.quant_state = getattr(linear, "quant_state", None)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        for name in ("lora_A", "lora_B"):
            shape = getattr(layer, name).shape
            setattr(layer, name, nn.Parameter(torch.empty(shape, device=packed.device, dtype=dtype)))
        layer.reset_lora_parameters()
        return layer.train(linear.training)

    def packed(self) -> QuantisedWeight:
        """The weight as products read it, in the dtype that the layer computes in.

        Raises:
            ValueError: it cannot be read any more; the message says why and what helps.
        """
        found: QuantisedWeight | str | None
        if self.quant_state is None:
            found = read_weight(self.weight, self.compute_dtype)
        else:
            found = read_codes(type(self).__name__, self.weight, self.quant_state, self.compute_dtype)
        if not isinstance(found, QuantisedWeight):
            raise ValueError(found or f"the weight is a {type(self.weight).__name__} now, not the quantised one")
        return found

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        weight = self.packed()
        if self.compute_dtype is None and weight.is_4bit:
            weight = weight.to(x.dtype)
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)  # as Linear4bit does
        return lora_linear(
            x, weight, self.lora_A, self.lora_B, self.scaling, bias,
            dropout_p=self.dropout, training=self.training, copy_input=self.copy_input,
        )  # fmt: skip

    def _start_dtype(self) -> torch.dtype:
        # As in PEFT: the dtype of 4-bit codes is none to round to.
        return self.compute_dtype or (self.weight.dtype if self.weight.dtype.is_floating_point else torch.float32)

    def merged_weight(self) -> Tensor:
        """W + scaling·B·A [out_features, in_features], decoded: to be quantised by the caller, if at all."""
        dense = self.packed().dequantize()
        a, b = self.lora_A.detach().float(), self.lora_B.detach().float()
        return torch.addmm(dense.float(), b, a, alpha=self.scaling).to(dense.dtype)

    def merge(self, safe: bool = False, keep_base: bool = True) -> None:
        """Raises ValueError: the sum would have to be quantised again."""
        raise ValueError(self.merge_reason())

    def merge_reason(self) -> str:
        """Why the branch is not merged, and what to do."""
        return _NOT_MERGED.format(self.packed().format)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = self.quant_state
        for name, value in ({} if state is None else state.as_dict(packed=True)).items():
            destination[prefix + _STATE + name] = value if keep_vars else value.detach()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """bitsandbytes' statistics come with its codes: either replaces both, or is refused."""
        start = prefix + _STATE
        given = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        own = self.quant_state
        if own is None:
            return
        unexpected[:] = [key for key in unexpected if not key.startswith(start)]
        if given:
            state = type(own).from_dict(given, self.weight.device)
            if (state.shape, state.quant_type) != (own.shape, own.quant_type):
                errors.append(f"{prefix}weight: the state dict's is {state.quant_type} {list(state.shape or ())}")
            self.quant_state = state
            vars(self.weight)["quant_state"] = state
        elif prefix + "weight" in state_dict:
            errors.append(f"{prefix}weight: the state dict has its codes and not their statistics ({start}absmax)")

    def extra_repr(self) -> str:
        """Sizes, rank, alpha, format, and whatever differs from the defaults."""
        return f"{super().extra_repr()}, base={self.packed().format}"
