"""Builds the C++ engine on first use and loads it. Cached by content, safe when many processes start at once."""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_SOURCES = Path(__file__).parent / "engine"
_FLAGS = [
    "-std=c++20",
    "-O2",
    "-ftree-vectorize",
    "-fvect-cost-model=dynamic",
    "-march=native",
    "-ffp-contract=off",
    "-fPIC",
    "-Wall",
    "-Wextra",
]


def compiler():
    """The C++ compiler. Raises RuntimeError where there is none."""
    found = os.environ.get("CXX") or shutil.which("g++")
    if not found:
        raise RuntimeError("the emulator needs g++ (11 or later) to build its engine")
    return found


def _host():
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    except OSError:
        return platform.processor()


def cache_directory():
    """Where built engines are kept, for whoever else caches by content."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(base) / "fastlora-emulator"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return directory
    except OSError:
        fallback = Path(tempfile.gettempdir()) / f"fastlora-emulator-{os.getuid()}"
        fallback.mkdir(exist_ok=True)
        return fallback


def _build(target):
    """Compiles into a directory of its own and moves the result into place, so that a reader never sees half a file."""
    cxx = compiler()
    with tempfile.TemporaryDirectory(dir=target.parent) as work:

        def compile_one(source):
            result = Path(work) / f"{source.stem}.o"
            done = subprocess.run([cxx, *_FLAGS, "-c", str(source), "-o", str(result)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{source.name}:\n{done.stderr[:4000]}")
            return str(result)

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, sorted(_SOURCES.glob("*.cpp"))))
        linked = Path(work) / "engine.so"
        subprocess.run([cxx, "-shared", "-o", str(linked), *objects], check=True)
        os.replace(linked, target)


@functools.cache
def _load():
    """The engine, or the error that building it met: a broken compiler is not asked again for every test."""
    digest = hashlib.sha256()
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    version = subprocess.run([compiler(), "-dumpfullversion"], capture_output=True, text=True, check=True).stdout
    digest.update(repr((_FLAGS, version, _host())).encode())
    target = cache_directory() / f"engine-{digest.hexdigest()[:24]}.so"
    try:
        build_once(target, _build)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        return error
    loaded = ctypes.CDLL(str(target))
    loaded.emu_op_count.restype = ctypes.c_uint64
    loaded.emu_op_name.restype = ctypes.c_char_p
    loaded.emu_op_name.argtypes = [ctypes.c_uint64]
    loaded.emu_program.restype = ctypes.c_void_p
    loaded.emu_program.argtypes = [ctypes.c_void_p]
    loaded.emu_free.argtypes = [ctypes.c_void_p]
    return loaded


def library():
    """The engine as a ctypes library. Raises RuntimeError if it cannot be built."""
    loaded = _load()
    if isinstance(loaded, Exception):
        raise RuntimeError(f"the emulator's engine could not be built: {loaded}") from loaded
    return loaded


def build_once(target, build):
    """build(target) where there is no such file; where another process is at it, waits for that."""
    if target.exists():
        return
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            build(target)


@functools.cache
def operations():
    """Name -> number of every operation that the engine executes."""
    engine = library()
    return {engine.emu_op_name(i).decode(): i for i in range(engine.emu_op_count())}
