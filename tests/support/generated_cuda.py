"""What looks for generated mutants of csrc."""

import functools
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

from benchmarks.cuda_resources import toolkit
from tests.support import check_lists, cpp_mutations, cuda_runtime
from tests.support.cuda_emulation import entries_of
from tests.support.cuda_runtime import NUMBERS
from tests.support.generated import ROOT, Checks, Generated, Stillborn, run_tests

# Neither the bindings, which hold no arithmetic, nor what is generated (wgmma.cuh) or for debug builds (spin.cuh).
_SHARED = "csrc/schedule.h"  # by the kernels and the host
_KERNELS = (_SHARED, "csrc/sm90/*.cuh", "csrc/sm90/ptx/[!ws]*.cuh")
_HOST = tuple(f"csrc/host/{name}.cpp" for name in ("plan", "projections", "operands", "launch", "tensor_map"))
_HOST_TESTS = tuple(
    f"tests/kernels/test_cuda_{name}.py" for name in ("plan", "plan_segments", "plan_projections", "host")
)
_LAUNCHES = tuple(
    f"tests/kernels/test_{name}.py"
    for name in (
        "cuda_device",
        "far_addresses",
        "cuda_kernels",
        "cuda_quantised",
        "cuda_range",
        "cuda_protocol",
        "cuda_projections",
    )
)
_NAME = re.compile(
    r"lora_sm90_(forward|backward)_(bf16|fp16)_(\d+)x(\d+)_r(\d+)(_transposed|_decoded|_in_loop)?(_segments|_shared)?"
    r"(_dropout)?"
)


def mutations() -> list[Generated]:
    """Every one."""
    paths = [path for pattern in (*_KERNELS, *_HOST) for path in sorted(ROOT.glob(pattern))]
    return [
        Generated(str(path.relative_to(ROOT)), mutation)
        for path in paths
        for mutation in cpp_mutations.find(path.read_text())
    ]


def checks(generated: Generated) -> Checks:
    """What may find a mutant. Each raises Stillborn where the compiler refuses it."""
    compiled = Compiled(generated)
    host, launches = (functools.partial(run_tests, generated, ((), tests)) for tests in (_HOST_TESTS, _LAUNCHES))
    if generated.path in _HOST:
        return [("the compiler", compiled.host), ("tests", host)], [("tests", launches)]
    every = {name: (name, functools.partial(compiled.run, check, kernels)) for name, kernels, check in _checks()}
    quick = [every.pop(name) for name in _first_of_each_kind()]
    return [*quick, *[("tests", host)] * (generated.path == _SHARED)], [*every.values()]


# A kernel's registration, by which the host knows its traits; and in its place an array of these in the PTX.
_REGISTRATION = re.compile(r"static const fastlora::Registration .*?;$", re.S | re.M)
_NUMBERS = (
    "static constexpr fastlora::Variant NAME##_variant ="
    " fastlora::sm90::variant_of<fastlora::sm90::KernelTraits<__VA_ARGS__>>(nullptr, nullptr);"
    f' extern "C" __device__ const int NAME##_numbers[] = {{{", ".join(f"NAME##_variant.{n}" for n in NUMBERS)}}};'
)
_ARRAY = re.compile(r"^.*\b(\w+)_numbers\[\d+\] = \{([^}]*)\};$", re.M)


class Compiled:
    """The mutated sources: a kernel's PTX, compiled when it is first asked for, and what the host knows of it; and the
    host code where it has changed as well."""

    def __init__(self, generated: Generated):
        self._directory, self._found, self._host = tempfile.TemporaryDirectory(), {}, None
        self._csrc = Path(self._directory.name, "csrc")
        shutil.copytree(ROOT / "csrc", self._csrc)
        changed = self._csrc.parent / generated.path
        changed.write_text(generated.apply(changed.read_text()))
        self._replace("kernels.cu", lambda text: _REGISTRATION.sub(_NUMBERS.replace("\\", ""), text))
        self._replace(
            "kernel.cuh", lambda text: text.replace("\nVariant variant_of(", "\nconstexpr Variant variant_of(")
        )
        self.numbers: dict[str, tuple[int, ...]] = {}
        self._has_host = generated.path == _SHARED

    def _replace(self, name: str, change: Callable[[str], str]) -> None:
        path = self._csrc / "sm90" / name
        old = path.read_text()
        assert change(old) != old, f"{name} is not what it was"
        path.write_text(change(old))

    def run(self, check: Callable, kernels: Iterable[str]) -> None:
        for kernel in kernels:
            self.ptx(kernel)
        runtime = self.host() if self._has_host else cuda_runtime.runtime()
        with (
            mock.patch.object(cuda_runtime, "runtime", lambda: runtime),
            runtime.describing({kernel: self.numbers[kernel] for kernel in kernels}),
        ):
            check(ptx=self.ptx)

    def host(self) -> cuda_runtime.Runtime:
        if self._host is None:
            try:
                self._host = cuda_runtime.Runtime(self._csrc)
            except subprocess.CalledProcessError as refused:
                raise Stillborn(self._without_folder(refused.stderr.splitlines()[0])) from refused
        return self._host

    def _without_folder(self, message: str) -> str:
        return message.replace(f"{self._directory.name}/", "")

    def ptx(self, kernel: str) -> str:
        if kernel not in self._found:
            self._found |= self._compile(*_NAME.fullmatch(kernel).groups()[:7])
        return self._found[kernel]

    def _compile(
        self, direction: str, element: str, m: str, n: str, rank: str, weight: str | None, call: str | None
    ) -> dict[str, str]:
        """The kernels of a line of variants.def: with dropout and without, for rows in segments, or the one that
        decodes in the loop."""
        macro, policy = f"FASTLORA_SM90{(call or '').upper()}", f"{(weight or '_dense')[1:].capitalize()}Weight"
        line = f"{macro}({m}, {n}, {rank}, {policy})"
        if weight == "_in_loop":
            line = f"FASTLORA_SM90_IN_LOOP({m}, {n}, {rank})"
        (self._csrc / "variants.def").write_text(f"{line}\n")
        options = ("-std=c++17", "-arch=compute_90a", "-lineinfo", "-ptx", "-o", "-")
        defines = (f"-DFASTLORA_DIRECTION={direction}", f"-DFASTLORA_ELEMENT={element}")
        command = [toolkit.load_setup().NVCC, *options, *defines, str(self._csrc / "sm90" / "kernels.cu")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise Stillborn(self._without_folder(errors[0] if errors else done.stderr[-200:]))
        for name, numbers in _ARRAY.findall(done.stdout):
            # In bytes, without the zeros at the end.
            written = bytes(map(int, numbers.split(","))).ljust(4 * len(NUMBERS), b"\0")
            self.numbers[name] = struct.unpack(f"<{len(NUMBERS)}i", written)
        return entries_of(_ARRAY.sub("", done.stdout))


@functools.cache
def _checks() -> list[tuple[str, set[str], Callable]]:
    """Those of one compilation together, of the kernels that serve most layers first."""

    def compiled(check: tuple[str, set[str], Callable]) -> tuple:
        _, element, m, n, rank, weight, call, dropout = _parts(check[1])
        return (m, n) != ("128", "256"), int(rank), weight or "", call or "", element, m, dropout or ""

    return sorted(check_lists.cuda_checks(), key=compiled)


def _first_of_each_kind() -> Iterable[str]:
    """The names of those that are the first to check something on a tile, with dropout or without."""
    first: dict[tuple, str] = {}
    for name, kernels, _ in _checks():
        _, _, m, n, _, _, _, dropout = _parts(kernels)
        first.setdefault((name.split()[0], m, n, dropout), name)
    return first.values()


def _parts(kernels: set[str]) -> tuple[str, ...]:
    """Of the name of a check's kernels: direction, element, tile, rank, layout, what the call is about, dropout."""
    return _NAME.fullmatch(min(kernels)).groups()
