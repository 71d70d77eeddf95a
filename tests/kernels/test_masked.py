"""Dropout's kernels of the composed backend without a GPU: they compile for every architecture without a spill, and
their PTX runs in the emulator."""

import re

import pytest
import torch

from fastlora.backends import composed, workspace
from fastlora.backends.target import Target
from fastlora.backends.triton import masked
from fastlora.problem import Needs, Scales
from tests.emulator import RaceError
from tests.support import launches, numerics
from tests.support.compile_target import REGISTER_FILE, SHARED_MEMORY, compile_for, remarks, resources
from tests.support.triton_checks import SCHEDULES, needs_compiler
from tests.support.triton_emulation import emulated

pytestmark = [needs_compiler, pytest.mark.usefixtures("own_workspace", "poisoned")]
SEED, ALL = torch.tensor(2**40), Needs(True, True, True, False)


def compile_both(arch: int, dtype: torch.dtype, rank: int, tf32: bool = False, seed: torch.Tensor = SEED) -> list:
    """The kernels of a layer of 4096 x 4096 and 512 tokens."""

    def meta(*shape):
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, a, dx, ds = meta(512, 4096), meta(rank, 4096), meta(512, 4096), meta(512, rank)
    options = {"device": torch.device("cpu"), "tf32": tf32}
    calls = (
        lambda: masked.masked_shrink(x, a, Scales(0.7, 1.0), 0.1, seed, **options),
        lambda: masked.mask_and_add(x, dx, ds, a, 0.1, seed, **options),
    )
    with compile_for(arch) as driver:
        assert masked.compile_all(calls, 2) == 2, "one kernel each"
    assert driver.launched == []
    return list(masked._compiled.values())


@pytest.mark.parametrize("arch", (80, 90, 100, 120))
@pytest.mark.parametrize("dtype, rank", [(torch.bfloat16, 128), (torch.float32, 64)], ids=str)
def test_no_spill_and_no_tf32_unasked(arch, dtype, rank):
    """At the largest rank of one program, which takes the most registers and shared memory."""
    for kernel in compile_both(arch, dtype, rank):
        used = resources(kernel)
        assert used.stack == 0 and used.local == 0, f"spills: {used}"
        assert used.registers * used.threads <= REGISTER_FILE, used
        assert used.shared <= min(SHARED_MEMORY.values()), "the smallest GPU's, for sm_86 compiles to what sm_80 does"
        instruction = {80: "mma.sync", 90: "mma", 100: "tcgen05.mma|mma.sync", 120: "mma.sync"}[arch]
        if dtype == torch.float32:
            instruction = "fma.rn.f32"
            assert not re.search("tf32|tcgen05", kernel.asm["ptx"])
        assert re.search(instruction, kernel.asm["ptx"])
        if "wgmma" in kernel.asm["ptx"]:
            assert not remarks(kernel, arch)


def test_tf32_where_it_is_allowed():
    assert all("tf32" in kernel.asm["ptx"] for kernel in compile_both(80, torch.float32, 16, tf32=True))


def test_a_seed_that_a_graph_draws_needs_no_other_kernel():
    """A capture must not have to compile."""
    eager = compile_both(80, torch.bfloat16, 16)
    captured = compile_both(80, torch.bfloat16, 16, seed=torch.empty((), dtype=torch.int64, device="meta"))
    assert [kernel.hash for kernel in eager] == [kernel.hash for kernel in captured]


def run(case: numerics.Case, arch: int, options, needs: Needs, edit_ptx=None) -> dict[str, torch.Tensor]:
    """A layer whose dropout kernels run in the emulator, on a device that wants its sums in parts."""
    c = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked, "target_of", lambda device: Target(arch, n_sms=64))
        with emulated(arch, options, edit_ptx) as stats:
            forward = (c.x, c.weight, c.lora_a, c.lora_b, c.bias, c.scaling, c.dropout_p, c.seed)
            y, s = launches.forward(composed, *forward)
            backward = (c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, c.scaling, c.dropout_p, c.seed, needs)
            gradients = launches.backward(composed, *backward)
    assert len(stats) == 2, "one launch of dropout each way"
    assert not any(buffer.any() for buffer in workspace._by_stream.values()), "the workspace was left dirty"
    return {"y": y, **{n: g for n, g in gradients._asdict().items() if g is not None}}


@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize("m, n, k, r, dtype", [(33, 16, 1064, 80, torch.bfloat16), (33, 24, 560, 5, torch.float32)])
def test_the_protocol(m, n, k, r, dtype, arch):
    """Races, bounds, what nobody wrote; several parts under several orders, with the same bits."""
    case = numerics.draw_case(m, n, k, r, dtype, dropout_p=0.3, bias=False)
    first, *others = [run(case, arch, options, ALL) for options in SCHEDULES[1:4]]
    numerics.assert_accurate(first, case, against_eager=dtype != torch.float32)
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)


DEFECTS = {
    "stores after the barrier that the count is behind": ("bar.sync", "//bar.sync"),
    "a count that releases nothing": ("atom.global.gpu.acq_rel", "atom.global.gpu.acquire"),
    "a count that acquires nothing": ("atom.global.gpu.acq_rel", "atom.global.gpu.release"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_planted_defects_are_found(defect):
    """In the part of the sums that arrives last; the barrier is the one in front of the count."""
    right, wrong = DEFECTS[defect]
    case = numerics.draw_case(33, 16, 1064, 5, torch.bfloat16, dropout_p=0.3, bias=False)

    def plant(ptx: str) -> str:
        if "acq_rel" not in ptx:  # the backward's
            return ptx
        where = ptx.rindex(right, 0, ptx.index("acq_rel") + 7)
        return ptx[:where] + wrong + ptx[where + len(right) :]

    with pytest.raises(RaceError):
        for options in SCHEDULES[:4]:
            run(case, 80, options, ALL, plant)
