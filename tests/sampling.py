"""The marker ``sampled(n)``: n cases of a test run in every suite, and the rest only where slow tests do."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    import pytest


def outside_of_samples(items: list[Any]) -> list[pytest.Item]:
    """Return the cases that are left out of the samples of their tests."""
    tests: dict[str, list[Any]] = {}
    for item in items:
        if item.get_closest_marker("sampled") and not item.get_closest_marker("slow"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out = []
    for cases in tests.values():
        count = cases[0].get_closest_marker("sampled").args[0]
        values = [[(name, repr(value)) for name, value in case.callspec.params.items()] for case in cases]
        left_out += [cases[position] for position in set(range(len(cases))) - set(sample(values, count))]
    return left_out


def sample(cases: Sequence[Sequence[Hashable]], count: int) -> list[int]:
    """Return positions of some cases: each value of each parameter as far as they suffice, and all as often as others."""
    seen: Counter[Hashable] = Counter()
    left, chosen = list(range(len(cases))), []

    def new_and_seen(position: int) -> tuple[int, int]:
        times = [seen[value] for value in cases[position]]
        return -times.count(0), sum(times)

    while left and len(chosen) < count:
        chosen.append(min(left, key=new_and_seen))
        left.remove(chosen[-1])
        seen.update(cases[chosen[-1]])
    return chosen
