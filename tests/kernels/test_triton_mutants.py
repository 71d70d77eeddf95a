"""Every planted defect of the Triton kernels is found; a table says by what.

python -m pytest tests/kernels/test_triton_mutants.py -m planted -rP     prints the check that found each
"""

import pytest

from tests.support import defects
from tests.support.triton_checks import needs_compiler

pytestmark = needs_compiler
TESTED = ("dX without the last projection",)  # of projections' own, which are many and alike


def planted():
    for defect in defects.triton_planted():
        swept = defect.place.startswith("projection") and defect.name not in TESTED
        marks = pytest.mark.sweep if swept else pytest.mark.planted
        yield pytest.param(defect, id=defect.name.replace(" ", "-"), marks=marks)


@pytest.mark.parametrize("defect", [*planted()])
def test_found(defect):
    found = defect.find(ways=1)
    assert found, f"nothing noticed: {defect.name}"
    print(f"{defect.name}: {found[0].check}")
