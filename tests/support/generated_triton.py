"""What looks for generated mutants of the Triton kernels and of their launcher."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator

import triton

from tests.support import check_lists, mutants, python_mutations
from tests.support.generated import Checks, Generated, Stillborn, run_tests


def mutations() -> list[Generated]:
    """Every one."""
    return [
        Generated(f"fastlora/backends/triton/{module}.py", mutation)
        for module in mutants.MODULES
        for mutation in python_mutations.find(mutants.source(module))
    ]


def checks(generated: Generated) -> Checks:
    """What may find a mutant. Each raises Stillborn where the compiler refuses it."""
    kernels = functools.cache(lambda: mutants.load(generated))

    def mutated(checks: Iterable[check_lists.Check]) -> Iterator[check_lists.Check]:
        return ((name, functools.partial(_on, kernels, check)) for name, check in checks)

    n_kinds = len(check_lists.triton_kinds(generated.module))
    every = check_lists.triton_checks(generated.module)
    host, tests = (("tests", functools.partial(run_tests, generated, *runs)) for runs in (_HOST_TESTS, _TESTS))
    return [*mutated(every[:n_kinds]), host], [*mutated(every[n_kinds:]), tests]


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


_HOST_TESTS = (
    ((), ("tests/kernels/test_queue.py", "tests/kernels/test_triton_launch.py", "tests/kernels/test_configs.py",
          "tests/kernels/test_quantised_launch.py", "tests/kernels/test_scaled_launch.py",
          "tests/kernels/test_segments_launch.py", "tests/kernels/test_projections_launch.py")),
)  # fmt: skip
# What the checks above have run already.
_DONE = ("integers_are_exact", "dropout_and_ranks", "float16", "infinities", "asked_for", "shipped", "lies_transposed")
_TESTS = (
    (("TRITON_INTERPRET=1",), ("tests/values",)),
    ((), ("tests/kernels/test_triton_ptx.py", "-k", " and ".join(f"not {name}" for name in _DONE))),
    ((), ("tests/kernels/test_triton_compile.py", "tests/kernels/test_warming.py", "tests/kernels/test_traffic.py",
          "tests/kernels/test_triton_driver.py", "tests/kernels/test_far_addresses.py",
          "tests/kernels/test_quantised_ptx.py", "tests/kernels/test_scaled_ptx.py",
          "tests/kernels/test_segments_ptx.py", "tests/kernels/test_segments_compile.py",
          "tests/kernels/test_projections_ptx.py")),
)  # fmt: skip
