"""Every planted defect of the Triton kernels is found; a table says by what.

python -m pytest tests/test_triton_mutants.py -rP     prints the check that found each
"""

import dataclasses

import mutants
import numerics
import pytest
import test_triton_ptx as proof
import torch
from emulator import EmulatorError

from fastlora.kernels import triton_lora, workspace
from fastlora.kernels.target import Target

pytestmark = proof.pytestmark

CASES = {False: (136, 72, 80, 8), True: (75, 48, 64, 8)}


def failure(kernels, arch: int, dropout: bool) -> str | None:
    """What finds a defect in ``kernels``, or None."""
    m, n, k, r = CASES[dropout]
    if dropout:
        case = numerics.draw_case(m, n, k, r, torch.bfloat16, dropout_p=0.3)
    else:
        case = numerics.draw_integer_case(m, n, k, r, torch.bfloat16)
    compare = numerics.assert_accurate if dropout else numerics.assert_exact
    for options in proof.SCHEDULES:
        limited = dataclasses.replace(options, timeout_s=60.0)
        try:
            results, _ = proof.run(case, proof.SMALL[arch], arch, limited, kernels=kernels)
            compare(results, case)
        except EmulatorError as error:
            return type(error).__name__
        except AssertionError as error:
            return "values" if "workspace" not in str(error) else "workspace"
    return None


@pytest.fixture(autouse=True)
def fresh(monkeypatch, poisoned):
    monkeypatch.setattr(workspace, "_by_stream", {})


@pytest.mark.parametrize("dropout", [False, True])
def test_nothing_is_found_in_the_kernels_as_shipped(monkeypatch, dropout):
    monkeypatch.setattr(triton_lora, "target_of", lambda device: Target(80, n_sms=3))
    assert failure(triton_lora, 80, dropout) is None


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_found(mutant, monkeypatch):
    kernels = mutants.load(mutant)
    monkeypatch.setattr(kernels, "target_of", lambda device: Target(80, n_sms=3))
    found = failure(kernels, 80, mutant.dropout)
    assert found is not None, f"nothing noticed: {mutant.name}"
    print(f"{mutant.name}: {found}")
