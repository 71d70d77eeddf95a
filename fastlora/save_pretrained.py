"""Whether a state dict is taken to be written for ``from_pretrained``, which knows nothing of LoRA layers, or loaded by
transformers' Trainer.

A module is not told why its state dict is taken or loaded, and the libraries offer no hook, so the answer is read off
the call stack. Nothing is put on the model: it holds for models, parts of models and copies alike.
"""

import sys
import warnings
from collections.abc import Collection, Mapping
from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor

_LIBRARIES = ("transformers", "accelerate", "diffusers", "huggingface_hub")
_FUNCTIONS = ("save_pretrained", "save_model")
_RESUMING = ("_load_from_checkpoint", "_load_best_model")
_UNMERGED = (
    "the model is saved with its LoRA layers unmerged: from_pretrained restores the base weights alone and drops "
    "lora_A and lora_B. For a model that reloads as trained, save what fastlora.merge_and_unload(model) returns; for "
    "the adapter, call fastlora.save_adapter(model, directory). As a checkpoint to resume from, it loads into a model "
    "that fastlora.inject has treated in the same way"
)
NOT_IN_CHECKPOINT = (
    "the checkpoint has no lora_A and lora_B by this name, and training would go on from a new start; what "
    "fastlora.save_adapter has written beside, fastlora.load_adapter reads"
)


def plain_saver() -> FrameType | None:
    """The outermost call on the stack of a library's function that writes a model for ``from_pretrained``, or None."""
    return _outermost(_FUNCTIONS)


class Resumed(NamedTuple):
    """A checkpoint that transformers' Trainer is loading into a model."""

    model: Any
    entries: Mapping[str, Tensor]  # of the file at hand
    names: Collection[str]  # of all its files

    def name_of(self, entry: str, value: Tensor) -> str:
        """What an entry of the model is called in the checkpoint: transformers renames those of some models (Mixtral's
        block of experts) as it saves them, and its Trainer does not name them back."""
        try:
            from transformers import PreTrainedModel
            from transformers.core_model_loading import revert_weight_conversion
        except ImportError:  # before transformers 5, which does not rename
            return entry
        if not isinstance(self.model, PreTrainedModel):
            return entry
        found = list(revert_weight_conversion(self.model, {entry: value}))
        return found[0] if len(found) == 1 else entry


def resumed() -> Resumed | None:
    """The checkpoint that transformers' Trainer is loading; None where it loads none, or does not tell."""
    if _outermost(_RESUMING) is None:
        return None
    loading, sharded = _outermost(("load_state_dict",), ("torch",)), _outermost(("load_sharded_checkpoint",))
    if loading is None:
        return None
    entries = loading.f_locals["state_dict"]
    if sharded is None:
        return Resumed(loading.f_locals["self"], entries, entries)
    index = sharded.f_locals.get("index")
    names = index.get("weight_map") if isinstance(index, dict) else None
    return None if names is None else Resumed(loading.f_locals["self"], entries, names)


def _outermost(functions: tuple[str, ...], libraries: tuple[str, ...] = _LIBRARIES) -> FrameType | None:
    found: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in functions and _library(frame) in libraries:
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
