"""Visits to a GPU rehearsed on a machine without one: python -m tests.support.rehearsal DIRECTORY

Every step of the stages runs as on the machine, at tiny sizes, on the device of stand_in_gpu.py; the toolkit's programs
are shell scripts. Prints each visit's exit state as JSON: a healthy one of both stages, one whose build fails, and one
with a test that hangs, one that spoils the context, and a wrong kernel.
"""

import contextlib
import dataclasses
import json
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu import objects, visit
from benchmarks.gpu.steps import Step
from fastlora.backends.cuda import extension
from fastlora.backends.cuda.tiles import CudaTile
from tests.support import cuda_runtime, stand_in_gpu

# Compiles by touching, links by copying what is built. COMPILER_FAILS makes it a broken compiler.
_NVCC = """#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0;; esac
[ -n "$COMPILER_FAILS" ] && { echo "kernel.cuh(12): error: planted"; exit 1; }
for a in "$@"; do
  [ "$last" = -o ] && out=$a
  [ "$last" = -MF ] && made=$a
  last=$a
done
case "$*" in
  *-shared*) cp "$BUILT_EXTENSION" "$out";;
  *) echo object > "$out"; echo "$out:" > "$made";;
esac
"""
_SMI = """#!/bin/sh
case "$*" in
  *-lms*) while :; do echo "1980, 3201, 650.5, 55"; sleep 0.05; done;;
  *) echo "stand-in GPU";;
esac
"""
_TOOL = '#!/bin/sh\necho "$(basename "$0")" "$*"\n'
_HANG_LIMIT = "3"  # where a hang is planted
_MARK = ("--device", "cpu", "--rounds", "5", "--case", "72", "136", "136")
_SMALL: dict[str, Callable[[tuple[str, ...]], tuple[str, ...]]] = {
    "mark": lambda command: (*command, *_MARK),
    "mark triton": lambda command: (*command, *_MARK),
    "precompile": lambda command: (*command[:4], "--no-mark", *command[4:-1], "test_values and 64-96"),
    "triton tests": lambda command: (*command[:-1], "test_values and 64-96"),
    "more triton tests": lambda command: (*command, "-k", "test_values and 40-136"),
    "more cuda tests": lambda command: (*command, "-k", "tensors_may_be"),
    "conformance": lambda command: (*command[:-1], "unique"),
    "graph tests": lambda command: ("echo", *command),  # captures need a GPU
    "sweep": lambda command: (
        *command, "--device", "cpu", "--rounds", "5", "--tokens", "16", "--tokens", "72", "--size", "136",
    ),
    "bench layer": lambda command: ("echo", *command),
    "bench host": lambda command: ("echo", *command),
}  # fmt: skip


def small(steps: list[Step]) -> list[Step]:
    """The steps with tiny sizes and short limits, none left out."""
    altered = []
    for step in steps:
        command = _SMALL.get(step.name, lambda command: command)(step.command)
        if step.name == "cuda tests":
            at = command.index("--limit") + 1
            limit = _HANG_LIMIT if "HANGS" in os.environ else command[at]
            command = (*command[:at], limit, *command[at + 1 :], "-k", "not streams")  # its size is for a GPU
        if "benchmarks.gpu.objects" in command:
            command = (*command, "--folder", os.environ["OBJECTS"], "--out", os.environ["LINKED"])
        altered.append(dataclasses.replace(step, command=command))
    return altered


def only(*names: str) -> Callable[[list[Step]], list[Step]]:
    return lambda steps: [step for step in small(steps) if step.name in names]


def result(outcomes: list, output: Path) -> dict:
    """What a visit left behind."""
    with tarfile.open(output / visit.ARCHIVE) as archive:
        logs = {
            Path(member.name).name: archive.extractfile(member).read().decode(errors="replace")
            for member in archive.getmembers()
            if member.name.endswith((".log", ".json"))
        }
    files = sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    flat = {name: json.loads((output / name).read_text()) for name in files if name.endswith(".json")}
    return {"steps": {each.name: [each.code, each.note] for each in outcomes}, "files": files, "logs": logs, **flat}


def prepare(directory: Path) -> stand_in_gpu.StandInGpu:
    """The stand-ins of the toolkit and of the device."""
    extension.loaded()
    cuda_runtime.runtime()  # built by the real compiler
    programs = directory / "bin"
    programs.mkdir()
    scripts = {"nvcc": _NVCC, "nvidia-smi": _SMI, "ncu": _TOOL, "compute-sanitizer": _TOOL, "env": _TOOL}
    for name, text in scripts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    os.environ["BUILT_EXTENSION"] = extension.loaded().__file__
    os.environ["OBJECTS"], os.environ["LINKED"] = str(directory / "objects"), str(directory / "linked" / "_C.so")
    return stand_in_gpu.install()


def rehearse(directory: Path) -> dict[str, dict]:
    torch.set_num_threads(1)  # forks of a process whose OpenMP has threads would wait for them
    gpu = prepare(directory)
    objects.prepare(directory / "objects")
    visit.preload()
    found = {}

    def run(name: str, stage: str, alter: Callable[[list[Step]], list[Step]]) -> None:
        output = directory / name
        with contextlib.redirect_stdout(sys.stderr):
            outcomes = visit.visit(stage, output, directory / f"{name}-work", 2, alter=alter)
        found[name] = result(outcomes, output)

    smallest = CudaTile(64, 128, 4, 4)
    run("contact", "contact", small)
    run("measure", "measure", small)

    os.environ["COMPILER_FAILS"] = "1"
    (directory / "objects" / "digest").write_text("other\n")
    run("broken build", "second", only("build", "info", "cuda tests", "mark", "mark triton"))
    del os.environ["COMPILER_FAILS"]
    os.environ["HANGS"] = "1"
    gpu.faults = stand_in_gpu.Faults(
        hangs=lambda spec, tile: spec.dropout and tile.block_m == 128 and tile.splits == 2,
        spoils=lambda spec, tile: spec.sizes.r == 32 and tile == smallest,
        wrong=lambda spec, tile: tile is not None and (tile.group_m == 8 or (tile.fused and spec.dropout)),
    )
    run("faults", "contact", only("cuda tests", "mark"))
    return found


if __name__ == "__main__":
    print(json.dumps(rehearse(Path(sys.argv[1]))))
