"""The launch options of the detectors: who must have a proxy fence, and whether races are found."""

import pytest

from tests.emulator import LaunchOptions, ProxyError
from tests.emulator.conformance import EmulatorRunner, all_cases

CASES = {case.name: case for case in all_cases()}
WRITER, READER = "fence.proxy.async.global;  // by the writer", "fence.proxy.async.global;  // by the reader"


@pytest.mark.parametrize(
    ("proxy_fence", "removed", "found"),
    [
        ("path", [WRITER], False),
        ("path", [READER], False),
        ("path", [WRITER, READER], True),
        ("writer", [WRITER], True),
        ("writer", [READER], False),
        ("both", [WRITER], True),
        ("both", [READER], True),
        ("both", [], False),
    ],
)
def test_proxy_fence_policies(proxy_fence, removed, found):
    case = CASES["hand-over through TMA"]
    for text in removed:
        case = case.edited(text, "")
    runner = EmulatorRunner(proxy_fence=proxy_fence)
    if not found:
        assert case.mismatch(runner.run(case)) is None
        return
    with pytest.raises(ProxyError, match="has no fence.proxy.async for global memory"):
        runner.run(case)


def test_without_race_detection_only_the_result_tells():
    case = CASES["bar.sync 0"].edited("bar.sync 0;", "")
    runner = EmulatorRunner()
    runner.options = LaunchOptions(race=False)
    runner.run(case)  # no error
