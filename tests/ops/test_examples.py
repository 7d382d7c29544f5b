"""The example arguments of every operation fit it: the reference takes them."""

from __future__ import annotations

import pytest

from lqlora import ops
from lqlora._dispatch import Operation
from lqlora.testing.backends._cases import Blocks, Product

OPERATIONS = [own for name in ops.__all__ if isinstance(own := getattr(ops, name), Operation)]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda own: own.name)
def test_an_operation_has_examples_that_its_reference_takes(operation):
    made = [
        make(problem)
        for make, problem in ((operation.examples, Blocks(seed=0)), (operation.products, Product(seed=0)))
        if make is not None
    ]
    assert made
    for arguments in made:
        assert operation.reference(*arguments) is not None
