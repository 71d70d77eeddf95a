"""Every instruction against a plain model; every case also on a GPU, where there is one."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.emulator import load_ptx
from tests.emulator.conformance import CudaRunner, EmulatorRunner, all_cases, coverage
from tests.emulator.engine_library import operations

CASES = {case.name: case for case in all_cases()}
ASYNCHRONOUS = [
    name
    for name in CASES
    if any(word in name for word in ("cp.async", "st.async", "bulk", "TMA", "mbarrier", "wgmma", "remote", "bar"))
]


def find_ptxas():
    found = shutil.which("ptxas")
    if not found:
        import triton

        found = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    return found


def test_names_are_unique():
    assert len(CASES) == sum(1 for _ in all_cases())


@pytest.mark.parametrize("name", CASES)
def test_emulator_agrees_with_the_model(name):
    case = CASES[name]
    assert case.mismatch(EmulatorRunner().run(case)) is None


@pytest.mark.parametrize("policy", ["early", "random"])
@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_any_completion_order_agrees_with_the_model(name, policy):
    case = CASES[name]
    for seed in (1, 2):
        assert case.mismatch(EmulatorRunner(async_policy=policy, seed=seed).run(case)) is None


def test_a_wrong_result_is_noticed():
    case = CASES["add.s32"]
    results = EmulatorRunner().run(case)
    results["p2"][17] += 1
    assert "[17]" in case.mismatch(results)


def test_every_operation_of_the_engine_is_covered():
    covered = {"trap"}  # its effect is an error: test_detect_launch.py
    for case in CASES.values():
        module = load_ptx(case.ptx)
        covered |= {
            operation.name for entry in module.entries for operation in module.program(entry).builder.operations
        }
    assert covered == set(operations())


def test_what_no_case_covers_is_named():
    ptx = CASES["add.s32"].ptx
    coverage.check(ptx)
    with pytest.raises(LookupError, match=r"add.cc.s32 x x x"):
        coverage.check(ptx.replace("add.s32", "add.cc.s32"))


def test_operands_in_other_places_are_other_instructions():
    of = coverage.signatures
    product = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f0, %f1, %f2, %f3}}, %rd0, %rd1, 1, 1, 1, {}, {}"
    assert of(product.format(0, 1)) != of(product.format(1, 1))
    assert of("ld.global.v2.b32 {%r1, %r2}, [%rd0]") != of("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0]")
    assert of("atom.global.gpu.release.add.u32 %r1, [%rd0], 1") == of(
        "atom.release.gpu.global.add.u32 %r1, [%rd0], %r2"
    )


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_90a"])
def test_the_assembler_accepts_the_cases(arch):
    """A sample: that the snippets are PTX, not what the translator happens to read."""
    for case in [case for case in CASES.values() if case.arch == arch][::16]:
        command = [find_ptxas(), "-arch", arch, "-o", "/dev/null", "-"]
        done = subprocess.run(command, input=case.ptx, capture_output=True, text=True)
        assert done.returncode == 0, f"{case.name}: {done.stderr}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_hardware_agrees_with_the_model():
    runner = CudaRunner()
    found = [case.mismatch(runner.run(case)) for case in CASES.values() if runner.supports(case)]
    assert [mismatch for mismatch in found if mismatch] == []
