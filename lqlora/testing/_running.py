"""One property under Hypothesis, and what became of it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
from hypothesis.errors import Flaky, HypothesisException

from lqlora.testing._subject import AdapterError, NotApplicableError, RefusedError, ViolationError
from lqlora.testing.report import Finding

if TYPE_CHECKING:
    from lqlora.testing._properties import Property
    from lqlora.testing._subject import Subject

__all__ = ["try_property"]

_SHOWN = 8  # entries of an array that a message lists


def try_property(prop: Property, subject: Subject, settings: hypothesis.settings) -> Finding:
    """Try a property on many inputs; a quantizer that fails it is shown by the smallest input found."""
    reason = prop.missing(subject)
    if reason:
        return Finding(prop.name, prop.statement, "skipped", reason)
    last = _Last({}, "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings are part of no promise
            _search(prop, subject, settings, last)
    except (ViolationError, RefusedError, Flaky) as error:
        often = " (not at each try)" if isinstance(error, Flaky) else ""
        return Finding(prop.name, prop.statement, "failed", f"{_spelled(last.drawn)}: {last.fault}{often}.", last.drawn)
    except NotApplicableError as error:
        return Finding(prop.name, prop.statement, "skipped", str(error))
    except (AdapterError, HypothesisException) as error:
        return Finding(prop.name, prop.statement, "error", f"{error}.")
    return Finding(prop.name, prop.statement, "passed")


@dataclass
class _Last:
    """The last input that failed: after Hypothesis has shrunk it, the smallest one."""

    drawn: dict[str, Any]
    fault: str


def _search(prop: Property, subject: Subject, settings: hypothesis.settings, last: _Last) -> None:
    @settings
    @hypothesis.given(prop.inputs(subject))
    def attempt(drawn: dict[str, Any]) -> None:
        try:
            prop.check(subject, **drawn)
        except (ViolationError, RefusedError) as error:
            last.drawn, last.fault = drawn, str(error).rstrip(".")
            raise

    attempt()


def _spelled(drawn: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {_value(value)}" for name, value in drawn.items())


def _value(value: object) -> str:
    if not isinstance(value, np.ndarray):
        return repr(value)
    dtype = f"{value.dtype}, shape {value.shape}"
    places = np.argwhere(value != 0)
    if value.size <= _SHOWN:
        return f"{value.tolist()} ({dtype})"
    if len(places) <= _SHOWN:
        entries = ", ".join(f"{value[tuple(at)]!s} at {', '.join(map(str, at))}" for at in places)
        return f"zeros but for {entries} ({dtype})" if entries else f"zeros ({dtype})"
    flat = ", ".join(str(entry) for entry in value.reshape(-1)[:_SHOWN])
    return f"[{flat}, …] ({dtype})"
