"""Builds the Hopper kernels, fastlora._C, where nvcc is found. Without it fastlora is a pure Python package."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
TILES = ((128, 256), (128, 128), (64, 128))
# The PTX goes into the library beside the machine code made of it: the tests run it on machines without a GPU.
TARGETS = "-gencode arch=compute_90a,code=sm_90a -gencode arch=compute_90a,code=compute_90a -lineinfo"
FLAGS = f"-std=c++17 -O3 {TARGETS} -Xcompiler -fPIC,-fvisibility=hidden"


def objects():
    """(object, source, flags): an object per direction, element type and tile, so that kernels compile side by side."""
    for source in ("plan.cpp", "launch.cpp", "bindings.cpp"):
        yield f"{source}.o", source, ""
    for direction in ("backward", "forward"):  # the slower ones first
        for element in ("bf16", "fp16"):
            for m, n in TILES:
                defines = f"-DFASTLORA_ELEMENT={element} -DFASTLORA_BLOCK_M={m} -DFASTLORA_BLOCK_N={n}"
                yield f"{direction}_{element}_{m}x{n}.o", f"lora_{direction}.cu", defines


class NinjaBuild(build_ext):
    """Compiles with ninja: in parallel, and again only what has changed."""

    def build_extension(self, ext):
        import pybind11

        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        temp = Path(self.build_temp).resolve()
        temp.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        includes = f"-isystem {sysconfig.get_paths()['include']} -isystem {pybind11.get_include()}"
        lines = [
            "rule compile\n  depfile = $out.d\n  deps = gcc",
            f"  command = {NVCC} {FLAGS} $flags {includes} -MD -MF $out.d -c $in -o $out",
            "rule link",
            f"  command = {NVCC} -shared -cudart static $in -o $out",
        ]
        for name, source, flags in objects():
            lines += [f"build {name}: compile {CSRC / source}", f"  flags = {flags}"]
        lines += [f"build {out}: link {' '.join(name for name, *_ in objects())}", ""]
        (temp / "build.ninja").write_text("\n".join(lines))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(temp)], check=True)


if __name__ == "__main__":
    if NVCC:
        setup(ext_modules=[Extension("fastlora._C", [])], cmdclass={"build_ext": NinjaBuild})
    else:
        setup()
