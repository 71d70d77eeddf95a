"""The CUDA toolkit's programs, and what the compiler reports about the kernels."""

import hashlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import ROOT

CSRC = ROOT / "csrc"
SOURCES = (".cu", ".cuh", ".def", ".h")
REMARK = re.compile(r"\(C75\d\d\)[^\n]*")


def tool(name: str) -> str:
    """A program of the CUDA toolkit, or the copy in the Triton package."""
    found = shutil.which(name)
    if found:
        return found
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if bundled.exists():
        return str(bundled)
    raise FileNotFoundError(f"{name} is neither on PATH nor in the triton package")


def sources() -> list[Path]:
    """What the kernels are compiled from."""
    return sorted(path for path in CSRC.rglob("*") if path.suffix in SOURCES)


def source_digest() -> str:
    """Changes with anything that the kernels are compiled from."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def resource_usage(library: Path) -> dict[str, dict[str, int]]:
    """Registers and stack bytes of each kernel in a library."""
    usage = _run(tool("cuobjdump"), "--dump-resource-usage", library)
    found = re.findall(r"Function (lora_\w+):\s*REG:(\d+) STACK:(\d+)", usage)
    return {name: {"registers": int(registers), "stack": int(stack)} for name, registers, stack in found}


def _run(*command) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def load_setup():
    """setup.py, as a module."""
    spec = importlib.util.spec_from_file_location("fastlora_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_report() -> tuple[list[str], dict[str, int]]:
    """Compiles every kernel. Returns the assembler's performance remarks, and each kernel's spilled bytes."""
    setup = load_setup()

    def report(source: str, flags: str) -> str:
        with tempfile.TemporaryDirectory() as work:
            command = [setup.NVCC, *setup.FLAGS.split(), *flags.split(), "-Xptxas", "-v", "-c", setup.CSRC / source]
            done = subprocess.run(
                [*map(str, command), "-o", f"{work}/out.o"], capture_output=True, text=True, check=True
            )
            return done.stdout + done.stderr

    with ThreadPoolExecutor() as pool:
        texts = list(pool.map(report, *zip(*((s, f) for _, s, f in setup.objects() if s.endswith(".cu")), strict=True)))
    text = "\n".join(texts)
    spills = {
        name: int(stores) + int(loads)
        for name, stores, loads in re.findall(
            r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads", text, re.S
        )
    }
    return REMARK.findall(text), spills


def nvcc_version() -> str | None:
    """The compiler's version, or None where there is no compiler."""
    nvcc = load_setup().NVCC
    return nvcc and re.search(r"release [\d.]+, V([\d.]+)", _run(nvcc, "--version")).group(1)
