"""Builds the Hopper kernels, fastlora._C, where nvcc and a C++ compiler are. Without them fastlora is pure Python."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
# The PTX goes into the library beside the machine code made of it: the tests run it on machines without a GPU.
TARGETS = "-gencode arch=compute_90a,code=sm_90a -gencode arch=compute_90a,code=compute_90a -lineinfo"
FLAGS = f"-std=c++17 -O3 {TARGETS} -Xcompiler -fPIC,-fvisibility=hidden"
OLDEST_PYTHON = "cp310"  # csrc/host/python.h keeps to its stable interface: one build serves it and every later one
SPIN_LIMIT = "FASTLORA_SPIN_LIMIT"


def debug_flags() -> str:
    """What a debug build adds: with FASTLORA_SPIN_LIMIT in the environment, waits of the kernels that end.

    Raises:
        ValueError: it is not a positive number.
    """
    limit = os.environ.get(SPIN_LIMIT, "")
    if limit and not (limit.isdecimal() and 0 < int(limit) < 2**63):
        raise ValueError(f"{SPIN_LIMIT}={limit!r} is not a number of tries from 1 on")
    return f"-D{SPIN_LIMIT}={int(limit)}" if limit else ""


def tiles() -> list[str]:
    """The groups of csrc/variants.def, each of one tile, in its order."""
    return re.findall(r"^#ifdef FASTLORA_TILE_(\w+)$", (CSRC / "variants.def").read_text(), re.M)


def objects():
    """(object, source, flags): an object per direction, element type and tile, so that kernels compile side by side."""
    for source in sorted((CSRC / "host").glob("*.cpp")):
        yield f"{source.name}.o", f"host/{source.name}", ""
    for direction in ("backward", "forward"):  # the slower ones first
        for element in ("bf16", "fp16"):
            for tile in tiles():
                defines = f"-DFASTLORA_DIRECTION={direction} -DFASTLORA_ELEMENT={element} -DFASTLORA_TILE_{tile}"
                yield f"sm90_{direction}_{element}_{tile}.o", "sm90/kernels.cu", defines


def ninja_command() -> list[str]:
    """How to call ninja.

    Raises:
        RuntimeError: it is not installed.
    """
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    if found is None:
        raise RuntimeError("the CUDA kernels need ninja to build: pip install ninja")
    return [found]


def kernel_objects() -> list[str]:
    """Those of the objects that are compiled for the device."""
    return [name for name, source, _ in objects() if source.endswith(".cu")]


def _run_ninja(out: Path, temp: Path, targets: list[str], ready: Path | None = None) -> None:
    """Writes the rules into ``temp`` and makes the targets there, side by side and only what has changed."""
    temp.mkdir(parents=True, exist_ok=True)
    includes = f"-isystem {sysconfig.get_paths()['include']}"
    lines = [
        "rule compile\n  depfile = $out.d\n  deps = gcc",
        f"  command = {NVCC} {FLAGS} {debug_flags()} $flags {includes} -MD -MF $out.d -c $in -o $out",
        "rule link",
        f"  command = {NVCC} -shared -cudart static $in -o $out",
    ]
    linked = []
    for name, source, flags in objects():
        if ready is not None and name in kernel_objects():
            linked.append(str(ready / name))
        else:
            lines += [f"build {name}: compile {CSRC / source}", f"  flags = {flags}"]
            linked.append(name)
    lines += [f"build {out}: link {' '.join(linked)}", ""]
    (temp / "build.ninja").write_text("\n".join(lines))
    subprocess.run([*ninja_command(), "-C", str(temp), *targets], check=True)


def build_library(out: Path, temp: Path, ready: Path | None = None) -> None:
    """Compiles the sources in ``temp`` and links them to ``out``. ``ready``: a folder that holds the kernels' objects
    (see compile_kernels)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _run_ninja(out, temp, [], ready)


def compile_kernels(temp: Path) -> None:
    """Compiles the kernels' objects in ``temp``, and links nothing: most of a build's time, on any machine."""
    _run_ninja(temp / "unlinked.so", temp, kernel_objects())


def in_place() -> Path:
    """The extension of the checkout."""
    return ROOT / "fastlora" / "_C.abi3.so"


def build_in_place() -> Path:
    """Builds the extension into the checkout without setuptools' help, which reads pyproject.toml only where it is new
    enough; for machines on which nothing can be installed."""
    if NVCC is None:
        raise RuntimeError("nvcc is neither on PATH nor in /usr/local/cuda/bin")
    library = in_place()
    build_library(library, ROOT / "build" / "in-place")
    return library


class NinjaBuild(build_ext):
    def build_extension(self, ext):
        build_library(Path(self.get_ext_fullpath(ext.name)).resolve(), Path(self.build_temp).resolve())


if __name__ == "__main__":
    if NVCC and (shutil.which("g++") or shutil.which("c++")):  # nvcc compiles nothing without one of them
        setup(
            ext_modules=[Extension("fastlora._C", [], py_limited_api=True)],
            cmdclass={"build_ext": NinjaBuild},
            options={"bdist_wheel": {"py_limited_api": OLDEST_PYTHON}},
        )
    else:
        setup()
