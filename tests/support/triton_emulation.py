"""Runs Triton launches on the CPU: the real launcher, the real compiler, and the PTX they came to, in the emulator."""

import functools
from collections.abc import Callable
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from fastlora.backends.target import Target
from tests.emulator import LaunchOptions, load_ptx, triton_descriptor
from tests.emulator.conformance import coverage
from tests.support.compile_target import Launch, compile_for

_OUTPUTS = (
    "y_ptr", "s_ptr", "dx_ptr", "ds_ptr", "da_ptr", "db_ptr", "dbias_ptr", "partial_", "dropped_ptr", "scratch_ptr",
    "unscaled_ptr", "scaled_ptr", "dm_ptr",
)  # fmt: skip


@functools.lru_cache(maxsize=256)
def _module(ptx: str):
    return load_ptx(ptx)


def _is_output(name: str, launch: Launch) -> bool:
    """Whether the launch writes a buffer that holds nothing before."""
    names = launch.kernel.src.fn.arg_names
    if "dropped_ptr" in names:  # masked.masked_backward_kernel adds to dX
        return name == "dropped_ptr"
    # The backward reads S, and Y before its scale.
    saved = name.startswith(("s_ptr", "unscaled_ptr")) and "ds_ptr" in names
    return name.startswith(_OUTPUTS) and not saved


def _is_updated(name: str, launch: Launch) -> bool:
    return name == "workspace_ptr" or (name == "dx_ptr" and "dropped_ptr" in launch.kernel.src.fn.arg_names)


@contextmanager
def emulated(
    arch: int,
    options: LaunchOptions | None = None,
    edit_ptx: Callable[[str], str] | None = None,
    on_kernel: Callable[[Any], None] | None = None,
):
    """Within it, a Triton launch on CPU tensors compiles for ``arch`` and runs in the emulator; yields the list of the
    launches' counters.

    Args:
        arch: compute capability (90 for 9.0).
        options: how the emulator runs.
        edit_ptx: may plant a defect; without it, every instruction must have a conformance case.
        on_kernel: gets each launch's compiled kernel, assembled as well, before it runs.
    """
    stats = []

    def run(launch: Launch) -> None:
        if on_kernel is not None:
            on_kernel(launch.kernel)
        metadata = launch.kernel.metadata
        descriptors = iter(getattr(metadata, "tensordesc_meta", None) or ())
        args: dict[str, Any] = {}
        tensors: dict[torch.Tensor, str] = {}  # dY comes twice, as a descriptor and as a pointer: one buffer
        for name, argument in launch.args.items():
            if name == "workspace_ptr" and "n_words" in launch.args:
                argument = argument[: launch.args["n_words"]]  # a buffer of this length would do
            if hasattr(argument, "block_shape"):
                tensors.setdefault(argument.base, name)
                args |= triton_descriptor(name, argument.base, next(descriptors))
            else:
                args[name] = argument
                if isinstance(argument, torch.Tensor):
                    tensors.setdefault(argument, name)
        outputs = [name for name in tensors.values() if _is_output(name, launch)]
        ptx = launch.kernel.asm["ptx"]
        if edit_ptx is None:
            coverage.check(ptx)
        module = _module(edit_ptx(ptx) if edit_ptx else ptx)
        stats.append(
            module.launch(
                metadata.name,
                grid=launch.grid,
                block=32 * metadata.num_warps,
                args=args | {"global scratch": None, "profile scratch": None},
                shared_bytes=metadata.shared,
                buffers={name: tensor for tensor, name in tensors.items()},
                read_only=[n for n in tensors.values() if n not in outputs and not _is_updated(n, launch)],
                uninitialised=outputs,
                options=options or LaunchOptions(),
            )
        )

    with compile_for(arch, run, assembles=on_kernel is not None):
        yield stats


@contextmanager
def emulated_launches(
    kernels: ModuleType,
    arch: int,
    options: LaunchOptions | None = None,
    edit_ptx: Callable[[str], str] | None = None,
    on_kernel: Callable[[Any], None] | None = None,
):
    """``emulated`` for the launches of one module, on a device with few multiprocessors. The module may be a mutant's
    copy: what that compiles to need not be covered."""
    if not kernels.__name__.startswith("fastlora."):
        edit_ptx = edit_ptx or str
    device = mock.patch.object(kernels, "target_of", lambda device: Target(arch, n_sms=3))
    with device, emulated(arch, options, edit_ptx, on_kernel) as stats:
        yield stats
