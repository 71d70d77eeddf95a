"""``LoRALinear``: an ``nn.Linear`` with a frozen weight and a trainable low-rank branch."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora.branch import Branch
from fastlora.dora import Norms, dora_linear
from fastlora.layer_checks import WEIGHT_DTYPES, check_adapter_dtype, check_hyperparameters, weight_reason
from fastlora.ops import lora_linear
from fastlora.placement import forget
from fastlora.sharding import is_dtensor, lora_linear_sharded
from fastlora.shared_input.scope import shared_output


class LoRALinear(Branch, nn.Linear):
    """``y = x·Wᵀ + bias + scaling·(dropout(x)·Aᵀ)·Bᵀ`` with W and bias frozen, A and B trainable.

    Args:
        in_features: size K of the last dimension of the input.
        out_features: size N of the last dimension of the output.
        bias: whether the frozen layer has a bias [N].
        r: rank R of the branch.
        alpha: numerator of the scaling.
        dropout: probability with which the branch drops an element of its input while training; the frozen product sees
            all of it.
        rslora: scale by alpha / sqrt(r) instead of alpha / r.
        init: "kaiming" (A as ``nn.Linear`` starts its weight) or "gaussian" (A normal, std 1 / r). B starts at zero.
        copy_input: save a copy of the input for the backward, so that the input may be modified in place after the
            layer (``x += layer(x)``). Otherwise the input itself is saved.
        dora: DoRA: scale each output by a trained magnitude over the norm of its row of W + scaling·B·A, before the
            bias. The magnitude starts as that norm. With dropout in training the base product's input is dropped, too,
            as in PEFT, by torch's own products, counted.
        device: where the parameters live. On "meta" nothing is drawn; see ``reset_parameters``.
        dtype: dtype of all parameters.

    Attributes:
        weight: frozen parameter [out_features, in_features].
        bias: frozen parameter [out_features], or None.
        lora_A: parameter [r, in_features].
        lora_B: parameter [out_features, r].
        lora_magnitude_vector: parameter [out_features] of a DoRA layer; others have none.
        r, alpha, scaling: rank, alpha, and the factor that multiplies the branch; ``scaling`` is read at every call.
        merged: whether ``weight`` holds the branch, in which case the forward is one ``F.linear`` and the adapter does
            not train.

    Raises:
        ValueError: r < 1, a dropout outside [0, 1], an alpha that is not finite, an unknown init.
        TypeError: r is not an integer, alpha or dropout not a number, or the dtype is not a floating-point one.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685); rsLoRA: Kalajdzievski,
    "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (arXiv:2312.03732).
    """

    plain_class: Any = nn.Linear  # what unload makes of a layer
    shares_input = False  # whether it is in a group (fastlora.shared_input)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str = "kaiming",
        copy_input: bool = False,
        dora: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_hyperparameters(r, alpha, dropout, init)
        if dtype is not None and dtype not in WEIGHT_DTYPES:
            raise TypeError(f"a LoRA layer needs a floating-point dtype of 16 bits or more, got {dtype}")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self._configure(r, alpha, dropout, rslora, init)
        self.copy_input = bool(copy_input)
        self.lora_A = nn.Parameter(self.weight.new_empty(r, in_features))
        self.lora_B = nn.Parameter(self.weight.new_empty(out_features, r))
        self.dora = bool(dora)
        if self.dora:
            self.lora_magnitude_vector = nn.Parameter(self.weight.new_empty(out_features))
            self._norms = Norms()
        self.reset_lora_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str = "kaiming",
        copy_input: bool = False,
        adapter_dtype: torch.dtype | None = None,
        dora: bool = False,
    ) -> "LoRALinear":
        """Puts a branch on an existing layer, whose weight and bias it shares: same storage, device, dtype and mode.

        Args:
            linear: a plain ``nn.Linear`` with a dense floating-point weight; left as it is.
            r, alpha, dropout, rslora, init, copy_input, dora: as for the class.
            adapter_dtype: dtype of A and B (and of the magnitude); the weight's own by default. float32 over a 16-bit
                weight is trained without casting the input up.

        Raises:
            TypeError: ``linear`` is not an ``nn.Linear``, carries a branch already, or its weight is not dense
                floating-point; ``adapter_dtype`` is neither the weight's nor float32 over a 16-bit weight.
            ValueError: as for the class.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, LoRALinear):
            raise TypeError(f"from_linear needs an nn.Linear, got {type(linear).__name__}")
        return cls._around(linear, r, alpha, dropout, rslora, init, copy_input, adapter_dtype, dora)

    @classmethod
    def _around(
        cls,
        linear: Any,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str = "kaiming",
        copy_input: bool = False,
        adapter_dtype: torch.dtype | None = None,
        dora: bool = False,
    ) -> Any:
        """``from_linear`` of a layer of the right class."""
        weight = linear.weight
        if weight_reason(weight):
            raise TypeError(f"from_linear cannot share this layer's weight: {weight_reason(weight)}")
        dtype = weight.dtype if adapter_dtype is None else adapter_dtype
        check_adapter_dtype(dtype, weight.dtype)
        # On "meta", so that no second weight is allocated and no random number is drawn for it.
        out_features, in_features = cls._features(weight)
        layer = cls(
            in_features,
            out_features,
            bias=linear.bias is not None,
            r=r,
            alpha=alpha,
            dropout=dropout,
            rslora=rslora,
            init=init,
            copy_input=copy_input,
            dora=dora,
            device="meta",
            dtype=weight.dtype,
        )
        layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        for name, parameter in layer.adapter_parameters().items():
            setattr(layer, name, nn.Parameter(torch.empty(parameter.shape, device=weight.device, dtype=dtype)))
        layer.reset_lora_parameters()
        return layer.train(linear.training)

    @staticmethod
    def _features(weight: Tensor) -> tuple[int, int]:
        """out_features and in_features of a layer with this weight."""
        return weight.shape[0], weight.shape[1]

    @property
    def weight_shape(self) -> tuple[int, int]:
        """The weight's shape, also where its value is elsewhere."""
        return self.out_features, self.in_features

    def reset_parameters(self) -> None:
        """Draws every parameter anew: for a layer made on "meta" and given memory with ``to_empty``."""
        super().reset_parameters()
        if "lora_A" in self._parameters:  # nn.Linear's constructor calls this before the branch exists
            self.reset_lora_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        if self.dora:
            return self._dora_forward(x)
        if self.shares_input and (y := shared_output(self, LoRALinear, x)) is not None:
            return y
        own: dict[str, Any] = self._parameters
        if len(own) == 4:  # all four: spared four searches by nn.Module.__getattr__, which a small layer would feel
            weight, lora_a, lora_b, bias = own["weight"], own["lora_A"], own["lora_B"], own["bias"]
        else:  # torch's parametrizations make properties of them
            weight, lora_a, lora_b, bias = self.weight, self.lora_A, self.lora_B, self.bias
        call: Any = lora_linear if type(weight) is nn.Parameter or not is_dtensor(weight) else lora_linear_sharded
        return call(
            x, weight, lora_a, lora_b, self.scaling, bias,
            dropout_p=self.dropout, training=self.training, copy_input=self.copy_input,
        )  # fmt: skip

    def shared_parts(self, x: Tensor | None) -> tuple | str:
        """What a call computes with now, or why it cannot be computed with its siblings' (fastlora.shared_input)."""
        if self.merged or self.dora:
            return "merged" if self.merged else "DoRA"
        scaling = self.scaling
        if scaling.__class__ is not float and scaling.__class__ is not int:
            return "a scaling that is no number"
        own: dict[str, Any] = self._parameters
        if "lora_A" in own:
            weight, lora_a, lora_b, bias = own["weight"], own["lora_A"], own["lora_B"], own["bias"]
        else:  # replicas of nn.DataParallel hold tensors that are no parameters
            weight, lora_a, lora_b, bias = self.weight, self.lora_A, self.lora_B, self.bias
        return weight, lora_a, lora_b, bias, scaling, self.dropout if self.training else 0.0

    def _dora_forward(self, x: Tensor) -> Tensor:
        if is_dtensor(self.weight):
            raise ValueError("DoRA over DTensors is not served: shard the layers by FSDP, which gathers them")
        return dora_linear(
            x, self.weight_rows, self.lora_A, self.lora_B, self.scaling, self.lora_magnitude_vector, self.bias,
            norms=self._norms, stored=self.weight,
            dropout_p=self.dropout, training=self.training, copy_input=self.copy_input,
        )  # fmt: skip

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in nn.Module. What replaces the weight or a frozen bias (torch's parallel styles do) is frozen, too."""
        if param is not None and name in ("weight", "bias"):
            replaced = self._parameters.get(name)
            if name == "weight" or (replaced is not None and not replaced.requires_grad):
                param.requires_grad_(False)
        super().register_parameter(name, param)

    def unload(self) -> None:
        """Makes this object a plain ``nn.Linear`` with the weight that it has: to be called on a merged layer.

        Raises:
            ValueError: the layer is not merged.
        """
        if not self.merged:
            raise ValueError("unload turns a merged layer into an nn.Linear; call merge() first")
        for name in ("forward", "_old_forward"):  # accelerate's hooks leave them on the object
            if getattr(vars(self).get(name), "__func__", None) is type(self).forward:
                setattr(self, name, self.plain_class.forward.__get__(self))
        self._drop_base()
        for name in self.adapter_parameters():
            delattr(self, name)
            forget(self, name)
        vars(self).pop("_norms", None)
        plain = self.plain_class
        own = vars(LoRALinear(1, 1, device="meta")).keys() - vars(nn.Linear(1, 1, device="meta")).keys()
        for name in ("plain_class", "shares_input"):
            vars(self).pop(name, None)
        for name in own & vars(self).keys():
            if name != "merged" or "forward" not in vars(self):  # a wrapper around the old forward reads `merged`
                del self.__dict__[name]
        self.__class__ = plain

    def extra_repr(self) -> str:
        """Sizes, rank, alpha and whatever differs from the defaults."""
        return f"{nn.Linear.extra_repr(self)}, {super().extra_repr()}"
