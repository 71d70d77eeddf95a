"""Every planted defect of the Triton kernels is found; a table says by what.

python -m pytest tests/kernels/test_triton_mutants.py -rP     prints the check that found each
"""

import pytest

from tests.support import defects
from tests.support.triton_checks import needs_compiler

pytestmark = needs_compiler


@pytest.mark.parametrize("defect", defects.triton_planted(), ids=lambda defect: defect.name.replace(" ", "-"))
def test_found(defect):
    found = defect.find(ways=1)
    assert found, f"nothing noticed: {defect.name}"
    print(f"{defect.name}: {found[0].check}")
