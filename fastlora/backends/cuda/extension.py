"""The compiled extension: the only importer of fastlora._C."""

from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any


@lru_cache(maxsize=1)
def load() -> tuple[ModuleType | None, str | None]:
    """The extension and None, or None and why it is not there."""
    try:
        return import_module("fastlora._C"), None
    except ImportError as error:
        return None, f"the extension fastlora._C is not built ({error}); install fastlora where nvcc is found"


def loaded() -> ModuleType:
    """The extension.

    Raises:
        RuntimeError: it is not built.
    """
    module, reason = load()
    if module is None:
        raise RuntimeError(f"the CUDA backend cannot run: {reason}")
    return module


@lru_cache(maxsize=1)
def variants() -> tuple[dict[str, Any], ...]:
    """Every compiled kernel: arch, backward, dtype ("bfloat16" or "float16"), transposed (the base weight lies as
    [in_features, out_features]), decodes (a packed base weight, in tiles ahead of the products), in_loop (likewise, in
    the loop of the products), segments (rows lie in segments), shared (several projections of one input), dropout,
    block_m, block_n, block_k, rank (the highest that it serves), cluster, threads, shared_bytes, gradient_columns, and
    what it can do: ``splits`` (the contraction of a tile) and ``fuses`` (S with the output's first column of tiles).

    Raises:
        RuntimeError: the extension is not built.
    """
    return tuple(loaded().variants())
