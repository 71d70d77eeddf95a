"""Bytes that autograd keeps between forward and backward, counted by its own hook."""

from collections.abc import Iterable

import torch
from torch import Tensor


class SavedTensors:
    """While entered, counts the bytes that autograd keeps for backward, each storage once.

    Storages of the given tensors (parameters, which exist anyway) do not count. What was saved must live until it has
    been counted: an address that is used twice counts once.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        self._existing = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self._storages: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """What was saved so far."""
        return sum(self._storages.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._existing:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self) -> "SavedTensors":
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._hooks.__exit__(*exception)
