"""What PEFT's quantised LoRA layers do beside their products, for those of them whose calls are fused.

A fused call makes both products in the dtype of its input, or of autocast. bitsandbytes' layers have a compute dtype of
their own: where it is another, they cast the input for the base product alone, PEFT's branch takes it as it is, and the
call is PEFT's.
"""

from typing import Any

import torch
from torch import Tensor

# PEFT's class -> the name of its fused class.
FUSED_NAMES = {
    "peft.tuners.lora.bnb.Linear4bit": "FusedLinear4bit",
    "peft.tuners.lora.torchao.TorchaoLoraLinear": "FusedTorchaoLinear",
}
_KEEPS_INPUT_DTYPE = ("Params4bit", "Int8Tensor")


def as_stock(base: Any, x: Tensor, y: Tensor) -> Tensor:
    """A fused result in the dtype that the stock layer returns, and the base layer in the state that it leaves.

    Args:
        base: the quantised layer, whose own forward did not run.
        x: its input.
        y: the fused layer's output, in autocast's dtype under autocast.
    """
    if not getattr(base, "compute_type_is_set", True):  # bitsandbytes takes it from the first input
        base.set_compute_type(x)
        base.compute_type_is_set = True
    if y.dtype == x.dtype:
        return y
    # Under autocast some base layers return their input's dtype, and PEFT adds the branch to that.
    kind = type(base.weight).__name__
    if kind in _KEEPS_INPUT_DTYPE:
        return y.to(torch.promote_types(x.dtype, y.dtype))
    if kind == "Float8Tensor" and base.bias is not None:  # added outside the product
        return y.to(torch.promote_types(base.bias.dtype, y.dtype))
    return y
