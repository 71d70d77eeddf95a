"""The conformance runner for GPUs on an emulated driver: that what it passes is what the cases say."""

import dataclasses

import pytest
import torch

from tests.emulator import RaceError, TensorMap
from tests.emulator.conformance import CudaRunner, all_cases
from tests.support.cuda_driver import EmulatedDevice

CASES = list(all_cases())


def is_special(case):
    """Passes more than addresses, or is launched in more than one dimension."""
    arguments = any(not isinstance(value, torch.Tensor) for value in case.args.values())
    shape = case.cluster != (1, 1, 1) or not isinstance(case.block, int) or case.grid[1:] != (1, 1)
    return arguments or shape or case.shared_bytes > 40000


SPECIAL = [case for case in CASES if is_special(case)]
OTHERS = [case for case in CASES if not is_special(case)][::16]


@pytest.fixture(scope="module")
def runner():
    return CudaRunner(EmulatedDevice())


@pytest.mark.parametrize("case", SPECIAL + OTHERS, ids=lambda case: case.name)
def test_the_runner_for_gpus_agrees_with_the_model(runner, case):
    assert runner.supports(case)
    mismatch = case.mismatch(runner.run(case))
    assert runner.device.error is None and mismatch is None


def test_errors_of_the_driver_are_raised(runner):
    case = next(case for case in CASES if case.name == "bar.sync 0")
    broken = {
        "error 209|error 200": {"ptx": "no PTX"},
        "error 500": {"entry": "other"},
        "dynamic shared memory: error 1 ": {"shared_bytes": 1 << 20},
        "cuLaunchKernelEx: error 719": {"ptx": case.ptx.replace("bar.sync 0;", "")},
    }
    for message, change in broken.items():
        with pytest.raises(RuntimeError, match=message):
            runner.run(dataclasses.replace(case, **change))
    assert runner.device.error is not None


def test_a_race_is_found_through_the_driver(runner):
    case = next(case for case in CASES if case.name == "shared by 32-bit address")
    with pytest.raises(RuntimeError, match="error 719"):
        runner.run(dataclasses.replace(case, ptx=case.ptx.replace("bar.sync 0;", "")))
    assert isinstance(runner.device.error, RaceError)


def test_a_map_that_the_driver_refuses(runner):
    case = next(case for case in CASES if case.name.startswith("TMA load (16, 64) of (70, 88) at (0, 0)"))
    for change in ({"box": (16, 512)}, {"box": (16, 4)}):
        x = dataclasses.replace(case.args["x"], **change)
        assert isinstance(x, TensorMap)
        with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled: error 1 "):
            runner.run(dataclasses.replace(case, args={**case.args, "x": x}))
