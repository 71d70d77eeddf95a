"""Options and parameters of the pytest-benchmark cases:
``pytest -c benchmarks/cases/pytest.ini benchmarks/cases/bench_layer.py --preset quick``."""

import pytest
import torch

from fastlora.bench.cases import preset_cases
from fastlora.bench.names import PRESETS
from fastlora.bench.peers import FASTLORA, FROZEN, ORDINARY, STORED_S

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = (FROZEN, FASTLORA, STORED_S, *ORDINARY)


def pytest_addoption(parser):
    parser.addoption("--preset", default="quick", choices=PRESETS, help="layers to measure")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = preset_cases(metafunc.config.getoption("--preset"), DEVICE)
        metafunc.parametrize("case", cases, ids=lambda case: case.label.replace(" ", "-"))
    if "peer" in metafunc.fixturenames:
        metafunc.parametrize("peer", VARIANTS, ids=lambda peer: peer.name.replace(" ", "-"))


@pytest.fixture
def device():
    return DEVICE
