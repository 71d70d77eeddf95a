"""Whether Triton can make what it launches kernels with: it compiles its driver and a launcher for each signature as C,
on the user's machine, when they are first needed."""

import os
import shutil
from functools import cache


def no_compiler() -> str | None:
    """Why there is no C compiler for Triton, or None where there is one (as triton.runtime.build looks for it)."""
    import triton

    if getattr(triton.knobs.build, "impl", None) is not None:
        return None
    named = os.environ.get("CC")
    if named is not None:
        return None if shutil.which(named) else f"the C compiler that CC names, {named!r}, cannot be run; mend CC"
    if shutil.which("gcc") or shutil.which("clang"):
        return None
    return "no C compiler to build its launchers with; install gcc or clang, or set CC to a C compiler"


@cache
def driver_fails() -> str | None:
    """Why Triton's driver does not start, or None: the compiler may lack Python.h, say, or the disk room. To be asked
    where there is a GPU. Once a process, for a failed attempt may take a second."""
    import triton

    try:
        _ = triton.runtime.driver.active
    except Exception as error:  # each of its parts has its own
        reason = next(iter(str(error).splitlines()), "")
        return f"its driver does not start ({type(error).__name__}: {reason}); it needs a C compiler and Python.h"
    return None
