"""csrc's host code over an emulated CUDA runtime: the cache of tensor maps, contexts, devices that come and fail."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support import cuda_runtime

pytestmark = pytest.mark.skipif(cuda_runtime.unavailable() is not None, reason=f"{cuda_runtime.unavailable()}")

ENTRIES = 4096  # of the cache
# cudaErrorNoDevice, InsufficientDriver, SystemNotReady, InitializationError (a forked process), Unknown
COUNTING_FAILS = (100, 35, 802, 3, 999)
MATRIX_BYTES = 64 * 64 * 2


@pytest.fixture
def runtime():
    """One process has one: a test leaves one device, no hook and no record of calls."""
    found = cuda_runtime.runtime()
    found.calls()
    yield found
    found.devices(1)
    found.on_launch(None)
    found.calls()


def encoded(runtime):
    """Addresses of the maps that were encoded since the last look."""
    return [int(call.split()[1], 16) for call in runtime.calls() if call.startswith("encode")]


def activations(first, count):
    return range(first, first + count * MATRIX_BYTES, MATRIX_BYTES)


def test_maps_make_room_one_at_a_time_and_by_last_use(runtime):
    """What every launch uses is encoded once, however many maps come and go; of the others the last ones stay."""
    start = 7 << 40
    runtime.launch(start)
    fixed = encoded(runtime)
    assert len(fixed) == len(set(fixed)) >= 5
    others = ENTRIES - (len(fixed) - 1)  # places beside what every launch uses
    moved = activations(start, others + 100)
    for act in moved[1:]:
        runtime.launch(act)
    assert encoded(runtime) == list(moved[1:]), "each once, and no other map again"
    for act in moved[-others:]:
        runtime.launch(act)
    assert encoded(runtime) == []
    runtime.launch(moved[99])
    assert encoded(runtime) == [moved[99]], "the longest unused has made room"


def test_a_context_is_made_current_before_a_map_is_encoded(runtime):
    """Autograd's threads have none; that their current device has the operands' number does not help."""
    failed = []

    def in_a_thread(device, act):
        try:
            runtime.launch(act, device)
        except Exception as error:
            failed.append(error)

    for device, act in ((0, 8 << 40), (1, 9 << 40)):
        runtime.devices(2)
        thread = threading.Thread(target=in_a_thread, args=(device, act))
        thread.start()
        thread.join()
        calls = runtime.calls()
        assert failed == []
        assert calls.index(f"cudaSetDevice {device}") < calls.index(next(c for c in calls if c.startswith("encode")))
        assert any(c.startswith("cudaLaunchKernel") and c.endswith(f"on {device}") for c in calls)


def test_the_callers_device_is_current_again_after_a_launch(runtime):
    runtime.devices(2)
    runtime.launch(10 << 40)
    runtime.launch(10 << 40, device=1)
    calls = runtime.calls()
    assert [c for c in calls if c.startswith("cudaSetDevice")] == [f"cudaSetDevice {device}" for device in (0, 1, 0)]
    with pytest.raises(RuntimeError, match=r"cudaSetDevice\(2\): error 101"):
        runtime.launch(10 << 40, device=2)


@pytest.mark.parametrize("error", COUNTING_FAILS)
def test_asking_for_devices_never_throws(runtime, error):
    runtime.devices(1, error)
    assert runtime.module.device_count() == 0
    assert runtime.module.device_error() == f"error {error}: of the emulated runtime"
    runtime.devices(3)
    assert runtime.module.device_count() == 3 and runtime.module.device_error() == ""


def test_that_there_was_no_device_is_forgotten():
    """In a process of its own: one launch that succeeds settles it."""
    code = (
        "from tests.support import cuda_runtime\n"
        "runtime = cuda_runtime.runtime()\n"
        "runtime.devices(0)\n"
        "for error in (0, 802):\n"
        "    runtime.devices(1 if error else 0, error)\n"
        "    try:\n"
        "        runtime.launch(1 << 41)\n"
        "    except RuntimeError as refused:\n"
        "        print(refused)\n"
        "runtime.devices(1)\n"
        "runtime.launch(1 << 41)\n"
        "print(runtime.calls()[-1])\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    first, second, last = done.stdout.splitlines()
    assert "no CUDA device (error 100: of the emulated runtime): cannot launch" in first
    assert "no CUDA device (error 802: of the emulated runtime): cannot launch" in second
    assert last.startswith("cudaLaunchKernel lora_sm90_forward_bf16_64x128_r16 on 0")


def test_a_failed_launch_says_what_it_was(runtime):
    runtime.on_launch(lambda launched: 1)
    with pytest.raises(RuntimeError, match=r"launching lora_sm90_forward_bf16_64x128_r16 M=64.*: error 719"):
        runtime.launch(1 << 42)


def test_what_a_launch_asks_for(runtime):
    asked = []
    runtime.on_launch(lambda launched: asked.append(launched) or 0)
    runtime.launch(1 << 42)
    plan = runtime.module.Plan(**cuda_runtime.PROBLEM)
    variant = plan.variant
    (launched,) = asked
    assert (launched.kernel, launched.block, launched.stream) == (variant["name"], (variant["threads"], 1, 1), 7)
    assert launched.grid == (plan.ctas, 1, 1) and launched.shared_bytes == variant["shared_bytes"]
