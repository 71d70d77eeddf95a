"""What a visit does, stage by stage, in order of worth: what is right before what is fast, headline before grid.

The limits of a stage's steps add up to more than its budget: each step gets what is left, and few need all of theirs.
"""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.steps import Step

CLI = ("-m", "fastlora.cli.main")
TEST_LIMIT_S = 15
MOST_WORKERS = 8  # that share the GPU: beyond, they wait for it and for each other's contexts
# Reasons of skips that are none for want of a GPU.
MAY_SKIP = ("small tiles are compiled up to rank 64", "needs two GPUs", "this GPU has no TMA")
TRITON_FIRST = ("tests/values", "-k", "test_values or test_integers or test_shipped")
CUDA_TESTS = "tests/kernels/test_cuda_device.py"


@dataclass(frozen=True)
class Stage:
    """budget: seconds for all of it. steps: of (output, work, workers), the folders of the results and of all else."""

    budget: float
    steps: Callable[[Path, Path, int], list[Step]]


def tests(*arguments: str, workers: int = 1, limit: float = TEST_LIMIT_S) -> tuple[str, ...]:
    """pytest in a process that is started again where a test hangs, dies, or spoils the CUDA context."""
    allowed = (word for reason in MAY_SKIP for word in ("--may-skip", reason))
    options = ("--limit", f"{limit:g}", "--workers", str(min(workers, MOST_WORKERS)), *allowed)
    return ("-m", "benchmarks.gpu.supervise", *options, "--", *arguments)


def sanitizer(tool: str) -> tuple[str, ...]:
    """Small layers under compute-sanitizer, which watches our kernels alone, slows them down by orders of magnitude,
    and whose findings fail the tests. Every tensor is an allocation of its own, or an access past its end would meet
    its neighbour's memory."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    options = ("--tool", tool, "--kernel-name", "kns=lora_", "--error-exitcode", "9")
    pytest = (sys.executable, "-m", "pytest", "-v", "-x", CUDA_TESTS, "-k", "small_layers")
    return ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", found, *options, *pytest)


def profile(direction: str, work: Path) -> tuple[str, ...]:
    """One launch of a direction under Nsight Compute, the clocks as they are."""
    found = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    options = ("--clock-control", "none", "--set", "full", "--kernel-name", "regex:lora_", "--launch-skip", "1")
    report = ("--launch-count", "1", "--force-overwrite", "--export", str(work / f"ncu-{direction}"))
    return (found, *options, *report, sys.executable, "-m", "benchmarks.gpu.sweep", "--once", direction)


def mark(backend: str, output: Path) -> tuple[str, ...]:
    name = "mark.json" if backend == "cuda" else f"mark-{backend}.json"
    return ("-m", "benchmarks.mark", "--backend", backend, "--output", str(output / name))


def basis(output: Path, workers: int) -> list[Step]:
    """What every stage on fresh ground begins with: the machine, the build, what can run, whether CUDA is right."""
    return [
        Step("device", ("nvidia-smi", "-q"), 10),
        Step("build", ("-m", "benchmarks.gpu.objects", "--link"), 150),
        Step("info", (*CLI, "info", "--json", "--require", "cuda,triton"), 30),
        Step("cuda tests", tests(CUDA_TESTS, "-m", "contact"), 75, needs=("build",)),
        Step("mark", mark("cuda", output), 70, needs=("build",)),
        Step("precompile", ("-m", "benchmarks.gpu.precompile", "--workers", str(workers), "--", *TRITON_FIRST), 70),
        Step("triton tests", tests(*TRITON_FIRST, workers=workers), 50),
        Step("mark triton", mark("triton", output), 45),
    ]


def contact(output: Path, work: Path, workers: int) -> list[Step]:
    """Whether anything runs, whether it is right, the mark, and then the rest of the tests."""
    return [
        *basis(output, workers),
        Step("memcheck", sanitizer("memcheck"), 45, needs=("build",)),
        Step("more cuda tests", tests(CUDA_TESTS, "-m", "not contact", limit=30), 90, needs=("build",)),
        Step("conformance", tests("tests/emulator/test_conformance.py", "-k", "hardware_agrees", limit=40), 45),
        Step("graph tests", tests("tests/integrations/test_cuda_graphs.py", limit=40), 60, needs=("build",)),
        Step("racecheck", sanitizer("racecheck"), 45, needs=("build",)),
        Step("more triton tests", tests("tests/values", workers=workers, limit=60), 120),
    ]


def measure(output: Path, work: Path, workers: int) -> list[Step]:
    """Tiles, splits and the parts of a backward; the benchmark; a profile of each direction."""
    bench = (*CLI, "bench", "--device", "cuda", "--seconds", "1.0")
    layer = (*bench, "--only", "layer", "--skip", "compiled peft", "--output", str(work / "bench"))
    return [
        Step("device", ("nvidia-smi", "-q"), 10),
        Step("build", ("-m", "benchmarks.gpu.objects", "--link"), 150),
        Step("info", (*CLI, "info", "--json", "--require", "cuda,triton"), 30),
        Step("sweep", ("-m", "benchmarks.gpu.sweep", "--output", str(output / "sweep.json")), 70, needs=("build",)),
        Step("ncu forward", profile("forward", work), 30, needs=("build",)),
        Step("ncu backward", profile("backward", work), 30, needs=("build",)),
        Step("bench layer", layer, 90),
        Step("bench host", (*bench, "--only", "host", "--output", str(work / "bench-host")), 40),
    ]


def second(output: Path, work: Path, workers: int) -> list[Step]:
    """After a fix: whether it is right, the mark, and what tuning finds."""
    return [*basis(output, workers), Step("tune", (*CLI, "tune", "--seconds", "6"), 90)]


STAGES = {"contact": Stage(230, contact), "measure": Stage(200, measure), "second": Stage(230, second)}
