"""Runs the launchers of fastlora.kernels.cuda on the CPU: the very parameters that would go to the GPU, and the PTX of the
very kernel, in the emulator."""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from emulator import LaunchOptions, Struct, TensorMap, load_ptx
from emulator.engine_library import _cache_directory as cache_directory

from fastlora.kernels import cuda

CSRC = Path(__file__).resolve().parent.parent / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
THREADS = 384
_OUTPUTS = ("c", "s", "grad_a", "grad_b", "grad_bias", "gradient_sums", "tile_parts")


def unavailable() -> str | None:
    """Why these tests cannot run here, or None."""
    if NVCC is None:
        return "nvcc is not found"
    return cuda._extension()[1]


@functools.cache
def ptx_of_object(direction: str, element: str, block_m: int, block_n: int, source: Path = CSRC) -> str:
    """The PTX of one object of setup.py; compiled once for each state of the sources."""
    files = sorted(source.glob("*.cu*")) + sorted(source.glob("*.h"))
    defines = [f"-DFASTLORA_ELEMENT={element}", f"-DFASTLORA_BLOCK_M={block_m}", f"-DFASTLORA_BLOCK_N={block_n}"]
    key = hashlib.sha256()
    for part in (NVCC, direction, *defines, *(file.read_text() for file in files)):
        key.update(part.encode() + b"\0")
    target = cache_directory() / f"{key.hexdigest()[:24]}.ptx"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            out = Path(work) / "out.ptx"
            command = [NVCC, "-std=c++17", "-O3", "-lineinfo", "-gencode", "arch=compute_90a,code=compute_90a", *defines]
            subprocess.run([*command, "-ptx", "-o", out, source / f"lora_{direction}.cu"], check=True)
            os.replace(out, target)
    return target.read_text()


def entry_text(ptx: str, name: str) -> str:
    """A module with this one entry."""
    starts = [match.start() for match in re.finditer(r"^\s*\.visible \.entry", ptx, re.M)]
    ends = [*starts[1:], len(ptx)]
    for start, end in zip(starts, ends, strict=True):
        if re.match(rf"\s*\.visible \.entry {name}\(", ptx[start:]):
            tail = ptx[starts[-1] :]
            files = "\n".join(re.findall(r"^\s*\.file\s.*$", tail, re.M)) if end != len(ptx) else ""
            return ptx[: starts[0]] + ptx[start:end] + files
    raise KeyError(f"no entry {name}")


def ptx_of(variant: dict, source: Path = CSRC) -> str:
    """The PTX of one compiled kernel."""
    direction = "backward" if variant["backward"] else "forward"
    element = "fp16" if variant["half"] else "bf16"
    return entry_text(ptx_of_object(direction, element, variant["block_m"], variant["block_n"], source), variant["name"])


@functools.cache
def _module(text: str):
    return load_ptx(text)


class EmulatedLaunch:
    """Takes the place of fastlora.kernels.cuda._launch. ``ptx`` gives a kernel's text; ``stats`` holds each launch's."""

    def __init__(self, options: LaunchOptions | None = None, ptx=ptx_of):
        self.options, self._ptx, self.stats = options or LaunchOptions(), ptx, []

    def __call__(self, plan, device, operands):
        addresses = {name: cuda._address(operand) for name, operand in operands.items()}
        raw, maps = plan.parameters(**addresses)
        tensors = {n: t for n, t in operands.items() if isinstance(t, torch.Tensor)}
        by_address = {t.data_ptr(): t for t in tensors.values()}
        stats = _module(self._ptx(plan.variant)).launch(
            plan.variant["name"],
            grid=plan.ctas,
            block=THREADS,
            args=[_parameters(raw, maps, by_address)],
            shared_bytes=plan.variant["shared_bytes"],
            buffers=tensors,
            read_only=[n for n in tensors if n not in _OUTPUTS and n != "workspace"],
            uninitialised=[n for n in tensors if n in _OUTPUTS],
            options=self.options,
        )
        self.stats.append(stats)


def _parameters(raw: bytes, maps: list[dict], by_address: dict[int, torch.Tensor]) -> Struct:
    """The structure that ``raw`` holds, with tensors and tensor maps in the emulator's terms."""
    at = {map["offset"]: _tensor_map(map, by_address[map["address"]]) for map in maps}
    fields, offset = [], 0
    while offset < len(raw):
        word = raw[offset : offset + 8]
        if offset in at:
            fields.append(at[offset])
            offset += 128
            continue
        tensor = by_address.get(int.from_bytes(word, "little"))
        fields.append(word if tensor is None else tensor)
        offset += 8
    return Struct(fields)


def _tensor_map(map: dict, tensor: torch.Tensor) -> TensorMap:
    return TensorMap(
        tensor,
        box=map["box"],
        swizzle=map["swizzle"],
        shape=(map["rows"], map["columns"]),
        strides=(map["stride_bytes"] // 2, 1),
    )
