"""What looks for generated mutants of the Triton kernels and of their launcher."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import triton

from tests.support import mutants, python_mutations, segment_checks
from tests.support import triton_checks as checks
from tests.support.defects import Finding
from tests.support.generated import LAUNCH_LIMIT_S, Generated, Stillborn, first_finding, run_tests


def mutations() -> list[Generated]:
    """Every one."""
    return [
        Generated(f"fastlora/backends/triton/{module}.py", mutation)
        for module in mutants.MODULES
        for mutation in python_mutations.find(mutants.source(module))
    ]


def look_for(generated: Generated) -> Finding | None:
    """What finds a mutant.

    Raises:
        Stillborn: the compiler refuses it.
    """
    kernels = functools.cache(lambda: mutants.load(generated))
    quick = [(name, functools.partial(_on, kernels, check)) for name, check in _checks()]
    return first_finding([*quick, ("tests", functools.partial(run_tests, generated, *_TESTS))])


def _on(kernels: Callable, check: Callable) -> None:
    try:
        with _quiet():
            check(kernels=kernels())
    except (triton.CompilationError, triton.runtime.errors.PTXASError) as error:
        raise Stillborn(str(error).splitlines()[0]) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Triton prints the whole kernel where the compiler fails."""
    with open("/dev/null", "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        yield


@functools.cache
def _checks() -> tuple[tuple[str, Callable], ...]:
    limited = tuple(dataclasses.replace(options, timeout_s=LAUNCH_LIMIT_S) for options in checks.SCHEDULES)

    def integers(sizes, arch):
        return f"sm_{arch} integers {sizes}", functools.partial(checks.check_integers, sizes, arch, schedules=limited)

    def dropped(sizes, dtype, arch):
        check = functools.partial(checks.check_dropout, sizes, dtype, arch, schedules=limited[2:4])
        return f"sm_{arch} dropout {sizes} {dtype}", check

    def segments(what, check, *given, schedules=limited):
        return what, functools.partial(check, *given, schedules=schedules)

    in_segments = [
        each
        for arch in checks.ARCHITECTURES
        for each in (
            segments(f"sm_{arch} segments, ragged", segment_checks.check_layout, "ragged", arch),
            segments(f"sm_{arch} segments, bad ends", segment_checks.check_bad_ends, arch, schedules=limited[3:4]),
            *(
                segments(f"sm_{arch} segments, {way}", segment_checks.check_way, way, arch, schedules=limited[2:4])
                for way in segment_checks.WAYS
            ),
            *(
                segments(f"sm_{arch} segments, {layout}", segment_checks.check_layout, layout, arch)
                for layout in segment_checks.LAYOUTS
                if layout != "ragged"
            ),
        )
    ]
    first = [
        integers((264, 136, 200, 8), 80), dropped(*checks.DROPPED[4], 80), integers(checks.FUSED_SIZES[0], 90),
        integers(checks.SEPARATE_SIZES[0], 80), dropped(*checks.DROPPED[0], 90),
        ("sm_80 float16 range", functools.partial(checks.check_float16_range, 3000.3, 0.3, 80)),
        ("sm_90 infinities", functools.partial(checks.check_infinities, 90)),
    ]  # fmt: skip
    rest = [
        each
        for arch in checks.ARCHITECTURES
        for each in (
            *(integers(sizes, arch) for sizes in checks.INTEGER_SIZES),
            *(dropped(sizes, dtype, arch) for sizes, dtype in checks.DROPPED),
        )
    ]
    known = {name for name, _ in first}
    shipped = [(each.id, functools.partial(checks.check_shipped, *each.values)) for each in checks.shipped()]
    rest = [each for each in rest if each[0] not in known]
    return (*first, *in_segments, *rest, *reversed(shipped))


_TESTS = (
    ((), ("tests/kernels/test_queue.py", "tests/kernels/test_triton_launch.py", "tests/kernels/test_configs.py",
          "tests/kernels/test_segments_launch.py")),
    (("TRITON_INTERPRET=1",), ("tests/values",)),
    ((), ("tests/kernels/test_triton_ptx.py", "tests/kernels/test_triton_compile.py", "tests/kernels/test_warming.py",
          "tests/kernels/test_segments_ptx.py", "tests/kernels/test_segments_compile.py",
          "tests/kernels/test_traffic.py", "tests/kernels/test_triton_driver.py")),
)  # fmt: skip
