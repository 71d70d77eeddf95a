"""A LoRA layer over transformers' ``Conv1D``, GPT-2's linear layer, whose weight lies as [in, out]."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastlora.module import LoRALinear
from fastlora.ops import lora_linear
from fastlora.sharding import is_dtensor, lora_linear_sharded

_MODULES = ("transformers.pytorch_utils", "transformers.modeling_utils")


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' own ``Conv1D`` and no subclass of it."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ in _MODULES


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """out_features and in_features of an ``nn.Linear`` or a ``Conv1D``; None for any other module."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if not is_conv1d(module):
        return None
    in_features, out_features = module.get_parameter("weight").shape
    return out_features, in_features


class LoRAConv1D(LoRALinear):
    """``LoRALinear`` with the parameters of a ``Conv1D``: weight [in_features, out_features] and bias [out_features].

    Made by ``from_linear`` (or ``inject``), and a ``Conv1D`` again by ``unload``. No copy of the weight is made in any
    other layout: the kernels' backends get its transposed view, and one that cannot read it passes the call on.
    """

    @classmethod
    def from_linear(cls, linear: nn.Module, **options: Any) -> "LoRAConv1D":  # type: ignore[override]
        """As ``LoRALinear.from_linear``, for a ``Conv1D``.

        Raises:
            TypeError: ``linear`` is no ``Conv1D`` of transformers, or as there.
            ValueError: as for ``LoRALinear``.
        """
        if not is_conv1d(linear):
            raise TypeError(f"LoRAConv1D.from_linear needs transformers' Conv1D, got {type(linear).__name__}")
        layer = cls._around(linear, **options)
        layer.plain_class = type(linear)
        return layer

    @staticmethod
    def _features(weight: Tensor) -> tuple[int, int]:
        return weight.shape[1], weight.shape[0]

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    @staticmethod
    def _rows(weight: Tensor) -> Tensor:
        return weight.t()

    def reset_parameters(self) -> None:
        """As ``Conv1D`` starts its parameters; the branch as in ``LoRALinear``."""
        if tuple(self.weight.shape) != self.weight_shape:  # what nn.Linear's constructor has made
            self.weight = nn.Parameter(self.weight.new_empty(self.weight_shape), requires_grad=False)
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if "lora_A" in self._parameters:
            self.reset_lora_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        weight, bias = self.weight.t(), self.bias
        if self.merged:
            return F.linear(x, weight, bias)
        if self.dora:
            return self._dora_forward(x)
        call: Any = lora_linear_sharded if is_dtensor(weight) else lora_linear
        return call(
            x, weight, self.lora_A, self.lora_B, self.scaling, bias,
            dropout_p=self.dropout, training=self.training, copy_input=self.copy_input,
        )  # fmt: skip

    def _add_branch(self, weight: Tensor, factor: float) -> Tensor:
        return super()._add_branch(weight.t(), factor).t().contiguous()

    def _scale_rows(self, weight: Tensor, scale: Tensor) -> Tensor:
        return weight * scale

    def unload(self) -> None:
        """Makes this object a ``Conv1D`` with the weight that it has: to be called on a merged layer.

        Raises:
            ValueError: the layer is not merged.
        """
        nx, nf = self.weight_shape
        super().unload()
        del self.in_features, self.out_features
        self.nx, self.nf = nx, nf
