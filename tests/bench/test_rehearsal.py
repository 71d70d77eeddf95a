"""A visit to a GPU, rehearsed whole at tiny sizes: what is right passes, each planted fault is named as what it is."""

import json
import subprocess
import sys

import pytest

from benchmarks import ROOT
from tests.support import cuda_runtime

pytestmark = pytest.mark.skipif(cuda_runtime.unavailable() is not None, reason=f"{cuda_runtime.unavailable()}")

MOST_FILES, LARGEST_BYTES, DEEPEST = 8, 16 << 20, 2


def failed(visit):
    return {name: note for name, (code, note) in visit["steps"].items() if code != 0}


def what_is_right_passes_every_step(visits):
    for stage in ("contact", "measure"):
        assert failed(visits[stage]) == {}, visits["said"]


def the_first_tests_are_over_every_tile(visits):
    log = visits["contact"]["logs"]["cuda-tests.log"]
    assert "tests: 24 passed, 2 skipped" in log  # the 25th, on streams, has a size for a GPU
    for tile in ("128, block_n=256", "128, block_n=128", "64, block_n=128"):
        assert any(f"block_m={tile}" in line and "PASSED" in line for line in log.splitlines())


def results_are_few_flat_files(visits):
    for stage in ("contact", "measure"):
        files = visits[stage]["files"]
        assert {"summary.json", "visit.tar.gz"} <= set(files) and len(files) <= MOST_FILES
        for name in files:
            assert name.count("/") <= DEEPEST
            assert (visits["folder"] / stage / name).stat().st_size <= LARGEST_BYTES
    assert {"mark.json", "mark-triton.json"} <= set(visits["contact"]["files"])
    assert "sweep.json" in visits["measure"]["files"]


def every_variant_is_in_one_rotation_with_the_noise_and_the_clocks(visits):
    rows = visits["contact"]["mark.json"]["rows"]
    assert len(rows) == 2 * 2 * 6 and all(row["frozen_us"] > 0 for row in rows)
    for row in rows:
        together = [other for other in rows if (other["pass"], other["r"]) == (row["pass"], row["r"])]
        assert {other["frozen_us"] for other in together} == {row["frozen_us"]}
        assert row["noise"] >= 0 and row["clocks"]["sm_mhz"] == [1980, 1980, 1980]


def objects_made_beforehand_are_linked(visits):
    log = visits["contact"]["logs"]["build.log"]
    assert "kernels.cu" not in log and "kernels in" in log


def a_build_that_fails_is_named_and_ends_what_needs_it_alone(visits):
    visit = visits["broken build"]
    skipped = "not run: build failed"
    assert failed(visit) == {"build": "", "cuda tests": skipped, "mark": skipped}
    assert "error: planted" in visit["logs"]["build.log"]
    assert "of other sources" in visit["logs"]["build.log"], "why the objects made beforehand were not linked"
    assert "kernel.cuh(12): error: planted" in visits["said"], "shown at once, not only kept"
    assert visit["mark-triton.json"]["rows"]


def a_hang_loses_one_test(visits):
    log = visits["faults"]["logs"]["cuda-tests.log"]
    hung = [line for line in log.splitlines() if line.startswith("HUNG")]
    assert len(hung) == 1 and "test_small_layers" in hung[0] and "splits=2" in hung[0] and "no end after" in hung[0]
    assert "stand_in_gpu.py" in log, "the stack of the test that hangs"
    assert "tests: 1 failed, 1 hung, 21 passed, 2 skipped, 1 spoiled" in log


def a_spoiled_context_costs_the_test_that_spoiled_it(visits):
    (line,) = (x for x in visits["faults"]["logs"]["cuda-tests.log"].splitlines() if x.startswith("SPOILED"))
    assert "64-520-392-32" in line and "splits=4" in line and "illegal memory access" in line


def a_wrong_kernel_fails_its_test_and_is_not_timed(visits):
    (line,) = (x for x in visits["faults"]["logs"]["cuda-tests.log"].splitlines() if x.startswith("FAILED"))
    assert "test_small_layers" in line and "fused=True" in line and "largest error" in line
    rows = visits["faults"]["mark.json"]["rows"]
    wrong = {row["variant"] for row in rows if "failure" in row}
    assert wrong == {"cuda group 8"} and all("ratio" in row for row in rows if row["variant"] not in wrong)
    assert all("wrong: " in row["failure"] and "ratio" not in row for row in rows if row["variant"] in wrong)
    assert set(failed(visits["faults"])) == {"cuda tests", "mark"}


CHECKS = (
    what_is_right_passes_every_step,
    the_first_tests_are_over_every_tile,
    results_are_few_flat_files,
    every_variant_is_in_one_rotation_with_the_noise_and_the_clocks,
    objects_made_beforehand_are_linked,
    a_build_that_fails_is_named_and_ends_what_needs_it_alone,
    a_hang_loses_one_test,
    a_spoiled_context_costs_the_test_that_spoiled_it,
    a_wrong_kernel_fails_its_test_and_is_not_timed,
)


def test_a_rehearsed_visit(tmp_path):
    """One test, because one rehearsal serves every check: as many tests might be shared out among processes."""
    command = [sys.executable, "-m", "tests.support.rehearsal", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    visits = {"folder": tmp_path, "said": done.stderr, **json.loads(done.stdout.splitlines()[-1])}
    wrong = {}
    for check in CHECKS:
        try:
            check(visits)
        except AssertionError as error:
            wrong[check.__name__] = str(error)
    assert not wrong, "\n\n".join(f"{name}: {why}" for name, why in wrong.items())
