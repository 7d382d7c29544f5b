from __future__ import annotations

import pytest

from lqlora import paper_grid
from lqlora.errors import InvalidArgumentError


@pytest.mark.parametrize(("which", "count"), [("code", 432), ("paper", 243)])
def test_the_grid_of_the_paper(which, count):
    grid = paper_grid(which)
    assert len(grid) == len(set(grid)) == len({str(fmt) for fmt in grid}) == count
    assert all(fmt.scales.offset == "min" for fmt in grid)


def test_another_grid_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"which must be .* 'both'"):
        paper_grid("both")
