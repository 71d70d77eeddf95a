"""DDP, FSDP2 and DTensor on two gloo processes: losses and state dicts of one process, files whole and sharded."""

import pytest
import torch

pytest.importorskip("peft")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

from tests.support.distributed_worker import SCENARIOS, assert_passed, outcomes_of, work


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return outcomes_of(work, tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes(outcomes, scenario):
    assert_passed(outcomes, scenario)
