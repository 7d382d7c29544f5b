"""Run the properties of a suite under Hypothesis, and collect the findings."""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
from hypothesis.errors import Flaky, HypothesisException

from lqlora._options import require_integer
from lqlora.errors import InvalidArgumentError
from lqlora.solvers import Problem
from lqlora.testing._verdicts import AdapterError, NotApplicableError, RefusedError, ViolationError
from lqlora.testing.report import Finding, Report

if TYPE_CHECKING:
    from collections.abc import Collection

    from lqlora.solvers import Budget
    from lqlora.testing._promises import Property, S

__all__ = ["try_properties"]

#: Entries of an array that a message lists.
_SHOWN = 8

#: Stored examples are not replayed, because the next call has another subject. The phase "explain" is left out: after a
#: failure it would run the subject many more times.
_PHASES = (hypothesis.Phase.generate, hypothesis.Phase.shrink)


def try_properties(
    registry: dict[str, Property[S]],
    subject: S,
    only: Collection[str] | None,
    exclude: Collection[str],
    max_examples: int,
    *,
    derandomize: bool,
    shrink: bool = True,
) -> Report:
    """Check the selected properties of a registry on a subject. Without ``shrink`` counterexamples are not minimized."""
    selected = _selected(registry, only, exclude)
    require_integer(max_examples, "max_examples", 1)
    # A subject may be slow, and a strategy may reject most of its draws, as that of infeasible problems does. Neither is
    # a fault of the subject, so deadlines and health checks are off. With several bugs reported, Hypothesis would
    # raise a group of exceptions, and _try_property would not see the class of the check's own.
    settings = hypothesis.settings(
        max_examples=int(max_examples),
        derandomize=derandomize,
        database=None,
        deadline=None,
        phases=_PHASES if shrink else _PHASES[:1],
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    findings = [
        Finding(name, registry[name].statement, "skipped", "excluded")
        if name in exclude
        else _try_property(registry[name], subject, settings)
        for name in selected
    ]
    return Report(tuple(findings))


def _selected(registry: dict[str, Property[S]], only: Collection[str] | None, exclude: Collection[str]) -> list[str]:
    for argument, names in (("only", only), ("exclude", exclude)):
        if isinstance(names, str):
            raise InvalidArgumentError(f"{argument} must be a list of names of properties, got the string {names!r}.")
        unknown = sorted(set(names or ()) - set(registry))
        if unknown:
            close = {name: difflib.get_close_matches(name, registry) for name in unknown}
            hints = "; ".join(f"{name!r} (similar: {', '.join(near) or 'none'})" for name, near in close.items())
            raise InvalidArgumentError(f"{argument} must contain names of properties, got {hints}.")
    return [name for name in registry if only is None or name in only]


def _try_property(prop: Property[S], subject: S, settings: hypothesis.settings) -> Finding:
    """Check a property on many inputs, and report a failure by the smallest input found."""
    reason = prop.missing(subject)
    if reason:
        return Finding(prop.name, prop.statement, "skipped", reason)
    last = _Last({}, "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no property is about warnings
            _search(prop, subject, settings, last)
    except (ViolationError, RefusedError, Flaky) as error:
        often = " (not in every run)" if isinstance(error, Flaky) else ""
        shown = f"{_spelled(last.drawn)}: " if last.drawn else ""
        return Finding(prop.name, prop.statement, "failed", f"{shown}{last.fault}{often}.", last.drawn)
    except NotApplicableError as error:
        return Finding(prop.name, prop.statement, "skipped", str(error))
    except (AdapterError, HypothesisException) as error:
        return Finding(prop.name, prop.statement, "error", f"{error}.")
    return Finding(prop.name, prop.statement, "passed")


@dataclass
class _Last:
    """The last input that failed, with its fault. Hypothesis ends with the smallest one."""

    drawn: dict[str, Any]
    fault: str


def _search(prop: Property[S], subject: S, settings: hypothesis.settings, last: _Last) -> None:
    @settings
    @hypothesis.given(prop.inputs(subject))
    def attempt(drawn: dict[str, Any]) -> None:
        # Hypothesis runs the smallest failing input again at the end, so the last failure noted is the one to report.
        try:
            prop.check(subject, **drawn)
        except (ViolationError, RefusedError) as error:
            last.drawn, last.fault = drawn, str(error).rstrip(".")
            raise

    attempt()


def _spelled(drawn: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {_value(value)}" for name, value in drawn.items())


def _value(value: object) -> str:
    if isinstance(value, Problem):
        return _problem(value)
    if not isinstance(value, np.ndarray):
        return repr(value)
    dtype = f"{value.dtype}, shape {value.shape}"
    places = np.argwhere(value != 0)
    if value.size <= _SHOWN:
        return f"{value.tolist()} ({dtype})"
    if len(places) <= _SHOWN:
        entries = ", ".join(f"{value[tuple(at)]!s} at {', '.join(map(str, at))}" for at in places)
        return f"zeros except {entries} ({dtype})" if entries else f"zeros ({dtype})"
    flat = ", ".join(str(entry) for entry in value.reshape(-1)[:_SHOWN])
    return f"[{flat}, …] ({dtype})"


def _problem(problem: Problem) -> str:
    parts = [f"cost {problem.cost.tolist()}", f"size {problem.size.tolist()}"]
    if not problem.allowed.all():
        parts.append(f"allowed {problem.allowed.tolist()}")
    if len(np.unique(problem.ties)) < len(problem.ties):
        parts.append(f"ties {problem.ties.tolist()}")
    if problem.budgets:
        parts.append(f"budgets {'; '.join(_budget(budget) for budget in problem.budgets)}")
    return ", ".join(parts)


def _budget(budget: Budget) -> str:
    limits = (("≥", budget.lower), ("≤", budget.upper))
    text = " and ".join(f"{sign} {limit}" for sign, limit in limits if limit is not None)
    return text if budget.members is None else f"{text} of rows {np.flatnonzero(budget.members).tolist()}"
