"""This machine's own ceilings, measured on the spot: a large copy and a large matrix product."""

import time

import torch

COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
MATMUL_SIZE = {"cuda": 8192, "cpu": 1536}
REPEATS = 5


def _best_seconds(call, device: str) -> float:
    """The fastest of REPEATS calls after one to warm up: a ceiling is what the machine can do at best."""
    times = []
    for _ in range(REPEATS + 1):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return min(times[1:])


def copy_gbs(device: str) -> float:
    """GB/s of a large copy within the device's memory, bytes read and bytes written both counted."""
    source = torch.empty(COPY_BYTES[device], dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / _best_seconds(lambda: target.copy_(source), device) / 1e9


def matmul_tflops(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of a large square product of random matrices."""
    size = MATMUL_SIZE[device]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(left, right, out=out), device) / 1e12


def measure_peaks(device: str, dtypes: dict[str, torch.dtype]) -> dict:
    """{"copy_gbs": GB/s, "matmul_tflops": {dtype name: TFLOP/s}}."""
    return {
        "copy_gbs": copy_gbs(device),
        "matmul_tflops": {name: matmul_tflops(device, dtype) for name, dtype in dtypes.items()},
    }


def larger_peaks(first: dict, second: dict) -> dict:
    """The larger of each of two measurements."""
    rates = {name: max(rate, second["matmul_tflops"][name]) for name, rate in first["matmul_tflops"].items()}
    return {"copy_gbs": max(first["copy_gbs"], second["copy_gbs"]), "matmul_tflops": rates}
