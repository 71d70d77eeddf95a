"""Forwards that something has put on an object in the place of its class's: hooks of device maps, kernels of the Hub.

``kernelize`` may give the block around experts a forward that reads their weights and never calls them. Branches on
these would be skipped; so the block of experts with branches is watched, and its call refused then.
"""

from typing import Any

from torch import nn


def has_own_forward(module: nn.Module) -> bool:
    """Whether an object has a forward of its own, as some hooks leave it."""
    forward = vars(module).get("forward")
    return forward is not None and _function(forward) is not type(module).forward


def is_replaced(module: nn.Module) -> bool:
    """Whether it has one that is not wrapped around its class's, as those of accelerate's hooks and of autocast are."""
    forward, own = vars(module).get("forward"), type(module).forward
    if forward is None:
        return False
    while forward is not None and _function(forward) is not own:
        forward = getattr(forward, "__wrapped__", None)
    return forward is None


def _function(forward: Any) -> Any:
    return getattr(forward, "__func__", forward)


class Watch:
    """Forward pre-hook of the block around an experts module: refuses a call that would not come to its branches."""

    def __init__(self, name: str):
        self.name = name  # of the experts in the block

    def __call__(self, block: nn.Module, args: tuple) -> None:
        experts: Any = block._modules[self.name]
        replaced = next((module for module in (block, experts) if is_replaced(module)), None)
        if replaced is not None and not all(branch.merged for branch in experts.branches()):
            raise ValueError(
                f"something (kernelize?) has replaced the forward of the {type(replaced).__name__} at experts with "
                "LoRA branches, which it would skip: merge them first (fastlora.merge), or leave that kernel out"
            )


def watch(block: nn.Module, name: str) -> None:
    """Watches a block from now on, once."""
    if not any(isinstance(hook, Watch) and hook.name == name for hook in block._forward_pre_hooks.values()):
        block.register_forward_pre_hook(Watch(name))


def end_watches(model: nn.Module) -> None:
    """Ends those of all modules of a model."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, Watch)]:
            del module._forward_pre_hooks[key]
