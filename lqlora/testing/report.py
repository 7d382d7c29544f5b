"""Reports of conformance suites: one finding for each property, printed as a table."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Finding", "Report"]

#: Width of a printed report.
_WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """Finding of one property.

    Parameters
    ----------
    name : str
        Name of the property.
    statement : str
        Statement of the property, in one line.
    result : {"passed", "failed", "error", "skipped"}
        "failed" if the subject violated the property or raised; "error" if the property could not be checked;
        "skipped" if it does not apply.
    message : str
        The smallest counterexample with its fault, or the reason why the property was skipped. Empty if it passed.
    counterexample : mapping of str to object, optional
        Arguments of the smallest counterexample, usually an array ``w``.

    Examples
    --------
    >>> Finding("shape", "The result has the shape of the input.", "passed").result
    'passed'
    """

    name: str
    statement: str
    result: Literal["passed", "failed", "error", "skipped"]
    message: str = ""
    counterexample: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Report:
    """Findings of all selected properties. Printing it gives a table.

    Parameters
    ----------
    findings : tuple of Finding
        One for each property.

    Examples
    --------
    >>> message = "w = [1.0] (float32, shape (1,)): shape (1,) gave shape ()."
    >>> report = Report((Finding("shape", "The result has the shape of the input.", "failed", message),))
    >>> report.passed, report.failed
    (False, ('shape',))
    >>> print(report)
    shape  FAILED  The result has the shape of the input.
                   w = [1.0] (float32, shape (1,)): shape (1,) gave shape ().
    1 failed.
    """

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """True if every property passed or was skipped."""
        return all(finding.result in ("passed", "skipped") for finding in self.findings)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the properties that failed or could not be checked."""
        return tuple(finding.name for finding in self.findings if finding.result in ("failed", "error"))

    def __getitem__(self, name: str) -> Finding:
        """Return the finding of a property."""
        return {finding.name: finding for finding in self.findings}[name]

    def __str__(self) -> str:
        """Return a table with a line for each property and its message below."""
        width = max((len(finding.name) for finding in self.findings), default=0)
        lines = []
        for finding in self.findings:
            result = finding.result if finding.result in ("passed", "skipped") else finding.result.upper()
            lines.append(f"{finding.name:{width}s}  {result:7s} {finding.statement}")
            indent = " " * (width + 10)
            lines += textwrap.wrap(
                finding.message, max(_WIDTH, width + 40), initial_indent=indent, subsequent_indent=indent
            )
        counts = Counter(finding.result for finding in self.findings)
        lines.append(", ".join(f"{count} {result}" for result, count in counts.items()) + ".")
        return "\n".join(lines)
