"""The Triton kernels over packed weights, proven on their own PTX: as test_triton_ptx.py does it for dense ones. Every
launch's scratch is compared with the library's own weight, bit for bit (quantised_checks.run)."""

import dataclasses
import math
import re

import pytest
import torch

import fastlora
from fastlora import one_launch, routes, selection
from fastlora.backends.configs import TILE_TABLES
from fastlora.backends.target import Target
from fastlora.backends.triton import quantised_launch
from fastlora.problem import Needs
from tests.emulator import LaunchOptions
from tests.support import numerics
from tests.support import quantised_checks as checks
from tests.support.compile_gate import assert_fits, expected_instruction
from tests.support.triton_checks import SCHEDULES, SMALL, needs_compiler
from tests.support.triton_emulation import emulated

pytestmark = [needs_compiler, pytest.mark.usefixtures("own_workspace", "poisoned")]


@pytest.mark.parametrize("arch, sizes", [(80, checks.SIZES[0]), (90, checks.SIZES[2])], ids=str)
def test_integers_are_exact_under_every_schedule(arch, sizes):
    checks.check_integers(sizes, arch)


@pytest.mark.parametrize("case", checks.EVERY_FORMAT, ids=lambda case: f"{case.name}-{case.dtype}-{case.arch}")
def test_formats(case):
    case.check()


def test_blocks_that_run_over_rows_with_dropout():
    """A block of several rows, and parts that begin within one."""
    checks.check_format("nf4", (75, 40, 40, 5), torch.bfloat16, 90, SCHEDULES[4], block=512, dropout_p=0.3)


@pytest.mark.parametrize("needs", [Needs(False, True, True, True)], ids=str)
def test_a_backward_without_dx_decodes_nothing(needs):
    case, packed = checks.draw_integers(checks.SIZES[0], torch.bfloat16)
    results, (forward, backward) = checks.emulate(case, packed, 80, SCHEDULES[3], needs)
    numerics.assert_exact(results, case)
    assert set(results) == {"y", *(name for name, need in needs._asdict().items() if need)}
    assert forward.buffers["codes_ptr"].bytes_read > 0
    assert "codes_ptr" not in backward.buffers or backward.buffers["codes_ptr"].bytes_read == 0


def test_the_packed_weight_is_read_once_a_launch_and_scratch_written_once():
    """Whatever the number of row blocks: one for each tile that reads the scratch."""
    m, n, k, r = 136, 72, 80, 8
    case, packed = checks.draw("nf4", (m, n, k, r), torch.bfloat16)
    _, launches = checks.emulate(case, packed, 80, LaunchOptions(resident=1))  # no wait polls
    row_blocks = math.ceil(m / SMALL[80].block_m)
    for launch in launches:
        codes, scratch = launch.buffers["codes_ptr"], launch.buffers["scratch_ptr"]
        assert codes.bytes_read == codes.first_touch_read == n * k // 2 and codes.bytes_written == 0
        assert scratch.bytes_written == scratch.first_touch_written == n * k * 2
        assert scratch.bytes_read >= row_blocks * n * k * 2 and scratch.first_touch_read == n * k * 2


@pytest.mark.parametrize("arch, table", [(80, "ampere"), (90, "hopper")])
def test_the_largest_tile_that_is_shipped(arch, table):
    """By the parts that are shipped: no spill, asynchronous copies out of scratch, the tile's matrix instruction."""
    config = dataclasses.replace(TILE_TABLES[table][0], fused=False)
    kernels = []
    case, packed = checks.draw("nf4 nested", (140, 272, 160, 16), torch.bfloat16)
    results, stats = checks.emulate(
        case, packed, arch, SCHEDULES[2], config=config, part=quantised_launch.PART, on_kernel=kernels.append
    )
    numerics.assert_accurate(results, case)
    assert all((each.wgmma if arch == 90 else each.mma) > 0 for each in stats)
    for kernel in kernels:
        assert_fits(kernel, arch, expected_instruction(arch, config, torch.bfloat16))
        assert asynchronous_copies(kernel) >= 2 * config.num_stages - 2, "of act and of the weight"


def asynchronous_copies(kernel) -> int:
    return len(re.findall(r"cp\.async\.c[ag]\.", kernel.asm["ptx"]))


def test_a_layer_asks_for_the_launch_that_decodes(monkeypatch):
    """From the public function on: one launch each way, counted as Triton's, and no fallback."""
    case, packed = checks.draw("nf4 nested", (50, 48, 64, 8), torch.bfloat16)
    given = {name: getattr(case, name).requires_grad_() for name in ("x", "lora_a", "lora_b", "bias")}
    monkeypatch.setattr(one_launch, "may_launch", lambda device, requested: True)
    monkeypatch.setattr(selection, "triton_unusable", lambda device: None)
    monkeypatch.setattr(quantised_launch, "target_of", lambda device: Target(80, n_sms=3))
    routes.forget_routes()
    fastlora.reset_dispatch_counts()
    with emulated(80) as stats, checks.allocated(packed.shape, torch.bfloat16) as scratch:
        for _ in range(2):  # the second finds its route by its key
            y = fastlora.lora_linear(given["x"], packed, given["lora_a"], given["lora_b"], case.scaling, given["bias"])
            gradients = torch.autograd.grad(y, list(given.values()), case.dy)
    routes.forget_routes()
    assert len(stats) == 4 and len(scratch) == 2, "a forward of few rows has none"
    fallbacks = {"cuda: the tensors are on cpu": 4}
    assert fastlora.dispatch_counts() == {"cuda": 0, "triton": 4, "composed": 0, "reference": 0, "fallbacks": fallbacks}
    results = {"y": y.detach(), **dict(zip(("dx", "da", "db", "dbias"), gradients, strict=True))}
    detached = {name: tensor.detach() for name, tensor in given.items()}
    numerics.assert_accurate(results, dataclasses.replace(case, **detached))
