"""Which backend serves a call, and why not a faster one."""

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.torch_version import TorchVersion

from fastlora.backends import composed, reference, segments_composed, segments_reference, tuning
from fastlora.backends.target import target_of
from fastlora.backends.triton import driver
from fastlora.problem import BACKENDS, LaunchSpec, Sizes

ENVIRONMENT_VARIABLE = "FASTLORA_BACKEND"

UNMEASURED = (100, 103)  # compute capabilities whose matrix instructions no kernel here was written or timed for


def backend_module(name: str) -> ModuleType:
    """The module of a backend: ``why_unsupported(spec)`` and ``prepare(spec)``. Imported at first use, since Triton and
    the compiled extension may be absent."""
    if name == "cuda":
        from fastlora.backends.cuda import launch as cuda

        return cuda
    if name == "triton":
        from fastlora.backends.triton import launch as triton

        return triton
    return composed if name == "composed" else reference


def serving_module(name: str, spec: LaunchSpec) -> ModuleType:
    """The module of a backend for a call, whose branch two of them have a module of its own for."""
    if spec.packed is not None and name == "cuda":
        from fastlora.backends.cuda import quantised_launch as cuda

        return cuda
    if spec.packed is not None and name == "triton":
        from fastlora.backends.triton import quantised_launch

        return quantised_launch
    if spec.column_scale is not None and name == "triton":
        from fastlora.backends.triton import scaled_launch

        return scaled_launch
    if spec.branch == "shared_input" and name == "cuda":
        from fastlora.backends.cuda import projection_launch as cuda_projections

        return cuda_projections
    if spec.branch == "shared_input" and name == "triton":
        from fastlora.backends.triton import projection_launch

        return projection_launch
    if spec.branch == "segments" and name == "cuda":
        from fastlora.backends.cuda import segment_launch as cuda_segments

        return cuda_segments
    if spec.branch == "segments" and name == "triton":
        from fastlora.backends.triton import segment_launch

        return segment_launch
    if spec.branch == "segments":
        return {"composed": segments_composed, "reference": segments_reference}.get(name) or backend_module(name)
    return backend_module(name)


def why_unsupported(name: str, spec: LaunchSpec) -> str | None:
    """Why a backend cannot serve a call here, after its name, or None."""
    needs_triton = name == "triton" or (name == "composed" and spec.dropout and spec.branch == "single")
    unusable = triton_unusable(spec.device) if needs_triton else None
    reason = unusable or serving_module(name, spec).why_unsupported(spec)
    return type(reason)(f"{name}: {reason}") if reason else None


def triton_unusable(device: torch.device | None = None) -> str | None:
    """Why Triton's kernels cannot run on a device (None: the current one), or None. That there is no device is a
    PassingReason."""
    try:
        import triton
    except ImportError as error:
        return f"not installed ({error}); pip install 'fastlora[triton]'"
    if TorchVersion(triton.__version__) < "3.6":
        return f"version {triton.__version__} is older than 3.6; pip install --upgrade 'triton>=3.6'"
    if triton.knobs.runtime.interpret:
        return backend_module("triton").interpreter_unusable()
    return driver.unusable(device)


def preference(spec: LaunchSpec, *, tuned: bool = True) -> tuple[str, ...]:
    """The order in which backends are tried for a call on a GPU.

    First is what ``fastlora tune`` found fastest for the call's class of shapes, unless ``tuned`` is False. Without
    that, the composed layer is in front of one launch each way where the latter is not known to be faster: in float32,
    whose kernels do without matrix instructions, and on GPUs that no kernel was timed on. Rows in segments, which torch
    composes of grouped products in bfloat16 alone, nobody has tuned.
    """
    of_segments = spec.branch == "segments"
    first = "composed" if spec.dtype == torch.float32 and not of_segments else None
    try:
        if target_of(spec.device).arch in UNMEASURED:
            first = "composed"
        if tuned and not of_segments:
            first = tuning.tuned_backend(spec) or first
    except (RuntimeError, AssertionError):
        pass  # a device that cannot be asked now; the backends' reasons say why
    return BACKENDS if first is None else (first, *(name for name in BACKENDS if name != first))


def select_backend(spec: LaunchSpec, requested: str | None) -> tuple[str, tuple[str, ...]]:
    """Chooses the backend of one call.

    Args:
        spec: the call's description.
        requested: a backend's name to insist on, or None for the best one.

    Returns:
        The backend's name, and the reasons why each faster one was passed over. Empty calls have no launch to make:
        they are the reference's, whatever is requested.

    Raises:
        ValueError: the requested backend does not exist or cannot serve this call, or no backend can; the message says
            why.
    """
    if requested is not None and requested not in BACKENDS:
        raise ValueError(f"unknown backend {requested!r}; choose one of {', '.join(BACKENDS)}")
    if spec.is_empty:
        return "reference", ()
    if requested is not None:
        reason = why_unsupported(requested, spec)
        if reason is not None:
            raise ValueError(f"backend {requested!r} cannot serve this call: {reason}")
        return requested, ()
    if spec.device.type != "cuda":
        return "reference", ()
    passed_over: list[str] = []
    for name in preference(spec):
        reason = why_unsupported(name, spec)
        if reason is None:
            return name, tuple(passed_over)
        passed_over.append(reason)
    raise ValueError(f"no backend serves this call: {'; '.join(passed_over)}")


def why_no_backend(spec: LaunchSpec) -> str | None:
    """Why no backend serves a call, or None."""
    try:
        select_backend(spec, None)
    except ValueError as error:
        return str(error)
    return None


def available_backends() -> dict[str, str]:
    """Each backend's name, and "usable" or the reason why it is not; where the machine's GPUs differ, that of each."""
    triton = _on_every_device(triton_unusable)
    return {
        "cuda": _on_every_device(backend_module("cuda").unusable),
        "triton": triton,
        "composed": triton if triton == "usable" else f"usable without dropout; with it not, triton: {triton}",
        "reference": "usable",
    }


def _on_every_device(unusable: Callable[[torch.device | None], str | None]) -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = {f"cuda:{i}": unusable(torch.device("cuda", i)) or "usable" for i in range(count)}
    if len(set(found.values())) > 1:
        return "; ".join(f"{device}: {state}" for device, state in found.items())
    return next(iter(found.values()), None) or unusable(None) or "usable"


def served_by(device: torch.device, dropout: bool = False) -> dict[str, str]:
    """Which backend serves the forward of a layer of 4096 x 4096 at rank 16 here, by dtype, for 2048 tokens."""
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        spec = LaunchSpec("forward", Sizes(2048, 4096, 4096, 16), dtype, (dtype, dtype), device, dropout=dropout)
        found[str(dtype).removeprefix("torch.")] = select_backend(spec, None)[0]
    return found


# The mapping within os.environ, which a change of that changes: the search through its layers takes as long as a check
# of all arguments.
_environment: Any = getattr(os.environ, "_data", None)
_encoded_name = None if _environment is None else os.environ.encodekey(ENVIRONMENT_VARIABLE)


def environment_backend() -> str | None:
    """The backend that the environment insists on, if any."""
    if _environment is not None and _encoded_name not in _environment:
        return None
    return os.environ.get(ENVIRONMENT_VARIABLE) or None
