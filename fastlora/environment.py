"""What a measurement must carry to be judged later: device, its limits and clocks, versions, commit, date."""

import datetime
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("fastlora", "torch", "triton", "numpy", "peft", "transformers", "loralib", "torchtune")
SMI_FIELDS = ("driver_version", "power.limit", "clocks.max.sm", "clocks.sm", "clocks.mem", "temperature.gpu")
TIMEOUT_S = 20
COMMIT_NOTE = Path("build", "commit")
SOURCES = (".py", ".cu", ".cuh", ".cpp", ".h", ".def")


def _output(command: list[str], directory: Path | None = None) -> str | None:
    """The command's output, or None where it does not exist or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Installed versions; None for what is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def source_digest(root: Path, folders: Iterable[str] = ("fastlora", "csrc", "benchmarks", "tests")) -> str:
    """Changes with any source file of a checkout, or of some of its folders, wherever it lies."""
    digest = hashlib.sha256()
    files = {path for folder in folders for path in (root / folder).rglob("*")}
    for path in sorted(files):
        if path.suffix in SOURCES:
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def note_commit(root: Path) -> None:
    """Leaves a note of the commit in the checkout, for a copy of it that has no history."""
    note = root / COMMIT_NOTE
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(f"{_commit_of(root)} {source_digest(root)}\n")


def commit() -> str | None:
    """The checkout's commit, with "+changes" where tracked files differ from it. In a copy without history it is that
    of the note (note_commit), with "+changes" where a source file differs. None for an installed wheel."""
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():
        return _commit_of(root)
    try:
        noted, digest = (root / COMMIT_NOTE).read_text().split()
    except (OSError, ValueError):
        return None
    return noted if digest == source_digest(root) or noted.endswith("+changes") else f"{noted}+changes"


def _commit_of(root: Path) -> str | None:
    head = _output(["git", "rev-parse", "--short=12", "HEAD"], root)
    changed = _output(["git", "status", "--porcelain", "--untracked-files=no"], root)
    return f"{head}+changes" if head and changed else head


def cpu_name() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpu_state() -> dict[str, str]:
    """Name, multiprocessors and L2 of the current GPU, and nvidia-smi's readings of it."""
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    state = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "l2_bytes": str(l2_bytes()),
        "memory_bytes": str(properties.total_memory),
    }
    query = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader", "-i", str(properties.uuid)]
    if not str(properties.uuid).startswith("GPU-"):
        query[-1] = f"GPU-{properties.uuid}"
    readings = _output(query)
    if readings:
        state.update(zip(SMI_FIELDS, (value.strip() for value in readings.split(",")), strict=False))
    return state


def l2_bytes() -> int:
    """Size of the current GPU's L2, as the driver reports it."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return getattr(properties, "L2_cache_size", 50 << 20)


def describe(device: str) -> dict:
    """Everything above, as JSON-able values."""
    found = {
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda_of_torch": torch.version.cuda,
        "versions": package_versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        found["gpu"] = gpu_state()
    return found
