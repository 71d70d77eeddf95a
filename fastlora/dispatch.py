"""Which backend serves a call, why not a faster one, and how often each did."""

import os
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from fastlora.backends import reference
from fastlora.problem import Sizes

BACKENDS = ("cuda", "triton", "reference")  # in order of preference on a GPU
ENVIRONMENT_VARIABLE = "FASTLORA_BACKEND"

_calls: Counter[str] = Counter()
_fallbacks: Counter[str] = Counter()


class Problem(NamedTuple):
    """All that the choice of a backend depends on."""

    sizes: Sizes
    dtype: torch.dtype
    device: torch.device
    aligned: bool  # every operand starts on 16 bytes and has rows of a multiple of 16 bytes


def _cuda_module():
    from fastlora.backends.cuda import launch as cuda

    return cuda


def _triton_module():
    from fastlora.backends.triton import launch as triton_lora

    return triton_lora


def _cuda_reason(problem: Problem) -> str | None:
    return _cuda_module().supports(problem)


def _triton_reason(problem: Problem) -> str | None:
    unusable = triton_unusable()
    return f"triton: {unusable}" if unusable else _triton_module().supports(problem)


_REASONS: dict[str, Callable[[Problem], str | None]] = {
    "cuda": _cuda_reason,
    "triton": _triton_reason,
    "reference": lambda problem: None,
}


@lru_cache(maxsize=1)
def triton_unusable() -> str | None:
    """Why Triton's kernels cannot run here, or None."""
    from packaging.version import Version

    try:
        import triton
    except ImportError as error:
        return f"not installed ({error}); pip install 'fastlora[triton]'"
    if Version(triton.__version__) < Version("3.6"):
        return f"version {triton.__version__} is older than 3.6"
    if triton.knobs.runtime.interpret:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device; TRITON_INTERPRET=1 runs the kernels slowly on the CPU"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


def select_backend(problem: Problem, requested: str | None) -> tuple[str, tuple[str, ...]]:
    """Chooses the backend of one call.

    Args:
        problem: sizes, dtype, device and alignment of the call.
        requested: a backend's name to insist on, or None for the best one.

    Returns:
        The backend's name, and the reasons why each faster one was passed over.

    Raises:
        ValueError: the requested backend does not exist or cannot serve this call; the message says why.
    """
    if requested is not None:
        if requested not in BACKENDS:
            raise ValueError(f"unknown backend {requested!r}; choose one of {', '.join(BACKENDS)}")
        reason = _REASONS[requested](problem)
        if reason is not None:
            raise ValueError(f"backend {requested!r} cannot serve this call: {reason}")
        return requested, ()
    if problem.device.type != "cuda":
        return "reference", ()
    passed_over = []
    for name in BACKENDS:
        reason = _REASONS[name](problem)
        if reason is None:
            break
        passed_over.append(reason)
    return name, tuple(passed_over)


_select_cached = lru_cache(maxsize=4096)(select_backend)


def environment_backend() -> str | None:
    """The backend that the environment insists on, if any."""
    return os.environ.get(ENVIRONMENT_VARIABLE) or None


def backend_for(problem: Problem, requested: str | None):
    """The module whose ``lora_forward`` / ``lora_backward`` serve this call. Counts the call, and every fallback."""
    name, passed_over = _select_cached(problem, requested)
    _calls[name] += 1
    for reason in passed_over:
        _fallbacks[reason] += 1
    if name == "cuda":
        return _cuda_module()
    if name == "triton":
        return _triton_module()
    return reference


def sole_backend(tensor: torch.Tensor, requested: str | None):
    """The reference, counted, where nothing else could serve the call and nothing else is asked for; None where there
    is a choice to make. It spares a small layer on the CPU the description of its problem."""
    if requested is not None or not tensor.is_cpu:
        return None
    _calls["reference"] += 1
    return reference


def count_fallback(reason: str) -> None:
    """Counts a call that something above the kernels (an integration, say) served without fastlora."""
    _fallbacks[reason] += 1


def dispatch_counts() -> dict:
    """Calls since the last reset: ``{"cuda": n, "triton": n, "reference": n, "fallbacks": {reason: n}}``.

    Each forward and each backward pass of a layer is one call.
    """
    return {**{name: _calls[name] for name in BACKENDS}, "fallbacks": dict(_fallbacks)}


def reset_dispatch_counts() -> None:
    """Sets every count to zero."""
    _calls.clear()
    _fallbacks.clear()


def available_backends() -> dict[str, str]:
    """Each backend's name, and "usable" or the reason why it is not."""
    return {
        "cuda": _cuda_module().unusable() or "usable",
        "triton": triton_unusable() or "usable",
        "reference": "usable",
    }
