"""Every planted defect of the Triton kernels is found; a table says by what.

python -m pytest tests/test_triton_mutants.py -rP     prints the check that found each
"""

import defects
import pytest
import test_triton_ptx as proof

pytestmark = proof.pytestmark


@pytest.mark.parametrize("defect", defects.triton_planted(), ids=lambda defect: defect.name.replace(" ", "-"))
def test_found(defect):
    found = defect.find()
    assert found is not None, f"nothing noticed: {defect.name}"
    print(f"{defect.name}: {found.check}")
