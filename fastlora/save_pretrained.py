"""Whether a state dict is taken to be written for ``from_pretrained``, which knows nothing of LoRA layers, or loaded by
transformers' Trainer.

A module is not told why its state dict is taken or loaded, and the libraries offer no hook, so the answer is read off
the call stack. Nothing is put on the model: it holds for models, parts of models and copies alike.
"""

import sys
import warnings
from collections.abc import Collection
from types import FrameType

_LIBRARIES = ("transformers", "accelerate", "diffusers", "huggingface_hub")
_FUNCTIONS = ("save_pretrained", "save_model")
_RESUMING = ("_load_from_checkpoint", "_load_best_model")
_UNMERGED = (
    "the model is saved with its LoRA layers unmerged: from_pretrained restores the base weights alone and drops "
    "lora_A and lora_B. For a model that reloads as trained, save what fastlora.merge_and_unload(model) returns; for "
    "the adapter, call fastlora.save_adapter(model, directory). As a checkpoint to resume from, it loads into a model "
    "that fastlora.inject has treated in the same way, unless transformers renames its entries (Mixtral's experts)"
)
NOT_IN_CHECKPOINT = (
    "the checkpoint has no lora_A and lora_B by this name, and training would go on from a new start. transformers "
    "renames the entries of some models as it saves them (Mixtral's experts) and does not name them back here: what "
    "fastlora.save_adapter has written beside, fastlora.load_adapter reads"
)


def plain_saver() -> FrameType | None:
    """The outermost call on the stack of a library's function that writes a model for ``from_pretrained``, or None."""
    return _outermost(_FUNCTIONS)


def resumed_names(given: Collection[str]) -> Collection[str] | None:
    """The names in the checkpoint that transformers' Trainer is loading; None where it loads none, or does not tell.

    Args:
        given: the names in the state dict at hand, which is of one file where the checkpoint has several.
    """
    if _outermost(_RESUMING) is None:
        return None
    sharded = _outermost(("load_sharded_checkpoint",))
    if sharded is None:
        return given
    index = sharded.f_locals.get("index")
    return index.get("weight_map") if isinstance(index, dict) else None


def _outermost(functions: tuple[str, ...]) -> FrameType | None:
    found: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in functions and _library(frame) in _LIBRARIES:
            found = frame
        frame = frame.f_back
    return found


def warn_unmerged(saver: FrameType) -> None:
    """Warns, on behalf of the line that calls this saving function, that the checkpoint will not reload as trained."""
    caller = saver.f_back or saver
    space = caller.f_globals
    warnings.warn_explicit(
        _UNMERGED,
        UserWarning,
        caller.f_code.co_filename,
        caller.f_lineno,
        module=space.get("__name__"),
        registry=space.setdefault("__warningregistry__", {}),
    )


def _library(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
