"""The debug build in which a wait that does not end says which it is and traps (FASTLORA_SPIN_LIMIT)."""

import re
import subprocess

import pytest
import torch

from benchmarks.cuda_resources import toolkit
from fastlora.backends import workspace
from fastlora.backends.cuda import launch as cuda
from fastlora.backends.cuda import tiles
from tests.emulator import DeadlockError, LaunchOptions, LivelockError, TrapError, load_ptx
from tests.support import cuda_emulation, deletions, launches
from tests.support.numerics import draw_case

setup = toolkit.load_setup()
unavailable = cuda_emulation.unavailable() or (None if setup.NVCC else "nvcc is not found")
pytestmark = pytest.mark.skipif(unavailable is not None, reason=f"CUDA kernels: {unavailable}")

LIMIT = 300  # tries, of those that the emulator's mbarriers and flags make where nothing else can run
NAME = "lora_sm90_forward_bf16_64x128_r16"


def compiled(source, out, *flags):
    """PTX, with the flags of a build under the limit."""
    command = [setup.NVCC, "-std=c++17", "-O3", "-arch=compute_90a", "-lineinfo", "-ptx", source, "-o", out, *flags]
    subprocess.run([*command, *setup.debug_flags().split()], check=True)
    return cuda_emulation.entries_of(out.read_text())


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One kernel of a debug build, as PTX."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(setup.SPIN_LIMIT, str(LIMIT))
        flags = ["-DFASTLORA_DIRECTION=forward", "-DFASTLORA_ELEMENT=bf16", "-DFASTLORA_TILE_64x128"]
        out = tmp_path_factory.mktemp("spin") / "kernels.ptx"
        return compiled(setup.CSRC / "sm90" / "kernels.cu", out, *flags)[NAME]


def forward(ptx, **options):
    """Y of a layer with more tiles than CTAs; its tiles wait for S."""
    c = draw_case(100, 136, 200, 16, torch.bfloat16)
    options = LaunchOptions(**{"seed": 3, "async_policy": "random", **options})
    with cuda_emulation.emulated(options, ptx=lambda name: ptx) as ran:
        y, _ = launches.forward(
            cuda, c.x, c.weight, c.lora_a, c.lora_b, c.bias, c.scaling, 0.0, None,
            tile=tiles.CudaTile(64, 128, 4, splits=2), ctas=4,
        )  # fmt: skip
    assert not ran.stats[-1].printed
    return y


def test_a_debug_build_computes_the_same(kernel):
    assert "vprintf" in kernel
    assert torch.equal(forward(kernel), forward(cuda_emulation.ptx_of(NAME)))


def test_a_build_without_the_limit_has_nothing_of_it():
    for variant in cuda.extension.variants():
        text = cuda_emulation.ptx_of(variant["name"])
        assert "vprintf" not in text and "trap" not in text and "noted_tiles" not in text
    assert cuda.extension.loaded().spin_limit is None


def without_flags(ptx):
    """No release adds to a flag of S."""
    changed, n = re.subn(r"red\.release\.gpu\.global\.add\.s32 [^;]*;", "", ptx)
    assert n
    return changed


def without_arrivals(ptx):
    """Nobody arrives at an mbarrier but those who announce bytes."""
    arrivals = [deletion for deletion in deletions.find(ptx) if deletion.what == "mbarrier.arrive"]
    assert arrivals
    return deletions.without(ptx, arrivals)


@pytest.mark.parametrize(
    "broken, said",
    (
        (without_arrivals, r"gives up at (pipeline|producer|consumer).cuh:\d+: mbarrier at shared address 0x"),
        (without_flags, r"gives up at (producer|consumer).cuh:\d+: flag at 0x[0-9a-f]+, wanted 1"),
    ),
    ids=("mbarrier", "flag"),
)
def test_a_wait_that_nobody_ends_traps_and_says_which(own_workspace, monkeypatch, kernel, broken, said):
    """Which of the waits that hang together gives up first depends on the schedule: under one of a few it is this one.
    The kernel as it ships hangs."""
    messages = []
    for seed in range(8):
        with pytest.raises(
            TrapError, match=r"printed: fastlora: block \d+ thread \d+ gives up at \w+.cuh:\d+: "
        ) as trap:
            forward(broken(kernel), seed=seed)
        monkeypatch.setattr(workspace, "_by_stream", {})
        messages.append(str(trap.value))
        if re.search(said, messages[-1]):
            break
    else:
        pytest.fail("\n".join(messages))
    shipped = broken(cuda_emulation.ptx_of(NAME))
    with pytest.raises((DeadlockError, LivelockError)):
        forward(shipped, timeout_s=60.0)


_NOTED = """
#include "ptx/mbarrier.cuh"
#include "ptx/thread.cuh"

extern "C" __global__ void noted() {
  using namespace fastlora::sm90;
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) mbarrier_init(shared_address(&barrier), 1);
  __syncthreads();
  if (threadIdx.x == 33) note_tile(2, 30, 40, 1);
  __syncwarp();
  if (threadIdx.x >= 32) mbarrier_wait(shared_address(&barrier), 0);
}
"""


def test_the_message_names_the_tile_that_the_warp_has_in_hand(tmp_path, monkeypatch):
    monkeypatch.setenv(setup.SPIN_LIMIT, str(LIMIT))
    source = tmp_path / "noted.cu"
    source.write_text(_NOTED)
    ptx = compiled(source, tmp_path / "noted.ptx", f"-I{setup.CSRC / 'sm90'}")["noted"]
    line = 1 + _NOTED.splitlines().index(next(each for each in _NOTED.splitlines() if "mbarrier_wait" in each))
    gives_up = rf"block 0 thread 32 gives up at noted.cu:{line}: mbarrier at shared address 0x400, wanted 0; tile "
    with pytest.raises(TrapError, match=gives_up + "kind 2 row 30 column 40 split 1"):
        load_ptx(ptx).launch("noted", 1, 64, [])
    without_note = re.sub(r"st\.volatile\.global[^;]*;", "", ptx)
    with pytest.raises(TrapError, match=gives_up + "kind -1 row 0"):
        load_ptx(without_note).launch("noted", 1, 64, [])


@pytest.mark.parametrize("limit", ("0", "-1", "many", "1e6", "9223372036854775808"))
def test_a_limit_that_is_no_number_of_tries_is_refused(monkeypatch, limit):
    monkeypatch.setenv(setup.SPIN_LIMIT, limit)
    with pytest.raises(ValueError, match="is not a number of tries"):
        setup.debug_flags()


def test_the_build_passes_the_limit_on(monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "ninja_command", lambda: ["true"])
    for limit, flag in (("", False), ("1000", True)):
        monkeypatch.setenv(setup.SPIN_LIMIT, limit)
        setup.build_library(tmp_path / "out.so", tmp_path / "build")
        assert ("-DFASTLORA_SPIN_LIMIT=1000" in (tmp_path / "build" / "build.ninja").read_text()) == flag
