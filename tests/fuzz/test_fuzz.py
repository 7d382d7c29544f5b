"""Damaged files of every kind are read correctly or refused: the fixed corpora, and files that are drawn anew from a seed."""

from __future__ import annotations

import random
import signal
import sys

import pytest

from lqlora.errors import LQLoRAError
from tests.fuzz.kinds import KINDS, load
from tests.fuzz.running import Case, Summary, check, run, same


def _assert_no_faults(summary: Summary) -> None:
    assert not summary.faults, f"{len(summary.faults)} faults:\n" + "\n".join(summary.faults[:20])


@pytest.mark.parametrize("name", KINDS)
def test_the_corpus_is_read_right_or_refused(tmp_path, name):
    summary = Summary()
    for index, case in enumerate(load(name).corpus(tmp_path)):
        summary.add(case, f"{name}, corpus, {index}")
    _assert_no_faults(summary)
    assert summary.read
    assert summary.refused


@pytest.mark.parametrize("name", KINDS)
def test_mutated_files_are_read_right_or_refused(tmp_path, name):
    summary = run(load(name), name, tmp_path, 150)
    _assert_no_faults(summary)
    # Mutations that every reader refuses at once would test little.
    assert summary.read > 10
    assert summary.refused > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_mutated_files_are_read_right_or_refused(tmp_path, name):
    _assert_no_faults(run(load(name), name, tmp_path, 1000, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_readers_of_the_corpus_hold_no_more_than_twice_the_file(tmp_path, name):
    summary = Summary()
    for index, case in enumerate(load(name).corpus(tmp_path, slow=True)):
        summary.add(case, f"{name}, corpus, {index}", memory=True)
    _assert_no_faults(summary)


def test_a_drawn_file_depends_on_its_seed_only(tmp_path):
    kind = load("plan")
    first, second = (kind.draw(random.Random("3"), tmp_path) for _ in range(2))
    assert (first.made, first.size) == (second.made, second.size)


class _EscapeError(LQLoRAError):
    def __str__(self):
        return "file \x1b[2J"


def _raises(error):
    def reader():
        raise error

    return reader


def _warns():
    import warnings

    warnings.warn("a warning of a reader", stacklevel=1)


def _runs_on():
    while True:
        pass


@pytest.mark.parametrize(
    ("reader", "said"),
    [
        (_raises(KeyError("a")), "raised KeyError"),
        (_raises(SystemExit()), "raised SystemExit"),
        (_raises(LQLoRAError("file " + "x" * 400)), "a message of 405 characters"),
        (_raises(_EscapeError()), "cannot be printed"),
        (_raises(LQLoRAError("it is damaged")), "names none of"),
        (_warns, "warned: UserWarning"),
        (lambda: sys.stdout.write("x"), "printed 'x"),
        pytest.param(
            _runs_on,
            "was stopped after",
            marks=pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers of CPU time"),
        ),
        (lambda: 2, "read '2', expected '3'"),
        (_raises(LQLoRAError("file is damaged")), "must read"),
    ],
)
def test_a_faulty_reader_is_found(reader, said):
    limit = 0.1 if reader is _runs_on else 10.0
    case = Case("", 10, ("file",), {"reader": reader}, lambda results: same("it", results["reader"], 3), "read", limit)
    with pytest.raises(AssertionError, match=said):
        check(case)


def test_a_reader_that_holds_more_than_its_file_is_found():
    case = Case("", 10, ("file",), {"reader": lambda: bytes(10 << 20)}, lambda results: None)
    check(case)
    with pytest.raises(AssertionError, match="held 10,4"):
        check(case, memory=True)
