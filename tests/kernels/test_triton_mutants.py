"""Every planted defect of the Triton kernels is found; a table says by what.

python -m pytest tests/kernels/test_triton_mutants.py -rP     prints the check that found each
"""

import pytest

from tests.kernels import test_triton_ptx as proof
from tests.support import defects

pytestmark = proof.pytestmark


@pytest.mark.parametrize("defect", defects.triton_planted(), ids=lambda defect: defect.name.replace(" ", "-"))
def test_found(defect):
    found = defect.find()
    assert found is not None, f"nothing noticed: {defect.name}"
    print(f"{defect.name}: {found.check}")
