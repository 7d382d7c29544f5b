"""Run readers on damaged files: each must read the file right, or raise one printable error of this library, and soon."""

from __future__ import annotations

import contextlib
import io
import random
import signal
import threading
import tracemalloc
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lqlora.errors import LQLoRAError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from types import FrameType

__all__ = ["Case", "Kind", "Summary", "check", "draw", "run", "same"]

#: Bytes that a reader may hold beside twice the size of the file: caches, the modules of a first call, messages.
_CONSTANT = 8 << 20

#: Length of the longest message.
_MESSAGE = 400

#: Of how many cases one is measured for memory: tracing makes a reader several times slower.
_MEASURED = 20


@dataclass
class Case:
    """A damaged file, with its readers and what they must find.

    Parameters
    ----------
    made : str
        How the file was made.
    size : int
        Bytes of the file.
    about : tuple of str
        Names of the file and of the arguments. The message of an error contains one of them.
    readers : mapping of str to callable
        Readers by name, called without arguments.
    judge : callable
        Called with the results of the readers that did not refuse, by name. Raises AssertionError if one is wrong.
    must : {"", "read", "refuse"}
        What every reader must do with the file, where that is known.
    seconds : float
        CPU time that one reader may take.
    """

    made: str
    size: int
    about: tuple[str, ...]
    readers: Mapping[str, Callable[[], Any]]
    judge: Callable[[dict[str, Any]], None]
    must: Literal["", "read", "refuse"] = ""
    seconds: float = 1.0


class Kind(Protocol):
    """A kind of files: draws damaged ones, and has a fixed corpus of them."""

    def draw(self, rng: random.Random, folder: Path) -> Case:
        """Return a damaged file."""

    def corpus(self, folder: Path, *, slow: bool = False) -> Iterator[Case]:
        """Yield the files that were once read wrong, or not at all; with ``slow``, more of them."""


@dataclass
class Summary:
    """Numbers of files that the first reader of their kind read and refused, and the faults found."""

    read: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, case: Case, where: str, *, memory: bool = False) -> None:
        """Check one case."""
        try:
            results = check(case, memory=memory)
        except AssertionError as error:
            self.faults.append(f"{where} ({case.made}): {error}")
        else:
            first = next(iter(case.readers))
            self.read += first in results
            self.refused += first not in results


def draw(kind: Kind, name: str, seed: int, index: int, folder: Path) -> Case:
    """Return one case; it depends on the arguments only, so that a fault can be repeated alone."""
    return kind.draw(random.Random(f"{name} {seed} {index}"), folder)


def run(
    kind: Kind, name: str, folder: Path, count: int, seed: int = 0, told: Callable[[int], object] = lambda index: None
) -> Summary:
    """Check a number of drawn cases. ``told`` is called with the index of each before it is read."""
    summary = Summary()
    for index in range(count):
        told(index)
        case = draw(kind, name, seed, index, folder)
        summary.add(case, f"{name} {seed} {index}", memory=index % _MEASURED == _MEASURED - 1)
    return summary


def check(case: Case, *, memory: bool = False) -> dict[str, Any]:
    """Call the readers of a case and judge what they found; raise AssertionError for any fault."""
    results = {}
    for name, reader in case.readers.items():
        refused = None
        with _limited(name, case, memory=memory), _quiet(name):
            try:
                results[name] = reader()
            except LQLoRAError as error:
                refused = error
            except (KeyboardInterrupt, _TooLongError):
                raise
            except BaseException as error:
                raise AssertionError(f"{name} raised {type(error).__name__}: {str(error)[:300]!r}") from error
        if refused is not None:
            _check_message(name, str(refused), case.about)
    wanted = {"read": len(case.readers), "refuse": 0, "": len(results)}[case.must]
    assert len(results) == wanted, f"{list(results) or 'nothing'} read the file, but must {case.must}"
    try:
        case.judge(results)
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"what was read cannot be used: {type(error).__name__}: {str(error)[:200]!r}") from error
    return results


def same(what: str, found: object, expected: object) -> None:
    """Raise AssertionError unless two values are equal. Tuples equal lists; true does not equal 1."""
    assert _exact(found) == _exact(expected), f"{what}: read {str(found)[:150]!r}, expected {str(expected)[:150]!r}"


def _exact(value: object) -> object:
    """Return a value without tuples, and with true and false as texts: to Python they equal 1 and 0."""
    if isinstance(value, list | tuple):
        return [_exact(own) for own in value]
    return repr(value) if isinstance(value, bool) else value


def _check_message(name: str, text: str, about: tuple[str, ...]) -> None:
    assert len(text) <= _MESSAGE, f"{name}: a message of {len(text)} characters: {text[:200]!r}"
    assert text.isprintable(), f"{name}: a message that cannot be printed: {text!r}"
    assert any(own in text for own in about), f"{name}: a message that names none of {about}: {text!r}"


class _TooLongError(BaseException):
    """Raised by a timer in a reader that runs on. No reader catches it."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise _TooLongError


@contextlib.contextmanager
def _limited(name: str, case: Case, *, memory: bool) -> Iterator[None]:
    """Raise if the body takes too much CPU time, or, if memory is traced, holds more than its file justifies."""
    # A tracing process is several times slower, so its time is not limited as strictly.
    limit = case.seconds * (20 if memory else 1)
    peak = 0
    if memory:
        tracemalloc.start()
    try:
        with _stopped_after(limit):
            yield
    except _TooLongError:
        raise AssertionError(f"{name} was stopped after {limit} s") from None
    finally:
        if memory:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert peak <= 2 * case.size + _CONSTANT, f"{name} held {peak:,} bytes for a file of {case.size:,}"


@contextlib.contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    """Interrupt the body after seconds of CPU time, where the system has such timers."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Raise if the body warns or prints."""
    text = io.StringIO()
    with (
        warnings.catch_warnings(record=True) as caught,
        contextlib.redirect_stdout(text),
        contextlib.redirect_stderr(text),
    ):
        warnings.simplefilter("always")
        yield
    assert not caught, f"{name} warned: {caught[0].category.__name__}: {str(caught[0].message)[:200]!r}"
    assert not text.getvalue(), f"{name} printed {text.getvalue()[:200]!r}"
