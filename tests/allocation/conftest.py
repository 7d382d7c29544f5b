from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.costs.cases import small_table

if TYPE_CHECKING:
    import lqlora as lq


@pytest.fixture(scope="session")
def table() -> lq.CostTable:
    return small_table()
