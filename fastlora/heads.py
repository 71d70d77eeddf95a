"""Modules of a model that an adapter's result depends on beside its branches: output heads, modules that train and are
saved whole, and parameters that no checkpoint holds."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from fastlora.quantised_weight import is_packed

# What PEFT trains and saves whole, and leaves without a branch, by the task in a transformers model's class name.
_TASKS = {
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
    "ForCausalLM": ("CAUSAL_LM", ()),
}
_HEADS = ("classifier", "score", "qa_outputs")
# Attributes of modules, so that the marks follow copies, pickles and wrappers, and no state dict holds them.
_SAVED, _DRAWN = "_fastlora_saved_whole", "_fastlora_newly_drawn"


def task_of(model: nn.Module) -> tuple[str | None, tuple[str, ...]]:
    """PEFT's name of the task that a model's class is for, and of the modules that PEFT then saves whole."""
    for suffix, task in _TASKS.items():
        if suffix in type(model).__name__:
            return task
    return None, ()


def is_head(model: nn.Module, name: str) -> bool:
    """Whether a module lies in an output head, as PEFT has it for "all-linear": the output embeddings of a transformers
    model, and what PEFT saves whole for its task. For a task that PEFT does not know, a head of one of these names."""
    if not hasattr(model, "get_output_embeddings"):
        return False
    model = getattr(model, "_orig_mod", model)
    parts = name.removeprefix("_orig_mod.").split(".")
    output = _output_embeddings(model)
    if output is not None and model.get_submodule(".".join(parts)) is output:
        return True
    task, names = task_of(model)
    return not set(parts).isdisjoint(names) if task else output is None and parts[0] in _HEADS


def _output_embeddings(model: Any) -> nn.Module | None:
    return model.get_output_embeddings()


def modules_ending_in(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Paths that end in one of the names, letter by letter, as PEFT finds ``modules_to_save``."""
    ends = tuple(names)
    return [name for name, _ in model.named_modules() if name and name.endswith(ends)]


def mark_saved(modules: Iterable[nn.Module]) -> None:
    """From now on these train, and are saved whole."""
    for module in modules:
        setattr(module, _SAVED, True)
        for parameter in module.parameters():
            parameter.requires_grad_(True)


def saved_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of what ``mark_saved`` has marked."""
    for name, module in model.named_modules():
        if getattr(module, _SAVED, False):
            yield name, module


def lies_in(name: str, roots: Iterable[str]) -> bool:
    """Whether a path is one of the roots or below one."""
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def note_newly_drawn(model: nn.Module, known: Iterable[nn.Module]) -> None:
    """Marks the modules whose parameters ``from_pretrained`` has drawn: transformers sets an attribute on those that a
    checkpoint held. Where no parameter has it, nothing is known, and a transformers model's heads may have been drawn.

    Args:
        known: modules whose marks stay as they are.
    """
    if not any(base.__name__ == "PreTrainedModel" for base in type(getattr(model, "_orig_mod", model)).__mro__):
        return
    recorded = any(getattr(parameter, "_is_hf_initialized", False) for parameter in model.parameters())
    known_ids = {id(module) for module in known}
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point() and p.dtype.itemsize > 1]
        own = [p for p in own if not is_packed(p)]  # what was drawn is not quantised
        if id(module) in known_ids or not own or any(p.is_meta for p in own):
            continue
        if recorded:
            drawn = not all(getattr(parameter, "_is_hf_initialized", False) for parameter in own)
        else:
            output = _output_embeddings(model)
            drawn = module is not output and is_head(model, name)
        setattr(module, _DRAWN, drawn)


def keep_marks(old: nn.Module, new: nn.Module) -> None:
    """A layer that replaces another has what was known of it."""
    setattr(new, _DRAWN, getattr(old, _DRAWN, False))
    for name, parameter in old.named_parameters(recurse=False):
        if getattr(parameter, "_is_hf_initialized", False):
            getattr(new, name)._is_hf_initialized = True


def clear_marks(model: nn.Module) -> None:
    """The model is plain again: what trained whole is not saved with a later adapter."""
    for module in model.modules():
        for mark in (_SAVED, _DRAWN):
            vars(module).pop(mark, None)


def newly_drawn(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of what ``note_newly_drawn`` has marked."""
    for name, module in model.named_modules():
        if getattr(module, _DRAWN, False):
            yield name, module
