"""Every planted defect of the Triton kernels is found; a table says by what.

python -m pytest tests/kernels/test_triton_mutants.py -rP     prints the check that found each
"""

import pytest

from tests.support import defects
from tests.support.triton_checks import needs_compiler

pytestmark = needs_compiler
TESTED = ("dX without the last projection",)  # of projections' own, which are many and alike


def planted():
    for defect in defects.triton_planted():
        swept = defect.place.startswith("projection") and defect.name not in TESTED
        yield pytest.param(defect, id=defect.name.replace(" ", "-"), marks=(pytest.mark.sweep,) if swept else ())


@pytest.mark.parametrize("defect", planted())
def test_found(defect):
    found = defect.find(ways=1)
    assert found, f"nothing noticed: {defect.name}"
    print(f"{defect.name}: {found[0].check}")
