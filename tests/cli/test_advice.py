"""Messages of the library in terms of command line options."""

from __future__ import annotations

import pytest

from lqlora.cli.advice import CommandError, advise_options, in_options
from lqlora.errors import InvalidArgumentError

OPTIONS = {
    "rank": "--ranks",
    "max_iter": "--iterations",
    "mode": "--mode",
    "exclude": "--exclude",
    "force": "--force",
    "bits_per_weight": "--bits",
}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("rank must be at most 16, got 17.", "--ranks must be at most 16, got 17."),
        ("The rank must be at most 16.", "The rank must be at most 16."),
        ("ranks must be integers.", "ranks must be integers."),
        ("Give bits_per_weight or max_iter.", "Give --bits or --iterations."),
        ("my/max_iter.json is missing, and 'max_iter' too.", "my/max_iter.json is missing, and 'max_iter' too."),
        ("It exists. Pass force=True to replace it.", "It exists. Pass --force to replace it."),
        ("It is large. Pass mode='exact'.", "It is large. Pass --mode exact."),
        ("It is 17. Pass clip_rank=True to pad.", "It is 17."),
        ("Nothing without exclude=('*.q', 'k').", "Nothing without --exclude ('*.q', 'k')."),
        ("a.b.c is 2.5. Pass max_iter=3.", "a.b.c is 2.5. Pass --iterations 3."),
    ],
)
def test_parameters_become_options(message, expected):
    assert in_options(message, OPTIONS) == expected


def test_errors_of_the_library_are_translated():
    with pytest.raises(CommandError, match=r"--iterations .*0") as caught, advise_options(OPTIONS):
        raise InvalidArgumentError("max_iter must be at least 1, got 0.")
    assert isinstance(caught.value.__cause__, InvalidArgumentError)


def test_other_errors_pass():
    with pytest.raises(KeyError), advise_options(OPTIONS):
        raise KeyError("max_iter")
