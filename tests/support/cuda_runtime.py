"""fastlora._C over a CUDA runtime for machines without a GPU (cudart.cpp).

The host code of csrc is compiled as it is; of the kernels it knows what the built extension says. So plans, tensor
maps and their cache, the device guard and the launch run for real, and the launch ends in a function of the caller's.
"""

import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cuda_resources import toolkit
from fastlora.backends.cuda import extension
from tests.emulator.engine_library import build_once, cache_directory

RUNTIME, MAPS = (Path(__file__).with_name(name) for name in ("cudart.cpp", "emulated_map.h"))
_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden")
PROBLEM = dict(
    backward=False, fp16=False, dropout=False, group_m=4, splits=1, fused=False, ctas=4, m=64, n=64, k=64, r=8,
    block_m=64, block_n=128,
)  # fmt: skip
_FIELDS = (
    "name", "kernel", "arch", "backward", "fp16", "transposed", "decodes", "in_loop", "segments", "shared", "dropout",
    "splits",
    "fuses", "cluster", "threads", "block_m", "block_n", "block_k", "rank", "shared_bytes", "gradient_columns",
    "split_partial_floats", "gradient_partial_floats",
)  # fmt: skip
# Those of a Variant that are numbers, in C++.
NUMBERS = tuple(field for field in _FIELDS if field not in ("name", "kernel"))
_HOOK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t,
    ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


@dataclass(frozen=True)
class Launched:
    """A kernel launch as the runtime was asked for it; ``parameters`` is the address of the kernel's structure."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    stream: int
    parameters: int


def unavailable() -> str | None:
    """Why it cannot be built here, or None."""
    return extension.load()[1] or (None if toolkit.load_setup().NVCC else "nvcc is not found")


def _registrations() -> str:
    """C++ that registers the extension's kernels; each is a place of its own, which nobody can run."""
    lines = ['#include "host/variant.h"', "static char kernels[1024];"]
    for i, variant in enumerate(extension.variants()):
        given = {**variant, "kernel": None, "fp16": variant["dtype"] == "float16"}
        values = [json.dumps(given[field]) if field != "kernel" else f"kernels + {i}" for field in _FIELDS]
        lines.append(f"static const fastlora::Registration r{i}({{{', '.join(values)}}});")
    lines += [
        'extern "C" __attribute__((visibility("default"))) void fake_variant(int index, const int* numbers) {',
        "  auto& v = const_cast<fastlora::Variant&>(fastlora::variants()[index]);",
        *(f"  v.{field} = numbers[{i}];" for i, field in enumerate(NUMBERS)),
        "}",
    ]
    return "\n".join(lines)


@functools.cache
def library(csrc: Path) -> Path:
    """The extension compiled from a folder like csrc; built once for the sources and kernels that it is made of."""
    setup = toolkit.load_setup()
    registrations = _registrations()
    sources = [*(csrc / "host").iterdir(), csrc / "schedule.h", RUNTIME, MAPS]
    digest = hashlib.sha256(repr((registrations, _FLAGS, setup.NVCC)).encode())
    for path in sorted(sources):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    target = cache_directory() / f"cuda-{digest.hexdigest()[:24]}.so"
    build_once(target, functools.partial(_build, setup.NVCC, csrc, registrations))
    return target


def _build(nvcc: str, csrc: Path, registrations: str, target: Path) -> None:
    includes = [f"-I{csrc}", "-isystem", sysconfig.get_paths()["include"]]
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        variants = Path(work, "variants.cpp")
        variants.write_text(registrations)
        sources = [*sorted((csrc / "host").glob("*.cpp")), RUNTIME, variants]

        def compile_one(source: Path) -> str:
            out = str(Path(work, source.name).with_suffix(".o"))
            command = [nvcc, *_FLAGS, *includes, "-c", source, "-o", out]
            subprocess.run(command, capture_output=True, text=True, check=True)
            return out

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, sources))
        linked = Path(work, "linked.so")
        subprocess.run([nvcc, "-shared", "-cudart", "none", *objects, "-o", linked], check=True)
        linked.replace(target)


class Runtime:
    """The emulated runtime, and the host code of a folder like csrc over it.

    module: the extension; takes the place of fastlora._C.
    """

    def __init__(self, csrc: Path) -> None:
        spec = importlib.util.spec_from_file_location("emulated._C", library(csrc))
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self._library = ctypes.CDLL(str(library(csrc)))
        self._library.fake_calls.restype = ctypes.c_char_p
        self._hook = None
        self.devices(1)

    def calls(self) -> list[str]:
        """What csrc has called since the last time, in order."""
        return self._library.fake_calls().decode().splitlines()

    def devices(self, count: int, error: int = 0) -> None:
        """How many devices there are, or the cudaError_t that asking for them gives."""
        self._library.fake_devices(count, error)

    @contextmanager
    def describing(self, kernels: dict[str, Sequence[int]]) -> Iterator[None]:
        """Within it, some kernels have other NUMBERS, by name."""
        known = {variant["name"]: (i, variant) for i, variant in enumerate(extension.variants())}
        given = {known[name][0]: numbers for name, numbers in kernels.items()}
        own = {
            known[name][0]: [int({**known[name][1], "fp16": known[name][1]["dtype"] == "float16"}[n]) for n in NUMBERS]
            for name in kernels
        }
        try:
            self._describe(given)
            yield
        finally:
            self._describe(own)

    def _describe(self, variants: dict[int, Sequence[int]]) -> None:
        for index, numbers in variants.items():
            self._library.fake_variant(index, (ctypes.c_int * len(NUMBERS))(*numbers))

    def on_launch(self, launched: Callable[[Launched], int] | None) -> None:
        """Where launches go; a result other than 0 is a failed launch. None: nowhere."""

        def call(kernel, grid, block, shared_bytes, stream, arguments):
            return launched(
                Launched(kernel.decode(), tuple(grid[:3]), tuple(block[:3]), shared_bytes, stream or 0, arguments[0])
            )

        self._hook = _HOOK(call) if launched else _HOOK()
        self._library.fake_hook(self._hook)

    def launch(self, act: int, device: int = 0) -> None:
        """A launch of PROBLEM with activations at this address, and all else at others that never change."""
        matrices = {"act": act, "weight": 1 << 40, "lora_a": 2 << 40, "lora_b": 3 << 40, "out": 4 << 40}
        operands = {name: (address, 8 if name == "lora_b" else 64) for name, address in matrices.items()}
        vectors = {"s": 5 << 40, "workspace": 6 << 40, "scale_in_s": 1.0}
        launch = self.module.Plan(**PROBLEM).bind((), **operands, **vectors)
        launch(device, 7)


@functools.cache
def runtime() -> Runtime:
    """That of csrc, with one device.

    Raises:
        RuntimeError: there is no compiled extension whose kernels it could know.
    """
    return Runtime(toolkit.load_setup().CSRC)
