"""What a node of LoRA layers kept for its backward, or an error that says why it is not there any more."""

from torch import Tensor


def saved_tensors(ctx) -> tuple[Tensor | None, ...]:
    """What a node saved: x, then weight and lora_a (or None) of its first layer, then whatever else it needs.

    Raises:
        RuntimeError: one of them was modified in place since; where it was x, the message says what to do.
    """
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error) or not _is_modified(ctx._raw_saved_tensors[0]):
            raise
        x, weight, lora_a = (saved.data for saved in ctx._raw_saved_tensors[:3])
        rank = "" if lora_a is None else f", rank {lora_a.shape[0]}"
        raise RuntimeError(
            f"the input {list(x.shape)} of a LoRA layer ({weight.shape[1]} -> {weight.shape[0]}{rank}) was modified in "
            "place after the layer's forward, and the gradient of lora_A reads it: write x = x + ... for x += ..., or "
            "give copy_input=True to lora_linear, LoRALinear, inject or patch, and the layer saves a copy"
        ) from error


def _is_modified(saved) -> bool:
    try:
        saved.unpack()
    except RuntimeError:
        return True
    return False
