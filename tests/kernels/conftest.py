"""What the tests of the kernels share."""

import pytest

from fastlora.backends import workspace


@pytest.fixture
def own_workspace(monkeypatch):
    """What one test leaves dirty is no one else's."""
    monkeypatch.setattr(workspace, "_by_stream", {})
