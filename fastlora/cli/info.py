"""`fastlora info`: what is installed, which devices there are, which backend can run here and why the others cannot."""

import json
import os
import platform
import shutil
import subprocess

import click

from fastlora.errors import CommandError, first_line
from fastlora.tables import wrapped

PACKAGES = ("fastlora", "torch", "triton", "numpy", "safetensors", "transformers", "peft")
COMPILERS = ("nvcc", "c++")
COMPILER_TIMEOUT_S = 20


def compiler_version(name: str) -> str | None:
    """The line of `<name> --version` that holds the release, or None where there is no such program."""
    path = shutil.which(name)
    if path is None:
        return None
    try:
        result = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=COMPILER_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not run: {error}"
    lines = result.stdout.splitlines()
    # nvcc prints its name and copyright first; other compilers put the version in the first line.
    release = next((line for line in lines if "release" in line), lines[0] if lines else "no version printed")
    return f"{release.strip()} ({path})"


def device_list() -> list[dict]:
    """One entry a device: the CPU, then each CUDA device with its compute capability, SM count and memory in bytes."""
    import torch

    devices = [
        {
            "device": "cpu",
            "name": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
    ]
    for index in range(torch.cuda.device_count()):
        try:
            properties = torch.cuda.get_device_properties(index)
        except (RuntimeError, AssertionError) as error:
            devices.append({"device": f"cuda:{index}", "problem": first_line(error)})
            continue
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
            }
        )
    return devices


def collect() -> dict:
    """Everything that `fastlora info` shows, as JSON-able values; None where something is not installed."""
    import torch

    import fastlora
    from fastlora.environment import package_versions
    from fastlora.selection import ENVIRONMENT_VARIABLE, environment_backend, served_by

    devices = device_list()
    return {
        "versions": {
            "python": platform.python_version(),
            **package_versions(PACKAGES),
            "CUDA of torch": torch.version.cuda,
            **{name: compiler_version(name) for name in COMPILERS},
        },
        "platform": platform.platform(),
        "environment": {ENVIRONMENT_VARIABLE: environment_backend()},
        "devices": devices,
        "backends": dict(fastlora.available_backends()),
        "served_by": {
            entry["device"] + (", dropout" if dropout else ""): served_by(torch.device(entry["device"]), dropout)
            for entry in devices
            for dropout in (False, True)
        },
    }


def table(rows: dict[str, object]) -> str:
    width = max(len(name) for name in rows)
    shown = {name: "none" if value is None else value for name, value in rows.items()}
    return "\n".join(wrapped(f"{name:<{width}}  {value}", "  ", " " * (width + 2)) for name, value in shown.items())


def as_text(report: dict) -> str:
    devices = {
        entry["device"]: ", ".join(f"{key} {value}" for key, value in entry.items() if key != "device")
        for entry in report["devices"]
    }
    sections = {
        "Versions": {**report["versions"], "platform": report["platform"]},
        "Devices": devices,
        "Backends": report["backends"],
        "Environment": {name: insistence(value, report["backends"]) for name, value in report["environment"].items()},
        "Who serves a layer of 4096 x 4096, R 16, M 2048": {
            device: ", ".join(f"{dtype} {name}" for dtype, name in served.items())
            for device, served in report["served_by"].items()
        },
    }
    return "\n\n".join(f"{title}\n{table(rows)}" for title, rows in sections.items())


def insistence(backend: str | None, backends: dict[str, str]) -> str:
    """What the environment's choice of a backend means for every call of a layer."""
    if backend is None:
        return "not set: the best backend serves each call"
    if backend not in backends:
        return f"{backend!r}, which is no backend: every call fails"
    state = backends[backend]
    return f"{backend}: no other serves a call" + ("" if state == "usable" else f", and here it is {state}")


def unmet(required: str, backends: dict[str, str]) -> str | None:
    """Which of the backends that a list with commas names are not usable, each with its reason; None where all are.

    Raises:
        CommandError: the list names one that does not exist.
    """
    wanted = [name.strip() for name in required.split(",") if name.strip()]
    for name in wanted:
        if name not in backends:
            raise CommandError(f"--require: no backend {name!r}; choose from {', '.join(backends)}")
    return "; ".join(f"{name}: {backends[name]}" for name in wanted if backends[name] != "usable") or None


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--require", default="", metavar="BACKEND[,...]", help="Fail, with the reason, where one is not usable.")
def info(as_json: bool, require: str) -> None:
    """Show versions, devices, and which backends are usable here."""
    report = collect()
    missing = unmet(require, report["backends"])
    click.echo(json.dumps(report, indent=2) if as_json else as_text(report))
    for name, value in report["environment"].items():
        if value is not None and value not in report["backends"]:
            raise CommandError(f"{name} is {value!r}: choose one of {', '.join(report['backends'])}, or unset it")
    if missing:
        raise CommandError(f"required, but not usable: {missing}")
