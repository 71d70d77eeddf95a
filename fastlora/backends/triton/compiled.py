"""A compiled kernel, launched again and again without the work of Triton's JIT function.

The JIT function binds arguments, makes a key of their types, alignments and values, and looks the compiled kernel up:
several times what the launch itself takes. A prepared launch serves calls that differ in addresses and in numbers that
nothing is compiled for, so it does this once. From then on it passes the arguments to Triton's launcher, written in C;
where Triton has none that this module knows (another version, a driver of the tests'), or a profiler hooks launches, to
the compiled kernel's own ``run``.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import BuiltinFunctionType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.backends.target import current_device

# (address, number of a layout) -> what a kernel takes for a TMA descriptor. A tensor map says where a matrix lies and
# how blocks are cut from it, which is all of its key: an entry cannot go stale, and keeps no memory alive. Those of
# weights are used in every step of a model; activations move, and now and then the table is made anew.
_maps: dict[tuple[int, int], list] = {}
_layouts: dict[tuple, int] = {}
_numbers = itertools.count()
_MOST_ENTRIES = 4096  # of each of the two

_RUNTIME = triton.knobs.runtime
_ENTER, _EXIT = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook  # chains of hooks; but anybody may replace them


def side_by_side(compilations: Iterable[Callable[[], Any]], workers: int) -> None:
    """Compiles in several threads what these calls compile, and loads it. Each is called twice: first to begin. Most of
    the work is outside of Python."""
    compilations = list(compilations)
    with ThreadPoolExecutor(workers) as pool, triton.AsyncCompileMode(pool):
        for begin in compilations:
            begin()
    for load in compilations:
        load()


class _Direct(NamedTuple):
    """Triton's launcher in C, and how it is called.

    call: takes the grid, the stream, ``head``, and the kernel's arguments, ``nested`` in one sequence or one by one.
    make_map: a TensorDescriptor and its number among a kernel's -> what the kernel takes for it, without tensors.
    """

    call: Callable
    head: tuple
    nested: bool
    make_map: Callable[[TensorDescriptor, int], list]


def _direct_launcher(compiled: Any) -> _Direct | None:
    """That of a compiled kernel, or None where it is not one of those that this is written for: Triton 3.6 has one for
    each signature, Triton 3.7 to 3.9 have one for all."""
    from triton.backends.nvidia import driver

    launcher, metadata = compiled.run, compiled.metadata
    if not isinstance(launcher, driver.CudaLauncher) or type(launcher).__call__ is not driver.CudaLauncher.__call__:
        return None
    if launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
        return None
    maps = tuple(getattr(metadata, "tensordesc_meta", None) or ())
    if any(each is None for each in maps):
        return None
    unused = (None,) * (len(inspect.signature(driver.make_tensordesc_arg).parameters) - 2)

    def make_map(descriptor: TensorDescriptor, number: int) -> list:
        return list(driver.make_tensordesc_arg(descriptor, maps[number], *unused))

    flags = (launcher.launch_cooperative_grid, launcher.launch_pdl)
    no_hooks, no_scratch = (None, None, None), (None, None)  # nor metadata for hooks
    if hasattr(launcher, "arg_annotations"):
        call = triton.runtime.driver.active.utils.launch
        annotations = (launcher.arg_annotations, launcher.kernel_signature)
        metadata_first = (compiled.packed_metadata, *no_hooks, *no_scratch)
        return _Direct(call, (compiled.function, *flags, *metadata_first, *annotations), True, make_map)
    call = launcher.launch
    if maps:  # a function that makes the maps and calls the launcher
        call = inspect.getclosurevars(call).nonlocals.get("launcher")
    if not isinstance(call, BuiltinFunctionType):
        return None
    scratch_first = (*no_scratch, compiled.packed_metadata, *no_hooks)
    return _Direct(call, (compiled.function, *flags, *scratch_first), False, make_map)


def _stand_in(argument: Any, kind: Any, device: str | None) -> Any:
    """An argument as ``compiled_as`` says, with tensors on a device in the place of null pointers."""
    if isinstance(kind, tuple) and argument is not None:
        return tuple(_stand_in(each, of_each, device) for each, of_each in zip(argument, kind, strict=True))
    if isinstance(kind, int):
        return kind if device == "meta" else argument
    if argument is None and kind is not None:
        return torch.empty(1, dtype=kind, device=device)
    return argument


class CompiledLaunch:
    """One kernel for the calls of one description.

    Args:
        kernel: a @triton.jit function whose first three parameters are matrices.
        grid: number of programs.
        device: of the tensors.
        blocks: for each of the first three arguments the block that its TMA descriptor loads; None: it is a pointer.
        compiled_as: index of an argument -> what it is compiled as, whatever the first call has there. A dtype: a
            pointer, null at run time where the argument is None (any other None is compiled for). A number: its type.
            A tuple: of each element of an argument that is one. None: what the first call has.
        constants: the kernel's last arguments, all constexpr.
        options: of the compilation.
    """

    def __init__(
        self,
        kernel: Any,
        grid: int,
        device: torch.device,
        blocks: tuple[list[int] | None, ...],
        compiled_as: dict[int, Any],
        constants: tuple,
        options: dict[str, Any],
    ):
        self.kernel, self.grid, self.blocks, self.compiled_as = kernel, grid, blocks, compiled_as
        self.constants, self.options = constants, options
        self._device = device.index if device.type == "cuda" else None
        self.compiled: Any = None  # kept: Triton unloads a kernel that nobody refers to
        self._direct: _Direct | None = None
        self._layouts: tuple[int | None, ...] = ()  # of the first three arguments; None: a pointer
        self._index = 0
        self._stream: Callable[[int], int] = int

    def __call__(self, *args: Any) -> None:
        """A launch on the current stream of the tensors' device, with the kernel's arguments but the constants."""
        if self._device is not None and current_device() != self._device:
            with torch.cuda.device(self._device):
                self._launch(args)
        else:
            self._launch(args)

    def compile(self, *args: Any) -> None:
        """Compiles and loads the kernel for arguments of this kind, which may be on the "meta" device; launches
        nothing. Within triton.AsyncCompileMode the compilation is only begun: another call after it has ended loads."""
        with nullcontext() if self._device is None else torch.cuda.device(self._device):
            self._compile(args, waits=False)

    def _launch(self, args: tuple) -> None:
        direct = self._direct
        hooked = _RUNTIME.launch_enter_hook is not _ENTER or _RUNTIME.launch_exit_hook is not _EXIT
        if direct is None or hooked or _ENTER.calls or _EXIT.calls:
            return self._run(args)
        given: list[Any] = []
        for matrix, layout in zip(args, self._layouts, strict=False):
            if layout is None:
                given.append(matrix)
            else:
                given += _maps.get((matrix.data_ptr(), layout)) or self._add_map(matrix, layout)
        given += args[3:]
        given += self.constants
        if direct.nested:
            direct.call(self.grid, 1, 1, self._stream(self._index), *direct.head, given)
        else:
            direct.call(self.grid, 1, 1, self._stream(self._index), *direct.head, *given)
        return None

    def _run(self, args: tuple) -> None:
        """A launch by Triton's own means: the first one, and any for which there is no direct launcher."""
        if _RUNTIME.interpret:
            self.kernel[(self.grid,)](*self._bound(args, "cpu"), **self.options)
            return
        if self.compiled is None:
            self._compile(args)
        kernel = self.compiled
        if kernel is None:  # a hook of Triton's replaces the compilation
            return
        grid, bound, stream = (self.grid, 1, 1), self._bound(args), self._stream(self._index)
        metadata = kernel.launch_metadata(grid, stream, *bound)
        kernel.run(
            *grid, stream, kernel.function, kernel.packed_metadata, metadata,
            _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook, *bound,
        )  # fmt: skip

    def _bound(self, args: tuple, stand_ins: str | None = None) -> tuple:
        """All arguments as a call of the kernel would bind them; with tensors on a device ``stand_ins`` in the place of
        null pointers, and, to compile ("meta"), numbers of the right type."""
        matrices = (
            matrix if block is None else TensorDescriptor.from_tensor(matrix, block)
            for matrix, block in zip(args, self.blocks, strict=False)
        )
        bound = [*matrices, *args[3:]]
        for index, kind in self.compiled_as.items() if stand_ins else ():
            bound[index] = _stand_in(bound[index], kind, stand_ins)
        return (*bound, *self.constants)

    def _compile(self, args: tuple, waits: bool = True) -> None:
        bound = self._bound(args, "meta")
        compiled = self.kernel.run(*bound, grid=(self.grid,), warmup=True, **self.options)
        if isinstance(compiled, triton.FutureKernel):
            compiled = compiled.result() if waits else None
        if compiled is None:
            return
        driver = triton.runtime.driver.active
        direct = _direct_launcher(compiled)
        self._index, self._stream = driver.get_current_device(), driver.get_current_stream
        self._layouts = tuple(
            None if block is None else self._layout(i, matrix, block, compiled)
            for i, (matrix, block) in enumerate(zip(args, self.blocks, strict=False))
        )
        self.compiled = compiled
        self._direct = direct  # last: another thread launches by it as soon as it is there

    @staticmethod
    def _layout(i: int, matrix: Tensor, block: list[int], compiled: Any) -> int:
        """The number of all that matrices' maps have in common: sizes, and how this kernel cuts blocks from them."""
        if len(_layouts) >= _MOST_ENTRIES:
            _layouts.clear()
        layout = (compiled.hash, i, *block, matrix.dtype, matrix.shape, matrix.stride())
        return _layouts.setdefault(layout, next(_numbers))

    def _add_map(self, matrix: Tensor, layout: int) -> list:
        i = self._layouts.index(layout)  # it has the index in it
        block, number = self.blocks[i], sum(each is not None for each in self.blocks[:i])
        assert self._direct is not None and block is not None
        if len(_maps) >= _MOST_ENTRIES:
            _maps.clear()
        _maps[matrix.data_ptr(), layout] = made = self._direct.make_map(
            TensorDescriptor.from_tensor(matrix, block), number
        )
        return made
