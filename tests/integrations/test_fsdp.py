"""FSDP of both versions around patched PEFT models, on two gloo processes: fused, with the training of stock PEFT."""

import pytest
import torch

pytest.importorskip("peft")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

from tests.support.distributed_worker import WORLD
from tests.support.fsdp_worker import SCENARIOS, work


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Tracebacks by scenario and rank: one pair of processes runs all, for starting it takes longest."""
    directory = tmp_path_factory.mktemp("fsdp")
    torch.multiprocessing.spawn(work, (str(directory),), nprocs=WORLD)
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes(outcomes, scenario):
    failures = [f"rank {rank}:\n{outcome[scenario]}" for rank, outcome in enumerate(outcomes) if outcome[scenario]]
    assert not failures, "\n".join(failures)
