"""Which layers of a model share an input: observed once, fixed before training, carried by their parents as names.

Nothing is guessed: neither names nor shapes say who receives the same tensor. One forward without gradients does, and a
group is what received one object, unchanged in between, in every forward of its parent.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.shared_input.scope import PLAN, close_scope, open_scope

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


class SharedInputs(dict):
    """Groups of layers that share an input: path of a parent -> tuples of names of its children. Printed, it says which
    groups there are, and how often."""

    def __repr__(self) -> str:
        kinds = Counter((_NUMBER.sub("*", path), names) for path, groups in self.items() for names in groups)
        lines = [f"{path or 'the model'}: {', '.join(names)} ({n})" for (path, names), n in kinds.items()]
        return "; ".join(lines) or "no layers that share an input"


def shared_inputs(model: nn.Module) -> SharedInputs:
    """The groups that ``inject(..., group=...)`` or ``patch(..., group=...)`` has made in a model."""
    return SharedInputs((path, tuple(groups)) for path, module in model.named_modules() if (groups := _plan(module)))


def observe(model: nn.Module, example: Any, paths: Iterable[str]) -> SharedInputs:
    """Runs a model once, in eval mode and without gradients, and finds which layers receive the same tensor.

    A group is children of one parent that were called once each with the very same tensor, at the same version, in
    every forward of that parent, in the order of their calls. The generators of random numbers and the modules' modes
    are as before.

    Args:
        model: any module, on its device; it may hold LoRA layers already.
        example: True for the model's own ``dummy_inputs`` (transformers has them), or a batch: a dict of arguments by
            name, a tuple or list of positional ones, or one tensor.
        paths: of the layers to look at.

    Raises:
        TypeError: the example is of another type.
        ValueError: the model has no ``dummy_inputs``, or does not run on them.
    """
    args, kwargs = _arguments(model, example)
    modules = dict(model.named_modules())
    names: dict[str, dict[str, nn.Module]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        names.setdefault(parent, {})[name] = modules[path]
    watches = {
        path: _Watch(modules[path], layers) for path, layers in names.items() if len(layers) > 1 and path in modules
    }
    try:
        with _undisturbed(model), torch.inference_mode(False), torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        if example is not True:
            raise
        raise ValueError(
            f"group=True: {type(model).__name__} does not run on its dummy_inputs ({type(error).__name__}: {error}); "
            "give group= a batch"
        ) from error
    finally:
        for watch in watches.values():
            watch.remove()
    return SharedInputs((path, tuple(watch.groups)) for path, watch in watches.items() if watch.groups)


def group(model: nn.Module, groups: Mapping[str, Iterable[tuple[str, ...]]], kind: type) -> SharedInputs:
    """Has layers computed together from now on; what was grouped before in these parents is forgotten.

    Args:
        groups: names of children by path of their parent.
        kind: the class that takes part; others are left out, and a group of less than two is none.

    Returns:
        The groups that were made.
    """
    made = SharedInputs()
    for path, of_parent in groups.items():
        parent = model.get_submodule(path)
        _ungroup(parent)
        kept = [tuple(name for name in names if type(parent._modules.get(name)) is kind) for names in of_parent]
        plan = tuple(names for names in kept if len(names) > 1)
        if not plan:
            continue
        vars(parent)[PLAN] = plan
        parent.register_forward_pre_hook(open_scope)
        parent.register_forward_hook(close_scope, always_call=True)
        for names in plan:
            for name in names:
                parent._modules[name].shares_input = True  # type: ignore[union-attr]
        made[path] = plan
    return made


def ungroup(model: nn.Module) -> None:
    """Takes every group of a model apart."""
    for module in model.modules():
        _ungroup(module)


def _ungroup(parent: nn.Module) -> None:
    if not _plan(parent):
        return
    for names in vars(parent).pop(PLAN):
        for name in names:
            vars(parent._modules.get(name, parent)).pop("shares_input", None)
    for hooks, hook in ((parent._forward_pre_hooks, open_scope), (parent._forward_hooks, close_scope)):
        for key in [key for key, each in hooks.items() if each is hook]:
            del hooks[key]
            parent._forward_hooks_always_called.pop(key, None)


def _plan(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    return vars(module).get(PLAN, ())


class _Watch:
    """Hooks that find the groups among some children of a parent."""

    def __init__(self, parent: nn.Module, layers: dict[str, nn.Module]):
        self.found: list[tuple[str, ...]] | None = None  # in all forwards so far
        self._calls: list[tuple[str, Tensor, int]] = []  # of the forward that runs; the tensors keep their identity
        self._handles = [
            parent.register_forward_pre_hook(lambda module, args: self._calls.clear()),
            parent.register_forward_hook(lambda module, args, output: self._end()),
        ]
        for name, layer in layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._recorder(name)))

    @property
    def groups(self) -> list[tuple[str, ...]]:
        return self.found or []

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _recorder(self, name: str):
        def record(layer: nn.Module, args: tuple) -> None:
            if args and isinstance(args[0], Tensor) and not args[0].is_inference():
                self._calls.append((name, args[0], args[0]._version))

        return record

    def _end(self) -> None:
        times = Counter(name for name, _, _ in self._calls)
        by_input: dict[tuple[int, int], list[str]] = {}
        for name, x, version in self._calls:
            if times[name] == 1:
                by_input.setdefault((id(x), version), []).append(name)
        groups = [tuple(names) for names in by_input.values() if len(names) > 1]
        self.found = groups if self.found is None else [each for each in self.found if each in groups]
        self._calls.clear()


def _arguments(model: nn.Module, example: Any) -> tuple[tuple, dict]:
    """Positional and named arguments of the forward to observe."""
    if example is True:
        inputs = getattr(model, "dummy_inputs", None)
        if not isinstance(inputs, Mapping):
            raise ValueError(
                f"group=True needs a model with dummy_inputs, and {type(model).__name__} has none; give group= a "
                "batch: a dict, a tuple or a tensor, as the model is called with"
            )
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        return (), {name: t.to(device) if isinstance(t, Tensor) else t for name, t in inputs.items()}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        return tuple(example), {}
    if isinstance(example, Tensor):
        return (example,), {}
    raise TypeError(
        f"group must be False, True (the model's dummy_inputs) or a batch (a dict, a tuple, a list or a tensor), got a "
        f"{type(example).__name__}"
    )


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode within, and afterwards the modes and the generators' states of before."""
    training = [module for module in model.modules() if module.training]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            for module in training:
                module.training = False  # past ``eval``, which some layers merge their weights in
            yield
    finally:
        for module in training:
            module.training = True
