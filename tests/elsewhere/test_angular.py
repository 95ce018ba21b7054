"""What the author of an encoder writes to hold it to the contract."""

import pytest

from multifid.model.suite import cases


@pytest.mark.parametrize("case", cases({"name": "angular", "layers": 2, "hidden": 12}), ids=str)
def test_the_encoder_keeps_the_contract(case):
    case()
