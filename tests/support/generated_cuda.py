"""What looks for generated mutants of csrc."""

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.cuda_resources import toolkit
from tests.support import cpp_mutations, cuda_checks
from tests.support.cuda_emulation import entries_of
from tests.support.defects import Finding
from tests.support.generated import LAUNCH_LIMIT_S, ROOT, Generated, Stillborn, first_finding, run_tests

# Neither the bindings, which hold no arithmetic, nor what is generated (wgmma.cuh) or for debug builds (spin.cuh).
_KERNELS = ("csrc/schedule.h", "csrc/sm90/*.cuh", "csrc/sm90/ptx/[!ws]*.cuh")
_HOST = ("csrc/host/plan.cpp", "csrc/host/operands.cpp", "csrc/host/launch.cpp", "csrc/host/tensor_map.cpp")
_HOST_TESTS = ("tests/kernels/test_cuda_host.py", "tests/kernels/test_cuda_kernels.py")
_NAME = re.compile(r"lora_sm90_(forward|backward)_(bf16|fp16)_(\d+)x(\d+)_r(\d+)(_dropout)?")


def mutations() -> list[Generated]:
    """Every one."""
    paths = [path for pattern in (*_KERNELS, *_HOST) for path in sorted(ROOT.glob(pattern))]
    return [
        Generated(str(path.relative_to(ROOT)), mutation)
        for path in paths
        for mutation in cpp_mutations.find(path.read_text())
    ]


def look_for(generated: Generated) -> Finding | None:
    """What finds a mutant.

    Raises:
        Stillborn: the compiler refuses it.
    """
    if generated.path in _HOST:
        return first_finding([("tests", functools.partial(run_tests, generated, ((), _HOST_TESTS)))])
    with tempfile.TemporaryDirectory() as directory:
        ptx = _Compiled(generated, Path(directory))
        return first_finding((name, functools.partial(check, ptx=ptx)) for name, check in _checks())


class _Compiled:
    """From a kernel's name to the PTX that the mutated sources come to, compiled when it is first asked for."""

    def __init__(self, generated: Generated, directory: Path):
        self._csrc, self._found = directory / "csrc", {}
        shutil.copytree(ROOT / "csrc", self._csrc)
        changed = directory / generated.path
        changed.write_text(generated.apply(changed.read_text()))

    def __call__(self, kernel: str) -> str:
        if kernel not in self._found:
            self._found |= self._compile(*_NAME.fullmatch(kernel).groups()[:5])
        return self._found[kernel]

    def _compile(self, direction: str, element: str, m: str, n: str, rank: str) -> dict[str, str]:
        """Both kernels of a line of variants.def, with dropout and without."""
        (self._csrc / "variants.def").write_text(f"FASTLORA_SM90({m}, {n}, {rank})\n")
        options = ("-std=c++17", "-arch=compute_90a", "-lineinfo", "-ptx", "-o", "-")
        defines = (f"-DFASTLORA_DIRECTION={direction}", f"-DFASTLORA_ELEMENT={element}")
        command = [toolkit.load_setup().NVCC, *options, *defines, str(self._csrc / "sm90" / "kernels.cu")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise Stillborn(errors[0] if errors else done.stderr[-200:])
        return entries_of(done.stdout)


@functools.cache
def _checks() -> tuple[tuple[str, Callable], ...]:
    """The kernels of the fewest compilations first."""
    large = cuda_checks.LARGE
    layers = sorted(cuda_checks.EVERY_KERNEL, key=lambda layer: (layer[0].block_n != large.block_n, layer[2] > 8))

    def integers(layer):
        tile, dropout, rank = layer
        name = f"integers {cuda_checks.describe(tile)} R={rank} {cuda_checks.describe(dropout)}"
        options = replace(cuda_checks.schedule_of(*layer), timeout_s=LAUNCH_LIMIT_S)
        return name, functools.partial(cuda_checks.check_integers, tile, dropout, rank, options)

    def schedules(tile, sizes, dropout_p):
        name = f"schedules {cuda_checks.describe(tile)} {sizes} p={dropout_p}"
        limited = tuple(replace(options, timeout_s=LAUNCH_LIMIT_S) for options in cuda_checks.SCHEDULES)
        return name, functools.partial(cuda_checks.check_schedules, tile, sizes, dropout_p, schedules=limited)

    def grouped(layer):
        options = replace(cuda_checks.SCHEDULES[0], timeout_s=2 * LAUNCH_LIMIT_S)
        name = f"groups {cuda_checks.describe(layer[0])} of {layer[0].group_m}"
        return name, functools.partial(cuda_checks.check_group, *layer, options)

    named = [integers(layer) for layer in layers]
    named += [
        ("gradients " + "+".join(name for name, wanted in needs._asdict().items() if wanted),
         functools.partial(cuda_checks.check_needs, needs))
        for needs in cuda_checks.SUBSETS
    ]  # fmt: skip
    named += [schedules(tile, sizes, p) for tile, sizes in cuda_checks.LAYERS for p in (0.0, 0.3)]
    masked = (cuda_checks.SMALL, 16), (large, 16)
    named += [(f"masks {tile.block_m}x{tile.block_n}", functools.partial(cuda_checks.check_masks, tile, rank))
              for tile, rank in masked]  # fmt: skip
    return (*named, *map(grouped, cuda_checks.GROUPED))
