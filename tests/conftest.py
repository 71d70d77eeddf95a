"""What every test shares."""

import pytest
from numerics import poison


@pytest.fixture
def poisoned(monkeypatch):
    poison(monkeypatch)
