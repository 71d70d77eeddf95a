"""What a layer's two launches cost the CPU, without a GPU: the real launch code over a driver that does nothing.

Counts calls (of Python functions and of C functions, by sys.setprofile; they are the same in every run) and times, in
CPU time of the thread, dispatch.forward and dispatch.backward of a layer whose operands are known to it already, and
F.linear in turn with them. The tensors are in CPU memory: on a GPU the question for the stream of the workspace is
added. Without --json both backends are measured, each in a process of its own, and results/host_calls.* written.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch.nn import functional as F

from benchmarks import RESULTS
from fastlora import dispatch, selection
from fastlora.environment import describe
from fastlora.problem import BackwardOperands, ForwardOperands, Needs
from fastlora.tables import Table

BACKENDS = ("triton", "cuda")
M, N, K, R = 64, 64, 64, 16
SCALING = 2.0
ARCH, N_SMS = 90, 132
CALLS = 4  # per reading of the clock
RESULT = RESULTS / "host_calls.json"


def _stand_in_for_triton(directory: Path) -> None:
    """Triton's own driver and launchers, over a libcuda.so.1 without a device behind it."""
    from tests.support import cuda_driver, triton_driver

    os.environ["TRITON_LIBCUDA_PATH"] = str(directory)
    library = ctypes.CDLL(str(cuda_driver.as_libcuda(directory)))
    triton_driver.as_cuda()
    context = ctypes.c_void_p()
    library.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
    library.cuCtxSetCurrent(context)

    import triton
    from triton.backends.nvidia.driver import CudaDriver

    from fastlora.backends.target import Target
    from fastlora.backends.triton import launch

    triton.runtime.driver.set_active(CudaDriver())
    launch.target_of = lambda device: Target(ARCH, N_SMS)


def _stand_in_for_cuda(directory: Path) -> None:
    """The extension's own host code, over a CUDA runtime that launches nothing."""
    from fastlora.backends.cuda import extension, launch
    from tests.support import cuda_runtime

    runtime = cuda_runtime.runtime()
    runtime.on_launch(None)
    extension.load = lambda: (runtime.module, None)  # type: ignore[assignment]
    launch.raw_stream = lambda device: 0
    launch.multiprocessors = lambda device: N_SMS  # type: ignore[assignment]


def stand_in_for(backend: str, directory: Path) -> None:
    """Has a backend's launches go to a driver or runtime, in this directory, that does nothing."""
    (_stand_in_for_triton if backend == "triton" else _stand_in_for_cuda)(directory)


def make_calls(backend: str, dropout_p: float) -> dict[str, Callable[[], object]]:
    """The launches of a layer and F.linear, each called twice before; what they compute is not defined."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((M, K), (N, K), (R, K), (N, R), (M, N))
    x, weight, lora_a, lora_b, dy = (torch.randn(s, generator=generator, dtype=torch.bfloat16) for s in shapes)
    shared = (SCALING, dropout_p, torch.tensor(1 << 40) if dropout_p else None)
    operands = ForwardOperands(x, weight, lora_a, lora_b, None, *shared)
    _, s = dispatch.forward(operands, backend)
    saved = BackwardOperands(dy, x, weight, lora_a, lora_b, s, *shared)
    needs = Needs(True, True, True, False)
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: dispatch.forward(operands, backend),
        "backward": lambda: dispatch.backward(saved, needs, backend),
        "linear": lambda: F.linear(x, weight),
    }
    for call in [*calls.values()] * 2:  # the first compiles, the second describes the matrices to the driver
        call()
    return calls


def count_calls(call: Callable[[], object]) -> int:
    """Calls of Python and C functions within a call."""
    found = 0

    def profile(frame, event, argument) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found - 2  # the function that is counted, and setprofile


def time_calls(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least µs of CPU time of each over many rounds in which they take turns: what others do to the machine can
    only add."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.thread_time_ns()
            for _ in range(CALLS):
                call()
            best[name] = min(best[name], (time.thread_time_ns() - started) / (1e3 * CALLS))
    return best


def measure(backend: str, dropout_p: float, rounds: int) -> dict:
    """Calls and µs of one backend in this process, whose drivers it replaces."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        stand_in_for(backend, Path(directory))
        selection.why_unsupported = lambda name, spec: None  # type: ignore[assignment]
        calls = make_calls(backend, dropout_p)
        counts = {f"{name}_calls": count_calls(call) for name, call in calls.items() if name != "linear"}
        times = {f"{name}_us": round(us, 2) for name, us in time_calls(calls, rounds).items()}
    return {"backend": backend, "dropout": dropout_p, **counts, **times}


def results_table(rows: list[dict]) -> Table:
    keys = ("forward_calls", "backward_calls", "forward_us", "backward_us", "linear_us")
    lines = [[row["backend"], f"{row['dropout']:g}", *(f"{row[key]:g}" for key in keys)] for row in rows]
    columns = ["backend", "dropout", "forward calls", "backward calls", "forward µs", "backward µs", "F.linear µs"]
    note = f"M = {M}, N = {N}, K = {K}, R = {R}, bfloat16; least µs of CPU time; `python -m benchmarks.host_calls`."
    return Table("Host cost of a launch", note, columns, lines)


@click.command(help=__doc__)
@click.option("--json", "as_json", is_flag=True, help="Print one backend's figures, and write nothing.")
@click.option("--backend", type=click.Choice(BACKENDS), default="triton", show_default=True, help="With --json.")
@click.option("--dropout", type=float, default=0.0, show_default=True, help="With --json.")
@click.option("--rounds", type=click.IntRange(1), default=2000, show_default=True)
def main(as_json: bool, backend: str, dropout: float, rounds: int) -> None:
    if as_json:
        print(json.dumps(measure(backend, dropout, rounds)))
        return
    command = [sys.executable, "-m", "benchmarks.host_calls", "--json", f"--rounds={rounds}"]
    rows = [
        json.loads(subprocess.run([*command, *each], check=True, capture_output=True, text=True).stdout)
        for each in ([f"--backend={name}", f"--dropout={p}"] for name in BACKENDS for p in (0.0, 0.1))
    ]
    report = {"command": "python -m benchmarks.host_calls", "environment": describe("cpu"), "rows": rows}
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(results_table(rows).to_markdown())


if __name__ == "__main__":
    main()
