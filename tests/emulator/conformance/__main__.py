"""Runs every case in the emulator and, where there is one, on the CUDA device: python -m tests.emulator.conformance."""

import sys

import torch

from . import CudaRunner, EmulatorRunner, all_cases
from .case import bits


def compare(case, emulated, measured):
    """The first value in which the device differs from the emulator, or None. Approximate instructions may."""
    if case.tolerance:
        return None
    for name in case.expected:
        if not torch.equal(bits(emulated[name]), bits(measured[name])):
            return f"{case.name}: the device and the emulator differ in {name}"
    return None


def main():
    device = CudaRunner() if torch.cuda.is_available() else None
    ran, on_device, found = 0, 0, []
    for case in all_cases():
        emulated = EmulatorRunner().run(case)
        problems = [case.mismatch(emulated)]
        if device and device.supports(case):
            measured = device.run(case)
            problems += [case.mismatch(measured), compare(case, emulated, measured)]
            on_device += 1
        ran += 1
        found += [problem for problem in problems if problem]
    print("\n".join(found))
    where = torch.cuda.get_device_name() if device else "a CUDA device (there is none)"
    print(f"{ran} cases in the emulator, {on_device} on {where}: {len(found)} problems")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
