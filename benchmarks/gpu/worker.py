"""The pytest process of benchmarks.gpu.supervise: journals every test, and exits where it cannot go on."""

import contextlib
import faulthandler
import json
import os
import sys
from pathlib import Path

import pytest

COLLECTED, STARTED, FINISHED, SPOILED = "collected", "started", "finished", "spoiled"
SPOILED_CODE = 70


class Recorder:
    """A pytest plugin.

    Args:
        journal: where events go.
        share: (i, n): every n-th of the tests, from the i-th.
        skip: tests that another process has run.
        limit: seconds that a test may take.
        may_skip: texts, one of which is in the reason of every skip that is not a failure.
    """

    def __init__(self, journal: Path, share: tuple[int, int], skip: set[str], limit: float, may_skip: list[str]):
        self.share, self.skip, self.limit, self.may_skip = share, skip, limit, may_skip
        self._journal = open(journal, "a", buffering=1)  # noqa: SIM115
        self._stacks = os.fdopen(os.dup(2), "w")  # pytest takes what is written to 2 itself
        self._found: tuple[str, str] = ("passed", "")

    def _write(self, *event: object) -> None:
        self._journal.write(json.dumps(event) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        index, count = self.share
        mine = items[index::count]
        self._write(COLLECTED, [item.nodeid for item in mine])
        items[:] = [item for item in mine if item.nodeid not in self.skip]
        _start_device()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:  # a file that cannot be imported, or that skips itself
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            allowed = report.skipped and any(text in reason for text in self.may_skip)
            outcome = "failed" if report.failed else "skipped" if allowed else "not run"
            self._write(FINISHED, report.nodeid, outcome, reason.strip().splitlines()[-1][:300])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        self._found = ("passed", "")
        self._write(STARTED, item.nodeid)
        faulthandler.dump_traceback_later(self.limit, exit=True, file=self._stacks)
        result = yield
        problem = _device_problem()  # what the test has launched and not waited for ends within its limit, too
        if problem and self._found[0] in ("passed", "skipped"):
            self._found = ("failed", problem)
        if problem and _device_problem():  # it does not pass: nothing runs on this context any more
            self._write(SPOILED, f"the CUDA context is lost: {self._found[1] or problem}")
            os._exit(SPOILED_CODE)
        faulthandler.cancel_dump_traceback_later()
        self._write(FINISHED, item.nodeid, *self._found)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self._found[0] != "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr)
            self._found = ("failed", " ".join(message.split())[:300])
        if report.skipped and self._found[0] == "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            allowed = any(text in reason for text in self.may_skip)
            self._found = ("skipped" if allowed else "not run", reason)


def _start_device() -> None:
    """Makes the CUDA context, which may take seconds where many processes do, before the first test's time begins."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # the tests will say
            torch.cuda.synchronize()


def _device_problem() -> str | None:
    """What is wrong with this process's CUDA context, or None."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def run_tests(
    arguments: list[str], journal: Path, share: tuple[int, int], skip: set[str], limit: float, may_skip: list[str]
) -> None:
    """Runs pytest in this process, which ends with its exit code."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # seconds of imports, and other opinions about time
    recorder = Recorder(journal, share, skip, limit, may_skip)
    unused = ("cacheprovider", "faulthandler", "unraisableexception", "threadexception")
    options = ["-vv", "--tb=short", "--continue-on-collection-errors"]  # twice: the project's own options hold a -q
    options += [word for name in unused for word in ("-p", f"no:{name}")]
    sys.exit(int(pytest.main([*options, *arguments], plugins=[recorder])))
